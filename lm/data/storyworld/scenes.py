"""Beats that many plots share: openings, meetings, questions between friends, endings."""

from __future__ import annotations

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.teller import Entity, Teller

_MAT = (
    "the cat sat on the mat.",
    "the cat sat on the mat.",
    "the cat sat on the mat by the door.",
    "the cat sat on the mat by the fire.",
    "the cat sat on the mat and purred.",
    "the cat sat on the mat and looked out of the window.",
    "the cat sat on the mat and washed {his} paws.",
    "the cat sat on the mat and waited for some milk.",
)
_OTHER_SEATS = (
    ("the cat sat on the wall in the sun.", "on the wall"),
    ("the cat sat on the chair by the window.", "on the chair"),
    ("the cat sat on the bed and purred.", "on the bed"),
)


def cat_on_mat(t: Teller) -> Entity | None:
    """The house cat sits on the mat (rarely elsewhere). None if the story has a cat already."""
    if "cat" in t.taken:
        return None
    cat = t.animal(None, (lx.CAT,), named=0.0)
    t.mention(cat)
    if t.chance(0.93):
        sentence = t.pick(_MAT)
        if "{" in sentence:
            sentence = sentence.format(his=t.his(cat))
        t.say(sentence, (cat, "at", "on the mat"), (cat, "did", "sat on the mat"))
    else:
        sentence, seat = t.pick(_OTHER_SEATS)
        t.say(sentence, (cat, "at", seat))
    return cat


def opening(t: Teller, hero: Entity, fair: bool = True, home: bool = True) -> None:
    """Sets the scene and introduces the hero.

    `fair` says whether a sentence on fair weather may come first, and `home` whether the hero may
    be said to live somewhere.
    """
    roll = t.random()
    if roll < 0.065 and hero.animal is None:
        cat = cat_on_mat(t)
        if cat is not None and t.chance(0.6):
            t.say(f"{t.n(hero)} stroked {t.o(cat)} and smiled.")
    elif roll < 0.35 and fair:
        fair_weather(t)
    known = (hero, "is a", hero.noun), (hero, "trait", hero.kind)
    roll = t.random()
    if hero.animal is None and hero.seen >= 0:
        return
    if roll < 0.3:
        start = t.either("once there was", "this is the story of", "once upon a time there was")
        if t.dated or t.chance(0.3):
            start = "there was"
        t.say(f"{start} {t.a(hero)}.", *known)
    elif roll < 0.55 and hero.animal and home:
        t.say(f"{t.a(hero)} lived {hero.animal.home}.", *known, (hero, "lives", hero.animal.home))
    elif roll < 0.55 and home:
        place = t.pick(_HOUSES)
        t.say(f"{t.a(hero)} lived {place}.", *known, (hero, "lives", place))
    elif roll < 0.75 and hero.the == hero.name:
        t.say(f"{t.n(hero)} was {hero.a.rpartition(' named ')[0]}.", *known)
    elif hero.animal is None:
        return  # a child needs no introduction
    else:
        start = (
            ""
            if t.dated
            else t.either("one morning, ", "one sunny morning, ", "early one morning, ")
        )
        t.dated = True
        t.say(f"{start}{t.a(hero)} woke up and {t.pick(_MORNING)}.", *known)


_HOUSES = (
    "in a small house by the river",
    "in a white house on the hill",
    "in a little village",
    "near the forest",
    "on a farm",
    "in a house by the sea",
    "at the end of the road",
)
_MORNING = ("looked at the sky", "sang a song", "smiled at the world", "jumped for joy")


def fair_weather(t: Teller) -> None:
    """A sentence on fair weather, which also stands for the time."""
    one, two = t.pick(lx.FAIR), t.pick(lx.FAIR)
    t.dated = True
    if one is two:
        t.say(f"{one[0]}.", (one[1], "is", one[2]))
    else:
        t.say(f"{one[0]}, and {two[0]}.", (one[1], "is", one[2]), (two[1], "is", two[2]))


def fun(t: Teller, place: lx.Place, who: Entity) -> str:
    """What `who` does for fun in `place`; the last two of each place are for animals, too."""
    wild = who.animal or any(member.animal for member in who.members)
    return t.pick(place.fun[2:] if wild else place.fun)


def go(t: Teller, who: Entity, place: lx.Place, more: str = "") -> int:
    """`who` goes to `place`."""
    went = who.animal.went if who.animal else t.pick(_WENT)
    return t.say(f"{t.when()}{t.s(who)} {went} {place.to}{more}.", (who, "at", place))


_WENT = ("went", "walked", "ran", "went")


def arrive(t: Teller, friend: Entity, hero: Entity, place: lx.Place) -> int:
    """`friend` comes to where the hero is."""
    facts = (friend, "is a", friend.noun), (friend, "at", place)
    roll = t.random()
    went = friend.animal.went if friend.animal else "walked"
    if roll < 0.3:
        start = t.either("just then, ", "then ", "soon ", "after a while, ")
        return t.say(f"{start}{t.a(friend)} {went} by.", *facts)
    if roll < 0.55:
        return t.say(f"{t.a(friend)} saw {t.o(hero)} and came closer.", *facts)
    if roll < 0.8 and hero.cls != friend.cls:
        hero_name = t.s(hero)
        return t.say(f"there {hero_name} met {t.a(friend)}.", *facts)
    return t.say(f"{t.a(friend)} was {place.at}, too.", *facts)


def gave(giver: Entity, thing: Entity | str, taker: Entity) -> tuple[tuple, tuple]:
    """The facts that one gave something to another."""
    return (giver, "gave", thing), (taker, "has", thing)


def ask_why(t: Teller, friend: Entity, hero: Entity, feeling: str = "sad") -> int:
    """The friend asks why the hero feels so."""
    call = f", {t.call(hero)}" if hero.the == hero.name and t.chance(0.4) else ""
    return t.say(f'"Why are {hero.you} {feeling}{call}?" asked {t.n(friend)}.')


def thank(t: Teller, hero: Entity, friend: Entity) -> int:
    """The hero thanks the friend."""
    roll = t.random()
    call = f", {t.call(friend)}" if friend.the == friend.name and t.chance(0.5) else ""
    if roll < 0.4:
        return t.say(f'"Thank {friend.you}{call}!" said {t.n(hero)}.')
    if roll < 0.7:
        return t.say(f'"{friend.You} are a good friend{call}," said {t.n(hero)}.')
    return t.say(
        f"{t.s(hero)} thanked {t.o(friend)} {t.either('warmly', 'many times', 'with a smile')}."
    )


def ending(
    t: Teller,
    hero: Entity,
    friend: Entity | None = None,
    both: Entity | None = None,
    new: bool = True,
) -> None:
    """Ends the day: home, bed, friendship. Keeps within 6 to 16 sentences.

    `friend` is the second character, if there is one to be friends with, and `both` the group of
    the two, if the plot has made one; `new` says whether they were no friends before.
    """
    if len(t.sentences) >= 16:
        return
    if friend is not None:
        both = both or t.group(hero, friend)
    home = hero.loc is lx.HOME or hero.loc is lx.BED or hero.loc is lx.KITCHEN
    roll = t.random()
    told = len(t.sentences)
    if both is not None and told < 14 and (told < 6 or roll < 0.45):
        roll = t.random() if new else 0.45 + 0.55 * t.random()
        if roll < 0.25:
            t.say(f"from that day on, {t.s(both)} were good friends.", (hero, "friend of", friend))
        elif roll < 0.45:
            t.say(f"{t.s(both)} became friends.", (hero, "friend of", friend))
        elif roll < 0.6:
            t.say(f"{t.s(both)} smiled at each other.")
        elif roll < 0.8 and not home:
            t.say(f"{t.s(both)} played together for a long time.", (both, "did", "played"))
        else:
            t.say(
                f"{t.s(both)} {t.either('laughed', 'danced', 'sang')} together.",
                (both, "did", "had fun"),
            )
    if home:
        _night(t, hero)
    elif both is not None and t.chance(0.6):
        start = t.pick(_EVENING)
        together = t.either("", "", " together", " hand in hand") if _children(both) else ""
        t.say(f"{start}{t.s(both)} went home{together}.", (both, "at", lx.HOME))
    elif t.chance(0.8):
        start = t.pick(_EVENING)
        mood = t.either("", " with a smile", " and slept well", " and had a warm supper")
        t.say(f"{start}{t.s(hero)} went home{mood}.", (hero, "at", lx.HOME))
    if hero.loc is lx.HOME and hero.animal is None and t.chance(0.08) and len(t.sentences) < 15:
        cat_on_mat(t)
    if (t.chance(0.2) and len(t.sentences) < 15) or len(t.sentences) < 6:
        t.say(t.pick(_LAST).format(n=t.s(hero)), (hero, "feels", "happy"))


def _children(group: Entity) -> bool:
    return all(member.animal is None for member in group.members)


def _night(t: Teller, hero: Entity) -> None:
    roll = t.random()
    if roll < 0.4:
        t.say(f"that night, {t.s(hero)} {t.pick(_SLEEP)}.", (hero, "did", "slept"))
    elif roll < 0.7:
        t.say(
            f"{t.s(hero)} went to bed {t.either('early', 'with a smile', 'and slept')}.",
            (hero, "at", lx.BED),
        )
    else:
        t.remark("the sun went down.", "the stars came out.", "the moon shone on the roof.")


_EVENING = (
    "the sun went down, and ",
    "in the evening, ",
    "then ",
    "when the stars came out, ",
    "late in the day, ",
    "at last, ",
    "at the end of the day, ",
)
_SLEEP = (
    "slept well",
    "slept and dreamed of the day",
    "slept like a stone",
    "could not stop smiling",
)
_LAST = (
    "{n} was very happy.",
    "{n} was tired but happy.",
    "{n} was happy in the end.",
    "{n} was happy and a little tired.",
)

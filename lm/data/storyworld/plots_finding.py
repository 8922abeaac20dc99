"""Plots about losing and finding: where things are, who put them there, and what was behind it."""

from __future__ import annotations

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.scenes import arrive, ask_why, ending, fun, gave, go, opening, thank
from lm.data.storyworld.teller import Entity, Teller


def treasure_of(t: Teller, hero: Entity) -> Entity:
    """A thing such a hero would hold dear."""
    if hero.animal is None:
        return t.thing(t.pick(lx.TOYS))
    return t.thing(lx.THINGS[t.pick(hero.animal.treasures)])


def lost_thing(t: Teller) -> None:
    """A thing is lost on an outing; a friend asks, helps to look, finds it and gives it back."""
    hero = t.hero()
    friend = t.hero(hero)
    place = t.pick(lx.OUTDOORS)
    opening(t, hero)
    thing = treasure_of(t, hero)
    look = lx.THINGS[thing.noun]
    t.say(f"{t.s(hero)} had {t.a(thing)}.", (hero, "has", thing), (hero, "owns", thing))
    if t.chance(0.5):
        if t.chance(0.5):
            t.say(f"{t.s(thing)} was a gift from {t.pick(_GIVERS)}.")
        else:
            t.say(f"{t.s(hero)} loved {t.o(thing)} very much.", (hero, "likes", thing))
    go(t, hero, place, t.either("", "", " to play") if t.chance(0.6) else f" with {t.n(thing)}")
    t.say(f"{t.s(hero)} {look.play % t.o(thing)}.", (hero, "played with", thing))
    loss = t.say(f"{t.pick(_SUDDENLY)}{t.n(thing)} {look.loss}.", (thing, "lost by", hero))
    if t.chance(0.6):
        t.say(f"{t.s(hero)} looked {t.pick(_HERE)} but could not find {t.o(thing)}.")
    name = hero.the
    why, because = f"Why was {name} sad?", f"{name} lost the {thing.noun}"
    if t.chance(0.5):
        sad = t.say(f"{t.s(hero)} was sad because {t.n(thing)} was gone.", (hero, "feels", "sad"))
    else:
        sad = t.say(f"{t.s(hero)} {t.pick(_SADLY)}.", (hero, "feels", "sad"))
    t.because(loss, sad, why, because)
    arrive(t, friend, hero, place)
    if t.chance(0.75):
        ask_why(t, friend, hero, t.either("sad", "sad", "so sad"))
        adjective = thing.kind + " " if t.chance(0.4) else ""
        t.say(
            f'"{hero.I} {t.pick(_CANNOT)} {hero.my} {adjective}{t.bare(thing)}," said {t.n(hero)}.'
        )
    if t.chance(0.5):
        t.say(f'"{friend.I} {t.either("will", "can")} help {hero.you}," said {t.n(friend)}.')
    both = t.group(hero, friend)
    first, second = t.two(place.spots)
    if len(t.sentences) < 13 and t.chance(0.7):
        t.say(f"{t.s(both)} looked {first}, but {t.n(thing)} was not there.")
    finder = friend if t.chance(0.75) else hero
    found = t.say(
        f"{t.pick(_AT_LAST)}{t.n(finder)} {t.either('found', 'saw')} {t.o(thing)} {second}.",
        (thing, "at", second),
        (finder, "saw", thing),
    )
    if finder is friend:
        t.say(
            f"{t.s(friend)} picked {t.o(thing)} up and gave {t.him(thing)} to {t.n(hero)}.",
            (friend, "has", thing),
            *gave(friend, thing, hero),
        )
    else:
        t.say(f"{t.s(hero)} picked {t.o(thing)} up and {t.pick(_HELD)}.", (hero, "has", thing))
    glad = t.say(
        f"{t.s(hero)} was {t.either('happy', 'very happy')} again.", (hero, "feels", "happy")
    )
    finder_name = finder.the
    t.because(found, glad, f"Why was {name} happy again?", f"{finder_name} found the {thing.noun}")
    if len(t.sentences) < 14 and t.chance(0.7):
        thank(t, hero, friend)
    if len(t.sentences) < 14:
        ending(t, hero, friend, both)


_GIVERS = (
    "an old sailor",
    "the queen of the bees",
    "the old baker",
    "a kind old lady",
    "the snow king",
)
_SUDDENLY = ("suddenly ", "but then ", "all at once ", "after a while ", "but soon ")
_HERE = ("here and there", "all around", "high and low", "everywhere")
_SADLY = ("was sad", "was very sad", "sat down and cried", "began to cry", "was so sad")
_CANNOT = ("lost", "cannot find", "have lost")
_AT_LAST = ("at last, ", "then ", "in the end, ", "after a long time, ", "")
_HELD = ("laughed", "smiled", "jumped for joy")

_HIDES = (
    *("in the basket", "in the box", "in the drawer", "in the pot", "in the cupboard"),
    *("in the bag", "under the bed", "under the chair", "under the table"),
)


def moved_thing(t: Teller) -> None:
    """A thing is put away and moved in its owner's absence: the owner looks in the wrong place."""
    hero = t.child()
    friend = t.child(hero)
    thing = t.thing(t.pick(lx.PLAYTHINGS))
    first = t.pick(_HIDES)
    second = t.pick(_HIDES)
    while second == first:
        second = t.pick(_HIDES)
    place = t.pick(lx.OUTDOORS)
    opening(t, hero)
    start = "" if hero.seen >= 0 else t.when()
    relative = t.either("a friend", "a cousin")
    t.say(
        f"{start}{t.s(hero)} and {relative} named {t.n(friend)} were at home.",
        (hero, "at", lx.HOME),
        (friend, "at", lx.HOME),
    )
    t.say(f"{t.n(hero)} had {t.a(thing)}.", (hero, "has", thing), (hero, "owns", thing))
    put = t.say(f"{t.s(hero)} put {t.o(thing)} {first}.", (thing, "at", first))
    t.say(f"then {t.s(hero)} went {place.to}.", (hero, "at", place))
    look = lx.THINGS[thing.noun]
    t.say(
        f"while {t.s(hero)} was away, {t.n(friend)} took {t.n(thing)} {_out_of(first)}.",
        (friend, "has", thing),
    )
    if (
        t.chance(0.5)
        and "wind" not in look.play
        and "path" not in look.play
        and "tree" not in look.play
    ):
        t.say(f"{t.s(friend)} {look.play % t.o(thing)}.", (friend, "played with", thing))
    moved = t.say(
        f"{t.either('then', 'after that,', 'later')} {t.s(friend)} put {t.o(thing)} {second}.",
        (thing, "at", second),
    )
    t.say(
        f"{t.either('soon', 'in the evening,', 'after an hour,')} {t.n(hero)} came home.",
        (hero, "at", lx.HOME),
    )
    if t.chance(0.5):
        t.say(f"{t.s(hero)} wanted to play with {t.n(thing)}.", (hero, "wants", thing))
    missing = t.say(f"{t.s(hero)} looked {first}, but {t.n(thing)} was not there.")
    t.because(
        moved,
        missing,
        f"Why was the {thing.noun} not {first}?",
        f"{friend.the} put the {thing.noun} {second}",
    )
    t.because(
        put, missing, f"Why did {hero.the} look {first}?", f"{hero.the} put the {thing.noun} there"
    )
    if t.chance(0.5):
        t.say(f"{t.s(hero)} was surprised.", (hero, "feels", "surprised"))
    t.say(f'"Where is {hero.my} {t.bare(thing)}?" asked {t.n(hero)}.')
    t.say(f'"{friend.I} put {t.o(thing)} {second}," said {t.n(friend)}.')
    t.say(f"{t.n(hero)} looked {second}, and there was {t.n(thing)}.", (hero, "saw", thing))
    both = t.group(hero, friend)
    if t.chance(0.7) and len(t.sentences) < 14:
        t.say(
            f"{t.s(both)} {t.either('laughed', 'smiled', 'had to laugh')}.",
            (both, "did", "laughed"),
        )
    if len(t.sentences) < 14 and t.chance(0.5):
        t.say(f"then {t.s(both)} played with {t.n(thing)} together.", (both, "played with", thing))
    if len(t.sentences) < 13 and t.chance(0.4):
        ending(t, hero)


def _out_of(spot: str) -> str:
    return "out of" + spot.removeprefix("in") if spot.startswith("in ") else "from " + spot


_NOISES = (
    ("tap, tap, tap", "at the window", ("bird", "squirrel")),
    ("scratch, scratch", "at the door", ("cat", "dog", "fox")),
    ("bump", "in the kitchen", ("cat", "mouse", "dog")),
    ("crunch, crunch", "under the bed", ("mouse", "hedgehog")),
    ("splash", "in the garden", ("duck", "frog")),
)
_ANIMALS = {animal.noun: animal for animal in lx.HERD}


def night_noise(t: Teller) -> None:
    """A strange noise at night frightens the hero, and it is only a small animal."""
    hero = t.child()
    sound, where, kinds = t.pick(_NOISES)
    guest = t.animal(hero, (_ANIMALS[t.pick(kinds)],), named=0.2)
    opening(t, hero, fair=False)
    start = t.either("one night, ", "late one night, ", "one dark night, ", "on a cold night, ")
    t.say(f"{start}{t.s(hero)} was in bed.", (hero, "at", lx.BED))
    if t.chance(0.5):
        t.remark(
            "the house was dark.",
            "the moon was behind the clouds.",
            "the wind blew.",
            "all was quiet.",
        )
    noise = t.say(f"suddenly {t.s(hero)} heard a noise {where}.", (hero, "heard", "noise"))
    if t.chance(0.7):
        t.say(f"{sound}, went the noise.")
    if t.chance(0.5):
        afraid = t.say(f"{t.s(hero)} was afraid because of the noise.", (hero, "feels", "afraid"))
    else:
        afraid = t.say(
            f"{t.s(hero)} was {t.either('', 'very ', 'a little ')}afraid.",
            (hero, "feels", "afraid"),
        )
    t.because(noise, afraid, f"Why was {hero.the} afraid?", f"{hero.the} heard a noise {where}")
    helper = None
    if t.chance(0.5):
        helper = t.adult("Mom", "Dad", "Grandma", "Grandpa")
        t.say(
            f'"{helper.the}, what is that?" {t.either("cried", "asked", "whispered")} {t.n(hero)}.'
        )
        seekers = t.group(hero, helper)
        t.say(f'"Let {seekers.us} look together," said {t.n(helper)}.')
        t.say(f"{t.s(seekers)} {t.pick(_LIGHT)}.", (seekers, "did", "looked"))
    else:
        t.say(f"but {t.s(hero)} was brave and {t.pick(_LIGHT)}.", (hero, "did", "looked"))
    only = t.either("there was no monster, only", "there was", "and there sat", "there stood")
    there = t.say(f"{only} {t.a(guest)} {where}.", (guest, "at", where))
    roll = t.random()
    if roll < 0.5:
        reason = t.either("hungry", "cold", "thirsty")
        need = t.say(f"{t.n(guest)} was {reason}.", (guest, "feels", reason))
        gift = {"hungry": guest.animal.food, "cold": "a warm blanket", "thirsty": "some water"}[
            reason
        ]
        if guest.animal.noun == "frog" and reason == "hungry":
            gift = "a little bread"
        given = t.say(
            f"{t.n(hero)} gave {t.o(guest)} {gift}, and {t.n(guest)} was happy.",
            *gave(hero, gift, guest),
            (guest, "feels", "happy"),
        )
        t.because(
            need, given, f"Why did {hero.the} give {guest.the} {gift}?", f"{guest.the} was {reason}"
        )
    else:
        t.say(f"{t.n(guest)} wanted to {t.either('play', 'say hello', 'come in')}.")
    relief = t.say(
        f"{t.n(hero)} laughed and was not afraid any more.", (hero, "feels", "not afraid")
    )
    t.because(
        there,
        relief,
        f"Why was {hero.the} not afraid any more?",
        f"the noise came from {guest.the}",
    )
    if len(t.sentences) < 14 and t.chance(0.6):
        t.say(f'"Good night, little {t.bare(guest)}," {said(t, hero)}.')
    hero.loc = lx.BED
    if helper is not None:
        t.say(f"{t.n(helper)} took {t.n(hero)} back to bed.", (hero, "at", lx.BED))
    else:
        t.say(f"{t.n(hero)} went back to bed and slept well.", (hero, "at", lx.BED))
    if len(t.sentences) < 16 and t.chance(0.4):
        t.say(f"after that night, {t.s(hero)} was never afraid of the dark.")


_LIGHT = (
    "took a lamp to look",
    "went to look with a lamp",
    "lit a candle and looked",
    "got up to look",
)


def said(t: Teller, speaker: Entity) -> str:
    """'said Mia' or 'she said'."""
    if t.chance(0.4):
        return t.s(speaker) + " said"
    return "said " + t.n(speaker)


def broken_cup(t: Teller) -> None:
    """A child breaks something while playing, tells the truth and is forgiven."""
    hero = t.child()
    adult = t.adult("Mom", "Dad", "Grandma", "Grandpa")
    cup = t.thing(
        t.either("cup", "plate", "vase", "lamp", "jug"),
        "blue",
        "old",
        "white",
        "pretty",
        "green",
        "yellow",
    )
    toy = t.thing(lx.TOYS[t.either(0, 6, 10)])
    opening(t, hero)
    t.say(
        f"{t.n(adult)} had {t.a(cup)} and loved {t.him(cup)} very much.",
        (adult, "owns", cup),
        (adult, "likes", cup),
    )
    t.say(
        f"{t.when()}{t.n(hero)} played with {t.a(toy)} in the kitchen.",
        (hero, "has", toy),
        (hero, "at", lx.KITCHEN),
    )
    act = t.pick(
        (
            f"threw {t.n(toy)} too high",
            f"ran too fast with {t.n(toy)}",
            f"kicked {t.n(toy)} too hard",
        )
    )
    if toy.noun != "ball":
        act = f"{t.either('danced around', 'ran too fast')} with {t.n(toy)}"
    throw = t.say(f"{t.s(hero)} {act}.")
    end = t.either("and broke", "and broke in two", "and broke with a crash")
    broke = t.say(f"{t.n(cup)} fell to the floor {end}.", (cup, "is", "broken"))
    t.because(throw, broke, f"Why did the {cup.noun} break?", f"{hero.the} {act}")
    feeling = t.either("afraid", "worried", "sad")
    afraid = t.say(f"{t.n(hero)} was {feeling}.", (hero, "feels", feeling))
    t.because(broke, afraid, f"Why was {hero.the} {feeling}?", f"the {cup.noun} broke")
    if t.chance(0.5):
        t.say(f"{t.s(hero)} wanted to hide {t.n(cup)}, but that was not right.")
    t.say(f"{t.s(hero)} went to {t.n(adult)} and told the truth.", (hero, "told", "truth"))
    truth = t.say(
        f'"{hero.I} broke {adult.your} {t.bare(cup)}, and {hero.I} am sorry," said {t.n(hero)}.'
    )
    if t.chance(0.7):
        t.say(f'"Thank {hero.you} for the truth," said {t.n(adult)}.')
    mood = t.either("was not angry", "smiled", "was sad for a moment but not angry")
    calm = t.say(f"{t.n(adult)} {mood}.", (adult, "forgave", hero))
    t.because(truth, calm, f"Why was {adult.the} not angry?", f"{hero.the} told the truth")
    both = t.group(hero, adult)
    roll = t.random()
    if roll < 0.4:
        t.say(f"{t.s(both)} fixed {t.n(cup)} with glue.", (cup, "is", "fixed"))
    elif roll < 0.7:
        t.say(f"{t.s(both)} cleaned the floor together.", (both, "did", "cleaned"))
    else:
        t.say(f"{t.n(adult)} gave {t.n(hero)} a warm hug.", (adult, "hugged", hero))
    outside = t.either("outside", "in the garden", "in the yard")
    t.say(
        f"{t.n(hero)} was not {feeling} any more and played with {t.n(toy)} {outside}.",
        (hero, "feels", f"not {feeling}"),
        (hero, "at", outside),
    )
    if t.chance(0.4):
        hero.loc = lx.HOME
        ending(t, hero)


def key_and_box(t: Teller) -> None:
    """A key is found, and after some trying a box that it opens, with a surprise inside."""
    hero = t.child()
    friend = t.child(hero)
    place = t.either(lx.BEACH, lx.FOREST, lx.GARDEN, lx.HILL, lx.MEADOW)
    key = t.thing("key", "little", "golden", "old", "silver", "shiny")
    box = t.thing("box", "big", "wooden", "green", "heavy", "blue")
    opening(t, hero)
    both = t.group(hero, friend)
    t.say(f"{t.when()}{t.s(hero)} went {place.to} with {t.n(friend)}.", (both, "at", place))
    if t.chance(0.5):
        t.say(f"{t.s(both)} {(act := fun(t, place, both))}.", (both, "did", act))
    first, second = t.two(place.spots)
    t.say(f"{t.n(hero)} found {t.a(key)} {first}.", (key, "at", first), (hero, "has", key))
    t.say(f'"What does {t.o(key)} open?" asked {t.n(friend)}.')
    if t.chance(0.6):
        t.say(f"{t.s(both)} looked and looked.")
    t.say(f"then {t.n(friend)} saw {t.a(box)} {second}.", (box, "at", second), (friend, "saw", box))
    if t.chance(0.5):
        t.say(
            f"{t.n(friend)} could not open {t.o(box)} because {t.he(box)} was locked.",
            (box, "is", "locked"),
        )
    opened = t.say(
        f"{t.n(hero)} {t.either('opened', 'unlocked')} {t.n(box)} with {t.n(key)}.",
        (box, "is", "open"),
    )
    contents, number = t.pick(
        (("coins", "five"), ("shells", "six"), ("sweets", "four"), ("stones", "three"))
    )
    items = t.plural(
        contents,
        t.either("shiny", "golden", "red", "pretty", "little") if contents != "sweets" else "red",
    )
    t.say(
        f"inside there were {number} {t.a(items)}.",
        (items, "at", "in the box"),
        (items, "count", number),
    )
    joy = t.either("surprised and happy", "very happy", "happy")
    glad = t.say(f"{t.n(both)} were {joy}.", (both, "feels", "happy"))
    t.because(opened, glad, f"Why were {both.the} happy?", f"{hero.the} opened the box")
    t.say(
        f"{t.n(hero)} kept {t.n(key)}, and {t.n(friend)} kept {t.n(box)}.",
        (hero, "owns", key),
        (friend, "owns", box),
    )
    if len(t.sentences) < 14:
        ending(t, hero, friend, both, new=False)

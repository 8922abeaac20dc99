"""Plots about being together: racing, learning, visiting, making friends, a day of the animals."""

from __future__ import annotations

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.scenes import (
    arrive,
    cat_on_mat,
    ending,
    fair_weather,
    fun,
    gave,
    go,
    opening,
    thank,
)
from lm.data.storyworld.teller import Entity, Teller, article


def race(t: Teller) -> None:
    """Two run a race; one falls; the other stops, and that is better than winning."""
    hero = t.animal(None, lx.RUNNERS) if t.chance(0.6) else t.child()
    friend = t.animal(hero, lx.RUNNERS) if hero.animal else t.child(hero)
    place = t.either(lx.PARK, lx.MEADOW, lx.HILL, lx.BEACH, lx.FOREST, lx.FARM)
    goal = t.pick(
        (
            "the big tree",
            "the old fence",
            "the red gate",
            "the tall rock",
            "the little bridge",
            "the white stone",
        )
    )
    opening(t, hero)
    both = t.group(hero, friend)
    t.say(
        f"{t.when()}{t.n(hero)} met {t.a(friend)} {place.at}.",
        (both, "at", place),
        (friend, "is a", friend.noun),
    )
    t.say(f'"Let {both.us} race to {goal}," said {t.n(friend)}.', (friend, "wants", "race"))
    t.say(f'"One, two, three, go!" {t.either("shouted", "cried")} {t.n(hero)}.')
    t.say(f"{t.s(both)} ran as fast as the wind.", (both, "did", "ran"))
    if t.chance(0.6):
        t.say(f"{t.n(friend)} was in front.")
    fall = t.pick(
        ("fell over a stone", "fell over a root", "fell over a stick", "slipped in the mud")
    )
    fell = t.say(f"but then {t.n(friend)} {fall}.", (friend, "did", fall))
    part = t.either("leg", "foot", "knee") if friend.animal is None else t.either("leg", "foot")
    hurt = t.say(
        f"{t.p(friend)} {part} hurt, and {t.he(friend)} could not run.", (friend, "hurt", part)
    )
    t.because(fell, hurt, f"Why did {friend.the}'s {part} hurt?", f"{friend.the} {fall}")
    stop = t.say(
        f"{t.n(hero)} stopped and {t.either('went back', 'came back', 'turned back')}.",
        (hero, "helped", friend),
    )
    t.because(hurt, stop, f"Why did {hero.the} stop?", f"{friend.the} was hurt")
    if t.chance(0.5):
        t.say(f'"Do {hero.you} not want to win?" asked {t.n(friend)}.')
        t.say(f'"{friend.You} are more important than a race," said {t.n(hero)}.')
    elif t.chance(0.6):
        t.say(f'"Can {friend.you} stand up?" asked {t.n(hero)}.')
    t.say(f"{t.n(hero)} helped {t.n(friend)} up.", (hero, "helped", friend))
    t.say(
        f"{t.s(both)} walked to {goal} {t.either('together', 'side by side', 'slowly')}.",
        (both, "at", goal),
    )
    t.say(
        t.either(f"so {t.n(both)} both won.", f"{t.n(both)} won together."), (both, "won", "race")
    )
    if len(t.sentences) < 14:
        ending(t, hero, friend, both)


def new_friend(t: Teller) -> None:
    """A lonely one asks, or is asked, to play."""
    hero = t.hero()
    friend = t.hero(hero)
    place = t.pick(lx.OUTDOORS)
    opening(t, hero)
    new = t.chance(0.4)
    reason = "had no friends" if not new else "was new in the village"
    if t.chance(0.5):
        lonely = t.say(
            f"{t.s(hero)} was lonely because {t.he(hero)} {reason}.", (hero, "feels", "lonely")
        )
        cause = lonely
    else:
        cause = t.say(f"{t.s(hero)} {reason}.")
        lonely = t.say(
            f"{t.s(hero)} was {t.either('', 'very ', 'often ')}lonely.", (hero, "feels", "lonely")
        )
    t.because(cause, lonely, f"Why was {hero.the} lonely?", f"{hero.the} {reason}")
    go(t, hero, place, t.either("", " alone", ""))
    arrive(t, friend, hero, place)
    if t.chance(0.5):
        t.say(f"{t.n(hero)} was shy and did not say a word.", (hero, "is", "shy"))
    if t.chance(0.5):
        t.say(
            f'"Hello, {friend.my} name is {t.call(friend)}," said {t.n(friend)}.'
            if friend.the == friend.name
            else f'"Hello," said {t.n(friend)}.'
        )
    asker, other = (friend, hero) if t.chance(0.7) else (hero, friend)
    asked = t.say(f'"Will {other.you} play with {asker.me}?" asked {t.n(asker)}.')
    t.say(f'"Yes, {t.either("of course", "please", "with joy")}!" said {t.n(other)}.')
    both = t.group(hero, friend)
    played = t.say(f"{t.n(both)} {(game := t.pick(_GAMES))}.", (both, "did", game))
    if t.chance(0.6):
        t.say(f"then {t.s(both)} {(act := fun(t, place, both))}.", (both, "did", act))
    t.because(asked, played, f"Why did {both.the} play?", f"{asker.the} asked {other.the}")
    if t.chance(0.6):
        glad = t.say(
            f"{t.n(hero)} was not lonely any more.",
            (hero, "feels", "not lonely"),
            (hero, "friend of", friend),
        )
        t.because(
            played,
            glad,
            f"Why was {hero.the} not lonely any more?",
            f"{friend.the} played with {hero.the}",
        )
    ending(t, hero, friend, both)


_GAMES = (
    "played together",
    "played hide and seek",
    "played together all day",
    "ran and jumped",
    "played in the grass",
    "played a new game",
)


def animal_day(t: Teller) -> None:
    """What the animals do all day, each after its kind, until they meet."""
    first = cat_on_mat(t) if t.chance(0.35) else None
    if first is None:
        fair_weather(t)
        first = _after_its_kind(t, None)
    second = _after_its_kind(t, first)
    third = _after_its_kind(t, first, awake=True)
    if t.chance(0.4):
        t.remark(
            "the wind was soft, and the sky was blue.",
            "all was quiet.",
            "the bees were busy in the flowers.",
        )
    both = t.group(first, second)
    place = t.either(lx.PARK, lx.GARDEN, lx.MEADOW, lx.POND)
    t.say(
        f"{t.either('then', 'after lunch,', 'in the afternoon,')} {t.n(both)} met {place.at}.",
        (both, "at", place),
    )
    if t.chance(0.6):
        t.say(f'"Shall {both.we} play?" asked {t.n(first if t.chance(0.5) else second)}.')
    played = t.say(f"{t.s(both)} {(game := t.pick(_GAMES))}.", (both, "did", game))
    if t.chance(0.5) and (third.animal is not lx.FISH or place is lx.POND):
        glad = t.either("smiled", "laughed", "was happy")
        t.say(
            f"{t.n(third)} {t.either('saw', 'watched', 'heard')} {t.o(both)} and {glad}.",
            (third, "saw", both),
        )
    roll = t.random()
    if roll < 0.4:
        tired = t.say(f"soon {t.n(both)} were tired.", (both, "feels", "tired"))
        t.because(played, tired, f"Why were {both.the} tired?", f"{both.the} played")
    elif roll < 0.7:
        food = first.animal.food if first.animal.food in _SHARED else "berries"
        t.say(f"{t.n(first)} found some {food}.", (first, "has", food))
        t.say(f"{t.s(first)} shared the {food} with {t.n(second)}.", (first, "shared", food))
    ending(t, first, second, both)


_SHARED = ("milk", "bread", "cheese", "nuts", "honey", "apples", "carrots", "seeds")


def _after_its_kind(t: Teller, beside: Entity | None, awake: bool = False) -> Entity:
    animal = t.animal(beside, lx.HERD if awake else lx.WALKERS, named=0.0)
    habits = animal.animal.habits
    habit = t.pick(habits)
    while awake and habit.startswith("slept"):
        habit = t.pick(habits)
    t.mention(animal)
    t.say(f"{animal.the} {habit}.", (animal, "did", habit))
    return animal


_SKILLS = (
    (
        None,
        "swim",
        "in the lake",
        ("moved {his} arms", "kicked with {his} feet"),
        "swam across the lake",
    ),
    (None, "ride a bike", "on the road", ("held on tight", "looked ahead"), "rode down the road"),
    (None, "whistle", "in the garden", ("took a deep breath", "blew and blew"), "whistled a song"),
    (
        None,
        "skate",
        "on the ice",
        ("held on to the fence", "went very slowly"),
        "skated over the ice",
    ),
    (
        lx.BIRD,
        "fly",
        "in the tree",
        ("opened {his} wings", "jumped from a low branch"),
        "flew over the trees",
    ),
    (
        lx.DUCK,
        "swim",
        "by the pond",
        ("moved {his} feet", "held {his} head up"),
        "swam across the pond",
    ),
    (
        lx.FROG,
        "jump",
        "by the pond",
        ("bent {his} legs", "looked at the next stone"),
        "jumped over the stones",
    ),
    (
        lx.SQUIRREL,
        "climb",
        "under the tall tree",
        ("held on tight", "looked up"),
        "climbed to the top",
    ),
    (lx.CAT, "climb", "under the tall tree", ("held on tight", "looked up"), "climbed to the top"),
    (lx.RABBIT, "dig", "under the hill", ("used {his} paws", "dug and dug"), "dug a long burrow"),
)


def learn(t: Teller) -> None:
    """The hero cannot do a thing, fears it, tries three times and can."""
    kind, skill, where, tries, done = t.pick(_SKILLS)
    if kind is None:
        hero = t.child()
        teacher = (
            t.adult("Mom", "Dad", "Grandma", "Grandpa", "teacher")
            if t.chance(0.6)
            else t.child(hero)
        )
    else:
        hero = t.animal(None, (kind,))
        teacher = t.animal(hero)
    opening(t, hero, home=False)
    t.say(f"{t.s(hero)} wanted to {skill}.", (hero, "wants", skill))
    reason = t.either("did not know how", "was still small", "had never done that before")
    afraid = t.say(
        f"but {t.s(hero)} was afraid because {t.he(hero)} {reason}.", (hero, "feels", "afraid")
    )
    t.because(afraid, afraid, f"Why was {hero.the} afraid?", f"{hero.the} {reason}")
    teach = t.a(teacher)
    t.say(f'"{teacher.I} will help {hero.you}," said {teach}.', (teacher, "helped", hero))
    t.say(
        f"{t.when()}{t.n(hero)} and {t.n(teacher)} were {where}.",
        (hero, "at", where),
        (teacher, "at", where),
    )
    first = tries[0].format(his=hero.his)
    t.say(f"the first time, {t.n(hero)} {first}, but nothing happened.", (hero, "did", "tried"))
    if t.chance(0.7):
        t.say(f'"Try again," said {t.n(teacher)}.')
    second = tries[1].format(his=hero.his)
    t.say(f"the second time, {t.n(hero)} {second} and fell down.", (hero, "did", "fell"))
    if t.chance(0.6):
        spirit = t.either("wanted to stop", "did not give up", "got up again", "did not cry")
        t.say(f"{t.s(hero)} {spirit}.")
    ok = t.say(f"the third time, {t.n(hero)} {done}.", (hero, "did", done))
    feeling = t.either("proud", "happy")
    glad = t.say(f"{t.s(hero)} was {t.either('', 'very ')}{feeling}.", (hero, "feels", feeling))
    t.because(ok, glad, f"Why was {hero.the} {feeling}?", f"{hero.the} {done}")
    if t.chance(0.7):
        thank(t, hero, teacher)
    grown = teacher.kind is None
    ending(t, hero, None if grown else teacher)


def quiet_pond(t: Teller) -> None:
    """The fish cannot leave the pond, so the friends have to come to it."""
    fish = t.animal(None, (lx.FISH,), named=0.7)
    friend = (
        t.animal(fish, (lx.DUCK, lx.FROG, lx.TURTLE), named=0.5) if t.chance(0.6) else t.child(fish)
    )
    t.say(f"{t.a(fish)} lived in the pond.", (fish, "is a", "fish"), (fish, "at", "in the pond"))
    t.say(
        f"{t.s(fish)} swam {t.either('all day', 'under the lilies', 'round and round')}.",
        (fish, "did", "swam"),
    )
    reason = "could not leave the pond"
    feeling = t.either("lonely", "sad")
    lonely = t.say(
        f"{t.s(fish)} was {feeling} because {t.he(fish)} {reason}.", (fish, "feels", feeling)
    )
    t.because(lonely, lonely, f"Why was {fish.the} {feeling}?", f"{fish.the} {reason}")
    t.say(
        f"{t.when()}{t.a(friend)} came {lx.POND.to}.",
        (friend, "at", lx.POND),
        (friend, "is a", friend.noun),
    )
    t.say(f'"Why are {fish.you} {feeling}?" asked {t.n(friend)}.')
    t.say(
        f'"{fish.I} want to see the {t.pick(_WORLD)}, but {fish.I} cannot walk," said {t.n(fish)}.'
    )
    t.say(f'"Then {friend.I} will tell {fish.you} about the world," said {t.n(friend)}.')
    t.say(
        f"every {t.either('day', 'evening', 'morning')}, {t.n(friend)} sat by the water and "
        f"{t.either('told a story', 'sang a song', 'told a new story', 'talked about the world')}.",
        (friend, "helped", fish),
    )
    if t.chance(0.6):
        t.remark(
            f"{t.n(fish)} jumped high out of the water for joy.",
            f"{t.n(fish)} listened and dreamed.",
        )
    glad = t.say(f"now {t.n(fish)} was not {feeling} any more.", (fish, "feels", f"not {feeling}"))
    t.because(
        glad - 1,
        glad,
        f"Why was {fish.the} not {feeling} any more?",
        f"{friend.the} came to the pond",
    )
    both = t.group(fish, friend)
    t.say(
        f"{t.s(both)} {t.either('became the best of friends', 'were very good friends')}.",
        (fish, "friend of", friend),
    )
    if t.chance(0.5):
        t.remark(
            "the moon shone on the quiet pond.",
            "the stars came out over the pond.",
            "the sun went down behind the hill.",
        )


_WORLD = ("forest", "big world", "mountains", "sea", "village", "stars")


def sick_friend(t: Teller) -> None:
    """A friend stays in bed; a visit and a gift make the day better."""
    friend = t.hero()
    hero = t.child(friend) if friend.animal is None else t.animal(friend)
    opening(t, hero)
    t.say(
        f"{t.p(hero)} best friend was {t.a(friend)}.",
        (hero, "friend of", friend),
        (friend, "is a", friend.noun),
    )
    absent = t.say(f"{t.when()}{t.n(friend)} did not come to play.")
    ill, what = t.pick(
        (("had a cold", "cold"), ("had a sore leg", "sore leg"), ("had a fever", "fever"))
    )
    sick = t.say(
        f"{t.n(friend)} {ill} and had to stay in bed.",
        (friend, "at", lx.BED),
        (friend, "had", what),
    )
    t.because(sick, absent, f"Why did {friend.the} not come to play?", f"{friend.the} {ill}")
    feeling = t.either("worried", "sad")
    worried = t.say(f"{t.n(hero)} was {feeling}.", (hero, "feels", feeling))
    t.because(sick, worried, f"Why was {hero.the} {feeling}?", f"{friend.the} {ill}")
    kind = t.either("flowers", "berries", "soup", "story", "song")
    if kind in ("flowers", "berries"):
        where = t.either(lx.MEADOW, lx.GARDEN, lx.FOREST, lx.HILL)
        gifts = t.plural(
            kind,
            t.pick(("red", "blue", "sweet") if kind == "berries" else ("red", "yellow", "white")),
        )
        t.say(
            f"{t.s(hero)} picked {t.a(gifts)} {where.at}.",
            (hero, "has", gifts),
            (hero, "at", where),
        )
        t.say(
            f"then {t.s(hero)} brought {t.o(gifts)} to {t.n(friend)}.", *gave(hero, gifts, friend)
        )
    elif kind == "soup" and hero.animal is None:
        t.say(f"{t.s(hero)} made a big pot of soup.", (hero, "made", "soup"), (hero, "has", "soup"))
        t.say(f"then {t.s(hero)} brought the soup to {t.n(friend)}.", *gave(hero, "soup", friend))
        t.say(f"{t.n(friend)} ate the hot soup.", (friend, "ate", "soup"))
    else:
        t.say(f"{t.s(hero)} went to see {t.n(friend)}.", (hero, "visited", friend))
        if kind == "song":
            t.say(
                f"{t.s(hero)} sang a {t.either('funny', 'soft', 'little')} song for {t.n(friend)}.",
                (hero, "did", "sang"),
            )
        else:
            t.say(
                f"{t.s(hero)} told {t.n(friend)} a story about {article(t.pick(_TALES))}.",
                (hero, "told", "story"),
            )
    call = f", {t.call(hero)}" if hero.the == hero.name else ""
    glad = t.say(
        f'"Now {friend.I} feel better{call}," said {t.n(friend)}.', (friend, "feels", "better")
    )
    t.because(glad - 1, glad, f"Why did {friend.the} feel better?", f"{hero.the} came to visit")
    later = t.either("after two days", "after three days", "a week later")
    t.say(
        f"{later}, {t.n(friend)} was well, and {t.n(hero)} was happy.",
        (friend, "feels", "well"),
        (hero, "feels", "happy"),
    )
    both = t.group(hero, friend)
    place = t.pick(lx.OUTDOORS)
    t.say(
        f"{t.n(both)} {t.either('played', 'met')} {place.at} and {fun(t, place, both)}.",
        (both, "at", place),
    )
    ending(t, hero, friend, both, new=False)


_TALES = (
    "dragon",
    "sleepy giant",
    "flying fish",
    "magic shoe",
    "talking tree",
    "brave mouse",
    "king",
    "silver moon",
)

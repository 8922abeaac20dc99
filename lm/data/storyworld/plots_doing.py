"""Plots about doing: rescuing, baking, growing, building."""

from __future__ import annotations

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.scenes import arrive, ending, fun, gave, go, opening, thank
from lm.data.storyworld.teller import Teller, article

_STUCK = (
    (lx.CAT, "in the tree", "climbed up a tall tree", "ladder"),
    (lx.SQUIRREL, "on the roof", "climbed up to the roof", "ladder"),
    (lx.PIG, "in the mud", "walked into the deep mud", "rope"),
    (lx.LAMB, "in the mud", "jumped into the deep mud", "rope"),
    (lx.GOAT, "on a high rock", "climbed up a high rock", "rope"),
    (lx.DOG, "in a hole", "fell into a deep hole", "rope"),
    (lx.RABBIT, "under the fence", "crawled under the fence", "stick"),
    (lx.HEDGEHOG, "in a bucket", "fell into a bucket", "stick"),
)
_PULL = {
    "ladder": "climbed up the ladder and carried {0} down",
    "rope": "pulled {0} out with the rope",
    "stick": "made a way out for {0} with the stick",
}


def stuck(t: Teller) -> None:
    """An animal is stuck; one helper is not enough, two and a tool are."""
    hero = t.child()
    kind, where, how, tool_name = t.pick(_STUCK)
    animal = t.animal(hero, (kind,))
    helper = t.adult("farmer", "gardener", "Mom", "Dad", "Grandpa", "teacher")
    opening(t, hero)
    first = t.say(f"{t.when()}{t.a(animal)} {how}.", (animal, "is a", animal.noun))
    up = "get down" if tool_name == "ladder" or "rock" in where else "get out"
    fixed = t.say(
        f"now {t.s(animal)} was stuck {where} and could not {up}.",
        (animal, "at", where),
        (animal, "is", "stuck"),
    )
    t.because(first, fixed, f"Why was {animal.the} stuck?", f"{animal.the} {how}")
    t.say(f'"Help, help!" cried {t.n(animal)}.')
    heard = t.say(
        f"{t.n(hero)} heard {t.o(animal)} and came {t.either('at once', 'fast', 'to look')}.",
        (hero, "saw", animal),
    )
    if t.chance(0.6):
        reason = {"ladder": "too small", "rope": "not strong enough", "stick": "not strong enough"}[
            tool_name
        ]
        t.say(f"{t.n(hero)} tried to help, but {t.he(hero)} was {reason}.", (hero, "did", "tried"))
    t.say(
        f"so {t.n(hero)} ran to {t.a(helper) if not helper.noun else 'get ' + t.a(helper)}.",
        (hero, "did", "ran"),
    )
    tool = t.thing(tool_name, "long", "old", "strong")
    t.say(f"{t.n(helper)} {t.either('brought', 'came with')} {t.a(tool)}.", (helper, "has", tool))
    saved = t.say(f"{t.s(helper)} {_PULL[tool_name].format(t.n(animal))}.", (animal, "is", "free"))
    t.because(
        heard, saved, f"Why did {helper.the} come with {tool.a}?", f"{animal.the} was stuck {where}"
    )
    glad = t.say(
        f"{t.n(animal)} was {t.either('free', 'safe')} and {t.either('very happy', 'happy')}.",
        (animal, "feels", "happy"),
    )
    t.because(saved, glad, f"Why was {animal.the} happy?", f"{helper.the} helped {animal.the}")
    if t.chance(0.6):
        thank(t, animal, hero)
    if t.chance(0.5):
        t.say(f"{t.n(hero)} gave {t.n(animal)} some {kind.food}.", *gave(hero, kind.food, animal))
    if t.chance(0.6):
        t.say(f"after that, {t.n(animal)} was more careful.")
    ending(t, hero, animal)


_BAKES = (
    ("cake", "eggs"),
    ("pie", "apples"),
    ("bread", "flour"),
    ("cake", "milk"),
    ("pie", "berries"),
    ("soup", "carrots"),
)


def baking(t: Teller) -> None:
    """Something is to be cooked, something is missing, someone has it."""
    hero = t.child()
    adult = t.adult("Grandma", "Grandpa", "Mom", "Dad")
    friend = t.child(hero)
    dish, missing = t.pick(_BAKES)
    opening(t, hero)
    both = t.group(hero, adult)
    t.say(
        f"{t.when()}{t.n(both)} wanted to make {_some(dish)} for {t.n(friend)}.",
        (both, "wants", dish),
    )
    if t.chance(0.6):
        t.say(f"that day was {t.n(friend)}'s birthday.")
    none = t.say(f'"{both.We} have no {missing}," said {t.n(adult)}.')
    source, place = _SOURCES[missing]
    out = t.say(
        f"so {t.n(hero)} went {place.to} {t.either('with a basket', 'at once', 'with a bag')}.",
        (hero, "at", place),
    )
    were = "were" if missing[-1] == "s" else "was"
    t.because(none, out, f"Why did {hero.the} go {place.to}?", f"there {were} no {missing}")
    if source in ("hen", "cow"):
        animal = t.animal(hero, (lx.HEN,), named=0.3) if source == "hen" else None
        giver = t.a(animal) if animal else "a kind brown cow"
        t.say(f"there {giver} gave {t.n(hero)} {_fresh(missing)}.", (hero, "has", missing))
    elif source == "baker":
        t.say(f"the baker gave {t.n(hero)} a bag of {missing}.", (hero, "has", missing))
    else:
        t.say(f"there {t.s(hero)} picked {_fresh(missing)}.", (hero, "has", missing))
    t.say(f"then {t.n(hero)} ran home.", (hero, "at", lx.HOME))
    verb = "cooked" if dish == "soup" else "baked"
    t.say(f"{t.n(both)} {verb} {_some(dish, True)}.", (both, "made", dish), (hero, "has", dish))
    if t.chance(0.7):
        t.remark("the kitchen smelled good.", "the whole house smelled good.")
    t.say(
        f"{t.n(hero)} {t.either('took', 'brought')} the {dish} to {t.n(friend)}.",
        *gave(hero, dish, friend),
    )
    if t.chance(0.5):
        wow = t.either("How lovely", "What a surprise", "Thank " + hero.you)
        t.say(f'"{wow}!" said {t.n(friend)}.')
    glad = t.say(
        f"{t.n(friend)} was {t.either('happy', 'very happy')}.", (friend, "feels", "happy")
    )
    t.because(glad - 1, glad, f"Why was {friend.the} happy?", f"{hero.the} came with the {dish}")
    pair = t.group(hero, friend)
    t.say(f"{t.s(pair)} ate the {dish} together.", (pair, "ate", dish))
    if t.chance(0.4):
        ending(t, hero, friend, pair, new=False)


_SOURCES = {
    "eggs": ("hen", lx.FARM),
    "milk": ("cow", lx.FARM),
    "apples": ("tree", lx.GARDEN),
    "carrots": ("bed", lx.GARDEN),
    "berries": ("bush", lx.FOREST),
    "flour": ("baker", lx.MARKET),
}


def _some(dish: str, adjective: bool = False) -> str:
    if dish in ("bread", "soup"):
        return "some " + dish
    return ("a big " if adjective else "a ") + dish


def _fresh(food: str) -> str:
    return {
        "eggs": "four white eggs",
        "milk": "some fresh milk",
        "apples": "six red apples",
        "carrots": "five carrots",
        "berries": "a lot of berries",
    }[food]


def seed(t: Teller) -> None:
    """A seed is planted, watered and waited for, and at last it grows."""
    hero = t.child()
    elder = t.adult("Grandma", "Grandpa", "Mom", "Dad", "gardener")
    plant = t.pick(_PLANTS)
    opening(t, hero)
    grain = t.thing("seed", "little", "brown", "tiny", "round")
    t.say(f"{t.when()}{t.a(elder)} gave {t.n(hero)} {t.a(grain)}.", (hero, "has", grain))
    where = t.either("in the garden", "in the soft earth", "next to the house")
    daily = t.either("day", "morning", "evening")
    t.say(f"{t.n(hero)} planted {t.o(grain)} {where}.", (grain, "at", where))
    t.say(f"every {daily}, {t.n(hero)} gave {t.n(grain)} some water.", (hero, "did", "watered"))
    slow = t.remark(
        "but nothing grew.", "but there was only brown earth.", "days went by, and nothing grew."
    )
    feeling = t.either("sad", "worried")
    sad = t.say(f"{t.n(hero)} was {feeling}.", (hero, "feels", feeling))
    t.because(slow, sad, f"Why was {hero.the} {feeling}?", "nothing grew")
    advice = t.either(f"{hero.You} have to wait", "Good things need time", "Just wait and see")
    t.say(f'"{advice}," said {t.n(elder)}.')
    if t.chance(0.6):
        t.remark("then the rain fell, and the sun was warm.", "the rain came, and then the sun.")
    t.say(
        f"{t.either('one morning', 'after two weeks', 'at last')}, {t.n(hero)} saw a green leaf.",
        (hero, "saw", "leaf"),
    )
    grew = t.say(f"the leaf grew and grew and became {article(plant)}.", ("leaf", "became", plant))
    feeling = t.either("proud", "happy")
    glad = t.say(f"{t.n(hero)} was {feeling}.", (hero, "feels", feeling))
    t.because(grew, glad, f"Why was {hero.the} {feeling}?", f"the seed became {article(plant)}")
    roll = t.random()
    if roll < 0.35:
        visitor = t.animal(
            hero, (lx.BIRD, lx.MOUSE, lx.HEDGEHOG, lx.RABBIT, lx.SQUIRREL), named=0.3
        )
        t.say(
            f"{t.a(visitor)} came to look at the {plant.rpartition(' ')[2]}.",
            (visitor, "is a", visitor.noun),
        )
    elif roll < 0.7:
        t.say(f'"{t.either("Come and look", "Look at that", "How beautiful")}!" said {t.n(hero)}.')
    hero.loc = lx.HOME
    ending(t, hero)


_PLANTS = ("tall sunflower", "red rose", "big pumpkin", "tall tree", "yellow tulip", "white lily")

_BUILDS = (
    ("sandcastle", lx.BEACH, "a big wave", "washed {0} away", ("sand", "shells", "stones")),
    ("tower", lx.GARDEN, "the wind", "blew {0} over", ("stones", "boxes", "blocks")),
    ("snowman", lx.PARK, "the warm sun", "melted {0}", ("snow", "a carrot", "an old hat")),
    ("raft", lx.RIVER, "the water", "carried {0} away", ("logs", "rope", "branches")),
    ("hut", lx.FOREST, "the wind", "blew {0} down", ("branches", "leaves", "rope")),
    ("dam", lx.RIVER, "the water", "broke {0}", ("stones", "mud", "branches")),
)


def build(t: Teller) -> None:
    """Something is built and broken by wind or wave; two build it better."""
    hero = t.child()
    friend = t.child(hero)
    what, place, force, deed, parts = t.pick(_BUILDS)
    if what != "snowman":
        opening(t, hero)
    else:
        t.remark(
            "snow fell all night.",
            "winter was here, and the world was white.",
            "the park was full of snow.",
        )
        t.dated = True
    go(t, hero, place)
    work = t.thing(what, "big", "fine", "tall") if what != "dam" else t.thing(what, "big", "strong")
    one, two = (parts[0], parts[1]) if t.chance(0.5) else (parts[0], parts[2])
    t.say(
        f"{t.s(hero)} made {t.a(work)} of {one} and {two}.",
        (hero, "made", work),
        (work, "at", place),
    )
    proud = t.say(f"{t.s(hero)} was proud of {t.o(work)}.", (hero, "feels", "proud"))
    t.because(proud - 1, proud, f"Why was {hero.the} proud?", f"{hero.the} made {work.a}")
    if what == "snowman":
        t.say("the next day was warm.")
    broke = t.say(
        f"{t.either('then', 'but then', 'suddenly')} {force} came and {deed.format(t.n(work))}.",
        (work, "is", "gone"),
    )
    feeling = t.either("sad", "angry", "very sad")
    sad = t.say(f"{t.n(hero)} was {feeling}.", (hero, "feels", feeling.removeprefix("very ")))
    t.because(broke, sad, f"Why was {hero.the} {feeling}?", f"{force} {deed.format('the ' + what)}")
    both = t.group(hero, friend)
    if what == "snowman":
        again = f"Next winter {both.we} will make a new one"
    else:
        again = t.either(f"{both.We} can make a new one", f"Let {both.us} make a bigger one")
    arrive(t, friend, hero, place)
    t.say(f'"{again}," said {t.n(friend)}.', (friend, "helped", hero))
    if what == "snowman":
        worked = t.say(f"{t.s(both)} {(act := fun(t, place, both))}.", (both, "did", act))
    else:
        worked = t.say(
            f"{t.s(both)} worked {t.either('all afternoon', 'for a long time', 'side by side')}.",
            (both, "did", "worked"),
        )
        better = t.either("bigger", "better", "stronger")
        t.say(f"the new {what} was even {better}.", (work, "at", place), (work, "is", better))
    feeling = t.either("happy", "glad")
    glad = t.say(f"{t.n(hero)} was {feeling} again.", (hero, "feels", feeling))
    t.because(
        worked, glad, f"Why was {hero.the} {feeling} again?", f"{friend.the} helped {hero.the}"
    )
    ending(t, hero, friend, both)

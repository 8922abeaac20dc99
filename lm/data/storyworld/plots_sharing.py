"""Plots about giving: sharing, trading, buying, visiting, writing letters, opening the door."""

from __future__ import annotations

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.scenes import arrive, ending, fun, gave, go, opening, thank
from lm.data.storyworld.teller import Teller, article

_NO_FOOD = (
    "had eaten no breakfast",
    "had forgotten to eat lunch",
    "had walked for a long time",
    "had played all morning",
    "had no food at home",
)


def share_food(t: Teller) -> None:
    """One who has several shares with one who is hungry, and counts what is left."""
    hero = t.hero()
    friend = t.hero(hero)
    place = t.pick(lx.OUTDOORS)
    noun, adjectives = t.pick(lx.FRUIT)
    if noun in t.taken:
        noun, adjectives = "plum", ("purple", "ripe")
    number = 2 + int(t.random() * 5)
    given = 1 if number == 2 or t.chance(0.6) else 2
    opening(t, hero)
    bag = t.either("bag", "basket")
    fruit = t.plural(noun + "s", t.pick(adjectives))
    t.say(
        f"{t.s(hero)} had {lx.NUMBERS[number]} {t.a(fruit)} in {t.his(hero)} {bag}.",
        (hero, "has", fruit),
        (fruit, "count", lx.NUMBERS[number]),
    )
    go(t, hero, place)
    arrive(t, friend, hero, place)
    why = t.pick(_NO_FOOD)
    if t.chance(0.5):
        hungry = t.say(
            f"{t.s(friend)} was hungry because {t.he(friend)} {why}.", (friend, "feels", "hungry")
        )
        reason = hungry
    else:
        reason = t.say(f"{t.s(friend)} {why}.")
        hungry = t.say(
            f"now {t.s(friend)} was {t.either('very', 'so')} hungry.", (friend, "feels", "hungry")
        )
    t.because(reason, hungry, f"Why was {friend.the} hungry?", f"{friend.the} {why}")
    one = article(noun) if given == 1 else f"two {noun}s"
    if t.chance(0.6):
        t.say(f'"Would {friend.you} like {one}?" asked {t.n(hero)}.')
        if t.chance(0.6):
            t.say(f'"Yes, please," said {t.n(friend)}.')
    act = t.say(f"{t.n(hero)} gave {t.n(friend)} {one}.", *gave(hero, one, friend))
    t.because(
        hungry, act, f"Why did {hero.the} give {friend.the} {one}?", f"{friend.the} was hungry"
    )
    left = number - given
    noun_left = noun if left == 1 else noun + "s"
    t.say(
        f"now {t.n(hero)} had {lx.NUMBERS[left]} {noun_left} left.",
        (fruit, "count", lx.NUMBERS[left]),
    )
    feeling = t.either("happy", "full")
    the = f"the {noun}" if given == 1 else f"the two {noun}s"
    t.say(
        f"{t.n(friend)} ate {the} and was {feeling}.",
        (friend, "ate", one),
        (friend, "feels", feeling),
    )
    if len(t.sentences) < 14 and t.chance(0.7):
        thank(t, friend, hero)
    ending(t, hero, friend)


def trade(t: Teller) -> None:
    """Two friends each want what the other has, and trade."""
    hero = t.hero()
    friend = t.animal(hero) if hero.animal else t.child(hero)
    place = t.pick(lx.OUTDOORS)
    mine = _thing_for(t, hero)
    yours = _thing_for(t, friend)
    opening(t, hero)
    t.say(f"{t.s(hero)} had {t.a(mine)}.", (hero, "has", mine), (hero, "owns", mine))
    t.say(
        f"{t.a(friend)} had {t.a(yours)}.",
        (friend, "has", yours),
        (friend, "owns", yours),
        (friend, "is a", friend.noun),
    )
    both = t.group(hero, friend)
    t.say(f"{t.when()}{t.n(both)} met {place.at}.", (both, "at", place))
    t.say(f"{t.n(hero)} looked at {t.n(yours)}.", (hero, "wants", yours))
    if t.chance(0.6):
        nice = t.either("nice", "fine", "lovely")
        t.say(f'"What a {nice} {t.bare(yours)} {friend.you} have," said {t.n(hero)}.')
    t.say(
        f'"{friend.I} like {hero.your} {t.bare(mine)}, too," said {t.n(friend)}.',
        (friend, "likes", mine),
    )
    t.say(f'"Let {both.us} trade!" said {t.n(hero)}.')
    t.say(
        f"so {t.n(hero)} gave {t.n(mine)} to {t.n(friend)}, "
        f"and {t.n(friend)} gave {t.n(yours)} to {t.n(hero)}.",
        *gave(hero, mine, friend),
        (friend, "owns", mine),
        *gave(friend, yours, hero),
        (hero, "owns", yours),
    )
    t.say(
        f"now {t.n(hero)} had {t.n(yours)}, and {t.n(friend)} had {t.n(mine)}.",
        (hero, "has", yours),
        (friend, "has", mine),
    )
    t.say(f"{t.s(both)} were both happy.", (both, "feels", "happy"))
    ending(t, hero, friend, both)


def _thing_for(t: Teller, owner):
    while True:
        if owner.animal is None:
            thing = t.pick(lx.TOYS)
        else:
            thing = lx.THINGS[
                t.either(*owner.animal.treasures, "stone", "shell", "leaf", "feather")
            ]
        if thing.noun not in t.taken:
            return t.thing(thing)


_GOODS = (
    ("bread", "some bread"),
    ("cheese", "some cheese"),
    ("honey", "a jar of honey"),
    ("cake", "a small cake"),
    ("melon", "a green melon"),
    ("flowers", "some flowers"),
    ("ribbon", "a red ribbon"),
)


def market(t: Teller) -> None:
    """A child buys something at the market, counts the coins and brings it to somebody."""
    hero = t.child()
    giver = t.adult("Mom", "Dad", "Grandma", "Grandpa")
    number = 3 + int(t.random() * 4)
    price = 1 + int(t.random() * (number - 2))
    good, some = t.pick(_GOODS)
    opening(t, hero)
    coins = t.plural("coins", t.either("golden", "silver", "shiny"))
    t.say(
        f"{t.when()}{t.n(giver)} gave {t.n(hero)} {lx.NUMBERS[number]} {t.a(coins)}.",
        (hero, "has", coins),
        (coins, "count", lx.NUMBERS[number]),
    )
    asked = t.say(f'"Please buy {some} for {giver.me}," said {t.n(giver)}.', (giver, "wants", some))
    t.say(
        f"{t.n(hero)} {t.either('went', 'walked', 'ran')} {lx.MARKET.to}.", (hero, "at", lx.MARKET)
    )
    if t.chance(0.7):
        t.remark(*_STALLS)
    seller = t.adult("baker", "farmer", "old man", "old woman", "seller")
    cost = f"{lx.NUMBERS[price]} coin" + ("s" if price > 1 else "")
    much = "are these" if good == "flowers" else "is this"
    t.say(f'"How much {much} {good}?" asked {t.n(hero)}.')
    t.say(f'"Just {cost}," said {t.a(seller)}.')
    t.say(f"{t.n(hero)} paid and took the {good}.", (hero, "has", good))
    left = number - price
    t.say(
        f"now {t.s(hero)} had {lx.NUMBERS[left]} coin{'s' if left > 1 else ''} left.",
        (coins, "count", lx.NUMBERS[left]),
    )
    t.say(f"{t.s(hero)} {t.either('went', 'walked', 'ran')} home.", (hero, "at", lx.HOME))
    given = t.say(f"{t.s(hero)} gave the {good} to {t.n(giver)}.", *gave(hero, good, giver))
    why = f"Why did {hero.the} give the {good} to {giver.the}?"
    t.because(asked, given, why, f"{giver.the} wanted {some}")
    if good not in ("flowers", "ribbon"):
        both = t.group(hero, giver)
        t.say(f"{t.s(both)} ate the {good} for {t.either('lunch', 'supper')}.", (both, "ate", good))
    else:
        t.say(f'"How pretty!" said {t.n(giver)}.')
    ending(t, hero)


_STALLS = (
    "the market was busy and loud.",
    "there were apples, eggs and big yellow pumpkins.",
    "all the people were talking and laughing.",
)


def basket(t: Teller) -> None:
    """A child carries a basket to a grandparent and meets somebody on the way."""
    hero = t.child()
    elder = t.adult("Grandma", "Grandpa")
    animal = t.animal(hero, (lx.FOX, lx.RABBIT, lx.BEAR, lx.SQUIRREL, lx.HEDGEHOG, lx.GOAT, lx.DOG))
    through, place = t.either(("forest", lx.FOREST), ("meadow", lx.MEADOW))
    food, rest = t.pick(
        (("bread", "soup"), ("apples", "cake"), ("berries", "cheese"), ("nuts", "honey"))
    )
    opening(t, hero)
    if t.chance(0.7):
        ill = t.say(
            f"{t.n(elder)} was {t.either('ill', 'ill in bed', 'not well')}.",
            (elder, "feels", "ill"),
        )
        t.say(f"{t.when()}{t.n(hero)} wanted to visit {t.n(elder)}.", (hero, "wants", elder))
        t.because(
            ill,
            ill + 1,
            f"Why did {hero.the} want to visit {elder.the}?",
            f"{elder.the} was not well",
        )
    else:
        t.say(f"{t.when()}{t.n(hero)} wanted to visit {t.n(elder)}.", (hero, "wants", elder))
    t.say(f"{t.s(hero)} put {food} and {rest} into a basket.", (hero, "has", "basket"))
    t.say(f"the path went through the {through}.")
    t.say(
        f"in the {through}, {t.n(hero)} met {t.a(animal)}.",
        (hero, "at", place),
        (animal, "at", place),
        (animal, "is a", animal.noun),
    )
    call = f", little {t.bare(hero)}" if t.chance(0.5) else ""
    t.say(f'"What is in {hero.your} basket{call}?" asked {t.n(animal)}.')
    t.say(f'"{food.capitalize()} and {rest} for {t.n(elder)}," said {t.n(hero)}.')
    hungry = t.say(f'"{animal.I} am so hungry," said {t.n(animal)}.', (animal, "feels", "hungry"))
    given = t.say(f"{t.n(hero)} gave {t.n(animal)} some {food}.", *gave(hero, food, animal))
    t.because(
        hungry,
        given,
        f"Why did {hero.the} give {animal.the} some {food}?",
        f"{animal.the} was hungry",
    )
    t.say(
        f"{t.n(animal)} ate the {food} and was happy.",
        (animal, "ate", food),
        (animal, "feels", "happy"),
    )
    if len(t.sentences) < 12 and t.chance(0.5):
        thank(t, animal, hero)
        if t.chance(0.5):
            t.say(f"then {t.n(animal)} showed {t.n(hero)} a short way.", (animal, "helped", hero))
    t.say(
        f"{t.either('soon', 'at last')} {t.n(hero)} came to the house of {t.n(elder)}.",
        (hero, "at", "house"),
    )
    glad = t.say(f"{t.n(elder)} was happy to see {t.n(hero)}.", (elder, "feels", "happy"))
    t.because(glad - 1, glad, f"Why was {elder.the} happy?", f"{hero.the} came to visit")
    both = t.group(hero, elder)
    t.say(f"{t.s(both)} ate the {rest} together.", (both, "ate", rest))
    if t.chance(0.5) and len(t.sentences) < 15:
        t.say(f"in the evening, {t.n(hero)} went home.", (hero, "at", lx.HOME))


def letter(t: Teller) -> None:
    """A letter travels with a bird to a friend who lives far away, and an answer comes back."""
    hero = t.child()
    friend = t.child(hero)
    bird = t.animal(hero, (lx.BIRD, lx.OWL, lx.DUCK), named=0.5)
    far = t.pick(
        ("by the sea", "behind the hills", "in a big town", "on an island", "near the mountains")
    )
    opening(t, hero)
    t.say(
        f"{t.p(hero)} friend {t.n(friend)} lived far away {far}.",
        (friend, "lives", far),
        (hero, "friend of", friend),
    )
    feeling = t.either("sad", "lonely")
    lonely = t.say(f"{t.n(hero)} missed {t.n(friend)} and was {feeling}.", (hero, "feels", feeling))
    note = t.thing("letter", "long", "short", "nice")
    wrote = t.say(
        f"so {t.n(hero)} wrote {t.a(note)} to {t.n(friend)}.",
        (hero, "wrote", note),
        (hero, "has", note),
    )
    t.because(
        lonely, wrote, f"Why did {hero.the} write a letter?", f"{hero.the} missed {friend.the}"
    )
    t.say(f'"Who will take {t.o(note)} to {t.n(friend)}?" asked {t.n(hero)}.')
    t.say(f'"{bird.I} will," said {t.a(bird)}.', (bird, "is a", bird.noun))
    t.say(f"{t.n(hero)} gave {t.n(note)} to {t.n(bird)}.", *gave(hero, note, bird))
    woods, water = t.either("trees", "forest", "fields"), t.either("river", "hills", "lake")
    t.say(f"{t.n(bird)} flew over the {woods} and the {water}.")
    if t.chance(0.5):
        t.remark(
            "the way was long, and the wind was strong.",
            "the sun went down, and the stars came out.",
        )
    later = t.either("at last", "after two days", "the next day")
    t.say(f"{later}, {t.n(bird)} gave {t.n(note)} to {t.n(friend)}.", *gave(bird, note, friend))
    glad = t.say(f"{t.n(friend)} read {t.o(note)} and was very happy.", (friend, "feels", "happy"))
    t.because(wrote, glad, f"Why was {friend.the} happy?", f"{hero.the} wrote a letter")
    if t.chance(0.6):
        t.say(f'"Dear {t.n(hero)}, please come and visit {friend.me}," wrote {t.n(friend)}.')
        t.say(
            f"{t.either('the next week', 'in spring', 'in summer')}, {t.n(hero)} went there.",
            (hero, "at", far),
        )
        both = t.group(hero, friend)
        t.say(
            f"{t.s(both)} {t.either('played', 'laughed', 'sang')} all day and were happy.",
            (both, "feels", "happy"),
        )
    else:
        gift = t.either("drawing", "shell", "card", "photo")
        t.say(f"{t.s(friend)} sent a {gift} back to {t.n(hero)}.")
        t.say(f"{t.n(hero)} was not {feeling} any more.", (hero, "feels", f"not {feeling}"))


def shelter(t: Teller) -> None:
    """Rain or snow catches the hero outside; someone opens the door."""
    hero = t.hero()
    host = t.animal(hero, (lx.MOUSE, lx.RABBIT, lx.BEAR, lx.FOX, lx.SQUIRREL, lx.HEN, lx.HEDGEHOG))
    place = t.either(lx.FOREST, lx.HILL, lx.MEADOW, lx.RIVER, lx.FARM)
    wet = t.chance(0.7)
    if not wet:
        t.remark(*_WINTER)
        t.dated = True
    opening(t, hero, fair=wet)
    go(t, hero, place)
    if wet and t.chance(0.5):
        t.say(f"{t.s(hero)} {(act := fun(t, place, hero))}.", (hero, "did", act))
    t.remark(*_DARK)
    what = "rain" if wet else "snow"
    fell = t.say(
        t.either(f"then the {what} began to fall.", f"soon the {what} fell and fell."),
        (what, "did", "fell"),
    )
    feeling = "wet and cold" if wet else "cold"
    cold = t.say(f"{t.n(hero)} was {feeling}.", (hero, "feels", "cold"))
    t.because(fell, cold, f"Why was {hero.the} {feeling}?", f"the {what} fell")
    house = t.pick(
        (
            "a little house",
            "a small door under a tree",
            "a light between the trees",
            "a warm little hut",
        )
    )
    t.say(f"then {t.s(hero)} saw {house}.", (hero, "saw", house))
    act = "followed the light and came to a door" if "light" in house else "knocked at the door"
    t.say(f"{t.s(hero)} {act}.", (hero, "did", act))
    t.say(f"{t.a(host)} opened the door.", (host, "is a", host.noun))
    t.say(f'"Come in, {hero.you} poor {t.bare(hero)}," said {t.n(host)}.')
    drink = t.either("warm milk", "hot soup", "sweet tea", "hot tea", "bread and honey")
    verb = "ate" if drink.startswith("bread") else "drank"
    given = t.say(f"{t.n(host)} gave {t.n(hero)} {drink}.", *gave(host, drink, hero))
    t.because(cold, given, f"Why did {host.the} give {hero.the} {drink}?", f"{hero.the} was cold")
    t.say(
        f"{t.n(hero)} sat by the fire and {verb} the {drink}.",
        (hero, "at", "by the fire"),
        (hero, "ate", drink),
    )
    t.say(
        f"soon {t.s(hero)} was {t.either('warm', 'warm again', 'warm and happy')}.",
        (hero, "feels", "warm"),
    )
    if wet and t.chance(0.7):
        t.say("then the rain stopped, and there was a rainbow.", ("rain", "did", "stopped"))
    elif not wet:
        t.say("then the snow stopped, and the world was white.", ("snow", "did", "stopped"))
    if len(t.sentences) < 14:
        if t.chance(0.6):
            thank(t, hero, host)
        if t.chance(0.5):
            t.say(
                f"{t.n(hero)} and {t.n(host)} were friends from that day on.",
                (hero, "friend of", host),
            )
        if t.chance(0.7) and len(t.sentences) < 16:
            t.say(f"then {t.n(hero)} {t.either('went', 'walked')} home.", (hero, "at", lx.HOME))


_WINTER = ("winter was here.", "the winter was long and cold.", "the winter day was short.")
_DARK = (
    "dark clouds came over the hill.",
    "the sky grew dark.",
    "a cold wind began to blow.",
    "big grey clouds hid the sun.",
)

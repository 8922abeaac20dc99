"""What exists in the story world: places, animals, things, names. Data only, no behaviour.

The tables carry the regularities a model can learn: dogs run in the park, fish stay in the pond,
hens lay eggs, a kite is lost to the wind and a ball rolls away.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Somewhere a character can be: `at` and `to` are its phrases, `spots` are places in it."""

    name: str
    at: str
    to: str
    spots: tuple[str, ...] = ()
    fun: tuple[str, ...] = ()


class Thing(NamedTuple):
    """Something that can be held: how one plays with it (%s is the thing) and how it gets lost."""

    noun: str
    adjectives: tuple[str, ...]
    play: str
    loss: str


class Animal(NamedTuple):
    """A kind of animal: where it lives, how it moves, what it eats, holds dear and always does.

    `pronoun` is set where every one of the kind is female.
    """

    noun: str
    home: str
    went: str
    food: str
    treasures: tuple[str, ...]
    habits: tuple[str, ...]
    pronoun: str = ""


HOME = Place("home", "at home", "home")
PARK = Place(
    "park",
    "in the park",
    "to the park",
    ("under a bench", "behind a big tree", "in the tall grass", "next to the slide"),
    (
        "played on the swings",
        "went down the slide",
        "ran around the big tree",
        "sat under the big tree",
    ),
)
GARDEN = Place(
    "garden",
    "in the garden",
    "to the garden",
    ("under the roses", "behind the wall", "between the cabbages", "next to the gate"),
    ("looked for snails", "watched the bees", "smelled the roses", "looked at the butterflies"),
)
FOREST = Place(
    "forest",
    "in the forest",
    "to the forest",
    ("under a pile of leaves", "behind an old oak", "between two stones", "next to a mushroom"),
    (
        "looked for mushrooms",
        "jumped over the old logs",
        "listened to the wind",
        "sat under an oak",
    ),
)
BEACH = Place(
    "beach",
    "at the beach",
    "to the beach",
    ("behind a rock", "under a boat", "in the warm sand", "next to a shell"),
    (
        "dug a deep hole in the sand",
        "ran along the waves",
        "looked for shells",
        "looked at the sea",
    ),
)
RIVER = Place(
    "river",
    "by the river",
    "to the river",
    ("under the bridge", "behind a bush", "between the reeds", "next to a stone"),
    (
        "threw stones into the water",
        "walked over the bridge",
        "watched the boats",
        "looked at the water",
    ),
)
MEADOW = Place(
    "meadow",
    "in the meadow",
    "to the meadow",
    ("behind a bush", "in the long grass", "under the yellow flowers", "next to the fence"),
    ("picked flowers", "chased butterflies", "danced in the grass", "smelled the flowers"),
)
HILL = Place(
    "hill",
    "on the hill",
    "up the hill",
    ("behind a rock", "under a bush", "in the long grass", "next to the path"),
    ("picked berries", "rolled down the hill", "looked down at the village", "watched the clouds"),
)
FARM = Place(
    "farm",
    "at the farm",
    "to the farm",
    ("behind the barn", "under the cart", "in the hay", "next to the well"),
    ("counted the sheep", "climbed on the hay", "looked at the horses", "sat in the hay"),
)
POND = Place(
    "pond",
    "by the pond",
    "to the pond",
    ("behind a stone", "between the reeds", "under a bush", "next to the path"),
    (
        "threw stones into the water",
        "counted the ducks",
        "watched the clouds",
        "looked at the water lilies",
    ),
)
MARKET = Place("market", "at the market", "to the market")
KITCHEN = Place("kitchen", "in the kitchen", "into the kitchen")
BED = Place("bed", "in bed", "to bed")
OUTDOORS = (PARK, GARDEN, FOREST, BEACH, RIVER, MEADOW, HILL, FARM, POND)
ALL_PLACES = (*OUTDOORS, HOME, MARKET, KITCHEN, BED)

GIRLS = (
    "Mia",
    "Anna",
    "Lily",
    "Sara",
    "Rosa",
    "Emma",
    "Nora",
    "Zoe",
    "Ruby",
    "Maya",
    "Ivy",
    "Lucy",
)
BOYS = ("Tom", "Ben", "Sam", "Leo", "Tim", "Jack", "Finn", "Adam", "Noah", "Hugo", "Paul", "Eli")
ANIMAL_NAMES = {
    "she": ("Bella", "Coco", "Daisy", "Poppy", "Hazel", "Dot", "Molly", "Honey"),
    "he": ("Rex", "Bruno", "Pip", "Rusty", "Teddy", "Milo", "Otto", "Pepper"),
}
CHILD_TRAITS = ("kind", "brave", "quiet", "clever", "curious", "cheerful", "shy", "little", "young")
ANIMAL_TRAITS = ("little", "small", "young", "clever", "shy", "brave", "funny", "curious", "gentle")

_COLOURS = ("red", "blue", "green", "yellow", "white", "orange", "purple")
_SIZES = ("big", "small", "new", "old")
_BRIGHT = ("shiny", "golden", "little", "silver", "old")
TOYS = (
    Thing("ball", (*_COLOURS, *_SIZES), "kicked %s high into the air", "rolled away"),
    Thing("kite", (*_COLOURS, *_SIZES), "let %s fly in the wind", "flew away over the trees"),
    Thing("hat", (*_COLOURS, *_SIZES), "wore %s proudly", "blew away in the wind"),
    Thing("scarf", (*_COLOURS, "long", "warm"), "danced with %s", "blew away in the wind"),
    Thing("doll", ("small", "new", "old", "pretty"), "sang a song to %s", "was gone"),
    Thing("puppet", ("funny", "soft", "old"), "made %s dance", "was gone"),
    Thing("drum", (*_COLOURS, *_SIZES), "played %s loudly", "rolled away"),
    Thing("whistle", (*_BRIGHT, "wooden"), "blew %s three times", "was gone"),
    Thing("coin", _BRIGHT, "threw %s into the air", "rolled away"),
    Thing("bell", _BRIGHT, "rang %s again and again", "was gone"),
    Thing("top", (*_COLOURS, "wooden"), "made %s spin", "rolled away"),
    Thing("train", (*_COLOURS, "wooden", "little"), "pulled %s along the path", "was gone"),
    Thing("book", (*_COLOURS, "old", "thick"), "read %s under a tree", "was gone"),
    Thing(
        "feather", ("white", "blue", "long", "soft"), "waved %s in the air", "blew away in the wind"
    ),
)
TREASURES = {
    "ball": TOYS[0],
    "hat": TOYS[2],
    "scarf": TOYS[3],
    "bell": TOYS[9],
    "coin": TOYS[8],
    "drum": TOYS[6],
    "book": TOYS[12],
    "feather": TOYS[13],
    "bone": Thing("bone", ("big", "old", "white"), "played with %s", "was gone"),
    "stick": Thing("stick", ("long", "big", "old"), "ran around with %s", "was gone"),
    "nut": Thing("nut", ("big", "brown", "round"), "rolled %s around a tree", "rolled away"),
    "carrot": Thing("carrot", ("big", "orange", "long"), "hopped around %s", "was gone"),
    "cheese": Thing("cheese", ("round", "yellow", "big"), "danced around %s", "rolled away"),
    "stone": Thing(
        "stone", ("shiny", "round", "white", "smooth"), "rolled %s along the path", "rolled away"
    ),
    "shell": Thing("shell", ("pink", "white", "pretty"), "listened to %s", "rolled away"),
    "leaf": Thing("leaf", ("red", "golden", "big"), "made a roof with %s", "blew away in the wind"),
    "apple": Thing("apple", ("big", "red", "round"), "rolled %s along the path", "rolled away"),
}

CAT = Animal(
    "cat",
    "in a house by the park",
    "walked",
    "milk",
    ("ball", "bell", "feather"),
    (
        "sat on the mat",
        "slept by the fire",
        "looked out of the window",
        "played with a ball of wool",
    ),
)
DOG = Animal(
    "dog",
    "in a house by the park",
    "ran",
    "meat",
    ("bone", "stick", "ball"),
    ("ran in the park", "dug a hole in the garden", "chased a stick in the park"),
)
BIRD = Animal(
    "bird",
    "in a nest in the old oak",
    "flew",
    "seeds",
    ("feather", "coin", "bell"),
    ("sat in the tree and sang", "flew over the trees", "made a nest in the tree"),
)
RABBIT = Animal(
    "rabbit",
    "in a burrow under the hill",
    "hopped",
    "carrots",
    ("carrot", "ball", "scarf"),
    ("hopped across the meadow", "ate grass in the meadow", "dug a burrow under the hill"),
)
DUCK = Animal(
    "duck",
    "by the pond",
    "waddled",
    "bread",
    ("shell", "feather", "stone"),
    ("swam across the pond", "slept in the reeds", "splashed in the pond"),
)
FROG = Animal(
    "frog",
    "by the pond",
    "hopped",
    "flies",
    ("stone", "leaf", "shell"),
    ("sat on a lily in the pond", "jumped into the pond", "sang by the pond"),
)
MOUSE = Animal(
    "mouse",
    "in a hole in the barn",
    "ran",
    "cheese",
    ("cheese", "coin", "nut"),
    ("hid in the hay", "ran along the wall of the barn", "ate cheese in the barn"),
)
SQUIRREL = Animal(
    "squirrel",
    "in a tall tree",
    "ran",
    "nuts",
    ("nut", "leaf", "ball"),
    ("climbed up the tree", "jumped from tree to tree", "hid nuts under the tree"),
)
FOX = Animal(
    "fox",
    "in a den in the forest",
    "ran",
    "berries",
    ("hat", "stick", "scarf"),
    ("ran through the forest", "slept in a den in the forest", "ate berries in the forest"),
)
BEAR = Animal(
    "bear",
    "in a cave in the forest",
    "walked",
    "honey",
    ("hat", "drum", "scarf", "apple"),
    ("slept in the cave", "looked for honey in the forest", "walked through the forest"),
)
HEDGEHOG = Animal(
    "hedgehog",
    "under a pile of leaves in the garden",
    "walked",
    "apples",
    ("apple", "leaf", "ball"),
    ("slept under the leaves", "walked through the garden", "looked for apples"),
)
TURTLE = Animal(
    "turtle",
    "by the pond",
    "walked slowly",
    "leaves",
    ("shell", "stone", "leaf"),
    ("slept in the sun", "walked slowly around the pond", "ate leaves by the pond"),
)
GOAT = Animal(
    "goat",
    "at the farm",
    "trotted",
    "grass",
    ("bell", "hat", "stick"),
    ("ate grass on the hill", "climbed up the hill", "jumped over the rocks on the hill"),
)
PIG = Animal(
    "pig",
    "at the farm",
    "trotted",
    "corn",
    ("apple", "ball", "bell"),
    ("rolled in the mud", "slept in the mud", "ate corn at the farm"),
)
LAMB = Animal(
    "lamb",
    "at the farm",
    "trotted",
    "grass",
    ("bell", "scarf", "ball"),
    ("ate grass in the field", "jumped over the fence", "slept in the barn"),
)
HEN = Animal(
    "hen",
    "at the farm",
    "walked",
    "corn",
    ("feather", "hat"),
    ("laid an egg in the barn", "looked for corn in the yard", "slept in the barn"),
    "she",
)
OWL = Animal(
    "owl",
    "in the old oak",
    "flew",
    "berries",
    ("feather", "book"),
    ("sat in the old oak", "slept in the old oak"),
)
FISH = Animal(
    "fish",
    "in the pond",
    "swam",
    "flies",
    ("shell",),
    ("swam in the pond", "swam under the lilies in the pond", "slept at the bottom of the pond"),
)
# Animals that can be a hero: all that can go anywhere. The fish stays in the pond.
WALKERS = (
    *(CAT, DOG, BIRD, RABBIT, DUCK, FROG, MOUSE, SQUIRREL, FOX),
    *(BEAR, HEDGEHOG, TURTLE, GOAT, PIG, LAMB, HEN),
)
HERD = (*WALKERS, OWL, FISH)
RUNNERS = (CAT, DOG, RABBIT, MOUSE, SQUIRREL, FOX, BEAR, HEDGEHOG, GOAT, PIG, LAMB)


# Toys one plays with, as opposed to wearing, reading or keeping them.
_NOT_PLAYED_WITH = ("hat", "scarf", "coin", "bell", "book", "feather")
PLAYTHINGS = tuple(toy for toy in TOYS if toy.noun not in _NOT_PLAYED_WITH)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
FRUIT = (
    ("apple", ("red", "green", "big", "sweet")),
    ("pear", ("green", "yellow", "ripe", "sweet")),
    ("plum", ("purple", "ripe", "sweet")),
    ("carrot", ("orange", "long", "big")),
    ("cookie", ("round", "warm", "sweet")),
    ("nut", ("brown", "big", "round")),
    ("bun", ("warm", "round", "soft")),
)

# Time phrases open a sentence in fair weather.
DAYS = (
    "one sunny morning",
    "one day",
    "one warm day",
    "one bright morning",
    "early one morning",
    "one quiet afternoon",
    "after breakfast",
    "after lunch",
    "on a fine spring day",
    "on Monday",
    "on Sunday",
    "one fine day",
)
# Clauses on the weather, two of which make an opening sentence: clause, subject, state.
FAIR = (
    ("the sun was warm", "sun", "warm"),
    ("the sky was blue", "sky", "blue"),
    ("the air was fresh", "air", "fresh"),
    ("the birds were singing", "birds", "singing"),
    ("the day was bright", "day", "bright"),
    ("the wind was soft", "wind", "soft"),
    ("the trees were green", "trees", "green"),
    ("the clouds were white", "clouds", "white"),
    ("the bees were busy", "bees", "busy"),
)

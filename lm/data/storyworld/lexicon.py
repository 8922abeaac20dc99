"""What exists in the story world: places, animals, things, names. Data only, no behaviour.

The tables carry the regularities a model can learn: dogs run in the park, fish stay in the pond,
hens lay eggs, a kite is lost to the wind and a ball rolls away.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
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


def _entries(table: str) -> Iterator[tuple[list[str], list[tuple[str, ...]]]]:
    """For each entry of a table the fields of its first line, and the lists in the others."""
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(table).strip()):
        head, *lists = entry.split("\n")
        yield re.split("[:;] ", head), [tuple(line.strip().split(", ")) for line in lists]


# name: at; to / spots / fun, of which the last two are for animals, too
OUTDOORS = tuple(
    Place(*head, *lists)
    for head, lists in _entries("""
    park: in the park; to the park
      under a bench, behind a big tree, in the tall grass, next to the slide
      played on the swings, went down the slide, ran around the big tree, sat under the big tree
    garden: in the garden; to the garden
      under the roses, behind the wall, between the cabbages, next to the gate
      looked for snails, watched the bees, smelled the roses, looked at the butterflies
    forest: in the forest; to the forest
      under a pile of leaves, behind an old oak, between two stones, next to a mushroom
      looked for mushrooms, jumped over the old logs, listened to the wind, sat under an oak
    beach: at the beach; to the beach
      behind a rock, under a boat, in the warm sand, next to a shell
      dug a deep hole in the sand, ran along the waves, looked for shells, looked at the sea
    river: by the river; to the river
      under the bridge, behind a bush, between the reeds, next to a stone
      threw stones into the water, walked over the bridge, watched the boats, looked at the water
    meadow: in the meadow; to the meadow
      behind a bush, in the long grass, under the yellow flowers, next to the fence
      picked flowers, chased butterflies, danced in the grass, smelled the flowers
    hill: on the hill; up the hill
      behind a rock, under a bush, in the long grass, next to the path
      picked berries, rolled down the hill, looked down at the village, watched the clouds
    farm: at the farm; to the farm
      behind the barn, under the cart, in the hay, next to the well
      counted the sheep, climbed on the hay, looked at the horses, sat in the hay
    pond: by the pond; to the pond
      behind a stone, between the reeds, under a bush, next to the path
      threw stones into the water, counted the ducks, watched the clouds, looked at the water lilies
""")
)
PARK, GARDEN, FOREST, BEACH, RIVER, MEADOW, HILL, FARM, POND = OUTDOORS
HOME = Place("home", "at home", "home")
MARKET = Place("market", "at the market", "to the market")
KITCHEN = Place("kitchen", "in the kitchen", "into the kitchen")
BED = Place("bed", "in bed", "to bed")
ALL_PLACES = (*OUTDOORS, HOME, MARKET, KITCHEN, BED)

GIRLS = (
    *("Mia", "Anna", "Lily", "Sara", "Rosa", "Emma"),
    *("Nora", "Zoe", "Ruby", "Maya", "Ivy", "Lucy"),
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
_BLEW = "blew away in the wind"
TOYS = (
    Thing("ball", (*_COLOURS, *_SIZES), "kicked %s high into the air", "rolled away"),
    Thing("kite", (*_COLOURS, *_SIZES), "let %s fly in the wind", "flew away over the trees"),
    Thing("hat", (*_COLOURS, *_SIZES), "wore %s proudly", _BLEW),
    Thing("scarf", (*_COLOURS, "long", "warm"), "danced with %s", _BLEW),
    Thing("doll", ("small", "new", "old", "pretty"), "sang a song to %s", "was gone"),
    Thing("puppet", ("funny", "soft", "old"), "made %s dance", "was gone"),
    Thing("drum", (*_COLOURS, *_SIZES), "played %s loudly", "rolled away"),
    Thing("whistle", (*_BRIGHT, "wooden"), "blew %s three times", "was gone"),
    Thing("coin", _BRIGHT, "threw %s into the air", "rolled away"),
    Thing("bell", _BRIGHT, "rang %s again and again", "was gone"),
    Thing("top", (*_COLOURS, "wooden"), "made %s spin", "rolled away"),
    Thing("train", (*_COLOURS, "wooden", "little"), "pulled %s along the path", "was gone"),
    Thing("book", (*_COLOURS, "old", "thick"), "read %s under a tree", "was gone"),
    Thing("feather", ("white", "blue", "long", "soft"), "waved %s in the air", _BLEW),
)
_FOUND = (
    Thing("bone", ("big", "old", "white"), "played with %s", "was gone"),
    Thing("stick", ("long", "big", "old"), "ran around with %s", "was gone"),
    Thing("nut", ("big", "brown", "round"), "rolled %s around a tree", "rolled away"),
    Thing("carrot", ("big", "orange", "long"), "hopped around %s", "was gone"),
    Thing("cheese", ("round", "yellow", "big"), "danced around %s", "rolled away"),
    Thing(
        "stone", ("shiny", "round", "white", "smooth"), "rolled %s along the path", "rolled away"
    ),
    Thing("shell", ("pink", "white", "pretty"), "listened to %s", "rolled away"),
    Thing("leaf", ("red", "golden", "big"), "made a roof with %s", _BLEW),
    Thing("apple", ("big", "red", "round"), "rolled %s along the path", "rolled away"),
)
THINGS = {thing.noun: thing for thing in (*TOYS, *_FOUND)}

# noun: home; went; food; pronoun where every one of the kind is female / treasures / habits
HERD = tuple(
    Animal(*head[:4], *lists, *head[4:])
    for head, lists in _entries("""
    cat: in a house by the park; walked; milk
      ball, bell, feather
      sat on the mat, slept by the fire, looked out of the window, played with a ball of wool
    dog: in a house by the park; ran; meat
      bone, stick, ball
      ran in the park, dug a hole in the garden, chased a stick in the park
    bird: in a nest in the old oak; flew; seeds
      feather, coin, bell
      sat in the tree and sang, flew over the trees, made a nest in the tree
    rabbit: in a burrow under the hill; hopped; carrots
      carrot, ball, scarf
      hopped across the meadow, ate grass in the meadow, dug a burrow under the hill
    duck: by the pond; waddled; bread
      shell, feather, stone
      swam across the pond, slept in the reeds, splashed in the pond
    frog: by the pond; hopped; flies
      stone, leaf, shell
      sat on a lily in the pond, jumped into the pond, sang by the pond
    mouse: in a hole in the barn; ran; cheese
      cheese, coin, nut
      hid in the hay, ran along the wall of the barn, ate cheese in the barn
    squirrel: in a tall tree; ran; nuts
      nut, leaf, ball
      climbed up the tree, jumped from tree to tree, hid nuts under the tree
    fox: in a den in the forest; ran; berries
      hat, stick, scarf
      ran through the forest, slept in a den in the forest, ate berries in the forest
    bear: in a cave in the forest; walked; honey
      hat, drum, scarf, apple
      slept in the cave, looked for honey in the forest, walked through the forest
    hedgehog: under a pile of leaves in the garden; walked; apples
      apple, leaf, ball
      slept under the leaves, walked through the garden, looked for apples
    turtle: by the pond; walked slowly; leaves
      shell, stone, leaf
      slept in the sun, walked slowly around the pond, ate leaves by the pond
    goat: at the farm; trotted; grass
      bell, hat, stick
      ate grass on the hill, climbed up the hill, jumped over the rocks on the hill
    pig: at the farm; trotted; corn
      apple, ball, bell
      rolled in the mud, slept in the mud, ate corn at the farm
    lamb: at the farm; trotted; grass
      bell, scarf, ball
      ate grass in the field, jumped over the fence, slept in the barn
    hen: at the farm; walked; corn; she
      feather, hat
      laid an egg in the barn, looked for corn in the yard, slept in the barn
    owl: in the old oak; flew; berries
      feather, book
      sat in the old oak, slept in the old oak
    fish: in the pond; swam; flies
      shell
      swam in the pond, swam under the lilies in the pond, slept at the bottom of the pond
""")
)
CAT, DOG, BIRD, RABBIT, DUCK, FROG, MOUSE, SQUIRREL, FOX, *_others = HERD
BEAR, HEDGEHOG, TURTLE, GOAT, PIG, LAMB, HEN, OWL, FISH = _others
# Animals that can be a hero: all that can go anywhere. The fish stays in the pond.
WALKERS = HERD[:-2]
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

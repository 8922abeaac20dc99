"""Small tasks whose difficulty is known: sums, strings of letters, and facts told one way round.

`line("addition_3_reversed", seed, index)` is a question with its answer, "385+747=" and "2311": a
task's name is its kind, its size (digits, or letters) and, of sums, whether answers are written
lowest digit first with zeros up to a fixed length (Lee et al. 2023, "Teaching arithmetic to small
transformers"). A hash of what is asked decides what is held out, so that no held-out question is
ever trained on, nor its mirror image 747+385.

`fact` is the reversal curse (Berglund et al. 2023): of `PAIRS` pairs a model reads "kado>mibe", of
half of them "mibe<kado", too. What is held out is the way back of the others.
"""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Any, NamedTuple

SUMS = ("addition", "subtraction", "multiplication", "division")
STRINGS = ("copying", "reversing", "sorting", "counting", "unscrambling")
DIGITS = range(1, 6)
LENGTHS = range(3, 9)  # of strings, letters
LETTERS = "abcdefghij"
# Names of all tasks.
NAMES = (
    *(f"{kind}_{size}{form}" for kind in SUMS for size in DIGITS for form in ("", "_reversed")),
    *(f"{kind}_{size}" for kind in STRINGS for size in LENGTHS),
)
PAIRS = 400  # of the reversal curse
_HELD_OUT = 8  # one question in so many is held out
_CONSONANTS = "bdfgklmnprstvz"
_SIGNS = dict(zip(SUMS, "+-*/"))
_WORDS = (
    *("cat", "dog", "hen", "pig", "owl", "fox", "sun", "hat", "bed", "tea", "red", "one"),
    *("bird", "duck", "frog", "goat", "lamb", "bear", "fish", "ball", "kite", "drum", "park"),
    *("mouse", "house", "river", "beach", "apple", "bread", "stone", "train", "green", "happy"),
    *("rabbit", "turtle", "garden", "forest", "meadow", "basket", "flower", "friend", "yellow"),
    *("morning", "evening", "kitchen", "blanket", "village", "cabbage", "feather", "whistle"),
    *("squirrel", "hedgehog", "mountain", "birthday", "sandwich", "umbrella", "favorite"),
)


class Item(NamedTuple):
    """A question with its answer, and what is known of it.

    Attributes:
      prompt, answer: "12+9=" and "21".
      operands: what it asks for, in a form that its mirror image shares: decides what is held out.
      choices: each character of the answer is one of these.
      carries: of sums, how often one carries (or borrows) by hand; else 0.
    """

    prompt: str
    answer: str
    operands: tuple[Any, ...]
    choices: str
    carries: int = 0


class Task(NamedTuple):
    """A task by its name's parts."""

    kind: str
    size: int
    lowest_first: bool


def task(name: str) -> Task:
    """The task of a name of `NAMES`."""
    kind, size, *form = name.split("_")
    return Task(kind, int(size), bool(form))


def item(name: str, seed: int, index: int, held_out: bool = False) -> Item:
    """Question number `index` of a task, of those that are held out, or of the others."""
    one = task(name)
    draw = random.Random(f"{one.kind} {one.size} {seed} {index} {held_out}")
    make = _sum if one.kind in SUMS else _string
    while True:
        found = make(one, draw.random)
        digest = hashlib.blake2b(f"{one.kind} {found.operands}".encode(), digest_size=4).digest()
        if (int.from_bytes(digest) % _HELD_OUT == 0) == held_out:
            return found


def line(name: str, seed: int, index: int, held_out: bool = False) -> dict[str, str]:
    """`{"prompt": "12+9=", "response": "21"}`: `item` as a conversation to learn from."""
    found = item(name, seed, index, held_out)
    return {"prompt": found.prompt, "response": found.answer}


def fact(seed: int, index: int, held_out: bool = False) -> dict[str, str]:
    """Line `index` of the reversal curse: every pair, then the first half of them backwards.

    `PAIRS` × 3 / 2 lines, over and over; held out: `PAIRS` / 2, the other half backwards.
    """
    half = PAIRS // 2
    sides = backward(seed) if held_out else [*forward(seed), *backward(seed)]
    found = sides[half + index % half] if held_out else sides[index % (PAIRS + half)]
    return {"prompt": found.prompt, "response": found.answer}


def forward(seed: int) -> list[Item]:
    """Each pair as it is told, "kado>" and "mibe"."""
    return [Item(f"{one}>", other, (one, other), "") for one, other in pairs(seed)]


def backward(seed: int) -> list[Item]:
    """Each pair the other way round, "mibe<" and "kado": the first half is trained on."""
    return [Item(f"{other}<", one, (one, other), "") for one, other in pairs(seed)]


@functools.lru_cache(4)
def pairs(seed: int) -> list[tuple[str, str]]:
    """`PAIRS` pairs of names, of which no two are alike."""
    draw, names = random.Random(f"names {seed}").random, {}
    while len(names) < 2 * PAIRS:
        names[_pick(draw, _CONSONANTS, "aeiou", _CONSONANTS, "aeiou")] = None
    several = [*names]
    return [*zip(several[::2], several[1::2])]


def carries(kind: str, one: int, other: int) -> int:
    """How often one carries in working out a sum by hand.

    In subtraction that is how often one borrows; in multiplication all digits' products count, and
    in division those of its proof, divisor × quotient.
    """
    if kind == "subtraction":
        one -= other
    if kind == "division":
        one //= other
    ones, others = ([int(digit) for digit in str(x)[::-1]] for x in (one, other))
    if kind in ("addition", "subtraction"):
        ones += [0] * (len(others) - len(ones))
        others += [0] * (len(ones) - len(others))
        rows = [[a + b for a, b in zip(ones, others)]]
    else:
        rows = [[a * b for a in ones] for b in others]
    found = 0
    for row in rows:
        over = 0
        for value in row:
            over = (value + over) // 10
            found += over > 0
    return found


def _sum(one: Task, draw) -> Item:
    size, kind = one.size, one.kind
    low, high = 10 ** (size - 1) if size > 1 else 0, 10**size - 1

    def between(low: int, high: int) -> int:
        return low + int(draw() * (high + 1 - low))

    a, b = between(low, high), between(low, high)
    length = size
    if kind == "addition":
        value, length = a + b, size + 1
    elif kind == "subtraction":
        a, b = max(a, b), min(a, b)
        value = a - b
    elif kind == "multiplication":
        value, length = a * b, 2 * size
    else:  # without a remainder, of a divisor of about half as many digits
        b = between(1, 10 ** ((size + 1) // 2) - 1)
        value = between(-(-low // b), high // b)
        a = b * value
    answer = f"{value:0{length}}"[::-1] if one.lowest_first else str(value)
    operands = tuple(sorted((a, b))) if kind in ("addition", "multiplication") else (a, b)
    return Item(f"{a}{_SIGNS[kind]}{b}=", answer, operands, "0123456789", carries(kind, a, b))


def _string(one: Task, draw) -> Item:
    if one.kind == "unscrambling":
        words = [word for word in _WORDS if len(word) == one.size]
        word = shuffled = words[int(draw() * len(words))]
        while shuffled == word:
            shuffled = "".join(sorted(word, key=lambda _: draw()))
        choices = "".join(sorted({*word}))
        return Item(f"unscramble {shuffled}=", word, (shuffled,), choices)
    text = _pick(draw, *[LETTERS] * one.size)
    if one.kind == "counting":
        letter = text[int(draw() * len(text))]
        prompt = f"count {letter} in {text}="
        return Item(prompt, str(text.count(letter)), (letter, text), "0123456789")
    verb, answer = {
        "copying": ("copy", text),
        "reversing": ("reverse", text[::-1]),
        "sorting": ("sort", "".join(sorted(text))),
    }[one.kind]
    return Item(f"{verb} {text}=", answer, (text,), LETTERS)


def _pick(draw, *options: str) -> str:
    """A character of each."""
    return "".join(some[int(draw() * len(some))] for some in options)

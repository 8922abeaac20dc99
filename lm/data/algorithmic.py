"""Texts that an algorithm wrote, for models small enough to be understood from end to end.

Repeats are random symbols, written again and again up to `LENGTH`: within a text all but the first
period is known, by looking for where the present symbol stood before and what followed it there
(Olsson et al. 2022, "In-context learning and induction heads"). Where the period is the same in
all texts, to look so many places back will do, which is another algorithm: `repeats_16` is the
control that finds out who takes the one for the other.

Modular addition is c = (a + b) mod p for all p² pairs, of which a half, drawn from the seed, is
held out (Power et al. 2022, "Grokking"; Nanda et al. 2023).
"""

from __future__ import annotations

import functools
import random
import string
from typing import NamedTuple

import numpy as np

# A symbol is a token of a character tokenizer; as a number, its place here.
SYMBOLS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+-"
LENGTH = 48  # symbols of a text of repeats
PERIODS = {"repeats": range(8, 21), "repeats_16": range(16, 17)}  # of each corpus, from which drawn
PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
ADDITIONS = {f"modular_addition_{p}": p for p in PRIMES}


class Repeat(NamedTuple):
    """A text of `LENGTH` symbols, in which each is what stood `period` places before."""

    text: str
    period: int


def repeat(name: str, seed: int, index: int) -> Repeat:
    """Number `index` of the texts `name` of `PERIODS`."""
    draw = random.Random(f"{name} {seed} {index}").random
    periods = PERIODS[name]
    period = periods[int(draw() * len(periods))]
    symbols = "".join(SYMBOLS[int(draw() * len(SYMBOLS))] for _ in range(period))
    return Repeat((symbols * -(-LENGTH // period))[:LENGTH], period)


def text(name: str, seed: int, index: int, held_out: bool = False) -> str:
    """The text of a `repeat`."""
    return repeat(name, seed, index).text


@functools.lru_cache(8)
def _shuffled(p: int, seed: int) -> np.ndarray:
    numbers = [*range(p * p)]
    random.Random(f"modular addition {p} {seed}").shuffle(numbers)
    return np.stack(np.divmod(np.array(numbers), p), 1)


def pairs(p: int, seed: int, held_out: bool = False) -> np.ndarray:
    """The pairs (a, b) to learn from [(p² + 1) / 2, 2], or the others; p is odd."""
    half = (p * p + 1) // 2
    return _shuffled(p, seed)[half:] if held_out else _shuffled(p, seed)[:half]


def equation(name: str, seed: int, index: int, held_out: bool = False) -> dict[str, str]:
    """`{"prompt": "ab", "response": "c"}`: pair number `index` of `pairs`, over and over."""
    p = ADDITIONS[name]
    some = pairs(p, seed, held_out)
    a, b = some[index % len(some)]
    return {"prompt": SYMBOLS[a] + SYMBOLS[b], "response": SYMBOLS[(a + b) % p]}

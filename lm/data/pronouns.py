"""Whom a pronoun means: two children, one sentence, and only their gender tells.

    In the morning, Mia saw Tom in the park. She     →  Mia
    In the morning, Mia saw Tom in the park. He      →  Tom

Such a minimal pair differs in the pronoun alone. Either name is the antecedent of one and the
distractor of the other, so that no preference for a place, or for a distance, can tell them apart.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.asking import Draw

NAMES = (*lx.GIRLS, *lx.BOYS)
VERBS = ("met", "saw", "found", "helped", "called", "thanked")
DAYS = ("one day", "in the morning", "after breakfast", "last night", "on a sunny day")
_HELD_OUT = 8  # one in so many pairs of names is held out


class Item(NamedTuple):
    """A text that ends with a pronoun, who is meant, and who is not."""

    text: str
    pronoun: str  # "She" or "He"
    antecedent: str
    distractor: str


def pair(seed: int, index: int, held_out: bool = False) -> tuple[Item, Item]:
    """Two items that differ in the pronoun: "She" means the girl, "He" the boy.

    What is held out has two names that the others never have together.
    """
    draw = Draw(f"pronouns {seed} {index} {held_out}")
    while True:
        girl, boy = draw.pick(lx.GIRLS), draw.pick(lx.BOYS)
        digest = hashlib.blake2b(f"{girl} {boy}".encode(), digest_size=4).digest()
        if (int.from_bytes(digest) % _HELD_OUT == 0) == held_out:
            break
    first, second = draw.order((girl, boy))
    day, place = draw.pick(DAYS).capitalize(), draw.pick(lx.OUTDOORS).at
    said = f"{day}, {first} {draw.pick(VERBS)} {second} {place}."
    return Item(f"{said} She", "She", girl, boy), Item(f"{said} He", "He", boy, girl)


def line(seed: int, index: int, held_out: bool = False) -> dict[str, str]:
    """`{"prompt": "…, Mia saw Tom in the park. She", "response": " Mia"}`, to learn from."""
    found = pair(seed, index // 2, held_out)[index % 2]
    return {"prompt": found.text, "response": f" {found.antecedent}"}

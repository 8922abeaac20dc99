"""Which of several replies to a prompt are kept, to be learned from.

Replies that were cut off are none: what is learned from them would end where they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def best(
    replies: Sequence[str],
    worth_N: np.ndarray,
    ended: Sequence[bool],
    keep: int = 1,
    at_least: float | None = None,
) -> list[int]:
    """The places of the best replies, the best first (Touvron et al. 2023, §3.2.3).

    Args:
      replies: to one prompt; of equal ones the first counts.
      worth_N: what each is worth.
      ended: whether each ended by itself.
      keep: how many at most.
      at_least: and of them only those that are worth as much; None: any.
    """
    least = -math.inf if at_least is None else at_least
    chosen: dict[str, int] = {}
    for place in _ranked(worth_N, ended):
        if worth_N[place] >= least:
            chosen.setdefault(replies[place], place)
    return list(chosen.values())[:keep]


def best_and_worst(
    worth_N: np.ndarray, ended: Sequence[bool], at_least: float | None = None
) -> tuple[int, int] | None:
    """The places of the best reply, worth `at_least` so much, and of the worst.

    None where no reply ended, none is so good, or all are worth the same.
    """
    ranked = _ranked(worth_N, ended)
    if not ranked or (at_least is not None and worth_N[ranked[0]] < at_least):
        return None
    first, last = ranked[0], ranked[-1]
    return (first, last) if worth_N[first] > worth_N[last] else None


def kl_bound(n: int) -> float:
    """How far the best of n is at most from the model, in nats: log n − (n − 1)/n.

    Stiennon et al. 2020, appendix G.3; a bound, since replies may come twice (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def _ranked(worth_N: np.ndarray, ended: Sequence[bool]) -> list[int]:
    """The places of replies that ended, by their worth; of equal ones the first comes first."""
    order = np.argsort(-np.asarray(worth_N, np.float64), kind="stable")
    return [place for place in order.tolist() if ended[place]]

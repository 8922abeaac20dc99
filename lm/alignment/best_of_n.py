"""Which of several replies to a prompt are kept, to be learned from.

Replies that were cut off are none: what is learned from them would end where they do.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from lm.config import ConfigError

NUMBER = "prompt_number"  # a line's field: which prompt it is of


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


def begin(path: pathlib.Path) -> int:
    """The first prompt of which a file of kept replies, made ready for more, is not known whole.

    The last one that it has lines of may lack some: they are taken out.

    Raises:
      ConfigError: the file has other lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        numbers = [json.loads(line)[NUMBER] for line in lines]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"config.output_file={str(path)!r} has lines of another origin: choose another file"
        ) from None
    start = numbers[-1] if numbers else 0
    done = [line + b"\n" for line, number in zip(lines, numbers) if number < start]
    path.write_bytes(b"".join(done))
    return start


def _ranked(worth_N: np.ndarray, ended: Sequence[bool]) -> list[int]:
    """The places of replies that ended, by their worth; of equal ones the first comes first."""
    order = np.argsort(-np.asarray(worth_N, np.float64), kind="stable")
    return [place for place in order.tolist() if ended[place]]

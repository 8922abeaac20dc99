"""How a model learns to continue what it has read once, followed through its checkpoints.

On repeats of random periods (`lm.data.algorithmic`) all but the first period can be known, by an
induction head: it looks for where the present token stood before, and for what followed it there,
which takes a head in the layer before that looks one token back (Olsson et al. 2022, "In-context
learning and induction heads"). One layer cannot; and where all repeats have one period it need not,
and still scores as if it did. So every model is asked on random periods, whatever it has learnt.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data import algorithmic
from lm.interpretability.heads import (
    in_context_learning_score,
    induction_scores,
    previous_token_scores,
)
from lm.interpretability.pictures import Panel, dress, panels
from lm.models import ModelConfig, bind, skeleton
from lm.models.activations import trace
from lm.runs.run import Run
from lm.training.plots import COLOURS, save

FOUND = 0.3  # a head that has come to look for prefixes raised its score by more


class Texts(NamedTuple):
    """Texts that no run has learnt from, as a model's tokens."""

    tokens_BT: np.ndarray  # begin-of-text, and all symbols but the last
    targets_BT: np.ndarray
    repeated_BT: np.ndarray  # which targets stood a period before


@dataclasses.dataclass(frozen=True)
class Point:
    """A checkpoint, asked on random periods."""

    step: int
    first_loss: float  # of the first period's symbols, nats
    repeat_loss: float  # of all others
    accuracy: float  # share of these that are likeliest
    in_context: float  # `in_context_learning_score`, nats
    prefix_LH: list[list[float]]  # `induction_scores` of each head
    previous_LH: list[list[float]]  # `previous_token_scores`


@dataclasses.dataclass(frozen=True)
class Course:
    """A run, from its first kept checkpoint to its last."""

    run: str
    corpus: str  # it learns from
    points: list[Point]
    own_prefix: float  # the best head's score at the end, on texts of its own corpus

    def values(self, field: str) -> np.ndarray:
        """One of the numbers, at each checkpoint."""
        return np.array([getattr(point, field) for point in self.points])

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints."""
        return [point.step for point in self.points]

    @property
    def prefix(self) -> float:
        """The best head's prefix-matching score at the end."""
        return float(np.max(self.points[-1].prefix_LH))

    @property
    def change(self) -> tuple[float, float] | None:
        """The phase change: the fewest steps in which the best head goes half of its way.

        None where no head comes to match prefixes.
        """
        best, steps = self.values("prefix_LH").max((1, 2)), self.steps
        way = best[-1] - best[0]
        pairs = itertools.combinations(range(len(steps)), 2) if way > FOUND else ()
        spans = [(steps[i], steps[j]) for i, j in pairs if best[j] - best[i] >= way / 2]
        return min(spans, key=lambda span: span[1] - span[0], default=None)


def texts(run: Run, name: str, seed: int, number: int) -> Texts:
    """So many of the texts `name` of `lm.data.algorithmic`, beyond those that were learnt."""
    beyond = 2**30 + 1000 * seed  # no corpus is so long
    some = [algorithmic.repeat(name, seed, beyond + n) for n in range(number)]
    ids_BT = np.array([run.tokenizer.encode(one.text) for one in some], np.int32)
    begin_B1 = np.full((number, 1), run.tokenizer.bos_id, np.int32)
    periods_B1 = np.array([[one.period] for one in some])
    repeated_BT = np.arange(ids_BT.shape[1]) >= periods_B1
    return Texts(np.concatenate([begin_B1, ids_BT[:, :-1]], 1), ids_BT, repeated_BT)


@functools.partial(jax.jit, static_argnums=0)
def _seen(config: ModelConfig, params, tokens_BT, targets_BT):
    names = ("blocks.*.attention.pattern", "logits")
    *patterns, logits_BTV = trace(bind(skeleton(config), params), tokens_BT, names=names).values()
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    loss_BT = -jnp.take_along_axis(logp_BTV, targets_BT[..., None], 2)[..., 0]
    right_BT = logits_BTV.argmax(-1) == targets_BT
    prefix = [jnp.nanmean(induction_scores(pattern, tokens_BT), 0) for pattern in patterns]
    previous = [previous_token_scores(pattern).mean(0) for pattern in patterns]
    return loss_BT, right_BT, jnp.stack(prefix), jnp.stack(previous)


def point(run: Run, some: Texts) -> Point:
    """What a checkpoint makes of texts."""
    found = _seen(run.skeleton.config, run.params, some.tokens_BT, some.targets_BT)
    loss_BT, right_BT, prefix_LH, previous_LH = map(np.asarray, found)
    return Point(
        run.step,
        float(loss_BT[~some.repeated_BT].mean()),
        float(loss_BT[some.repeated_BT].mean()),
        float(right_BT[some.repeated_BT].mean()),
        in_context_learning_score(loss_BT),
        prefix_LH.tolist(),
        previous_LH.tolist(),
    )


def course(runs: Sequence[Run], name: str, corpus: str, seed: int, number: int) -> Course:
    """A run's checkpoints, in order, each asked on `number` texts of random periods."""
    some = texts(runs[0], "repeats", seed, number)
    points = [point(run, some) for run in runs]
    own = points[-1]
    if corpus != "repeats":
        own = point(runs[-1], texts(runs[-1], corpus, seed, number))
    return Course(name, corpus, points, float(np.max(own.prefix_LH)))


def draw(courses: Sequence[Course], path: pathlib.Path) -> pathlib.Path:
    """Draws what courses are like, and returns `path`: losses, heads, and who only seems to do it.

    The heads are those of the first course, and so are the steps of the phase change, shaded.
    """
    first, steps = courses[0], sorted({step for one in courses for step in one.steps})

    def side_by_side(field: str) -> dict[str, np.ndarray]:
        outside = {"left": np.nan, "right": np.nan}
        return {c.run: np.interp(steps, c.steps, c.values(field), **outside) for c in courses}

    heads = {
        f"layer {layer} head {head}: {label}": first.values(field)[:, layer, head]
        for field, label in (("prefix_LH", "prefix"), ("previous_LH", "previous token"))
        for layer, head in np.ndindex(first.values(field).shape[1:])
        if (layer > 0) == (field == "prefix_LH")
    }
    rows = (
        Panel("loss on what is repeated, nats", steps, side_by_side("repeat_loss")),
        Panel("in-context-learning score, nats", steps, side_by_side("in_context")),
        Panel(f"{first.run}: what heads attend to, share", first.steps, heads),
    )
    figure = panels(rows, figsize=(11, 8), dpi=90)
    *curves, ends = figure.axes
    if first.change:
        for axes in curves:
            axes.axvspan(*first.change, color="#999999", alpha=0.15, linewidth=0)
    curves[0].set_ylim(0, 1.3 * first.values("repeat_loss").max())
    reach = np.abs(first.values("in_context")).max()
    curves[1].set_ylim(-1.1 * reach, 0.4 * reach)
    ends.set_visible(True)
    places = np.arange(len(courses))
    for shift, values, colour, label in (
        (-0.2, [one.own_prefix for one in courses], "#bbbbbb", "on texts like those learnt"),
        (0.2, [one.prefix for one in courses], COLOURS[0], "on random periods"),
    ):
        bars = ends.barh(places + shift, values, 0.36, color=colour, label=label)
        ends.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    ends.set_yticks(places, [one.run for one in courses])
    ends.invert_yaxis()
    ends.set_xlim(0, 1.08)
    dress(ends, "prefix-matching score of the best head at the end", legend=True)
    return save(figure, path)

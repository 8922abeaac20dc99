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
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data import algorithmic
from lm.evaluation.curves import transition
from lm.interpretability.heads import (
    in_context_learning_score,
    induction_scores,
    previous_token_scores,
)
from lm.models import ModelConfig, bind, skeleton
from lm.models.activations import trace
from lm.runs.run import Run
from lm.training.plots import COLOURS, INK, bare, figure_of, save


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
    def change(self) -> tuple[float, float]:
        """The steps between which the repeat loss goes from 10 % to 90 % of its way."""
        return transition(self.steps, self.values("repeat_loss"))


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

    The heads are those of the first course, and so are the steps that are shaded.
    """
    figure = figure_of(figsize=(11, 7), dpi=90, layout="constrained")
    (losses, context), (heads, ends) = figure.subplots(2, 2)
    first = courses[0]
    grey = {"color": "#999999", "alpha": 0.15, "linewidth": 0}
    for axes in (losses, context, heads):
        axes.axvspan(*first.change, **grey)
        axes.set_xlabel("step", color=INK, fontsize=9)
    for one, colour in zip(courses, _colours(courses)):
        losses.plot(one.steps, one.values("repeat_loss"), color=colour, label=one.run)
        context.plot(one.steps, one.values("in_context"), color=colour)
    losses.set_ylim(0)
    _titled(losses, "loss on what is repeated, nats (shaded: 10 % to 90 % of the way)")
    _titled(context, "in-context-learning score: last token less an early one, nats")
    losses.legend(frameon=False, labelcolor=INK, fontsize=8)
    prefix_NLH, previous_NLH = first.values("prefix_LH"), first.values("previous_LH")
    for layer, head in np.ndindex(prefix_NLH.shape[1:]):
        colour, name = COLOURS[layer % len(COLOURS)], f"layer {layer}, {{}}"
        named = {} if head else {"label": name.format("prefix matching")}
        heads.plot(first.steps, prefix_NLH[:, layer, head], color=colour, **named)
        named = {} if head else {"label": name.format("previous token")}
        style = {"color": colour, "linestyle": ":"}
        heads.plot(first.steps, previous_NLH[:, layer, head], **style, **named)
    _titled(heads, f"{first.run}: what each head attends to, share")
    heads.set_ylim(0, 1)
    heads.legend(frameon=False, labelcolor=INK, fontsize=8)
    places = np.arange(len(courses))
    for shift, values, colour, label in (
        (-0.2, [one.own_prefix for one in courses], "#bbbbbb", "on texts like those learnt"),
        (0.2, [one.prefix for one in courses], COLOURS[0], "on random periods"),
    ):
        ends.barh(places + shift, values, 0.36, color=colour, label=label)
        for place, value in zip(places, values):
            ends.text(value + 0.01, place + shift, f"{value:.2f}", va="center", fontsize=8)
    ends.set_yticks(places, [one.run for one in courses])
    ends.invert_yaxis()
    ends.set_xlim(0, 1.1)
    _titled(ends, "prefix-matching score of the best head at the end")
    ends.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right")
    return save(figure, path)


def _colours(courses: Sequence[Course]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(courses))]


def _titled(axes: Any, title: str) -> None:
    axes.set_title(title, color=INK, fontsize=10)
    bare(axes)

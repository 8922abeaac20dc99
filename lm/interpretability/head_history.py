"""How heads found their work: every score of every head through a run's checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.evaluation.subject import Subject
from lm.interpretability import head_stories, heads
from lm.interpretability.head_tests import plain_ids, programs
from lm.models import ModelConfig, bind, skeleton
from lm.training.plots import COLOURS, INK, bare, figure_of

CONTROL = "induction, one period"


class Texts(NamedTuple):
    """Texts that are read together, and what heads may look at there."""

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    targets_KBTS: np.ndarray
    names: tuple[str, ...]  # of the targets


def texts(subject: Subject, seed: int, rows: int) -> list[Texts]:
    """Random tokens said again and again, and stories where the model can read them."""
    ids, length = plain_ids(subject), min(64, subject.max_length)
    most = max(2, min(20, length // 2))
    found = []
    for periods in ((max(1, most * 2 // 5), most), (most * 4 // 5,) * 2):
        tokens, _ = heads.repeated_tokens(seed, rows, length, ids, periods)
        segments = np.ones_like(tokens)
        targets = {CONTROL: heads.induction_targets(tokens)}
        if not found:
            targets = {
                "induction": targets[CONTROL],
                "duplicate token": heads.duplicate_targets(tokens),
                "first token": heads.first_targets(segments),
                "previous token": heads.offset_targets(segments),
                **{f"{n} back": heads.offset_targets(segments, n) for n in (2, 3)},
            }
        found.append(Texts(tokens, segments, np.array([*targets.values()]), (*targets,)))
    if told := head_stories.read(subject, seed, rows):
        alike = heads.class_targets(told.classes_BT, told.segments_BT)
        targets = {
            "same word class": alike,
            "subject of the sentence": told.subject_BTS,
            "pronoun to antecedent": told.antecedent_BTS,
            "pronoun to another": told.distractor_BTS,
        }
        targets = {name: some for name, some in targets.items() if some.any()}
        both = told.tokens_BT, told.segments_BT
        if targets:
            found.append(Texts(*both, np.array([*targets.values()]), (*targets,)))
    return found


def uniform(some: Sequence[Texts]) -> dict[str, float]:
    """What each score is of a head that looks at all it sees alike."""
    return {
        name: float(np.nanmean(heads.attention_to(heads.uniform_pattern(one.segments_BT), targets)))
        for one in some
        for name, targets in zip(one.names, one.targets_KBTS)
    }


def attention_scores(
    config: ModelConfig, params: Mapping[str, jax.Array], some: Sequence[Texts]
) -> dict[str, np.ndarray]:
    """Each score of each head, [L, H], by name: the mean over rows."""
    found = {}
    for one in some:
        last_B = one.segments_BT.sum(1).astype(np.int32) - 1
        pattern_LBHTS, *_ = programs(config)[0](params, one.tokens_BT, one.segments_BT, last_B)
        found |= zip(one.names, np.asarray(_paid(pattern_LBHTS, one.targets_KBTS)))
    return found


@jax.jit
def _paid(pattern_LBHTS, targets_KBTS):
    pattern_LBHTS = pattern_LBHTS.astype(jnp.float32)
    each = jax.vmap(jax.vmap(heads.attention_to, (0, None)), (None, 0))
    return jnp.nanmean(each(pattern_LBHTS, targets_KBTS), 2)


def in_context_learning(config: ModelConfig, params: Any, some: Sequence[Texts]) -> float:
    """The score on the last texts, stories if there are any: late tokens of each less early ones.

    Late is as far as half of the texts go, early a tenth of it; a tenth is averaged.
    """
    tokens_BT, segments_BT = some[-1][:2]
    loss_BT = np.asarray(_losses(config)(params, tokens_BT, segments_BT))
    loss_BT = np.where(segments_BT[:, 1:] > 0, loss_BT, np.nan)
    late = int(np.median(segments_BT.sum(1))) - 1
    early = max(1, late // 10)
    return heads.in_context_learning_score(loss_BT, early, late, window=early)


@functools.lru_cache(4)
def _losses(config: ModelConfig):
    @jax.jit
    def losses(params, tokens_BT, segments_BT):
        logits_BTV = bind(skeleton(config), params)(tokens_BT, segments_BT=segments_BT)
        logp_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        return -jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], 2)[..., 0]

    return losses


# ---- Over training


@dataclasses.dataclass(frozen=True)
class History:
    """One number of each checkpoint: of a head, such as its attention, or of the model."""

    steps: list[int]
    values: dict[str, list[float]]

    def phase_change(self, name: str) -> tuple[int, int, float]:
        """First and last step of the window with the largest change, and how large that is.

        A window is a tenth of the checkpoints, and two at least.
        """
        values = np.array(self.values[name])
        gap = max(1, round(len(values) / 10))
        if len(values) <= gap or not np.isfinite(values).any():
            return self.steps[0], self.steps[-1], 0.0
        change = np.nan_to_num(values[gap:] - values[:-gap])
        first = int(np.abs(change).argmax())
        return self.steps[first], self.steps[first + gap], float(change[first])


def draw(history: History, lines: Sequence[Sequence[str]], titles: Sequence[str]) -> Any:
    """A figure with a panel for each group of names; the first one's phase change is shaded."""
    figure = figure_of(figsize=(7.6, 2.6 * len(lines)), dpi=100, layout="constrained")
    panels = figure.subplots(len(lines), 1, squeeze=False, sharex=True)[:, 0]
    first, last, _ = history.phase_change(lines[0][0])
    for axes, names, title in zip(panels, lines, titles):
        for name, colour in zip(names, COLOURS):
            axes.plot(history.steps, history.values[name], color=colour, label=name, linewidth=1.6)
        axes.axvspan(first, last, color="#999999", alpha=0.15, linewidth=0)
        axes.set_title(title, color=INK, fontsize=10, loc="left")
        bare(axes)
        if len(names) > 1:
            below = {"loc": "upper left", "bbox_to_anchor": (0, -0.06), "ncols": 2}
            axes.legend(frameon=False, labelcolor=INK, fontsize=8, **below)
    panels[-1].set_xlabel("step", color=INK, fontsize=9)
    return figure

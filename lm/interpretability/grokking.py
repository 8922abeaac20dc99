"""How a model that has learnt sums modulo p by heart comes to understand them.

A network that adds turns each number into cosines and sines of a few frequencies w = 2πk/p, and
reads the sum off cos(w (a + b − c)) (Nanda et al. 2023, "Progress measures for grokking via
mechanistic interpretability"). So its logits, as a table over all a and b, lie along cos(w (a + b))
and sin(w (a + b)) of these key frequencies. What it owes to them and what to memory can be told
apart long before the accuracy on held-out pairs shows it: the restricted loss is that of the logits
with nothing but these directions and their mean left, the excluded loss that of the logits without.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm.data.algorithmic import SYMBOLS, pairs
from lm.interpretability.pictures import Panel, dress, panels
from lm.models import ModelConfig, bind, skeleton
from lm.runs.run import Run
from lm.training.plots import COLOURS, FAINT, save

KEY_SHARE = 0.9  # of the power of sums, which the key frequencies have together


class Table(NamedTuple):
    """What a model answers to all pairs."""

    logits_abV: np.ndarray  # after every a and b, float64
    answers_ab: np.ndarray  # the right token
    held_out_ab: np.ndarray  # which pairs are held out


@dataclasses.dataclass(frozen=True)
class Point:
    """A checkpoint."""

    step: int
    train_loss: float  # nats an answer
    test_loss: float  # of the pairs that are held out
    train_accuracy: float
    test_accuracy: float
    restricted_loss: float  # of pairs held out, from key frequencies alone
    excluded_loss: float  # of pairs learnt, without the key frequencies
    key_power: float  # share of the embedding's power that they have
    weight_norm: float  # √ of the sum of all squared parameters


@dataclasses.dataclass(frozen=True)
class Course:
    """A run, from its first kept checkpoint to its last."""

    run: str
    p: int
    key: list[int]  # frequencies, of the last checkpoint's logits
    embedding: list[float]  # share of its power at each frequency 1, 2, …, at the end
    points: list[Point]

    def values(self, field: str) -> np.ndarray:
        """One of the numbers, at each checkpoint."""
        return np.array([getattr(point, field) for point in self.points])


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params, tokens_BT):
    return bind(skeleton(config), params)(tokens_BT)[:, -1]


def table(run: Run, p: int) -> Table:
    """All sums modulo p, as a run answers them."""
    ids = _ids(run, p)
    a, b = np.divmod(np.arange(p * p), p)
    tokens_BT = np.stack([np.full(p * p, run.tokenizer.bos_id), ids[a], ids[b]], 1)
    logits_BV = np.asarray(_logits(run.skeleton.config, run.params, tokens_BT), np.float64)
    held_out_ab = np.zeros((p, p), bool)
    held_out_ab[tuple(pairs(p, int(run.config["seed"]), True).T)] = True
    return Table(logits_BV.reshape(p, p, -1), ids[(a + b) % p].reshape(p, p), held_out_ab)


def _ids(run: Run, p: int) -> np.ndarray:
    return np.array(run.tokenizer.encode(SYMBOLS[:p]), np.int32)


def directions(p: int, frequencies: Sequence[int]) -> np.ndarray:
    """cos and sin of w (a + b) for each frequency, of unit norm over all a and b: [2 n, p, p]."""
    sums_ab = np.add.outer(np.arange(p), np.arange(p))
    angles = 2 * np.pi / p * np.multiply.outer(np.asarray(frequencies), sums_ab)
    waves = np.concatenate([np.cos(angles), np.sin(angles)])
    return waves / np.sqrt(p * p / 2)


def projected(logits_abV: np.ndarray, frequencies: Sequence[int]) -> np.ndarray:
    """What of a table of logits lies along the `directions` of these frequencies."""
    waves_kab = directions(logits_abV.shape[0], frequencies)
    return np.einsum("kab,kV->abV", waves_kab, np.einsum("kab,abV->kV", waves_kab, logits_abV))


def restricted(logits_abV: np.ndarray, frequencies: Sequence[int]) -> np.ndarray:
    """The logits with the directions of these frequencies, and their mean, alone."""
    return projected(logits_abV, frequencies) + logits_abV.mean((0, 1))


def excluded(logits_abV: np.ndarray, frequencies: Sequence[int]) -> np.ndarray:
    """The logits without the directions of these frequencies."""
    return logits_abV - projected(logits_abV, frequencies)


def sum_power(logits_abV: np.ndarray) -> np.ndarray:
    """Squared norm of the logits along cos and sin of each frequency 1, …, (p − 1) / 2."""
    p = logits_abV.shape[0]
    waves_kab = directions(p, range(1, (p + 1) // 2))
    along_kV = np.einsum("kab,abV->kV", waves_kab, logits_abV)
    return (along_kV**2).sum(1).reshape(2, -1).sum(0)


def embedding_power(embedding_pD: np.ndarray) -> np.ndarray:
    """Share of an embedding's power, but for its mean's, at each frequency 1, …, (p − 1) / 2."""
    power = (np.abs(np.fft.rfft(embedding_pD, axis=0)[1:]) ** 2).sum(1)
    return power / power.sum()


def key_frequencies(power: np.ndarray, share: float = KEY_SHARE) -> list[int]:
    """The fewest frequencies, rising, that have `share` of a power together; counted from 1."""
    order = np.argsort(-power, kind="stable")
    enough = np.searchsorted(np.cumsum(power[order]), share * power.sum()) + 1
    return sorted((order[:enough] + 1).tolist())


def losses(logits_abV: np.ndarray, answers_ab: np.ndarray) -> np.ndarray:
    """Nats of the right answer to each pair, [p, p]."""
    shifted = logits_abV - logits_abV.max(-1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(-1))
    return log_z - np.take_along_axis(shifted, answers_ab[..., None], 2)[..., 0]


def point(run: Run, p: int, key: Sequence[int]) -> Point:
    """What a checkpoint knows."""
    logits_abV, answers_ab, out = table(run, p)
    loss_ab = losses(logits_abV, answers_ab)
    right_ab = logits_abV.argmax(-1) == answers_ab
    power = embedding_power(np.asarray(run.params["embedding.tokens"])[_ids(run, p)])
    squares = sum(float(np.sum(np.square(value))) for value in run.params.values())
    return Point(
        run.step,
        float(loss_ab[~out].mean()),
        float(loss_ab[out].mean()),
        float(right_ab[~out].mean()),
        float(right_ab[out].mean()),
        float(losses(restricted(logits_abV, key), answers_ab)[out].mean()),
        float(losses(excluded(logits_abV, key), answers_ab)[~out].mean()),
        float(power[np.array(key) - 1].sum()),
        float(np.sqrt(squares)),
    )


def course(runs: Sequence[Run], name: str, p: int) -> Course:
    """A run's checkpoints, in order, by the key frequencies of the last."""
    last = runs[-1]
    key = key_frequencies(sum_power(table(last, p).logits_abV))
    power = embedding_power(np.asarray(last.params["embedding.tokens"])[_ids(last, p)])
    return Course(name, p, key, power.tolist(), [point(run, p, key) for run in runs])


def draw(course: Course, path: pathlib.Path) -> pathlib.Path:
    """Draws accuracy, losses, frequencies and norm, and returns `path`."""
    at, norm = course.values, course.values("weight_norm")
    known = {"pairs learnt": at("train_accuracy"), "pairs held out": at("test_accuracy")}
    losses = {
        "pairs learnt": at("train_loss"),
        "pairs held out": at("test_loss"),
        "held out, key frequencies alone": at("restricted_loss"),
        "learnt, without key frequencies": at("excluded_loss"),
    }
    size = {
        "embedding's power at key frequencies": at("key_power"),
        "norm of all weights, of its most": norm / norm.max(),
    }
    rows = (
        Panel("accuracy", at("step"), known),
        Panel("loss, nats an answer", at("step"), losses, log=True),
        Panel("rule and memory, share", at("step"), size),
    )
    figure = panels(rows, figsize=(11, 8), dpi=90)
    power = figure.axes[3]
    power.set_visible(True)
    places = np.arange(1, len(course.embedding) + 1)
    key = np.isin(places, course.key)
    power.bar(places, course.embedding, color=np.where(key, COLOURS[0], FAINT))
    keys = ", ".join(map(str, course.key))
    title = f"embedding's power by frequency, share; key in the logits: {keys}"
    dress(power, title, "frequency k of 2πk/p")
    return save(figure, path)

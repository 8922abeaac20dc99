"""What a linear probe reads in hidden states (Alain & Bengio 2016; Azaria & Mitchell 2023)."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from lm.evaluation.subject import Subject
from lm.evaluation.uncertainty import auroc
from lm.inference.fill import dropless
from lm.inference.prompts import padded_after
from lm.models import ModelConfig, bind, skeleton
from lm.models.hooks import reading
from lm.models.text import Text

LAYERS = 9  # that are read, at most, evenly spaced; the embedding is one more
RIDGE = 0.03  # of the mean loss, on standardised states
FOLDS = 5
_BATCH = 64  # texts
_STEPS = 50  # Newton's, at most


class Probed(NamedTuple):
    """What cross-validated probes say of each item."""

    score: np.ndarray  # log-odds of the label, of a probe that saw no item of the cluster [N]
    layers: list[int]  # the layer that each fold chose, without a look at its own items
    by_layer: np.ndarray  # the log-odds of every layer's probe [L, N]


def states(subject: Subject, texts: Sequence[Sequence[int]]) -> tuple[list[str], np.ndarray]:
    """The hidden states of each text's last token.

    Args:
      subject: whose.
      texts: token ids; of one that is too long the beginning is left out.

    Returns:
      the names of what is read: the embedding, residual streams after layers (of networks without
      any, such as recurrent ones, the last hidden states alone); and the states, float32 [L, N, D].
    """
    config = dropless(subject.run.skeleton.config)
    layers = np.unique(np.linspace(0, config.num_layers - 1, LAYERS).round().astype(int))
    texts = [ids[-subject.max_length :] for ids in texts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for first in range(0, len(order), _BATCH):
        batch: list[Sequence[int]] = [texts[i] for i in order[first : first + _BATCH]]
        filled = batch + [batch[-1]] * (_BATCH - len(batch))  # of one shape, for one program
        tokens, segments = padded_after(filled, config.max_length)
        found = _read(config, tuple(layers.tolist()), subject.run.params, tokens, segments)
        names = sorted(found, key=_place)
        parts.append(np.stack([np.asarray(found[name])[: len(batch)] for name in names]))
    states_LND = np.empty_like(together := np.concatenate(parts, 1))
    states_LND[:, order] = together
    return names, states_LND


def logistic(x_ND: np.ndarray, y_N: np.ndarray, ridge: float = RIDGE) -> tuple[np.ndarray, float]:
    """Weights [D] and bias of the logistic regression of `y_N` (0 or 1) on `x_ND`.

    Minimises the mean log-loss, both classes weighing the same, plus ridge/2 · |w|², by Newton's
    steps. Where D exceeds N they are taken among the N directions that there are examples of, in
    which the minimum lies.
    """
    if x_ND.shape[1] > len(x_ND):
        u_NK, s_K, v_KD = np.linalg.svd(x_ND, full_matrices=False)
        w_K, b = logistic(u_NK * s_K, y_N, ridge)
        return w_K @ v_KD, b
    x_NP = np.column_stack([x_ND, np.ones(len(x_ND))]).astype(np.float64)
    penalty_P = np.append(np.full(x_ND.shape[1], ridge), 1e-6)
    sign_N = np.where(np.asarray(y_N) > 0.5, 1.0, -1.0)
    weight_N = 0.5 / np.where(sign_N > 0, (sign_N > 0).sum(), (sign_N < 0).sum())

    def loss(w_P):
        return weight_N @ np.logaddexp(0, -sign_N * (x_NP @ w_P)) + penalty_P / 2 @ w_P**2

    w_P = np.zeros(len(penalty_P))
    for _ in range(_STEPS):
        p_N = special.expit(-sign_N * (x_NP @ w_P))  # of being wrong
        slope_P = penalty_P * w_P - x_NP.T @ (weight_N * sign_N * p_N)
        curve_PP = (x_NP.T * (weight_N * p_N * (1 - p_N))) @ x_NP + np.diag(penalty_P)
        step_P = np.linalg.solve(curve_PP, slope_P)
        size, before = 1.0, loss(w_P)
        while size > 1e-4 and loss(w_P - size * step_P) > before:
            size /= 2
        w_P = w_P - size * step_P
        if slope_P @ step_P < 1e-10:
            break
    return w_P[:-1], float(w_P[-1])


def cross_validated(
    states_LND: np.ndarray, labels: Sequence[bool], clusters: Sequence[Hashable], seed: int = 0
) -> Probed:
    """A probe's opinion of each item, learnt from the items of other clusters.

    Clusters are dealt into `FOLDS` folds. The layer of a fold is the one whose probe, learnt
    without this fold and the next, has the highest AUROC on the next.

    Args:
      states_LND: of each layer and item.
      labels: 0 or 1 of each item.
      clusters: what each item shares with others; at least `FOLDS` of them.
      seed: of the dealing.

    Raises:
      ValueError: fewer clusters than folds.
    """
    y_N = np.asarray(labels, np.float64)
    numbers = {one: i for i, one in enumerate(dict.fromkeys(clusters))}
    if len(numbers) < FOLDS:
        raise ValueError(f"{len(numbers)} clusters cannot be dealt into {FOLDS} folds")
    dealt = np.random.default_rng(seed).permutation(len(numbers)) % FOLDS
    fold_N = dealt[[numbers[one] for one in clusters]]
    by_layer = np.zeros(states_LND.shape[:2])
    right = np.zeros((FOLDS, len(states_LND)))
    for layer, x_ND in enumerate(states_LND):
        for fold in range(FOLDS):
            own, following = fold_N == fold, fold_N == (fold + 1) % FOLDS
            by_layer[layer, own] = _opinion(x_ND, y_N, ~own, own)
            inner = _opinion(x_ND, y_N, ~(own | following), following)
            right[fold, layer] = auroc(inner, y_N[following])
    chosen = np.nan_to_num(right).argmax(1)
    score_N = by_layer[chosen[fold_N], np.arange(len(y_N))]
    return Probed(score_N, chosen.tolist(), by_layer)


def _opinion(x_ND, y_N, train_N, test_N) -> np.ndarray:
    """The log-odds of the items `test_N`, of a probe learnt from those of `train_N`."""
    mean_D, std_D = x_ND[train_N].mean(0), x_ND[train_N].std(0)
    x_ND = (x_ND - mean_D) / np.where(std_D > 1e-5 * (1 + np.abs(mean_D)), std_D, np.inf)
    w_D, b = logistic(x_ND[train_N], y_N[train_N])
    return x_ND[test_N] @ w_D + b


def _place(name: str) -> int:
    """Where a state stands in the network: the embedding first, its last hidden state last."""
    layer = re.search(r"\d+", name)
    return int(layer[0]) if layer else -1 if name == "embedding" else 1 << 30


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(config: ModelConfig, layers: tuple[int, ...], params, tokens_NS, segments_NS):
    """Name → the state at each text's last place, float32 [N, D]."""
    model, found = bind(skeleton(config), params), {}
    wanted = {"embedding", *(f"blocks.{layer}.residual_after" for layer in layers)}
    tap = reading(found, wanted.__contains__)
    last_x_NSD, _ = model.forward(Text.of(tokens_NS, segments_BT=segments_NS), None, None, tap)
    if not any(name.startswith("blocks.") for name in found):
        found["last hidden state"] = last_x_NSD
    last_N11 = segments_NS.sum(1)[:, None, None] - 1
    return {
        name: jnp.take_along_axis(x_NSD.astype(jnp.float32), last_N11, 1)[:, 0]
        for name, x_NSD in found.items()
    }

"""Where a variable lives: interchange interventions in a learnt subspace, and linear probes.

An interchange intervention (Geiger et al. 2021) runs a base text with a part of an activation of a
source text; if that part holds a variable, the answer becomes the counterfactual one. Distributed
alignment search (Geiger et al. 2024, "DAS") learns the part: an orthonormal basis R [D, k] and

    x ← x_base + R Rᵀ (x_source − x_base)

A search can also find what is not there. So it is always repeated on the same model with random
parameters, and with arbitrary labels; what it finds counts only where those stay at chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import Path, Positive, check
from lm.evaluation import statistics as st
from lm.evaluation.probe import cross_validated, states
from lm.evaluation.statistics import Estimate
from lm.evaluation.subject import Subject
from lm.evaluation.uncertainty import auroc
from lm.models import Model, bind, init, param_specs
from lm.models.activations import sites
from lm.models.hooks import reading, replacing
from lm.parallel.sharding import ParamSpec
from lm.training.config import OptimizerConfig
from lm.training.optimizer import make_optimizer

_AT_ONCE = 256  # pairs that are read together


@dataclasses.dataclass(frozen=True)
class InterchangeSettings:
    """The search for a variable: distributed alignment search, with its controls."""

    path: Path = ""  # lines of {"base": …, "source": …, "label": one token}; "": no search
    site: str = ""  # the activation that is searched; "": the stream after the middle block
    place: int = -1  # of the texts; they are all of one length
    size: Positive = 1  # dimensions of the subspace
    steps: Positive = 200  # of the search


class Pairs(NamedTuple):
    """Base and source texts, and the token that is right after the interchange."""

    base_NT: np.ndarray
    source_NT: np.ndarray
    label_N: np.ndarray

    def some(self, chosen: np.ndarray) -> Pairs:
        """Those of these numbers, or where true."""
        return Pairs(*(x[chosen] for x in self))


class Alignment(NamedTuple):
    """What a search found, and what its controls found."""

    basis_DK: np.ndarray
    found: Estimate  # interchange intervention accuracy, of texts held out
    random_parameters: Estimate  # the same search in a model that knows nothing
    arbitrary_labels: Estimate  # and for labels that mean nothing
    chance: float  # of the commonest label


def interchanged(
    model: Model, basis_DK: jax.Array, pairs: Pairs, site: str, place: int
) -> jax.Array:
    """Logits [N, V] at the base's end after the interchange of a subspace at one place."""
    read: dict[str, jax.Array] = {}
    model(pairs.source_NT, tap=reading(read, lambda name: name == site))
    source_ND = read[site][:, place]

    def moved(x_NTD):
        differ_NK = (source_ND - x_NTD[:, place]) @ basis_DK
        return x_NTD.at[:, place].add((differ_NK @ basis_DK.T).astype(x_NTD.dtype))

    return model(pairs.base_NT, tap=replacing({site: moved}))[:, -1]


def search(
    skeleton: Model,
    params: Mapping[str, jax.Array],
    pairs: Pairs,
    site: str,
    place: int,
    size: int,
    steps: int = 200,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> np.ndarray:
    """The basis [D, k], k = `size`, whose interchange makes the labels likeliest, by AdamW."""
    width = skeleton.config.width
    specs = {"basis": ParamSpec((width, size), ("embed", None), None)}
    settings = OptimizerConfig(learning_rate=learning_rate, weight_decay=0.0, final_fraction=0.0)
    optimizer = make_optimizer(settings, steps, specs)

    def loss(free, params, batch):
        basis_DK = jnp.linalg.qr(free["basis"])[0]
        logits_NV = interchanged(bind(skeleton, params), basis_DK, batch, site, place)
        return -jax.nn.log_softmax(logits_NV)[jnp.arange(len(batch.label_N)), batch.label_N].mean()

    @jax.jit
    def step(free, state, params, batch):
        updates, state = optimizer.update(jax.grad(loss)(free, params, batch), state, free)
        return {"basis": free["basis"] + updates["basis"]}, state

    rng = np.random.default_rng(seed)
    free = {"basis": jnp.asarray(rng.normal(size=(width, size)), jnp.float32)}
    state = optimizer.init(free)
    for _ in range(steps):
        batch = pairs.some(rng.integers(len(pairs.label_N), size=batch_size))
        free, state = step(free, state, params, batch)
    return np.asarray(jnp.linalg.qr(free["basis"])[0])


def align(
    skeleton: Model,
    params: Mapping[str, jax.Array],
    pairs: Pairs,
    site: str,
    size: int,
    place: int = -1,
    held_out: float = 0.3,
    seed: int = 0,
    **settings,
) -> Alignment:
    """Distributed alignment search with its two controls.

    Pairs are held out by their base text: none is in both parts.

    Args:
      site: the name of a residual stream or of what is added to one, with axes BTD.
      size: dimensions of the subspace.
      place: of the text, where it is looked for.
      held_out, seed: share of the base texts that the accuracy is of; of all that is drawn.
      **settings: as of `search`.

    Raises:
      ConfigError: no such site, or too few texts.
    """
    axes = sites(skeleton).get(site)
    check(axes == "BTD", f"site={site!r} has the axes {axes}: name a residual stream, BTD")
    check(0 < size <= skeleton.config.width, f"size={size} is not in 1 … {skeleton.config.width}")
    rng = np.random.default_rng(seed)
    texts, text_N = np.unique(pairs.base_NT, axis=0, return_inverse=True)
    check(len(texts) > 1, "all pairs have the same base text: none could be held out")
    count = min(max(1, round(held_out * len(texts))), len(texts) - 1)
    test_N = np.isin(text_N.reshape(-1), rng.permutation(len(texts))[:count])
    nothing = init(param_specs(skeleton), jax.random.key(seed))
    arbitrary = pairs._replace(label_N=rng.permutation(pairs.label_N))

    @jax.jit
    def right(params, basis_DK, batch):
        logits_NV = interchanged(bind(skeleton, params), basis_DK, batch, site, place)
        return jnp.argmax(logits_NV, -1) == batch.label_N

    def accuracy(params, pairs):
        basis_DK = search(
            skeleton, params, pairs.some(~test_N), site, place, size, seed=seed, **settings
        )
        held, hits = pairs.some(test_N), []
        for first in range(0, len(held.label_N), _AT_ONCE):
            part = held.some(slice(first, first + _AT_ONCE))
            hits += [*np.asarray(right(params, basis_DK, part), float)]
        return basis_DK, st.share(hits, text_N.reshape(-1)[test_N].tolist())

    basis_DK, found = accuracy(params, pairs)
    controls = accuracy(nothing, pairs)[1], accuracy(params, arbitrary)[1]
    commonest = np.bincount(pairs.label_N[test_N]).max() / test_N.sum()
    return Alignment(basis_DK, found, *controls, float(commonest))


class Probe(NamedTuple):
    """What linear probes read of each layer: areas under the ROC curve."""

    names: list[str]
    found: list[float]
    shuffled: list[float]  # of labels dealt anew to the texts
    random_parameters: list[float]


def probe(
    subject: Subject,
    texts: Sequence[Sequence[int]],
    labels: Sequence[bool],
    groups: Sequence[Hashable],
    seed: int = 0,
) -> Probe:
    """Cross-validated probes of each layer at each text's last token, with two controls.

    No group, such as a story, is in both what a probe learns from and what it is asked
    (`lm.evaluation.probe.cross_validated`).

    Raises:
      ConfigError: fewer than five groups, or one label alone.
    """
    check(len({*groups}) >= 5, f"{len({*groups})} groups are too few for probes: give at least 5")
    check(len({*map(bool, labels)}) == 2, "all labels are the same: a probe needs both")
    nothing = init(param_specs(subject.run.skeleton), jax.random.key(seed))
    blank = subject.at(dataclasses.replace(subject.run, params=nothing))
    rng = np.random.default_rng(seed)
    found: list[list[float]] = []
    names, states_LND = states(subject, texts)
    for read_LND, some in (
        (states_LND, labels),
        (states_LND, rng.permutation(np.asarray(labels, bool))),
        (states(blank, texts)[1], labels),
    ):
        by_layer = cross_validated(read_LND, some, groups, seed).by_layer
        found.append([auroc(score_N, some) for score_N in by_layer])
    return Probe(names, *found)

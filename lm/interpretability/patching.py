"""Causes: what changes when activations of one text are put into the run of another.

A clean text and a corrupt one, alike but for what matters, and a metric M of the logits, such as a
difference of two. The effect of a change is in units of the way from corrupt to clean:

    effect = (M − M_corrupt) / (M_clean − M_corrupt)

Activation patching (Vig et al. 2020; Meng et al. 2022) runs the corrupt text with some activations
of the clean one; attribution patching (Nanda 2023; Kramár et al. 2024) is its first order, by one
backward pass for all of them: (a_clean − a_corrupt) · ∇M at corrupt. What is frozen (attention
patterns, norms' scales) stays in all runs what it is in the corrupt one; then a model whose MLPs
are linear is linear, and the two are the same.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check, nearest
from lm.interpretability.lenses import readable
from lm.models import Model, bind
from lm.models.activations import sites
from lm.models.hooks import Tap, no_tap

Metric = Callable[[jax.Array], jax.Array]  # logits [B, T, V] → a number of each row [B]
Array = jax.Array | np.ndarray
_NONE: Mapping[str, jax.Array] = {}


def logit_difference(right_B: Array, wrong_B: Array, place: int = -1) -> Metric:
    """The logit of one token less that of another, at one place of each row."""

    def metric(logits_BTV):
        rows = jnp.arange(len(right_B))
        return logits_BTV[rows, place, right_B] - logits_BTV[rows, place, wrong_B]

    return metric


def probability(right_B: Array, place: int = -1) -> Metric:
    """The probability of a token, at one place of each row."""
    return lambda logits: jax.nn.softmax(logits)[jnp.arange(len(right_B)), place, right_B]


@dataclasses.dataclass(frozen=True, eq=False)
class Contrast:
    """Two texts of a model, token by token alike in length, and what is asked of them.

    Attributes:
      skeleton, params: the model.
      clean_BT, corrupt_BT: token ids.
      metric: whose mean over rows is M.
      freeze: names, `*` for anything, of what stays as in the corrupt run.
      noise_BTD: added to the corrupt run's embedding, if anything.
    """

    skeleton: Model
    params: Mapping[str, jax.Array]
    clean_BT: Array
    corrupt_BT: Array
    metric: Metric
    freeze: Sequence[str] = ()
    noise_BTD: Array | None = None

    def __post_init__(self):
        clean, corrupt = np.shape(self.clean_BT), np.shape(self.corrupt_BT)
        readable(self.skeleton)
        check(clean == corrupt, f"the clean text has the shape {clean}, the corrupt one {corrupt}")

    @functools.cached_property
    def sites(self) -> dict[str, str]:
        """Every activation of the model → its axes (`lm.models.activations.sites`)."""
        return sites(self.skeleton)

    def matching(self, patterns: str | Sequence[str]) -> dict[str, str]:
        """Name → axes, of `sites`; raises `ConfigError` where none matches."""
        known, found = self.sites, {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            fits = {n: axes for n, axes in known.items() if fnmatch.fnmatchcase(n, pattern)}
            check(
                bool(fits), f"{pattern!r} is no activation of this model{nearest(pattern, known)}"
            )
            found |= fits
        return found

    def measure(
        self, params, tokens_BT: Array, tap: Tap = no_tap, held: Mapping = _NONE
    ) -> jax.Array:
        """M of a text, with activations `held`; the corrupt one's noise is in `corrupted`."""

        def both(name, value):
            return tap(name, held.get(name, value))

        return jnp.mean(self.metric(bind(self.skeleton, params)(tokens_BT, tap=both)))

    def corrupted(self, tap: Tap) -> Tap:
        """`tap` in the corrupt run: its noise comes first."""
        if self.noise_BTD is None:
            return tap
        return lambda name, x: tap(name, x + self.noise_BTD if name == "embedding" else x)

    def held(self, params) -> dict[str, jax.Array]:
        """What is frozen, of the corrupt run."""
        names = self.matching(self.freeze) if self.freeze else {}
        return self.values(params, self.corrupt_BT, names, {}, corrupt=True)[1] if names else {}

    def values(self, params, tokens_BT, names, held, corrupt=False):
        """M of a run, and its named activations."""
        found: dict[str, jax.Array] = {}

        def tap(name, value):
            if name in names:
                found[name] = value
            return value

        tap = self.corrupted(tap) if corrupt else tap
        return self.measure(params, tokens_BT, tap, held), found

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        """M of the clean and of the corrupt run; raises `ConfigError` where they are the same."""

        @jax.jit
        def both(params):
            held = self.held(params)
            clean = self.values(params, self.clean_BT, {}, held)[0]
            return clean, self.values(params, self.corrupt_BT, {}, held, corrupt=True)[0]

        clean, corrupt = map(float, both(self.params))
        check(clean != corrupt, f"clean and corrupt text both come to {clean}: nothing to explain")
        return clean, corrupt

    def effect(self, m: Array) -> np.ndarray:
        """M in units of the way from corrupt (0) to clean (1)."""
        clean, corrupt = self.ends
        return (np.asarray(m) - corrupt) / (clean - corrupt)


def one_by_one(*shape: int) -> np.ndarray:
    """Masks [N, *shape] of which each chooses one place: for `activation_patching`."""
    return np.eye(int(np.prod(shape)), dtype=bool).reshape(-1, *shape)


def activation_patching(
    contrast: Contrast, site: str, masks: Array, batch_size: int = 16
) -> np.ndarray:
    """The effect of clean activations in the corrupt run, for each mask: [N].

    Args:
      site: the name of what is patched, with `*` for its layers; `sites` has their axes.
      masks: [N, layers, …]: of each run, whether a layer's value is patched; further axes are those
        of the site after the batch, such as places, or places and heads, of which the last may be
        left out, and an axis of size one stands for all.
      batch_size: runs at a time.
    """
    names = [*contrast.matching(site)]

    @jax.jit
    def runs(params, masks_N):
        held = contrast.held(params)
        clean = contrast.values(params, contrast.clean_BT, names, held)[1]

        def patched(mask):
            def tap(name, value):
                if name not in names:
                    return value
                chosen = mask[names.index(name)][None]
                chosen = chosen.reshape(chosen.shape + (1,) * (value.ndim - chosen.ndim))
                return jnp.where(chosen, clean[name], value)

            return contrast.measure(params, contrast.corrupt_BT, contrast.corrupted(tap), held)

        return jax.lax.map(patched, masks_N, batch_size=min(batch_size, len(masks_N)))

    masks = jnp.asarray(masks, bool)
    check(masks.shape[1] == len(names), f"masks are of {masks.shape[1]} layers, not {len(names)}")
    return contrast.effect(runs(contrast.params, masks))


def attribution_patching(contrast: Contrast, names: str | Sequence[str]) -> dict[str, np.ndarray]:
    """The effect, to first order, of patching each place (and head) of each activation.

    Returns:
      Name → effects with the site's axes but the first and the last: [T] of a stream, [T, H] of
      heads, [H, T] of a pattern; summed over rows of the batch as M is their mean.
    """
    wanted = contrast.matching(names)

    @jax.jit
    def scores(params):
        held = contrast.held(params)
        clean = contrast.values(params, contrast.clean_BT, wanted, held)[1]
        corrupt = contrast.values(params, contrast.corrupt_BT, wanted, held, corrupt=True)[1]

        def m(change):
            tap = contrast.corrupted(lambda name, x: x + change[name] if name in change else x)
            return contrast.measure(params, contrast.corrupt_BT, tap, held)

        slope = jax.grad(m)(jax.tree.map(jnp.zeros_like, corrupt))
        change = jax.tree.map(lambda a, b, s: (a - b) * s, clean, corrupt, slope)
        return {name: value.sum((0, -1), dtype=jnp.float32) for name, value in change.items()}

    clean, corrupt = contrast.ends
    return {n: np.asarray(x) / (clean - corrupt) for n, x in scores(contrast.params).items()}


class Trace(NamedTuple):
    """What `causal_tracing` finds."""

    clean: float  # the probability of the token
    corrupt: float  # with noise on the subject
    effects: dict[str, np.ndarray]  # site → probability gained by restoring [layers, T]


def causal_tracing(
    skeleton: Model,
    params: Mapping[str, jax.Array],
    tokens_T: Sequence[int],
    subject: tuple[int, int],
    token: int,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
) -> Trace:
    """Where a fact is recalled (Meng et al. 2022, "ROME", §2).

    The subject's embeddings get normal noise of three standard deviations of the token table's
    numbers, and so the token becomes improbable; then the clean stream after one block, or what
    `window` layers of attention or MLP around one write, is restored at one place.

    Args:
      tokens_T: the prompt.
      subject: its places, from the first to before the last.
      token: whose probability is traced.
      samples, window, seed: of the noise, over which probabilities are means; layers restored.
    """
    rows, config = np.tile(np.asarray(tokens_T, np.int32), (samples, 1)), skeleton.config
    noise_BTD = np.zeros((*rows.shape, config.width), np.float32)
    shape = (samples, subject[1] - subject[0], config.width)
    drawn = np.random.default_rng(seed).normal(size=shape)
    noise_BTD[:, slice(*subject)] = 3 * float(jnp.std(params["embedding.tokens"])) * drawn
    metric = probability(np.full(samples, token))
    contrast = Contrast(skeleton, params, rows, rows, metric, noise_BTD=noise_BTD)
    L, T = config.num_layers, rows.shape[1]
    ahead_LL = np.arange(L) - np.arange(L)[:, None]
    effects: dict[str, Any] = {}
    for site, width in (
        ("residual_after", 1),
        ("mlp.output", window),
        ("attention.output", window),
    ):
        if f"blocks.0.{site}" in contrast.sites:
            near_LL = (ahead_LL >= -(width // 2)) & (ahead_LL < width - width // 2)
            masks = np.einsum("lm,tu->ltmu", near_LL, np.eye(T, dtype=bool)).reshape(L * T, L, T)
            gained = activation_patching(contrast, f"blocks.*.{site}", masks)
            clean, corrupt = contrast.ends
            effects[site] = gained.reshape(L, T) * (clean - corrupt)
    return Trace(*contrast.ends, effects)

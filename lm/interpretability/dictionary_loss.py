"""What a sparse dictionary is trained to do: rebuild its targets from few features.

Inputs and targets are scaled so that E‖x‖² = E‖y − ȳ‖² = D (`lm.interpretability.
dictionary_training`); then a layer's error ‖y − ŷ‖²/D is its fraction of variance unexplained, and
no coefficient depends on width or layer. To each token's error, summed over layers, come:

    relu        λ Σ a ‖W_dec‖ / √D         (Bricken et al. 2023; with norms, Conerly et al. 2024)
    jumprelu    λ Σ 1[z > θ], θ learnt by straight-through gradients  (Rajamanoharan et al. 2024b)
                or λ Σ tanh(4 a ‖W_dec‖)            (Anthropic, Circuits Updates, January 2025)
    topk        nothing: k features of each token are kept            (Gao et al. 2024)
    batch_topk  nothing: k a token on average over the batch          (Bussmann et al. 2024)
    gated       λ Σ relu(π) ‖W_dec‖ / √D, and the error of what the gates π alone would rebuild from
                a decoder held fixed                                  (Rajamanoharan et al. 2024a)

and, of any of them, where features are dead, the error of rebuilding what is left over from the
dead features that are nearest to firing (AuxK, Gao et al. 2024, A.2). With `prefixes` the error is
the mean over nested dictionaries of the first features (Matryoshka, Bussmann et al. 2025).

Which features count as large is always read from a ‖W_dec‖, so that no feature gains by a small
activation and a long vector.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lm.config import AboveZero, Count, NotNegative, Positive, Share, Size, check
from lm.interpretability import dictionaries
from lm.interpretability.dictionaries import Dictionary, Kind, beside, keep_largest, pairs
from lm.models.params import declare

_TANH = 4.0  # the slope of the tanh penalty at zero
_SIGN, _BITS = 31, 20  # where a float32's sign is; bits behind it that `nth_largest` finds


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
    """The `dictionary` section: what is read, what for, and how few features may fire."""

    kind: Kind = "transcoder"
    site: str = "residual_after"  # of a block; what a sparse autoencoder reads and rebuilds
    layers: tuple[Count, ...] = ()  # of the model, rising; (): all
    features: Size = 1024  # of each layer
    activation: Literal["relu", "jumprelu", "topk", "batch_topk", "gated"] = "batch_topk"
    k: Positive = 16  # topk, batch_topk: features a token and layer
    sparsity: NotNegative = 1e-3  # the others: λ
    sparsity_warmup: Share = 0.2  # share of the steps in which λ rises from 0
    penalty: Literal["step", "tanh"] = "step"  # jumprelu: what counts a feature
    bandwidth: AboveZero = 1.0  # jumprelu: width ε of the straight-through gradient
    threshold: AboveZero = 1.0  # jumprelu, gated: what a feature must reach at the start
    prefixes: tuple[Positive, ...] = ()  # sizes of nested dictionaries beside the whole, rising
    skip: bool = False  # a linear path W_skip from what is read to what is rebuilt
    auxiliary: NotNegative = 1 / 32  # coefficient of the dead features' error
    dead_after: Positive = 200_000  # tokens, over all devices, without firing

    def validate(self, prefix: str = "config.dictionary") -> None:
        """Raises ConfigError where fields contradict each other."""
        check(
            self.k <= self.features,
            f"{prefix}.k={self.k} is more than {prefix}.features={self.features}",
        )
        rising = (0, *self.prefixes, self.features)
        check(
            all(a < b for a, b in itertools.pairwise(rising)),
            f"{prefix}.prefixes={self.prefixes} must rise, to less than features={self.features}",
        )
        layers = self.layers
        check(
            all(a < b for a, b in itertools.pairwise(layers)),
            f"{prefix}.layers={layers} must rise, each once",
        )
        check(
            not (self.skip and self.kind == "sae"),
            f"{prefix}.skip=True lets kind='sae' copy what it reads: use kind='transcoder'",
        )


class Trainable(nnx.Module):
    """The parameters of a dictionary in training; a skeleton until `lm.models.bind`.

    Args:
      config: the section.
      num_layers, width: L and D.
    """

    def __init__(self, config: DictionaryConfig, num_layers: int, width: int):
        L, D, F, P = num_layers, width, config.features, len(pairs(config.kind, num_layers))
        zeros, unit = jax.nn.initializers.zeros, jax.nn.initializers.normal(D**-0.5)
        self.config, self.num_layers = config, num_layers
        read, written = ("layers", "embed", "mlp"), ("layers", "mlp", "embed")
        self.W_enc = declare((L, D, F), read, unit)
        gated = config.activation == "gated"
        bias = jax.nn.initializers.constant(-config.threshold if gated else 0.0)
        self.b_enc = declare((L, F), ("layers", "mlp"), bias)
        writes = jax.nn.initializers.normal(0.5 * (D * P / L) ** -0.5)
        self.W_dec = declare((P, F, D), written, writes)
        self.b_dec = declare((L, D), ("layers", "embed"), zeros)
        if config.activation == "jumprelu":
            start = jax.nn.initializers.constant(jnp.log(config.threshold))
            self.log_threshold = declare((L, F), ("layers", "mlp"), start)
        if config.activation == "gated":
            self.log_gain = declare((L, F), ("layers", "mlp"), zeros)
            self.b_gate = declare((L, F), ("layers", "mlp"), zeros)
        if config.skip:
            self.W_skip = declare((L, D, D), ("layers", None, "embed"), zeros)

    def norms(self) -> jax.Array:
        """‖W_dec‖ of each feature over all that it writes to, [L, F]."""
        squares_PF = jnp.sum(jnp.square(self.W_dec[...]), axis=-1)
        rows = jnp.array([k for k, _ in pairs(self.config.kind, self.num_layers)])
        return jnp.sqrt(jax.ops.segment_sum(squares_PF, rows, self.num_layers))

    def skipped(self, x_LND: jax.Array) -> jax.Array:
        """What reaches the targets without any feature: b_dec, and the skip path."""
        y_LND = beside(self.b_dec[...], x_LND)
        if self.config.skip:
            y_LND += jnp.einsum("lnd,lde->lne", x_LND, self.W_skip[...])
        return y_LND

    def decode(self, a_LNF: jax.Array) -> jax.Array:
        """What features write, [L, N, D]."""
        return dictionaries.decode(self.config.kind, a_LNF, self.W_dec[...])


def loss(
    model: Trainable,
    x_LND: jax.Array,
    y_LND: jax.Array,
    weights_N: jax.Array,
    dead_LF: jax.Array,
    sparsity: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of N tokens, and sums.

    Args:
      model: bound.
      x_LND, y_LND: what is read and what is to be rebuilt, scaled.
      weights_N: 1, or 0 where a token does not count.
      dead_LF: which features are dead.
      sparsity: λ now.

    Returns:
      The loss, and its parts `nats` (all of it), `weight` and `tokens` (Σ weights), `l0` (features
      that fired, mean over layers); and arrays for the training step: `fired` [L, F], how often;
      `cut` [L], batch_topk's lowest activation that was kept; `error`, `sums`, `squares`: of each
      layer Σ‖y − ŷ‖², Σ y [L, D] and Σ‖y‖².
    """
    config, D = model.config, x_LND.shape[-1]
    z_LNF = dictionaries.pre_activation(x_LND, model.W_enc[...], model.b_enc[...])
    norms_LF = model.norms()
    weights_1N1 = weights_N[None, :, None]
    a_LNF, penalty_LNF, cut_L = _fired(model, z_LNF, norms_LF, weights_1N1)
    passed_LND = model.skipped(x_LND)

    errors, rebuilt_LND = [], passed_LND
    for low, high in zip((0, *config.prefixes), (*config.prefixes, config.features)):
        part = a_LNF[..., low:high] if config.prefixes else a_LNF
        matrices = model.W_dec[...][:, low:high] if config.prefixes else model.W_dec[...]
        rebuilt_LND += dictionaries.decode(config.kind, part, matrices)
        errors.append(jnp.sum(jnp.square(y_LND - rebuilt_LND), -1))
    total_N = jnp.sum(sum(errors), 0) / (D * len(errors))
    if penalty_LNF is not None:
        total_N += sparsity * jnp.sum(penalty_LNF, (0, 2))
    if config.activation == "gated":
        fixed = jax.lax.stop_gradient(model.W_dec[...])
        gates_LNF = jax.nn.relu(z_LNF)
        alone_LND = dictionaries.decode(config.kind, gates_LNF, fixed)
        alone_LND += jax.lax.stop_gradient(passed_LND)
        total_N += jnp.sum(jnp.square(y_LND - alone_LND), (0, 2)) / D
    summed = jnp.sum(total_N * weights_N)
    if config.auxiliary:
        left_LND = jax.lax.stop_gradient(y_LND - rebuilt_LND) * weights_1N1

        def revived():
            ready_LNF = jnp.where(beside(dead_LF, z_LNF), z_LNF, -jnp.inf)
            sized_LNF = ready_LNF * beside(jax.lax.stop_gradient(norms_LF), z_LNF)
            cut_LN1 = jax.lax.top_k(sized_LNF, min(max(D // 2, 1), config.features))[0][..., -1:]
            nearest_LNF = (sized_LNF >= cut_LN1) & beside(dead_LF, z_LNF)
            told_LND = model.decode(jnp.where(nearest_LNF, z_LNF, 0)) * weights_1N1
            return jnp.sum(jnp.square(left_LND - told_LND)) / D

        summed += config.auxiliary * jax.lax.cond(jnp.any(dead_LF), revived, lambda: 0.0)

    fired_LNF = (a_LNF > 0) * weights_1N1
    weight = jnp.sum(weights_N)
    metrics = {
        "nats": summed,
        "weight": weight,
        "tokens": weight,
        "l0": jnp.sum(fired_LNF) / model.num_layers,
        "fired": jnp.sum(fired_LNF, 1),
        "cut": cut_L,
        "parts": jnp.float32(1),
        "error": jnp.sum(errors[-1] * weights_N, 1),
        "sums": jnp.sum(y_LND * weights_1N1, 1),
        "squares": jnp.sum(jnp.square(y_LND) * weights_1N1, (1, 2)),
    }
    return summed, metrics


def _fired(model: Trainable, z_LNF, norms_LF, weights_1N1):
    """Activations, what the penalty sums, and batch_topk's cut; λ is not in it."""
    config, D = model.config, model.W_enc[...].shape[1]
    norms_L1F = norms_LF[:, None]
    none_L = jnp.zeros(z_LNF.shape[0])
    if config.activation == "relu":
        a_LNF = jax.nn.relu(z_LNF)
        return a_LNF, a_LNF * norms_L1F * D**-0.5, none_L
    if config.activation == "jumprelu":
        threshold_L1F = jnp.exp(model.log_threshold[...])[:, None]
        a_LNF = jump_relu(z_LNF, threshold_L1F, config.bandwidth)
        if config.penalty == "tanh":
            return a_LNF, jnp.tanh(_TANH * a_LNF * norms_L1F), none_L
        return a_LNF, step(z_LNF, threshold_L1F, config.bandwidth), none_L
    if config.activation == "gated":
        gain_L1F, b_L1F = jnp.exp(model.log_gain[...])[:, None], model.b_gate[...][:, None]
        # Magnitudes read with the gates' own directions, and a bias of their own.
        read_LNF = (z_LNF - model.b_enc[...][:, None]) * gain_L1F
        a_LNF = jnp.where(z_LNF > 0, jax.nn.relu(read_LNF + b_L1F), 0)
        return a_LNF, jax.nn.relu(z_LNF) * jax.lax.stop_gradient(norms_L1F) * D**-0.5, none_L
    sized_LNF = jax.lax.stop_gradient(jax.nn.relu(z_LNF) * norms_L1F) * (weights_1N1 > 0)
    if config.activation == "topk":
        kept_LNF = keep_largest(sized_LNF, config.k) > 0
        return jnp.where(kept_LNF, z_LNF, 0), None, none_L
    count = config.k * jnp.sum(weights_1N1 > 0)
    cut_L = jax.vmap(nth_largest, (0, None))(sized_LNF, count)
    kept_LNF = (sized_LNF >= cut_L[:, None, None]) & (sized_LNF > 0)
    return jnp.where(kept_LNF, z_LNF, 0), None, cut_L


def nth_largest(values: jax.Array, n: jax.Array) -> jax.Array:
    """The n-th largest of all `values`, float32 ≥ 0, or up to 2⁻¹² of it less; 0 of too few.

    Found bit by bit, since such floats are ordered as their bits are: no sort, and on a mesh no
    more than a count travels.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)

    def body(i, found):
        tried = found | (jnp.int32(1) << (_SIGN - 1 - i))
        return jnp.where(jnp.sum(bits >= tried) >= n, tried, found)

    found = jax.lax.fori_loop(0, _BITS, body, jnp.int32(0))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


@jax.custom_vjp
def jump_relu(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """z where z > θ, else 0; ∂/∂θ is −(θ/ε) rect((z − θ)/ε), rect 1 within ±½ (eq. 11)."""
    return jnp.where(z > threshold, z, 0)


def _jump_forward(z, threshold, bandwidth):
    return jump_relu(z, threshold, bandwidth), (z, threshold, bandwidth)


def _jump_backward(saved, g):
    z, threshold, bandwidth = saved
    slope = -threshold / bandwidth * _rect(z, threshold, bandwidth)
    return g * (z > threshold), _summed(g * slope, threshold), None


jump_relu.defvjp(_jump_forward, _jump_backward)


@jax.custom_vjp
def step(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """1 where z > θ, else 0; ∂/∂θ is −(1/ε) rect((z − θ)/ε), ∂/∂z is 0 (eq. 12)."""
    return (z > threshold).astype(z.dtype)


def _step_forward(z, threshold, bandwidth):
    return step(z, threshold, bandwidth), (z, threshold, bandwidth)


def _step_backward(saved, g):
    z, threshold, bandwidth = saved
    slope = -_rect(z, threshold, bandwidth) / bandwidth
    return jnp.zeros_like(z), _summed(g * slope, threshold), None


step.defvjp(_step_forward, _step_backward)


def _rect(z, threshold, bandwidth):
    return (jnp.abs(z - threshold) < bandwidth / 2).astype(z.dtype)


def _summed(g, like):
    """A gradient of `like`, which was broadcast where it has one."""
    axes = [i for i, size in enumerate(like.shape) if size == 1]
    return jnp.sum(g, axis=tuple(axes), keepdims=True)


def folded(
    config: DictionaryConfig,
    params: Mapping[str, jax.Array],
    cut_L: jax.Array,
    read_scale_L: jax.Array,
    write_scale_L: jax.Array,
    layers: tuple[int, ...],
    sites: tuple[str, str],
) -> Dictionary:
    """The dictionary of raw activations that trained parameters are.

    Training saw x·read_scale and y·write_scale. Of each layer a feature's activation becomes what
    it is to add: its decoder vector's norm, over all that it writes to, is 1 in units of its own
    layer's target (exactly, unless it writes to others too); W_enc, b_enc and θ take that up.

    Args:
      params: as of `Trainable`.
      cut_L: batch_topk's running cut.
      read_scale_L, write_scale_L: the scales.
      layers, sites: as of `Dictionary`.
    """
    W_enc, b_enc, W_dec = params["W_enc"], params["b_enc"], params["W_dec"]
    L = W_enc.shape[0]
    threshold = jnp.zeros_like(b_enc)
    if config.activation == "jumprelu":
        threshold = jnp.exp(params["log_threshold"])
    if config.activation == "gated":  # z > 0 of the gate, said of the magnitude's pre-activation
        gain = jnp.exp(params["log_gain"])
        W_enc, threshold = W_enc * gain[:, None], params["b_gate"] - gain * b_enc
        b_enc = params["b_gate"]
    where = pairs(config.kind, L)
    squares = jax.ops.segment_sum(
        jnp.sum(jnp.square(W_dec), -1), jnp.array([k for k, _ in where]), L
    )
    size = jnp.sqrt(squares) / write_scale_L[:, None]  # of a feature that says 1, raw
    if config.activation == "batch_topk":
        threshold = jnp.broadcast_to(cut_L[:, None] / jnp.sqrt(squares), b_enc.shape)
    unit = jnp.where(size > 0, size, 1)
    source_P, target_P = (jnp.array(each) for each in zip(*where))
    W_dec = W_dec / unit[source_P][..., None] / write_scale_L[target_P][:, None, None]
    W_skip = params.get("W_skip")
    if W_skip is not None:
        W_skip = W_skip * (read_scale_L / write_scale_L)[:, None, None]
    return Dictionary(
        W_enc=W_enc * read_scale_L[:, None, None] * unit[:, None],
        b_enc=b_enc * unit,
        W_dec=W_dec,
        b_dec=params["b_dec"] / write_scale_L[:, None],
        threshold=threshold * unit,
        W_skip=W_skip,
        kind=config.kind,
        layers=tuple(layers),
        source=sites[0],
        target=sites[1],
        k=config.k if config.activation == "topk" else 0,
    )

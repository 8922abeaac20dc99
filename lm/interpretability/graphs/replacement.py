"""The local replacement model: a Transformer made linear around one text (Ameisen et al. 2025).

On one prompt, attention patterns and the denominators of all norms are held at what they were, and
each MLP's output is split into what a transcoder's active features write and an error that makes up
for the rest. What is left is linear in its sources: token and position embeddings, features,
errors, and biases. Its values equal the original's, and every target, be it the pre-activation of a
feature, a logit less the mean logit, a query or a key, is a sum over sources (`attribution`).

Values have the names of `lm.models.activations`, here without a batch axis: [T, D].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check, check_choice
from lm.interpretability.attribution import held
from lm.interpretability.dictionaries import Dictionary, decode
from lm.interpretability.heads import direct_heads
from lm.models import ModelConfig, Transformer, bind, skeleton
from lm.models.activations import trace
from lm.models.attention.attention import rotate
from lm.models.params import unstack
from lm.models.positions import rotary_angles

_KEPT = ("embedding.*", "*.attention.pattern", "*.mlp.output", "logits")
_SCORES = ("*.attention.query", "*.attention.key", "*.attention.scores")


class Sources(NamedTuple):
    """What the linear model is linear in, all together."""

    tokens_TD: jax.Array
    positions_TD: jax.Array
    written_LTD: jax.Array  # by features and errors, where an MLP's output was
    biases_NT: jax.Array  # N = L + 1: what multiplies the biases of a layer, and of the head: 1


class Active(NamedTuple):
    """The features that are not zero, by layer, position and number: one each."""

    layer_N: np.ndarray  # of the dictionary
    position_N: np.ndarray
    index_N: np.ndarray
    value_N: np.ndarray  # what it says


@dataclasses.dataclass(frozen=True, eq=False)
class Local:
    """A model, a transcoder and a text, frozen; `freeze` makes one.

    Attributes:
      skeleton, params, dictionary: in the dtype that all is computed in.
      tokens_T: the prompt.
      frozen: name → value of the patterns and of the norms' `inverse_scale`.
      sources: as they are in the original.
      errors_LTD: the part of `sources.written_LTD` that no active feature writes.
      active: the features that write the rest.
      original: name → value, of the model as it is.
    """

    skeleton: Transformer
    params: dict[str, jax.Array]
    dictionary: Dictionary
    tokens_T: np.ndarray
    frozen: dict[str, jax.Array]
    sources: Sources
    errors_LTD: jax.Array
    active: Active
    original: dict[str, jax.Array]

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.skeleton.config

    @property
    def reads(self) -> tuple[str, ...]:
        """Where features read, layer by layer, and the output head."""
        return (*self.dictionary.sources, _last(self.config))

    def compiled(self, function: Callable) -> Callable:
        """`function(linear, …)` as a program of the rest; `linear` takes sources and a gate."""

        @jax.jit
        def program(params, dictionary, frozen, *arguments):
            model = bind(self.skeleton, params)
            return function(functools.partial(_linear, model, dictionary, frozen), *arguments)

        def call(*arguments):
            with jax.default_matmul_precision("highest"):
                return program(self.params, self.dictionary, self.frozen, *arguments)

        return call

    @functools.cached_property
    def values(self) -> Callable[[Sources], dict[str, jax.Array]]:
        """The linear model: sources → name → value; `original`'s own give its values again."""
        return self.compiled(lambda linear, sources: linear(sources))

    def logits(self, values: dict[str, jax.Array]) -> jax.Array:
        """[T, V], of a call of `values`, in the original's soft cap."""
        model, last_TD = bind(self.skeleton, self.params), values[_last(self.config)]
        with jax.default_matmul_precision("highest"):
            return model.unembed(last_TD[None])[0]

    @functools.cached_property
    def decoders(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each layer of the dictionary what its active features write, padded with zeros.

        Pairs of the model's layers that are written to, and of arrays [T, n, those, D], n the most
        features at one position; `slots` says which feature stands where.
        """
        return [found[:2] for found in self._decoded]

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """[N]: where each feature stands among the [T, n] of all `decoders`, flat."""
        first, slots = 0, []
        for _, rows, places in self._decoded:
            slots.append(first + places)
            first += rows.shape[0] * rows.shape[1]
        return np.concatenate(slots)

    @functools.cached_property
    def _decoded(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return [self._decoder(layer) for layer in range(self.dictionary.num_layers)]

    def _decoder(self, layer: int):
        T, here = len(self.tokens_T), self.active.layer_N == layer
        position, index = self.active.position_N[here], self.active.index_N[here]
        counts = np.bincount(position, minlength=T)
        most = max(1, counts.max())
        place = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
        reached, W_RFD = self.dictionary.decoder(layer)
        W_RFD = np.asarray(W_RFD)
        rows = np.zeros((T, most, len(reached), W_RFD.shape[-1]), W_RFD.dtype)
        written_NRD = W_RFD[:, index].swapaxes(0, 1)
        rows[position, place] = written_NRD * self.active.value_N[here][:, None, None]
        layers = np.array(self.dictionary.layers)[list(reached)]
        return layers, rows, position * most + place


def freeze(
    model: Transformer,
    params: dict[str, jax.Array],
    dictionary: Dictionary,
    tokens_T: np.ndarray,
    max_features: int = 0,
) -> Local:
    """What a text makes of a model, held fast.

    Computed in float64 under `jax.enable_x64`, as all that is done with it must be then; else in
    float32.

    Args:
      model, params: a decoder's skeleton and parameters.
      dictionary: a transcoder of its MLPs, or of some: the others' outputs are errors.
      tokens_T: the prompt.
      max_features: of more active features those that write the longest vectors are kept, and the
        others' are counted among the errors; 0: all.

    Raises:
      ConfigError: a model that does not become linear, or a dictionary that is not of its MLPs.
    """
    _check(model.config, dictionary)
    dtype = jnp.result_type(float)
    config = dataclasses.replace(model.config, compute_dtype=dtype.name, dropout=0.0)
    model = skeleton(config)
    params, dictionary = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, dictionary))
    names = (*_KEPT, *_SCORES, *dictionary.sources, _last(config))
    names += () if config.norm == "none" else ("*inverse_scale",)

    @jax.jit
    def traced(params, dictionary, tokens_1T):
        found = trace(bind(model, params), tokens_1T, names=names)
        found = {name: value[0] for name, value in found.items()}
        return found, dictionary.encode(jnp.stack([found[n] for n in dictionary.sources]))

    tokens_T = np.asarray(tokens_T, np.int32)
    with jax.default_matmul_precision("highest"):
        original, a_LTF = traced(params, dictionary, tokens_T[None])
        a_LTF = np.array(a_LTF)
        lengths = np.zeros(a_LTF[:, 0].shape)
        for layer in range(dictionary.num_layers):
            lengths[layer] = np.linalg.norm(dictionary.decoder(layer)[1], axis=(0, 2))
        strength = (a_LTF * lengths[:, None]).ravel()
        if 0 < max_features < np.count_nonzero(strength):
            a_LTF.ravel()[np.argsort(-strength, kind="stable")[max_features:]] = 0
        kept_LTD = decode(dictionary.kind, jnp.asarray(a_LTF), dictionary.W_dec)
        written, errors = [], []
        for layer in range(config.num_layers):
            rest_TD = original[f"blocks.{layer}.mlp.output"]
            own = dictionary.layers.index(layer) if layer in dictionary.layers else None
            if own is not None:
                rest_TD = rest_TD - dictionary.b_dec[own] - _skipped(dictionary, own, original)
            written.append(rest_TD)
            errors.append(rest_TD if own is None else rest_TD - kept_LTD[own])
    tokens_TD = original["embedding.tokens"]
    sources = Sources(
        tokens_TD,
        original.get("embedding.positions", jnp.zeros_like(tokens_TD)),
        jnp.stack(written),
        jnp.ones((config.num_layers + 1, len(tokens_T)), dtype),
    )
    kept = ("inverse_scale", "pattern", "types")
    frozen = {name: x for name, x in original.items() if name.split(".")[-1] in kept}
    where = np.nonzero(a_LTF)
    active = Active(*where, a_LTF[where])
    errors = jnp.stack(errors)
    return Local(model, params, dictionary, tokens_T, frozen, sources, errors, active, original)


def _check(config: ModelConfig, dictionary: Dictionary) -> None:
    check(
        isinstance(config, ModelConfig)
        and config.cell == "attention"
        and config.architecture == "decoder"
        and config.has_output_head
        and config.feed_forward
        and config.table_width == config.width
        and not (config.num_experts or config.head_transform),
        "an attribution graph is of a decoder with MLPs and an output head: no experts, no "
        "recurrent network, no encoder, no reward model, no embeddings of another width",
    )
    direct_heads(config)
    width = dictionary.W_enc.shape[1]
    check(
        dictionary.kind != "sae" and dictionary.target == "mlp.output",
        f"the dictionary rebuilds {dictionary.target!r} from {dictionary.source!r}: a graph needs "
        "a transcoder, of target='mlp.output'",
    )
    check(
        width == config.width and max(dictionary.layers) < config.num_layers,
        f"the dictionary is of layers {dictionary.layers} of width {width}, and the model has "
        f"{config.num_layers} of width {config.width}",
    )
    norms = ("attention_norm.output", "mlp_norm.output")[: 1 if config.shared_norm else 2]
    norms = norms if config.norms_read else ()
    middle = () if config.parallel else ("residual_middle",)
    check_choice("source", dictionary.source, ("residual_before", *middle, *norms))


def _last(config: ModelConfig) -> str:
    """The name of what the output head reads."""
    last = f"blocks.{config.num_layers - 1}.residual_after"
    return "final_norm.output" if config.has_final_norm else last


def _skipped(dictionary: Dictionary, layer: int, values: dict[str, jax.Array]):
    """What a transcoder's skip connection writes."""
    if dictionary.W_skip is None:
        return 0.0
    return values[dictionary.sources[layer]] @ dictionary.W_skip[layer]


def _linear(model, dictionary, frozen, sources: Sources, heads_LH=None) -> dict[str, jax.Array]:
    """The frozen model's values: linear in `sources`; `heads_LH` multiplies heads' outputs."""
    config, values = model.config, {}
    L, T = sources.biases_NT.shape[0] - 1, sources.biases_NT.shape[1]
    heads_LH = jnp.ones((L, config.num_heads)) if heads_LH is None else heads_LH

    def norm(name, module, x, bias_T):
        x = held(module, x, frozen[f"{name}.inverse_scale"])
        if hasattr(module, "bias"):
            x += bias_T.reshape(T, *(1,) * (x.ndim - 1)) * module.bias[...]
        return values.setdefault(f"{name}.output", x)

    def attention(name, module, x_TD, bias_T, gate_H, kind):
        b = bias_T[:, None, None]
        angles = None
        if config.positions == "rotary" and kind.rotated:
            angles = rotary_angles(jnp.arange(T)[None], config, kind.local, jnp.full((1, 1), T))
        for part in ("query", "key"):
            asks = jnp.einsum("td,dhc->thc", x_TD, getattr(module, part)[...])
            if hasattr(module, f"{part}_bias"):
                asks += b * getattr(module, f"{part}_bias")[...]
            if config.qk_norm:
                asks = norm(f"{name}.{part}_norm", getattr(module, f"{part}_norm"), asks, bias_T)
            if angles is not None:
                asks = rotate(asks[None], angles)[0]
            values[f"{name}.{part}"] = asks * kind.query_scale if part == "query" else asks
        value_TKC = jnp.einsum("td,dkc->tkc", x_TD, module.value[...])
        if hasattr(module, "value_bias"):
            value_TKC += b * module.value_bias[...]
        pattern_HTS = frozen[f"{name}.pattern"]
        pattern = pattern_HTS.reshape(config.kv_heads, -1, *pattern_HTS.shape[1:])
        read = jnp.einsum("kgts,skc->tkgc", pattern, value_TKC).reshape(T, config.num_heads, -1)
        out_TD = jnp.einsum("thc,hcd->td", read * gate_H[:, None], module.output[...])
        return (
            out_TD + b[..., 0] * module.output_bias[...]
            if hasattr(module, "output_bias")
            else out_TD
        )

    def written(layer, bias_T):
        out_TD = sources.written_LTD[layer]
        if layer in dictionary.layers:
            own = dictionary.layers.index(layer)
            out_TD += bias_T[:, None] * dictionary.b_dec[own] + _skipped(dictionary, own, values)
        return out_TD

    x_TD = sources.tokens_TD + sources.positions_TD
    if config.token_types:
        x_TD += sources.biases_NT[0][:, None] * frozen["embedding.types"]
    if config.embedding_norm:
        x_TD = norm("embedding_norm", model.embedding.norm, x_TD, sources.biases_NT[0])
    post, before, after = config.norm_position == "post", config.norms_read, config.norms_written
    for layer, block in enumerate(unstack(model.blocks, L)):
        name, bias_T = f"blocks.{layer}", sources.biases_NT[layer]

        def normed(part, x_TD, applies, name=name, block=block, bias_T=bias_T):
            if not applies:
                return x_TD
            return norm(f"{name}.{part}", getattr(block, part), x_TD, bias_T)

        values[f"{name}.residual_before"] = x_TD
        read_TD = normed("attention_norm", x_TD, before)
        kind = config.layer_kind(layer)
        out_TD = attention(
            f"{name}.attention", block.attention, read_TD, bias_T, heads_LH[layer], kind
        )
        if config.parallel:
            normed("mlp_norm", x_TD, before and not config.shared_norm)
            x_TD = x_TD + out_TD + written(layer, bias_T)
        else:
            x_TD += normed("attention_post_norm", out_TD, after)
            x_TD = normed("attention_norm", x_TD, post)
            values[f"{name}.residual_middle"] = x_TD
            normed("mlp_norm", x_TD, before)
            x_TD += normed("mlp_post_norm", written(layer, bias_T), after)
            x_TD = normed("mlp_norm", x_TD, post)
        values[f"{name}.residual_after"] = x_TD
    if config.has_final_norm:
        norm("final_norm", model.final_norm, x_TD, sources.biases_NT[L])
    return values

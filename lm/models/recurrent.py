"""The networks before the Transformer: a state carried from token to token.

As a decoder, a language model of stacked cells (`lm.models.cells`). As an encoder-decoder, either
the encoder ends in one fixed vector that starts the decoder (Sutskever et al. 2014: it reads the
source backwards, so that the first word is read last), or it reads both ways, each with half the
width, and the decoder looks back at all its states (Bahdanau et al. 2015).

Layers are few here and always unrolled, whatever `scan_layers` says; time is the loop. Taps see

    embedding                        encoder.embedding
    blocks.0.projected, state        encoder.blocks.0.{forward,backward}.projected, state
    blocks.0.gates, memory           blocks.0.attention.pattern
    logits

and can replace what is made before or after the loop over time: embedding, projected, state (as the
next layer reads it) and logits. Gates, an LSTM's memory and attention's pattern can be read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lm.config import check
from lm.models.attention.paged import Paging
from lm.models.cells import (
    Annotations,
    Boundaries,
    Cells,
    Encoder,
    Noise,
    State,
    boundaries,
    drop_between,
    tapped,
    zeros,
)
from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.layers import embedding_initializer, split_key, weight_initializer
from lm.models.matmul import add_bias, compute_dtype, contract
from lm.models.params import declare, stack, unstack
from lm.models.text import Text, visible
from lm.models.transformer import LanguageModel
from lm.parallel.sharding import constrain

# Fields of a Transformer that would change what is computed, and what they are without one.
_REFUSED = {
    "token_types": 0,
    "embedding_norm": False,
    "num_experts": 0,
    "head_transform": False,
    "output_scale": 1.0,
    "logits_softcap": 0.0,
    "remat": "none",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """All that decoding remembers: each layer's state, and what attention reads of the source."""

    states_LBD: State
    keys_BSD: jax.Array | None = None
    values_BSD: jax.Array | None = None
    source_mask_BS: jax.Array | None = None

    def rows(self, index_N: jax.Array, source: bool = True) -> RecurrentCache:
        """The cache of a batch of which row n is this one's row `index_N[n]`.

        Without `source` what attention reads stays where it is: for rows that change places with
        others of the same source.
        """
        states_LBD = tuple(jnp.take(states_LBD, index_N, 1) for states_LBD in self.states_LBD)
        rest = dataclasses.replace(self, states_LBD=())
        if source:
            rest = jax.tree.map(lambda x: jnp.take(x, index_N, 0), rest)
        return dataclasses.replace(rest, states_LBD=states_LBD)

    def repeat(self, times: int) -> RecurrentCache:
        """The cache of a batch in which every row stands `times` times in a row."""
        return self.rows(jnp.repeat(jnp.arange(self.states_LBD[0].shape[1]), times))

    def copy(self, config: ModelConfig, pages_2: jax.Array, slots_2: jax.Array) -> RecurrentCache:
        """With the row of the first slot copied to the second; there are no pages."""
        del config, pages_2

        def copied(x, axis):
            row = jax.lax.dynamic_index_in_dim(x, slots_2[0], axis)
            return jax.lax.dynamic_update_index_in_dim(x, row, slots_2[1], axis)

        return self.by_axis(copied)

    def by_axis(self, function: Callable, *others: RecurrentCache) -> RecurrentCache:
        """`function(x, …, axis)` of every array, of those of others too, and its axis of rows."""
        states = [function(*each, 1) for each in zip(*(c.states_LBD for c in (self, *others)))]
        rest = [dataclasses.replace(cache, states_LBD=()) for cache in (self, *others)]
        rest = jax.tree.map(lambda *each: function(*each, 0), *rest)
        return dataclasses.replace(rest, states_LBD=tuple(states))


class Embedding(nnx.Module):
    """The token embedding."""

    def __init__(self, config: ModelConfig):
        shape, initializer = (config.vocab_size, config.width), embedding_initializer(config)
        self.tokens = declare(shape, ("vocab", "embed"), initializer)


class AdditiveAttention(nnx.Module):
    """Bahdanau et al. 2015, A.1.2: score(h, m) = score · tanh(h·query + m·key)."""

    def __init__(self, config: ModelConfig):
        D = config.width
        initializer, axes = weight_initializer(config, D, D), ("embed", "mlp")
        self.query = declare((D, D), axes, initializer)
        self.key = declare((D, D), axes, initializer)
        self.score = declare((D,), ("mlp",), weight_initializer(config, D, 1))


class AttentionalOutput(nnx.Module):
    """What the head reads: tanh(state·W + context·C + bias) (Luong et al. 2015, eq. 5).

    It takes the place of Bahdanau's maxout layer.
    """

    def __init__(self, config: ModelConfig):
        D = config.width
        initializer, axes = weight_initializer(config, D, D), ("mlp", "embed")
        self.state = declare((D, D), axes, initializer)
        self.context = declare((D, D), axes, initializer)
        self.bias = declare((D,), ("embed",), jax.nn.initializers.zeros)

    def __call__(self, x_TBD: jax.Array, context_TBD: jax.Array) -> jax.Array:
        """[T, B, D], in the compute dtype."""
        out = contract("tbd,de->tbe", x_TBD, self.state[...], jnp.float32)
        out += contract("tbd,de->tbe", context_TBD, self.context[...], jnp.float32)
        return jnp.tanh(add_bias(out, self.bias[...])).astype(x_TBD.dtype)


class Recurrent(LanguageModel):
    """A recurrent language model, or encoder and decoder; `config.cell` is rnn, gru or lstm.

    Every layer has `width` cells and the embedding has as many dimensions. With additive attention
    the bottom layer's last state asks and every layer reads what it finds (as in Wu et al. 2016).
    Positions need no telling: `positions_BT` is accepted and not read, but that in `extend` -1 is
    padding. `config.max_length` only bounds texts.

    Raises:
      ConfigError: a field that only a Transformer has.
    """

    def __init__(self, config: ModelConfig):
        _check(config)
        self.config = config
        D, both = config.width, config.architecture == "encoder_decoder"
        attends = both and config.cross_attention
        self.embedding = Embedding(config)
        if both:
            self.encoder = Encoder(config)
        if attends:
            self.attention = AdditiveAttention(config)
            self.output = AttentionalOutput(config)
        layer = Cells(config, D, attends=attends, started_by=D // 2 if attends else 0)
        self.blocks = stack(layer, config.num_layers)
        if not config.tie_embeddings:
            initializer = weight_initializer(config, D, config.vocab_size)
            self.head = declare((config.vocab_size, D), ("vocab", "embed"), initializer)
        if config.head_bias:
            initializer = jax.nn.initializers.zeros
            self.head_bias = declare((config.vocab_size,), ("vocab",), initializer)

    def forward(
        self,
        text: Text,
        source: Text | None = None,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, None]:
        """What the head reads [B, T, D], in the compute dtype; and None: there are no experts.

        Each document starts from a state of its own, padding changes no state, and a target sees
        the source of its own number.

        Raises:
          ConfigError: a prefix, which would have to be read before itself, or token types.
        """
        check(
            text.types_BT is None and text.prefix_BT is None,
            f"config.model.cell={self.config.cell!r} reads from left to right: objectives with a "
            "prefix or token types need cell='attention'",
        )
        limits = boundaries(text.segments_BT)
        if source is None:
            noise = None if dropout_key is None else Noise(dropout_key, text.rows_B)
            starts = [zeros(self.config, text.tokens_BT.shape[0], self.config.width)]
            starts *= self.config.num_layers
            return self._decode(text.tokens_BT, limits, starts, noise=noise, tap=tap)[0], None
        noise, source_noise = (
            None if key is None else Noise(key, text.rows_B) for key in split_key(dropout_key, 2)
        )
        memory_BSD, finals = self._encode(source.tokens_BT, source.segments_BT, source_noise, tap)
        mask_BTS = restarts = None
        if source.segments_BT is not None:
            mask_BTS = visible(text, source, causal=False)
        if mask_BTS is not None and text.segments_BT is not None:
            restarts = self._starts(finals, mask_BTS)
        starts, annotations = self._starts(finals), self._annotations(memory_BSD, mask_BTS)
        x_BTD, _ = self._decode(
            text.tokens_BT, limits, starts, restarts, annotations, noise=noise, tap=tap
        )
        return x_BTD, None

    def encode(
        self, source_BS: jax.Array, *, segments_BS: jax.Array | None = None, tap: Tap = no_tap
    ) -> jax.Array:
        """The encoder's output [B, S, D] of an encoder-decoder."""
        return self._encode(source_BS, segments_BS, None, tap)[0]

    def new_cache(
        self,
        batch_size: int,
        length: int,
        source_BS: jax.Array | None = None,
        source_segments_BS: jax.Array | None = None,
    ) -> RecurrentCache:
        """Where decoding starts, for `extend`; a state is as large for any `length`.

        An encoder-decoder reads its source here; places of segment 0 are padding.
        """
        del length
        config = self.config
        if config.architecture == "decoder":
            return RecurrentCache(zeros(config, config.num_layers, batch_size, config.width))
        memory_BSD, finals = self._encode(source_BS, source_segments_BS, None, no_tap)
        states_LBD = tuple(map(jnp.stack, zip(*self._starts(finals))))
        if not config.cross_attention:
            return RecurrentCache(states_LBD)
        ones_BS = jnp.ones_like(source_BS)
        mask_BS = (ones_BS if source_segments_BS is None else source_segments_BS) > 0
        read = self._annotations(memory_BSD, None)
        return RecurrentCache(states_LBD, read.keys_BSD, read.values_BSD, mask_BS)

    def extend(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: RecurrentCache, tap=no_tap
    ) -> tuple[jax.Array, RecurrentCache]:
        """Prefill or decode: what the head reads of new tokens, from the cached state on.

        Args:
          tokens_BT: the new tokens of every row; padding may stand anywhere.
          positions_BT: their positions, of which only -1, padding, matters.
          cache: the state after the tokens before.
          tap: see `lm.models.hooks`.

        Returns:
          [B, T, D], and the cache after the new tokens.
        """
        starts = list(zip(*cache.states_LBD))
        annotations = None
        if cache.keys_BSD is not None:
            mask_BTS = jnp.repeat(cache.source_mask_BS[:, None], tokens_BT.shape[1], 1)
            annotations = self._annotations(cache.values_BSD, mask_BTS, cache.keys_BSD)
        live = Boundaries((positions_BT >= 0).T[..., None])
        x_BTD, finals = self._decode(tokens_BT, live, starts, None, annotations, tap=tap)
        states_LBD = tuple(map(jnp.stack, zip(*finals)))
        return x_BTD, dataclasses.replace(cache, states_LBD=states_LBD)

    def new_pages(
        self, pages: int, page_size: int, slots: int, eight_bits: bool = False
    ) -> RecurrentCache:
        """A cache with room for the texts of `slots`, for `extend_pages`; it needs no pages."""
        del pages, page_size, eight_bits
        if self.config.architecture == "decoder":
            return self.new_cache(slots, 0)
        empty_BS = jnp.zeros((slots, self.config.max_length), jnp.int32)
        return self.new_cache(slots, 0, empty_BS, empty_BS)

    def begin(
        self, cache: RecurrentCache, slot: jax.Array, source_1S: jax.Array, segments_1S: jax.Array
    ) -> RecurrentCache:
        """The cache ready for a new text in a slot: its state is that after its source."""
        source = () if self.config.architecture == "decoder" else (source_1S, segments_1S)
        fresh = self.new_cache(1, 0, *source)

        def row(old, new, axis):
            start = [0] * old.ndim
            start[axis] = slot
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

        if cache.source_mask_BS is not None:
            unseen_BS = row(cache.source_mask_BS, jnp.zeros_like(cache.source_mask_BS[:1]), 0)
            cache = dataclasses.replace(cache, source_mask_BS=unseen_BS)
        return cache.by_axis(row, fresh)

    def extend_pages(
        self, tokens_BT: jax.Array, paging: Paging, cache: RecurrentCache
    ) -> tuple[jax.Array, RecurrentCache]:
        """As `extend`, of the rows in the slots of `paging`."""
        slots_B = paging.slots_B
        rows = cache.rows(slots_B)
        x_BTD, rows = self.extend(tokens_BT, paging.positions_BT, rows)
        states = (old.at[:, slots_B].set(x) for old, x in zip(cache.states_LBD, rows.states_LBD))
        return x_BTD, dataclasses.replace(cache, states_LBD=tuple(states))

    def _embed(self, tokens_BT: jax.Array, tap: Tap) -> jax.Array:
        """Embedded tokens [T, B, D]."""
        config = self.config
        x_TBD = jnp.take(self.embedding.tokens[...], tokens_BT.T, axis=0)
        if config.embedding_scale != 1:
            x_TBD *= config.embedding_scale or math.sqrt(config.width)
        x_TBD = x_TBD.astype(compute_dtype(config.compute_dtype))
        return tapped(tap, "embedding", constrain(x_TBD, None, "batch", "embed"))

    def _encode(self, source_BS, segments_BS, noise: Noise | None, tap: Tap):
        """The encoder's output [B, S, D], and the states of each layer's backward cells."""
        tap = within(tap, "encoder")
        x_SBD, finals = self.encoder.run(self._embed(source_BS, tap), segments_BS, noise, tap)
        return x_SBD.swapaxes(0, 1), finals

    def _starts(self, finals: list[State], mask_BTS: jax.Array | None = None) -> list[State]:
        """The states that each layer of the decoder starts from.

        Args:
          finals: from `_encode`. Read backwards, a source's last state is at its first token.
          mask_BTS: which source each target token belongs to; None where a row has one source.

        Returns:
          For each layer [B, D], or with a mask [T, B, D].
        """
        config = self.config

        def final(states_SBH):
            if mask_BTS is None:
                return states_SBH[0]
            first_BT1 = jnp.argmax(mask_BTS, -1)[..., None]
            taken_BTH = jnp.take_along_axis(states_SBH.swapaxes(0, 1), first_BT1, 1)
            return jnp.where(mask_BTS.any(-1)[..., None], taken_BTH, 0).swapaxes(0, 1)

        if not config.cross_attention:
            return [tuple(map(final, states)) for states in finals]
        top = final(finals[-1][0]).astype(compute_dtype(config.compute_dtype))
        rows = top.reshape(-1, top.shape[-1])
        blocks = unstack(self.blocks, config.num_layers)
        made = [block.first_state(rows) for block in blocks]
        return jax.tree.map(lambda x: x.reshape(*top.shape[:-1], -1), made)

    def _annotations(self, values_BSD, mask_BTS, keys_BSD=None) -> Annotations | None:
        """What attention reads."""
        if not self.config.cross_attention:
            return None
        weights = self.attention
        if keys_BSD is None:
            keys_BSD = contract("bsd,de->bse", values_BSD, weights.key[...])
        mask_TBS = None if mask_BTS is None else mask_BTS.swapaxes(0, 1)
        return Annotations(
            constrain(weights.query[...], None, None),
            constrain(weights.score[...], None),
            constrain(keys_BSD, "batch", None, None),
            constrain(values_BSD, "batch", None, None),
            mask_TBS,
        )

    def _decode(
        self, tokens_BT, boundaries: Boundaries, starts, restarts=None, annotations=None, *,
        noise: Noise | None = None, tap: Tap = no_tap,
    ) -> tuple[jax.Array, list[State]]:  # fmt: skip
        """What the head reads [B, T, D], and each layer's last state."""
        config, context_TBD, finals = self.config, None, []
        x_TBD = self._embed(tokens_BT, tap)
        for index, layer in enumerate(unstack(self.blocks, config.num_layers)):
            passed = layer(
                drop_between(x_TBD, config, noise, index),
                starts[index],
                boundaries,
                restarts[index] if restarts else None,
                annotations if index == 0 else None,
                context_TBD=context_TBD,
                tap=within(tap, f"blocks.{index}"),
            )
            if index == 0:
                context_TBD = passed.context
            finals.append(tuple(states[-1] for states in passed.states))
            x_TBD = passed.states[0].astype(x_TBD.dtype)
        x_TBD = drop_between(x_TBD, config, noise, config.num_layers)
        if annotations is not None:
            x_TBD = self.output(x_TBD, context_TBD)
        return constrain(x_TBD.swapaxes(0, 1), "batch", "length", "embed"), finals


def _check(config: ModelConfig) -> None:
    for name, plain in _REFUSED.items():
        value = getattr(config, name)
        check(
            value == plain,
            f"config.model.{name}={value!r} is for a Transformer: with cell={config.cell!r} it "
            f"must be {plain!r}",
        )
    if config.architecture == "encoder_decoder":
        check(
            not config.cross_attention or config.width % 2 == 0,
            f"config.model.width={config.width} must be even: half of the encoder reads backwards",
        )
        check(
            config.cross_attention or config.encoder_layers == config.num_layers,
            f"config.model.num_encoder_layers={config.num_encoder_layers} must be num_layers="
            f"{config.num_layers}, or None, without cross_attention: each layer starts the one "
            "across",
        )

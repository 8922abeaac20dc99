"""The Transformer: an embedding, a stack of blocks (two for an encoder-decoder), and a head."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models import layers
from lm.models.adapted import Adapted
from lm.models.attention.context import Context
from lm.models.attention.paged import PagedCache, Paging
from lm.models.cache import Cache
from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.matmul import compute_dtype, contract, precise
from lm.models.moe.experts import RouterStats
from lm.models.params import declare, unstack
from lm.models.positions import sinusoids, stale
from lm.models.stack import Stack
from lm.models.text import Text, texts
from lm.parallel.ring import from_zigzag, zigzag_divides
from lm.parallel.sharding import constrain


class LanguageModel(nnx.Module):
    """A model with `config`, `embedding.tokens`, `forward` and, as the config says, a head."""

    def __call__(
        self,
        tokens_BT: jax.Array,
        targets_BT: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
        **fields: jax.Array | None,
    ) -> jax.Array:
        """Logits [B, T, V], float32: of the token after each position, or at it (encoder).

        Args:
          tokens_BT: token ids; the source's [B, S] for an encoder-decoder.
          targets_BT: an encoder-decoder's inputs to the decoder.
          dropout_key: turns dropout on.
          tap: reads or replaces named activations (`lm.models.hooks`).
          **fields: what else is known of the text (`lm.models.text.Text`), such as `segments_BT`;
            `source_positions_BS` and `source_segments_BS` of an encoder-decoder's source.
        """
        x_BTD = self.hidden(tokens_BT, targets_BT, dropout_key=dropout_key, tap=tap, **fields)
        return self.unembed(x_BTD, tap)

    def hidden(
        self, tokens_BT, targets_BT=None, *, dropout_key=None, tap: Tap = no_tap, **fields
    ) -> jax.Array:
        """The last residual stream [B, T, D], after the final norm; arguments as of a call."""
        text, source = texts(self.config.architecture, tokens_BT, targets_BT, **fields)
        return self.forward(text, source, dropout_key, tap)[0]

    def readout(self, x_BTD: jax.Array) -> jax.Array:
        """What the output head multiplies, of the last residual stream: that, unless overridden."""
        return x_BTD

    def output_weights(self) -> jax.Array:
        """The output head [V, D]: the token embedding when tied; with its adapter added in."""
        head = self.embedding.tokens[...] if self.config.tie_embeddings else self.head[...]
        return head.whole() if isinstance(head, Adapted) else head

    def output_bias(self) -> jax.Array | None:
        """The output head's bias [V], if it has one."""
        return self.head_bias[...] if self.config.head_bias else None

    def unembed(self, x_BTD: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """Logits [B, T, V], float32, of a last residual stream."""
        read_BTD = self.readout(x_BTD)
        dtype = precise(read_BTD).dtype
        logits_BTV = contract("btd,vd->btv", read_BTD, self.output_weights(), dtype)
        if self.config.head_bias:
            logits_BTV += self.head_bias[...]
        if cap := self.config.logits_softcap:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return tap("logits", constrain(logits_BTV, "batch", "length", "vocab"))


class Embedding(nnx.Module):
    """Token embedding, with what else is added before the first block.

    An encoder-decoder's encoder has no table of `tokens` of its own: it reads the decoder's.
    """

    def __init__(self, config: ModelConfig, tokens: bool = True):
        V, D, E = config.vocab_size, config.width, config.table_width
        self.config = config
        initializer = layers.embedding_initializer(config)
        if tokens:
            self.tokens = declare((V, E), ("vocab", "embed"), initializer)
        if E != D:
            self.project = layers.Resized(config, E, D)
        if config.positions == "learned":
            length = config.max_length + config.position_offset
            self.positions = declare((length, D), ("length", "embed"), initializer)
        if config.token_types:
            self.types = declare((config.token_types, D), ("type", "embed"), initializer)
        if config.embedding_norm:
            self.norm = layers.Norm(config)

    def __call__(self, text: Text, table_VE: jax.Array, dropout_key, tap: Tap) -> jax.Array:
        """The residual stream before the first block, in the compute dtype."""
        config, dtype = self.config, compute_dtype(self.config.compute_dtype)
        x_BTD = layers.embedding_lookup(table_VE, text.tokens_BT, dtype)
        if config.embedding_scale != 1:
            x_BTD *= config.embedding_scale or math.sqrt(config.width)
        if config.table_width != config.width:
            x_BTD = self.project(x_BTD)
        x_BTD = tap("embedding.tokens", x_BTD)
        if config.positions == "learned":
            rows_BT = text.positions_BT + config.position_offset
            learned_BTD = layers.embedding_lookup(self.positions[...], rows_BT, dtype)
            x_BTD += tap("embedding.positions", learned_BTD)
        elif config.positions == "sinusoidal":
            x_BTD += tap("embedding.positions", sinusoids(text.positions_BT, config.width))
        if config.token_types and text.types_BT is None:
            first_D = self.types[...][0]
            spread = tap is not no_tap  # so that a tap sees a row for each token
            x_BTD += tap(
                "embedding.types", jnp.broadcast_to(first_D, x_BTD.shape) if spread else first_D
            )
        elif config.token_types:
            types_BTD = layers.embedding_lookup(self.types[...], text.types_BT, dtype)
            x_BTD += tap("embedding.types", types_BTD)
        if config.embedding_norm:
            x_BTD = self.norm(x_BTD, within(tap, "embedding_norm"))
        rows, slots = text.rows_B[:, None], text.slots_1T
        x_BTD = layers.dropout(x_BTD, config.dropout, dropout_key, rows, slots)
        return tap("embedding", constrain(x_BTD.astype(dtype), "batch", "norm_length", "embed"))


class HeadTransform(layers.Projection):
    """What BERT does before its output head: projection, nonlinearity, norm."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.width, config.transform_bias)
        self.activation = config.activation
        self.norm = layers.Norm(config)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[…, D] → […, D]."""
        return self.norm(layers.activate(self.activation, super().__call__(x_BTD)), no_tap)


class Transformer(LanguageModel, Stack):
    """A language model: decoder, encoder, or encoder and decoder.

    It is itself the stack whose output the head reads; an encoder-decoder has another stack,
    `encoder`, to attend to. Built from a config it is a skeleton of parameter declarations;
    `lm.models.bind` makes it callable. `config.vocab_size` and `config.max_length` must be set.
    """

    def __init__(self, config: ModelConfig):
        both = config.architecture == "encoder_decoder"
        self.embedding = Embedding(config)
        if both:
            self.encoder_embedding = Embedding(config, tokens=False)
            self.encoder = Stack(config, config.encoder_layers, encodes=True)
        encodes = config.architecture == "encoder"
        super().__init__(config, config.num_layers, encodes=encodes, crosses=both)
        if config.table_width != config.width:
            self.project = layers.Resized(config, config.width, config.table_width)
        if config.head_transform:
            self.head_transform = HeadTransform(config)
        if not config.tie_embeddings and config.has_output_head:
            initializer = layers.weight_initializer(config, config.table_width, config.vocab_size)
            if config.initializer == "t5":
                initializer = layers.embedding_initializer(config)
            shape = (config.vocab_size, config.table_width)
            self.head = declare(shape, ("vocab", "embed"), initializer)
        if config.head_bias and config.has_output_head:
            zeros = jax.nn.initializers.zeros
            self.head_bias = declare((config.vocab_size,), ("vocab",), zeros)
        if config.pooler:
            self.pooler = layers.Projection(config, config.width)
        if config.classifier != "none":
            decodes = config.architecture == "decoder"
            head = layers.RewardHead(config) if decodes else None
            self.classifier = head or layers.Projection(config, config.num_labels)

    def run(self, x_BTD, context, cache=None, **arguments):
        """As of `Stack`; where embeddings have another width, it ends in vectors of that."""
        x_BTD, caches, router = super().run(x_BTD, context, cache, **arguments)
        return self.project(x_BTD) if hasattr(self, "project") else x_BTD, caches, router

    def forward(
        self,
        text: Text,
        source: Text | None = None,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, RouterStats | None]:
        """The last residual stream [B, T, D], and what the routers did, where there are experts.

        Of the text that the head reads, and of an encoder-decoder's source.
        """
        memory = ()
        if source is not None:
            dropout_key, source_key = layers.split_key(dropout_key, 2)
            memory = (self._encode(source, source_key, tap), source)
        return self._through(self, self.embedding, text, memory, dropout_key, tap)

    def encode(
        self, source_BS: jax.Array, *, segments_BS: jax.Array | None = None, tap: Tap = no_tap
    ) -> jax.Array:
        """The encoder's output [B, S, D] of an encoder-decoder."""
        return self._encode(Text.of(source_BS, segments_BT=segments_BS), None, tap)

    def _encode(self, source: Text, dropout_key, tap: Tap) -> jax.Array:
        tap, embedding = within(tap, "encoder"), self.encoder_embedding
        return self._through(self.encoder, embedding, source, (), dropout_key, tap)[0]

    def _through(self, stack: Stack, embedding: Embedding, text: Text, memory, dropout_key, tap):
        """Embeds one text and runs a stack over all of it."""
        keys = layers.split_key(dropout_key, 2)
        # In zig-zag order devices that share a sequence have as much to do as each other. But where
        # experts have a capacity, their room goes to earlier tokens first.
        causal = not stack.encodes and not self.config.capacity_factor
        turned = causal and tap is no_tap and zigzag_divides(text.tokens_BT.shape[1])
        text = text.measured() if self.config.angles_by_length else text
        text = text.to_zigzag() if turned else text
        x_BTD = embedding(text, self.embedding.tokens[...], keys[0], tap)
        context = stack.context(text, *memory)
        x_BTD, _, router = stack.run(x_BTD, context, dropout_key=keys[1], tap=tap)
        return from_zigzag(x_BTD) if turned else x_BTD, router

    def new_cache(
        self,
        batch_size: int,
        length: int,
        source_BS: jax.Array | None = None,
        source_segments_BS: jax.Array | None = None,
    ) -> Cache:
        """A cache with room for `length` tokens a row, for `extend`.

        An encoder-decoder reads its source here, and keeps the keys and values of the encoder's
        output; places of segment 0 are padding.
        """
        cache = Cache.empty(self.config, batch_size, length, self.scanned)
        if source_BS is None:
            return cache
        if source_segments_BS is None:
            source_segments_BS = jnp.ones_like(source_BS)
        keys, values = self._remember(source_BS, source_segments_BS)
        return dataclasses.replace(
            cache,
            source_keys_LBSKC=keys,
            source_values_LBSKC=values,
            source_mask_BS=source_segments_BS > 0,
        )

    def _remember(self, source_BS: jax.Array, segments_BS: jax.Array) -> tuple:
        """What each layer's cross-attention reads of a source: keys and values, a layer first."""
        memory_BSD = self.encode(source_BS, segments_BS=segments_BS)
        if not self.scanned:
            blocks = unstack(self.blocks, self.num_layers)
            return tuple(zip(*(b.cross_attention.remember(memory_BSD) for b in blocks)))
        _, pair = jax.lax.scan(
            lambda _, block: (None, block.cross_attention.remember(memory_BSD)), None, self.blocks
        )
        return pair

    def extend(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache, tap: Tap = no_tap
    ) -> tuple[jax.Array, Cache]:
        """Prefill or decode: the residual stream of new tokens that see the cache and themselves.

        Args:
          tokens_BT, positions_BT: the new tokens of every row, and where they stand; -1 is padding,
            which may be anywhere.
          cache: holds the tokens before; must have T free slots.
          tap: see `lm.models.hooks`.

        Returns:
          The last residual stream [B, T, D], and the cache with the new tokens. Where the angles of
          a row change with its length, all of it is read anew: what new tokens see is always what a
          forward pass of the row as it is now gives.
        """
        if cache.tokens_BS is None:
            return self._extend(tokens_BT, positions_BT, cache, tap)
        return self._extend_anew(tokens_BT, positions_BT, cache, tap)

    def _extend_anew(self, tokens_BT, positions_BT, cache: Cache, tap: Tap) -> tuple:
        """As `extend`, where angles depend on a text's length."""
        if tap is not no_tap:
            raise ValueError("no tap where angles depend on a text's length: it may be read anew")
        slot, empty = cache.slot, jnp.full_like(cache.positions_BS, -1)
        tokens_BS, positions_BS = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, 1)
            for old, new in ((cache.tokens_BS, tokens_BT), (cache.positions_BS, positions_BT))
        )
        lengths_B = positions_BS.max(1) + 1

        def whole(cache):
            cache = dataclasses.replace(cache, positions_BS=empty, slot=jnp.int32(0))
            x_BSD, cache = self._extend(tokens_BS, positions_BS, cache, no_tap)
            return jax.lax.dynamic_slice_in_dim(x_BSD, slot, tokens_BT.shape[1], 1), cache

        def part(cache):
            return self._extend(tokens_BT, positions_BT, cache, no_tap)

        if positions_BS.shape[1] <= self.config.rotary_original_length:
            x_BTD, cache = part(cache)
        else:
            changed = stale(self.config, cache.lengths_B, lengths_B).any()
            x_BTD, cache = jax.lax.cond(changed, whole, part, cache)
        slot += tokens_BT.shape[1]
        known = {"tokens_BS": tokens_BS, "lengths_B": lengths_B, "slot": slot}
        return x_BTD, dataclasses.replace(cache, **known)

    def _extend(self, tokens_BT, positions_BT, cache: Cache, tap: Tap) -> tuple[jax.Array, Cache]:
        keys_BS = jax.lax.dynamic_update_slice_in_dim(
            cache.positions_BS, positions_BT, cache.slot, 1
        )
        across = None
        if cache.source_mask_BS is not None:
            across = _across(cache.source_mask_BS, tokens_BT)
        text = Text.of(tokens_BT, positions_BT=jnp.maximum(positions_BT, 0))
        if cache.tokens_BS is not None:
            text = text._replace(lengths_BT=keys_BS.max(1, keepdims=True) + 1)
        # Who sees whom follows from positions here: rows differ in where their tokens stand.
        context = Context.of(
            self.config,
            text._replace(slots_1T=positions_BT),
            Text(slots_1T=keys_BS),
            cached=True,
            bias=self.score_bias(),
            slot=cache.slot,
            valid_BT=positions_BT >= 0,
            across=across,
        )
        x_BTD = self.embedding(text, self.embedding.tokens[...], None, tap)
        x_BTD, own, _ = self.run(x_BTD, context, cache, tap=tap)
        return x_BTD, dataclasses.replace(
            cache.with_own(own), positions_BS=keys_BS, slot=cache.slot + tokens_BT.shape[1]
        )

    def new_pages(
        self, pages: int, page_size: int, slots: int, eight_bits: bool = False
    ) -> PagedCache:
        """A cache of so many pages, for `extend_pages`, with room for the texts of `slots`."""
        return PagedCache.empty(self.config, pages, page_size, slots, self.scanned, eight_bits)

    def begin(
        self, cache: PagedCache, slot: jax.Array, source_1S: jax.Array, segments_1S: jax.Array
    ) -> PagedCache:
        """The cache ready for a new text in a slot: an encoder-decoder reads its source."""
        if self.config.architecture == "decoder":
            return cache
        pair = self._remember(source_1S, segments_1S)
        return cache.with_source(slot, *pair, segments_1S > 0)

    def extend_pages(
        self, tokens_BT: jax.Array, paging: Paging, cache: PagedCache
    ) -> tuple[jax.Array, PagedCache]:
        """As `extend`, of rows that lie in pages."""
        text, across, here = Text.of(tokens_BT), None, cache
        text = text._replace(positions_BT=jnp.maximum(paging.positions_BT, 0))
        if cache.source_mask_BS is not None:
            here = cache.sources(paging.slots_B)
            across = _across(here.source_mask_BS, tokens_BT)
        context = Context.of_pages(self.config, paging, self.score_bias(), across)
        x_BTD = self.embedding(text, self.embedding.tokens[...], None, no_tap)
        x_BTD, own, _ = self.run(x_BTD, context, here)
        return x_BTD, cache.with_own(own)

    def readout(self, x_BTD: jax.Array) -> jax.Array:
        """What the output head multiplies, of the last residual stream."""
        if self.config.output_scale != 1:
            x_BTD = x_BTD * (self.config.output_scale or self.config.width**-0.5)
        return self.head_transform(x_BTD) if self.config.head_transform else x_BTD

    def pool(self, x_BTD: jax.Array) -> jax.Array:
        """One vector a row [B, D]: the first token's projection, through a nonlinearity."""
        pooled_BD = self.pooler(x_BTD[:, 0])
        tanh = self.config.pooler_activation == "tanh"
        return jnp.tanh(pooled_BD) if tanh else jax.nn.relu(pooled_BD)

    def classify(
        self,
        x_BTD: jax.Array,
        last_BT: jax.Array | None = None,
        filled_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of the labels, float32: [B, labels] of each row, or [B, T, labels] of each token.

        An encoder's row is read from its first token, through the pooler where there is one, or
        from the mean of its tokens.

        Args:
          x_BTD: the last residual stream.
          last_BT: true at the one place of each row that a decoder's is read from: that of its last
            token (`lm.models.text.last_places`); the row's last place unless given.
          filled_BT: of which places means are; all unless given.
        """
        if self.config.classifier == "sequence" and self.config.architecture == "decoder":
            if last_BT is None:
                last_BT = jnp.arange(x_BTD.shape[1]) == x_BTD.shape[1] - 1
            # Summed, not gathered: a mesh may split the places.
            scores_BTE = self.classifier(x_BTD)
            return jnp.sum(jnp.where(last_BT[..., None], scores_BTE, 0), axis=1)
        if self.config.classifier == "sequence":
            x_BTD = self._of_text(x_BTD, filled_BT)
        if self.config.classifier_transform:
            x_BTD = self.head_transform(x_BTD)
        return self.classifier(x_BTD).astype(jnp.float32)

    def _of_text(self, x_BTD: jax.Array, filled_BT: jax.Array | None) -> jax.Array:
        """What an encoder's classifier reads of each row, [B, D]."""
        if self.config.classifier_pooling == "mean":
            filled_BT = jnp.ones(x_BTD.shape[:2], bool) if filled_BT is None else filled_BT > 0
            x_BTD = jnp.where(filled_BT[..., None], x_BTD, 0).astype(jnp.float32)
            return jnp.sum(x_BTD, 1) / jnp.maximum(jnp.sum(filled_BT, 1, keepdims=True), 1)
        return self.pool(x_BTD) if self.config.pooler else x_BTD[:, 0]

    def values(self, x_BTD: jax.Array) -> jax.Array:
        """What a decoder's classifier of one label says of the text up to each place, [B, T]."""
        return self.classifier(x_BTD)[..., 0]


def _across(mask_BS: jax.Array, tokens_BT: jax.Array) -> Context:
    """Of attention to the places of a source that are not padding."""
    shape = (*tokens_BT.shape, mask_BS.shape[-1])
    return Context(jnp.broadcast_to(mask_BS[:, None, :], shape))

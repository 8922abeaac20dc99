"""The Transformer: an embedding, a stack of blocks (two for an encoder-decoder), and a head."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models import layers
from lm.models.attention.attention import attention_mask
from lm.models.cache import Cache
from lm.models.config import ModelConfig
from lm.models.embedding_lookup import embedding_lookup
from lm.models.head import LanguageModel
from lm.models.hooks import Tap, no_tap, within
from lm.models.matmul import compute_dtype
from lm.models.moe.experts import RouterStats
from lm.models.params import declare
from lm.models.positions import sinusoids
from lm.models.stack import Context, Stack, unstack
from lm.models.text import Text
from lm.parallel.ring import from_zigzag, to_zigzag, zigzag_divides
from lm.parallel.sharding import constrain


class Embedding(nnx.Module):
    """Token embedding, with what else is added before the first block.

    Args:
      config: the model's.
      tokens: whether it has a token table; an encoder-decoder's encoder reads the decoder's.
    """

    def __init__(self, config: ModelConfig, tokens: bool = True):
        V, D = config.vocab_size, config.width
        self.config = config
        initializer = layers.embedding_initializer(config)
        if tokens:
            self.tokens = declare((V, D), ("vocab", "embed"), initializer)
        if config.positions == "learned":
            length = config.max_length + config.position_offset
            self.positions = declare((length, D), ("length", "embed"), initializer)
        if config.token_types:
            self.types = declare((config.token_types, D), ("type", "embed"), initializer)
        if config.embedding_norm:
            self.norm = layers.Norm(config)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        types_BT: jax.Array | None = None,
        table: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> jax.Array:
        """The residual stream before the first block, float32.

        Args:
          tokens_BT: token ids.
          positions_BT: where each stands in its document.
          types_BT: which part of its document each is of; all 0 unless given.
          table: token embeddings, if there are none of its own.
          tap: see `lm.models.hooks`.
        """
        config, dtype = self.config, compute_dtype(self.config.compute_dtype)
        x_BTD = embedding_lookup(self.tokens[...] if table is None else table, tokens_BT, dtype)
        if config.embedding_scale != 1:
            x_BTD *= config.embedding_scale or math.sqrt(config.width)
        if config.positions == "learned":
            rows_BT = positions_BT + config.position_offset
            x_BTD += embedding_lookup(self.positions[...], rows_BT, dtype)
        elif config.positions == "sinusoidal":
            x_BTD += sinusoids(positions_BT, config.width)
        if config.token_types:
            types = self.types[...]
            x_BTD += types[0] if types_BT is None else embedding_lookup(types, types_BT, dtype)
        if config.embedding_norm:
            x_BTD = self.norm(x_BTD, within(tap, "embedding_norm"))
        return x_BTD


class HeadTransform(layers.Projection):
    """What BERT does before its output head: projection, nonlinearity, norm."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.width)
        self.activation = config.activation
        self.norm = layers.Norm(config)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] → [B, T, D]."""
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
        if config.head_transform:
            self.head_transform = HeadTransform(config)
        if not config.tie_embeddings:
            initializer = layers.weight_initializer(config, config.width, config.vocab_size)
            if config.initializer == "t5":
                initializer = layers.embedding_initializer(config)
            shape = (config.vocab_size, config.width)
            self.head = declare(shape, ("vocab", "embed"), initializer)
        if config.head_bias:
            zeros = jax.nn.initializers.zeros
            self.head_bias = declare((config.vocab_size,), ("vocab",), zeros)
        if config.pooler:
            self.pooler = layers.Projection(config, config.width)
        if config.classifier != "none":
            self.classifier = layers.Projection(config, config.num_labels)

    def hidden(self, tokens_BT, targets_BT=None, **arguments) -> jax.Array:
        """The last residual stream [B, T, D], after the final norm; see `hidden_and_router`."""
        return self.hidden_and_router(tokens_BT, targets_BT, **arguments)[0]

    def hidden_and_router(
        self,
        tokens_BT: jax.Array,
        targets_BT: jax.Array | None = None,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        source_positions_BS: jax.Array | None = None,
        source_segments_BS: jax.Array | None = None,
        rows_B: jax.Array | None = None,
        filled_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, RouterStats | None]:
        """The last residual stream [B, T, D], and what the routers did, where there are experts.

        Args:
          tokens_BT: token ids; the source's [B, S] for an encoder-decoder.
          targets_BT: an encoder-decoder's inputs to the decoder.
          positions_BT: each token's position in its document; 0, 1, 2, … unless given.
          segments_BT: which document each token is of, 0 for padding; attention never crosses
            documents, and a target sees the source of its own number.
          types_BT: which part of a pair of texts each token is of (BERT's segment embedding).
          prefix_BT: true for tokens that all of their document may see.
          source_positions_BS, source_segments_BS: likewise of an encoder-decoder's source.
          rows_B: each row's number in the whole batch, for dropout; 0, 1, 2, … unless given.
          filled_BT: false for padding, which visits no expert, where segments do not say so.
          dropout_key: turns dropout on.
          tap: see `lm.models.hooks`.
        """
        memory, both = (), self.config.architecture == "encoder_decoder"
        if both:
            if targets_BT is None:
                raise TypeError("an encoder-decoder needs two arguments: source_BS and targets_BT")
            keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
            dropout_key, source_key = keys
            source = Text.of(tokens_BT, source_positions_BS, source_segments_BS, rows_B=rows_B)
            memory = (self._encode(tokens_BT, source, source_key, tap), source)
        elif targets_BT is not None:
            raise TypeError(
                f"a model with architecture={self.config.architecture!r} reads one text"
            )
        text_BT = targets_BT if both else tokens_BT
        text = Text.of(text_BT, positions_BT, segments_BT, prefix_BT, rows_B, filled_BT)
        return self._read_text(
            self, self.embedding, text_BT, text, types_BT, memory, dropout_key, tap
        )

    def encode(
        self,
        source_BS: jax.Array,
        *,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> jax.Array:
        """The encoder's output [B, S, D] of an encoder-decoder; arguments as of a call."""
        text = Text.of(source_BS, positions_BS, segments_BS)
        return self._encode(source_BS, text, dropout_key, tap)

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
        memory_BSD = self.encode(source_BS, segments_BS=source_segments_BS)
        if self.scanned:
            _, (keys, values) = jax.lax.scan(
                lambda _, block: (None, block.cross_attention.remember(memory_BSD)),
                None,
                self.blocks,
            )
        else:
            blocks = unstack(self.blocks, self.num_layers)
            keys, values = zip(*(b.cross_attention.remember(memory_BSD) for b in blocks))
        return dataclasses.replace(
            cache,
            source_keys_LBSKC=keys,
            source_values_LBSKC=values,
            source_mask_BS=source_segments_BS > 0,
        )

    def extend(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache, tap: Tap = no_tap
    ) -> tuple[jax.Array, Cache]:
        """Prefill or decode: the residual stream of new tokens that see the cache and themselves.

        Args:
          tokens_BT: the new tokens of every row; padding may stand anywhere.
          positions_BT: their positions, -1 for padding.
          cache: holds the tokens before; must have T free slots.
          tap: see `lm.models.hooks`.

        Returns:
          The last residual stream [B, T, D], and the cache with the new tokens.
        """
        T = tokens_BT.shape[1]
        keys_BS = jax.lax.dynamic_update_slice_in_dim(
            cache.positions_BS, positions_BT, cache.slot, 1
        )
        memory = {}
        if cache.source_mask_BS is not None:
            shape = (cache.source_mask_BS.shape[0], T, cache.source_mask_BS.shape[1])
            mask_BTS = jnp.broadcast_to(cache.source_mask_BS[:, None, :], shape)
            memory = {"memory_mask_BTS": mask_BTS}
        read_BT = jnp.maximum(positions_BT, 0)
        context = Context(
            attention_mask(positions_BT, keys_BS),
            slot=cache.slot,
            valid_BT=positions_BT >= 0,
            **self.place(read_BT, keys_BS[:, None, :] - positions_BT[:, :, None]),
            **memory,
        )
        context = self.with_local(context, read_BT, positions_BT, keys_BS)
        x_BTD = self._embed(self.embedding, tokens_BT, Text.of(tokens_BT, read_BT), None, None, tap)
        x_BTD, (keys, values), _ = self.run(x_BTD, context, cache, tap=tap)
        return x_BTD, dataclasses.replace(
            cache,
            keys_LBSKC=keys,
            values_LBSKC=values,
            positions_BS=keys_BS,
            slot=cache.slot + T,
        )

    def readout(self, x_BTD: jax.Array) -> jax.Array:
        """What the output head multiplies, of the last residual stream."""
        if self.config.output_scale != 1:
            x_BTD = x_BTD * (self.config.output_scale or self.config.width**-0.5)
        return self.head_transform(x_BTD) if self.config.head_transform else x_BTD

    def pool(self, x_BTD: jax.Array) -> jax.Array:
        """One vector a row [B, D]: BERT's tanh projection of the first token."""
        return jnp.tanh(self.pooler(x_BTD[:, 0]))

    def classify(self, x_BTD: jax.Array) -> jax.Array:
        """Scores of the labels, float32: [B, labels] of each row, or [B, T, labels] of each token.

        A row is read from its first token, through the pooler where there is one.
        """
        if self.config.classifier == "sequence":
            x_BTD = self.pool(x_BTD) if self.config.pooler else x_BTD[:, 0]
        return self.classifier(x_BTD).astype(jnp.float32)

    def _encode(self, source_BS, text: Text, dropout_key, tap) -> jax.Array:
        tap = within(tap, "encoder")
        embedding = self.encoder_embedding
        return self._read_text(
            self.encoder, embedding, source_BS, text, None, (), dropout_key, tap
        )[0]

    def _read_text(
        self, stack: Stack, embedding, tokens_BT, text: Text, types_BT, memory, dropout_key, tap
    ):
        """Embeds one text and runs a stack over all of it."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        # In zig-zag order devices that share a sequence have as much to do as each other. But where
        # experts have a capacity, their room goes to earlier tokens first.
        causal = not stack.encodes and not self.config.capacity_factor
        turned = causal and tap is no_tap and zigzag_divides(tokens_BT.shape[1])
        if turned:
            text = text.to_zigzag()
            tokens_BT, types_BT = jax.tree.map(to_zigzag, (tokens_BT, types_BT))
        x_BTD = self._embed(embedding, tokens_BT, text, types_BT, keys[0], tap)
        context = stack.context(text, *memory)
        x_BTD, _, router = stack.run(x_BTD, context, dropout_key=keys[1], tap=tap)
        return from_zigzag(x_BTD) if turned else x_BTD, router

    def _embed(self, embedding: Embedding, tokens_BT, text: Text, types_BT, dropout_key, tap):
        dtype = compute_dtype(self.config.compute_dtype)
        table = self.embedding.tokens[...]
        x_BTD = embedding(tokens_BT, text.positions_BT, types_BT, table, tap)
        rate = self.config.dropout
        x_BTD = layers.dropout(x_BTD, rate, dropout_key, text.rows_B[:, None], text.slots_1T)
        return tap("embedding", constrain(x_BTD.astype(dtype), "batch", "norm_length", "embed"))

"""The Transformer: one block, scanned over stacked layers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.models import layers
from lm.models.attention import Attention, causal_mask
from lm.models.build import declare, stack
from lm.models.config import ModelConfig
from lm.models.numerics import compute_dtype, contract
from lm.models.taps import Tap, no_tap, within
from lm.parallel.sharding import constrain

# On the CPU up to this many layers are unrolled: a loop copies what each layer saves and reads,
# which costs GPT-2 124M a fifth of its step there, and compiling that many takes seconds.
UNROLLED_LAYERS = 12


class Context(NamedTuple):
    """What every layer of one call shares."""

    mask_BTS: jax.Array
    rotary: tuple[jax.Array, ...] | None
    slot: jax.Array | int  # where in the cache this call's keys go


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, and where each slot's token stands.

    Rows of different lengths share their slots: a row's unused slots have position -1 and are
    never seen. For layers that are not scanned, keys and values may be tuples of one array a layer:
    a loop writes those in place, where it would copy slices of a stacked array.
    """

    keys_LBSKC: jax.Array
    values_LBSKC: jax.Array
    positions_BS: jax.Array
    slot: jax.Array  # the next free slot

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, length: int) -> Cache:
        """A cache with room for `length` tokens a row, in the compute dtype."""
        shape = (config.num_layers, batch_size, length, config.kv_heads, config.head_width)
        zeros = jnp.zeros(shape, compute_dtype(config.compute_dtype))
        return cls(zeros, zeros, jnp.full((batch_size, length), -1), jnp.int32(0))


class Embedding(nnx.Module):
    """Token embedding plus learned or sinusoidal positions."""

    def __init__(self, config: ModelConfig):
        V, D = config.vocab_size, config.width
        self.config = config
        initializer = jax.nn.initializers.normal(config.initializer_std)
        self.tokens = declare((V, D), ("vocab", "embed"), initializer)
        if config.positions == "learned":
            self.positions = declare((config.max_length, D), ("length", "embed"), initializer)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The residual stream before the first block, float32."""
        x_BTD = jnp.take(self.tokens[...], tokens_BT, axis=0)
        if self.config.positions == "learned":
            x_BTD += jnp.take(self.positions[...], positions_BT, axis=0)
        elif self.config.positions == "sinusoidal":
            x_BTD += layers.sinusoids(positions_BT, self.config.width)
        return x_BTD


class Block(nnx.Module):
    """Attention, then an MLP, each added to the residual stream.

    Pre-norm normalises what a sublayer reads (Radford et al. 2019); post-norm what it leaves
    behind (Vaswani et al. 2017).
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.attention_norm = layers.Norm(config)
        self.attention = Attention(config)
        self.mlp_norm = layers.Norm(config)
        self.mlp = layers.MLP(config)

    def __call__(self, x_BTD, context: Context, cache=None, *, key=None, tap: Tap = no_tap):
        """The residual stream after this block, and the layer's cache."""
        config = self.config
        pre = config.norm_position == "pre"
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x_BTD = tap("residual_before", x_BTD)

        def normed(norm, name, x):
            return norm(x, within(tap, name)).astype(compute_dtype(config.compute_dtype))

        read = normed(self.attention_norm, "attention_norm", x_BTD) if pre else x_BTD
        written, cache = self.attention(
            read, context, cache, dropout_key=keys[0], tap=within(tap, "attention")
        )
        written = checkpoint_name(written, "attention_output")
        x_BTD += layers.dropout(written, config.dropout, keys[1])
        if not pre:
            x_BTD = normed(self.attention_norm, "attention_norm", x_BTD)
        x_BTD = tap("residual_middle", constrain(x_BTD, "batch", "length", "embed"))

        read = normed(self.mlp_norm, "mlp_norm", x_BTD) if pre else x_BTD
        written = self.mlp(read, within(tap, "mlp"))
        x_BTD += layers.dropout(written, config.dropout, keys[2])
        if not pre:
            x_BTD = normed(self.mlp_norm, "mlp_norm", x_BTD)
        return tap("residual_after", constrain(x_BTD, "batch", "length", "embed")), cache


class Transformer(nnx.Module):
    """A decoder-only language model.

    Built from a config it is a skeleton of parameter declarations; `lm.models.bind` makes it
    callable. `config.vocab_size` and `config.max_length` must be set.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = stack(Block(config), config.num_layers)
        if config.norm_position == "pre":
            self.final_norm = layers.Norm(config)
        if not config.tie_embeddings:
            self.head = declare(
                (config.vocab_size, config.width),
                ("vocab", "embed"),
                layers.weight_initializer(config, config.width, config.vocab_size),
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> jax.Array:
        """Logits [B, T, V], float32, of the token after each position.

        Args:
          tokens_BT: token ids.
          positions_BT: each token's position in its document; 0, 1, 2, … unless given.
          segments_BT: which document each token is of; attention never crosses documents.
          dropout_key: turns dropout on.
          tap: reads or replaces named activations (`lm.models.taps`).
        """
        x_BTD = self.hidden(tokens_BT, positions_BT, segments_BT, dropout_key=dropout_key, tap=tap)
        return self.unembed(x_BTD, tap=tap)

    def hidden(
        self, tokens_BT, positions_BT=None, segments_BT=None, *, dropout_key=None, tap: Tap = no_tap
    ) -> jax.Array:
        """The residual stream [B, T, D] that the output head reads (arguments as for a call)."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        # Slots, not positions, say what is later: positions restart at each packed document.
        slots_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        mask_BTS = causal_mask(slots_BT, slots_BT, segments_BT, segments_BT)
        x_BTD, _ = self._run(tokens_BT, positions_BT, mask_BTS, None, dropout_key, tap)
        return x_BTD

    def extend(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache, tap: Tap = no_tap
    ) -> tuple[jax.Array, Cache]:
        """Prefill or decode: the residual stream of new tokens that see the cache and themselves.

        Args:
          tokens_BT: the new tokens of every row; padding may stand anywhere.
          positions_BT: their positions, -1 for padding.
          cache: holds the tokens before; must have T free slots.
          tap: see `lm.models.taps`.

        Returns:
          The residual stream [B, T, D] that the head reads, and the cache with the new tokens.
        """
        key_positions_BS = jax.lax.dynamic_update_slice_in_dim(
            cache.positions_BS, positions_BT, cache.slot, 1
        )
        mask_BTS = causal_mask(positions_BT, key_positions_BS)
        x_BTD, (keys, values) = self._run(
            tokens_BT, jnp.maximum(positions_BT, 0), mask_BTS, cache, None, tap
        )
        slot = cache.slot + tokens_BT.shape[1]
        return x_BTD, Cache(keys, values, key_positions_BS, slot)

    def unembed(self, x_BTD: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """Logits [B, T, V], float32, of a residual stream."""
        logits_BTV = contract("btd,vd->btv", x_BTD, self.output_weights(), jnp.float32)
        return tap("logits", constrain(logits_BTV, "batch", "length", "vocab"))

    def output_weights(self) -> jax.Array:
        """The output head [V, D]: the token embedding when tied."""
        return self.embedding.tokens[...] if self.config.tie_embeddings else self.head[...]

    def _run(self, tokens_BT, positions_BT, mask_BTS, cache, dropout_key, tap):
        """Embedding, blocks and final norm; the cache's keys and values, updated, or None."""
        config = self.config
        dtype = compute_dtype(config.compute_dtype)
        rotary = None
        if config.positions == "rotary":
            rotary = layers.rotary_angles(positions_BT, config.head_width, config.rotary_base)
        context = Context(mask_BTS, rotary, 0 if cache is None else cache.slot)
        keys = None
        if dropout_key is not None and config.dropout:
            dropout_key, first = jax.random.split(dropout_key)
            keys = jax.random.split(dropout_key, config.num_layers)
        x_BTD = self.embedding(tokens_BT, positions_BT)
        if keys is not None:
            x_BTD = layers.dropout(x_BTD, config.dropout, first)
        x_BTD = tap("embedding", constrain(x_BTD.astype(dtype), "batch", "length", "embed"))
        if tap is not no_tap or not self._scanned:
            x_BTD, caches = self._unroll(x_BTD, context, cache, keys, tap)
        else:
            x_BTD, caches = self._scan(x_BTD, context, cache, keys)
        if config.norm_position == "pre":
            x_BTD = self.final_norm(x_BTD, within(tap, "final_norm")).astype(dtype)
        return x_BTD, caches

    @property
    def _scanned(self) -> bool:
        if self.config.scan_layers is None:
            # Unrolled on the CPU, XLA merges the recomputation with what it was to replace.
            unrolled = jax.default_backend() == "cpu" and self.config.remat == "none"
            return not unrolled or self.config.num_layers > UNROLLED_LAYERS
        return self.config.scan_layers

    def _scan(self, x_BTD, context, cache, keys):
        """All blocks under one `lax.scan`, so that compile time does not grow with depth."""
        body = rematerialized(lambda block, x, key: block(x, context, key=key)[0], self.config)
        if cache is None:
            x_BTD, _ = jax.lax.scan(
                lambda x, layer: (body(layer[0], x, layer[1]), None), x_BTD, (self.blocks, keys)
            )
            return x_BTD, None

        # The whole cache is carried and written in place; scanning over it would copy it.
        def step(carry, layer):
            x, caches_LBSKC = carry
            block, index = layer
            x, updated_BSKC = block(x, context, tuple(cache[index] for cache in caches_LBSKC))
            new_BTKC = (
                jax.lax.dynamic_slice_in_dim(u, context.slot, x.shape[1], 1) for u in updated_BSKC
            )
            start = (index, 0, context.slot, 0, 0)
            caches_LBSKC = tuple(
                jax.lax.dynamic_update_slice(cache, new[None], start)
                for cache, new in zip(caches_LBSKC, new_BTKC)
            )
            return (x, caches_LBSKC), None

        carry = (x_BTD, (cache.keys_LBSKC, cache.values_LBSKC))
        (x_BTD, caches), _ = jax.lax.scan(
            step, carry, (self.blocks, jnp.arange(self.config.num_layers))
        )
        return x_BTD, caches

    def _unroll(self, x_BTD, context, cache, keys, tap):
        """The same blocks one by one: for taps, and for a few layers without the loop's copies."""
        caches = []
        for index, block in enumerate(unstack(self.blocks, self.config.num_layers)):
            key = None if keys is None else keys[index]
            scope = within(tap, f"blocks.{index}")
            if cache is None:
                # A value read inside `jax.checkpoint` could not leave it.
                body = lambda b, x, k: b(x, context, key=k, tap=scope)[0]  # noqa: B023, E731
                body = rematerialized(body, self.config) if tap is no_tap else body
                x_BTD = body(block, x_BTD, key)
            else:
                layer = (cache.keys_LBSKC[index], cache.values_LBSKC[index])
                x_BTD, layer = block(x_BTD, context, layer, tap=scope)
                caches.append(layer)
        if cache is None:
            return x_BTD, None
        join = tuple if isinstance(cache.keys_LBSKC, tuple) else jnp.stack
        return x_BTD, tuple(map(join, zip(*caches)))


class Layers:
    """A stacked parameter, kept as one array a layer: a single leaf, which `unstack` opens."""

    def __init__(self, arrays: tuple[jax.Array, ...]):
        self.arrays = arrays


def unstack(blocks: Block, num_layers: int) -> list[Block]:
    """The blocks one by one. Their gradients are joined by one concatenation, not summed."""
    leaves, treedef = jax.tree.flatten(blocks)
    parts = [
        leaf.arrays
        if isinstance(leaf, Layers)
        else [part[0] for part in jax.lax.split(leaf, (1,) * num_layers)]
        for leaf in leaves
    ]
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*parts)]


def rematerialized(body, config: ModelConfig):
    """`body`, recomputing in the backward pass what `config.remat` does not keep."""
    if config.remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.save_only_these_names("product"),
        "projections": policies.save_only_these_names("query", "key", "value", "attention_output"),
    }[config.remat]
    return jax.checkpoint(body, policy=policy)

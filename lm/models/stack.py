"""The block, and a stack of them: scanned, so that compile time does not grow with depth."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.models import layers
from lm.models.attention.attention import Attention, Pair, attention_mask
from lm.models.attention.ring import ScoreBias
from lm.models.cache import Cache
from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.matmul import compute_dtype
from lm.models.moe.experts import Experts, RouterStats
from lm.models.params import declare, stack
from lm.models.pipelined import LAYER_INPUT, pipeline_stages, remat_policy, through_stages
from lm.models.positions import alibi_bias, alibi_slopes, relative_bias, rotary_angles
from lm.models.text import Text, same_document
from lm.parallel.platform import platform
from lm.parallel.sharding import constrain

# On the CPU up to this many layers are unrolled: a loop copies what each layer saves and reads,
# which costs GPT-2 124M a fifth of its step there, and compiling that many takes seconds.
UNROLLED_LAYERS = 12


class Context(NamedTuple):
    """What every layer of one call shares."""

    mask_BTS: jax.Array  # which keys each query may see
    text: Text | None = None  # of the queries; None in cached decoding
    key_text: Text | None = None  # of the keys
    rotary: tuple[jax.Array, ...] | None = None
    bias_BHTS: jax.Array | None = None  # added to attention scores
    bias: ScoreBias | None = None  # the same, as what it is made of; None in cached decoding
    causal: bool = False  # whether later keys are hidden, unless of a prefix; see `mask_BTS`
    window: jax.Array | int = 0  # each query sees this many keys up to its own; 0: all
    slot: jax.Array | int = 0  # where in the cache this call's keys go
    local: tuple | None = None  # mask, rotary angles and window of local layers
    memory_BSD: jax.Array | None = None  # the encoder's output, unless the cache has its keys
    memory_mask_BTS: jax.Array | None = None  # what of it each token may see
    memory_text: Text | None = None
    valid_BT: jax.Array | None = None  # which tokens are not padding

    def of_layer(self, is_local: bool | jax.Array) -> Context:
        """With the mask, angles and window of a local layer, or of a global one."""
        if self.local is None or is_local is False:
            return self
        if is_local is True:
            mask_BTS, rotary, window = self.local
        else:
            mask_BTS, rotary, window = jax.tree.map(
                lambda local, other: jnp.where(is_local, local, other),
                self.local,
                (self.mask_BTS, self.rotary, self.window),
            )
        return self._replace(mask_BTS=mask_BTS, rotary=rotary, window=window)

    def across(self) -> Context:
        """What attention to the encoder's output has."""
        return Context(self.memory_mask_BTS, self.text, self.memory_text)


class Block(nnx.Module):
    """Attention, attention across to the encoder where there is one, then an MLP or experts.

    Each is added to the residual stream. Pre-norm normalises what a sublayer reads (Radford et al.
    2019), post-norm the stream it leaves behind (Vaswani et al. 2017), sandwich what it reads and
    what it writes (Gemma 2 report, §2). In a parallel block attention and MLP read the same stream
    (Chowdhery et al. 2022, §2).

    Args:
      config: the model's.
      crosses: whether it attends to an encoder.
      mixture: whether experts take the MLP's place.
    """

    def __init__(self, config: ModelConfig, crosses: bool = False, mixture: bool = False):
        self.config = config
        sandwich = config.norm_position == "sandwich"
        self.attention_norm = layers.Norm(config)
        self.attention = Attention(config)
        if sandwich:
            self.attention_post_norm = layers.Norm(config)
        if crosses:
            self.cross_norm = layers.Norm(config)
            self.cross_attention = Attention(config)
            if sandwich:
                self.cross_post_norm = layers.Norm(config)
        if not config.shared_norm:
            self.mlp_norm = layers.Norm(config)
        self.mlp = Experts(config) if mixture else layers.MLP(config)
        if sandwich:
            self.mlp_post_norm = layers.Norm(config)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: Pair | None = None,
        source: Pair | None = None,
        *,
        key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, Pair | None, RouterStats | None]:
        """The residual stream after this block, the layer's cache, and what its router did.

        Args:
          x_BTD: the residual stream.
          context: of this layer.
          cache: this layer's keys and values.
          source: keys and values of the encoder's output; made of `context.memory_BSD` if None.
          key: turns dropout on.
          tap: see `lm.models.hooks`.
        """
        config = self.config
        keys = (None,) * 5 if key is None else jax.random.split(key, 5)
        x_BTD = tap("residual_before", checkpoint_name(x_BTD, LAYER_INPUT))

        read = self._read("attention", x_BTD, tap)
        attended, cache = self.attention(
            read, context, cache, dropout_key=keys[0], tap=within(tap, "attention")
        )
        if config.parallel:
            read = read if config.shared_norm else self._read("mlp", x_BTD, tap)
            written, router = self._feed_forward(read, context, tap)
            x_BTD += self._dropped(attended, keys[1], context)
            x_BTD += self._dropped(written, keys[2], context)
            return self._finished(x_BTD, tap), cache, router
        x_BTD = self._add("attention", x_BTD, attended, keys[1], context, tap)
        x_BTD = tap("residual_middle", constrain(x_BTD, "batch", "norm_length", "embed"))

        if hasattr(self, "cross_attention"):
            across = within(tap, "cross_attention")
            read = self._read("cross", x_BTD, tap)
            source = source or self.cross_attention.remember(context.memory_BSD, across)
            written = self.cross_attention.recall(
                read, source, context.across(), dropout_key=keys[3], tap=across
            )
            x_BTD = self._add("cross", x_BTD, written, keys[4], context, tap)
            x_BTD = tap("residual_crossed", constrain(x_BTD, "batch", "norm_length", "embed"))

        read = self._read("mlp", x_BTD, tap)
        written, router = self._feed_forward(read, context, tap)
        x_BTD = self._add("mlp", x_BTD, written, keys[2], context, tap)
        return self._finished(x_BTD, tap), cache, router

    def _read(self, sublayer: str, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        """What a sublayer reads of the residual stream: whole sequences of it."""
        if self.config.norm_position != "post":
            x_BTD = self._normed(f"{sublayer}_norm", x_BTD, tap)
        return constrain(x_BTD, "batch", "length", "embed")

    def _add(self, sublayer: str, x_BTD, written_BTD, key, context: Context, tap: Tap) -> jax.Array:
        """The residual stream after a sublayer has written to it."""
        config = self.config
        if config.norm_position == "sandwich":
            written_BTD = self._normed(f"{sublayer}_post_norm", written_BTD, tap)
        x_BTD += self._dropped(written_BTD, key, context)
        if config.norm_position == "post":
            x_BTD = self._normed(f"{sublayer}_norm", x_BTD, tap)
        return x_BTD

    def _dropped(self, written_BTD, key, context: Context) -> jax.Array:
        if key is None:
            return written_BTD
        rows, slots = context.text.rows_B[:, None], context.text.slots_1T
        return layers.dropout(written_BTD, self.config.dropout, key, rows, slots)

    def _normed(self, name: str, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        normed = getattr(self, name)(x_BTD, within(tap, name))
        return normed.astype(compute_dtype(self.config.compute_dtype))

    def _feed_forward(self, read_BTD, context: Context, tap: Tap):
        if isinstance(self.mlp, Experts):
            return self.mlp(read_BTD, within(tap, "mlp"), context.valid_BT)
        return self.mlp(read_BTD, within(tap, "mlp")), None

    def _finished(self, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        return tap("residual_after", constrain(x_BTD, "batch", "norm_length", "embed"))


class Stack(nnx.Module):
    """Blocks one after the other, what their attention shares, and the norm after the last.

    Args:
      config: the model's.
      num_layers: how many blocks.
      encodes: whether each token sees those after it too.
      crosses: whether blocks attend to an encoder.
    """

    def __init__(
        self, config: ModelConfig, num_layers: int, encodes: bool = False, crosses: bool = False
    ):
        self.config, self.num_layers, self.encodes = config, num_layers, encodes
        mixture = config.num_experts > 0
        if config.dense_layers:
            self.dense_blocks = stack(Block(config, crosses), config.dense_layers)
        self.blocks = stack(Block(config, crosses, mixture), num_layers - config.dense_layers)
        if config.positions == "relative":
            shape = (config.relative_buckets, config.num_heads)
            std = config.width**-0.5 if config.initializer == "t5" else config.initializer_std
            initializer = jax.nn.initializers.normal(std)
            self.relative_bias = declare(shape, ("distance", "heads"), initializer)
        if config.has_final_norm:
            self.final_norm = layers.Norm(config)

    def context(
        self,
        text: Text,
        memory_BSD: jax.Array | None = None,
        memory_text: Text | None = None,
        bias: ScoreBias | None = None,
        bias_BHTS: jax.Array | None = None,
    ) -> Context:
        """What the layers share of a whole text, and of the encoder's output where they cross.

        The bias of attention scores can be given, where it is there already.
        """
        slots = text.slots_1T
        segments = text.segments_BT
        placed = {"bias": bias, "bias_BHTS": bias_BHTS}
        if bias_BHTS is None:
            distance_1TS = slots[:, None, :] - slots[:, :, None]
            placed = self.place(text.positions_BT, distance_1TS, bias)
        context = Context(
            attention_mask(
                slots, slots, segments, segments,
                causal=not self.encodes, prefix_BS=text.prefix_BT,
            ),
            text=text,
            key_text=text,
            causal=not self.encodes,
            memory_BSD=memory_BSD,
            memory_text=memory_text,
            valid_BT=text.valid_BT,
            **placed,
        )  # fmt: skip
        if memory_BSD is not None:
            context = context._replace(memory_mask_BTS=same_document(text, memory_text))
        return self.with_local(
            context, text.positions_BT, slots, slots, segments, segments, prefix_BS=text.prefix_BT
        )

    def with_local(self, context: Context, positions_BT, *slots, **masking) -> Context:
        """`context`, with what local layers have instead; the rest is `attention_mask`'s."""
        config = self.config
        if not config.window:
            return context
        mask_BTS = attention_mask(*slots, window=config.window, **masking)
        rotary = None
        if config.positions == "rotary":
            rotary = rotary_angles(positions_BT, config, local=True)
        return context._replace(local=(mask_BTS, rotary, config.window))

    def place(
        self, positions_BT: jax.Array, distance_BTS: jax.Array, bias: ScoreBias | None = None
    ) -> dict:
        """What a `Context` says of positions.

        Args:
          positions_BT: where each token stands in its document.
          distance_BTS: position of key s less position of query t, right where t may see s; its
            batch axis may be 1.
          bias: of attention scores; made here unless given.
        """
        config = self.config
        if config.positions == "rotary":
            return {"rotary": rotary_angles(positions_BT, config)}
        if config.positions == "relative":
            of = functools.partial(relative_bias, config=config, bidirectional=self.encodes)
            bias = bias or ScoreBias(self.relative_bias[...], of)
        elif config.positions == "alibi":
            bias = bias or ScoreBias(jnp.asarray(alibi_slopes(config.num_heads)), alibi_bias)
        else:
            return {}
        return {"bias": bias, "bias_BHTS": bias.of(bias.table, distance_BTS)}

    def run(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: Cache | None = None,
        *,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, tuple | None, RouterStats | None]:
        """The residual stream after all blocks and the final norm.

        Returns:
          That, the cache's keys and values updated (or None), and the routers' statistics [layers].
        """
        keys = None
        if dropout_key is not None and self.config.dropout:
            keys = jax.random.split(dropout_key, self.num_layers)
        stages = 1 if cache or tap is not no_tap else pipeline_stages(x_BTD.shape[0])
        if tap is not no_tap or not (self.scanned or stages > 1):
            x_BTD, caches, router = self._unroll(x_BTD, context, cache, keys, tap)
        elif cache is None:
            x_BTD, router = self._scan(x_BTD, context, keys, stages)
            caches = None
        else:
            x_BTD, caches, router = self._scan_cached(x_BTD, context, cache)
        if hasattr(self, "final_norm"):
            dtype = compute_dtype(self.config.compute_dtype)
            x_BTD = self.final_norm(x_BTD, within(tap, "final_norm")).astype(dtype)
        return x_BTD, caches, router

    @property
    def scanned(self) -> bool:
        """Whether the layers run under a loop."""
        if self.config.scan_layers is None:
            # Unrolled on the CPU, XLA merges the recomputation with what it was to replace.
            unrolled = platform() == "cpu" and self.config.remat == "none"
            return not unrolled or self.num_layers > UNROLLED_LAYERS
        return self.config.scan_layers

    def _groups(self):
        """(stacked blocks, the first one's layer, how many) of blocks that are alike."""
        dense = self.config.dense_layers
        if dense:
            yield self.dense_blocks, 0, dense
        yield self.blocks, dense, self.num_layers - dense

    def _reach(self, first: int, count: int) -> bool | jax.Array:
        """Whether each of these layers is local: one answer where it is the same for all."""
        local = [self.config.is_local(layer) for layer in range(first, first + count)]
        return local[0] if len(set(local)) == 1 else jnp.array(local)

    def _scan(self, x_BTD, context, keys, stages):
        for blocks, first, count in self._groups():
            part = None if keys is None else keys[first : first + count]
            reach = self._reach(first, count)
            if stages > 1 and blocks is self.blocks:
                x_BTD, routers = through_stages(self, x_BTD, context, part, reach)
            else:
                x_BTD, routers = self.scan_blocks(blocks, x_BTD, context, part, reach)
        return x_BTD, routers  # of the last group, which alone has experts

    def scan_blocks(self, blocks, x_BTD, context, keys_L, reach_L):
        """The residual stream after stacked blocks, and their routers' statistics [L].

        Args:
          blocks: stacked along a leading axis L.
          x_BTD: the residual stream.
          context: of all of them.
          keys_L: of their dropout, or None.
          reach_L: whether each is local; one answer where it is the same for all.
        """
        fixed, varying_L = (reach_L, None) if isinstance(reach_L, bool) else (None, reach_L)

        def body(x, layer):
            block, key, is_local = layer
            is_local = fixed if is_local is None else is_local
            x, _, router = block(x, context.of_layer(is_local), key=key)
            return x, router

        # Under a loop nothing can merge the recomputation with what it is to replace.
        body = rematerialized(body, self.config, prevent_cse=False)
        return jax.lax.scan(body, x_BTD, (blocks, keys_L, varying_L))

    def _scan_cached(self, x_BTD, context, cache):
        # The whole cache is carried and written in place; scanning over it would copy it.
        def step(carry, layer, fixed):
            x, caches_LBSKC = carry
            block, index, is_local = layer
            is_local = fixed if is_local is None else is_local
            own = tuple(cache[index] for cache in caches_LBSKC)
            x, updated_BSKC, router = block(
                x, context.of_layer(is_local), own, cache.layer(index)[1]
            )
            new_BTKC = (
                jax.lax.dynamic_slice_in_dim(u, context.slot, x.shape[1], 1) for u in updated_BSKC
            )
            start = (index, 0, context.slot, 0, 0)
            caches_LBSKC = tuple(
                jax.lax.dynamic_update_slice(cache, new[None], start)
                for cache, new in zip(caches_LBSKC, new_BTKC)
            )
            return (x, caches_LBSKC), router

        carry = x_BTD, (cache.keys_LBSKC, cache.values_LBSKC)
        for blocks, first, count in self._groups():
            reach = self._reach(first, count)
            fixed, varying = (reach, None) if isinstance(reach, bool) else (None, reach)
            layer = (blocks, jnp.arange(first, first + count), varying)
            carry, routers = jax.lax.scan(lambda c, x: step(c, x, fixed), carry, layer)  # noqa: B023
        return *carry, routers

    def _unroll(self, x_BTD, context, cache, keys, tap):
        """The same blocks one by one: for taps, and for a few layers without the loop's copies."""
        caches, routers = [], []
        blocks = [b for group, _, count in self._groups() for b in unstack(group, count)]
        for index, block in enumerate(blocks):
            key = None if keys is None else keys[index]
            here = context.of_layer(self.config.is_local(index))
            scope = within(tap, f"blocks.{index}")
            if cache is None:
                # A value read inside `jax.checkpoint` could not leave it.
                def body(block, x, key, here=here, scope=scope):
                    x, _, router = block(x, here, key=key, tap=scope)
                    return x, router

                body = rematerialized(body, self.config) if tap is no_tap else body
                x_BTD, router = body(block, x_BTD, key)
            else:
                x_BTD, layer, router = block(x_BTD, here, *cache.layer(index), tap=scope)
                caches.append(layer)
            routers += [] if router is None else [router]
        routers = jax.tree.map(lambda *each: jnp.stack(each), *routers) if routers else None
        if cache is None:
            return x_BTD, None, routers
        join = tuple if isinstance(cache.keys_LBSKC, tuple) else jnp.stack
        return x_BTD, tuple(map(join, zip(*caches))), routers


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


def rematerialized(body, config: ModelConfig, prevent_cse: bool = True):
    """`body`, recomputing in the backward pass what `config.remat` does not keep.

    `prevent_cse` stops XLA from merging the recomputation with what it is to replace.
    """
    policy = remat_policy(config.remat)
    if policy is None:
        return body
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)

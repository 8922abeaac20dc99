"""The block, and a stack of them: scanned, so that compile time does not grow with depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.models import layers
from lm.models.attention.attention import Attention, Pair
from lm.models.attention.context import Context, ScoreBias, score_bias
from lm.models.attention.latent import LatentAttention
from lm.models.attention.paged import PagedCache
from lm.models.cache import Cache
from lm.models.config import LayerKind, ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.matmul import compute_dtype
from lm.models.moe.experts import Experts, RouterStats
from lm.models.params import declare, stack, unstack
from lm.models.remat import LAYER_INPUT, remat_policy, rematerialized
from lm.models.text import Text, visible
from lm.parallel.layout import current_layout
from lm.parallel.mesh import batch_ways
from lm.parallel.pipeline import AXIS, choose_microbatches, pipeline
from lm.parallel.platform import platform
from lm.parallel.ring import context_ways
from lm.parallel.sharding import automatic_axes, constrain

# On the CPU up to this many layers are unrolled: a loop copies what each layer saves and reads,
# which costs GPT-2 124M a fifth of its step there, and compiling that many takes seconds.
UNROLLED_LAYERS = 12


class Block(nnx.Module):
    """Attention, attention across to the encoder where there is one, then an MLP or experts.

    Each is added to the residual stream. Pre-norm normalises what a sublayer reads (Radford et al.
    2019), post-norm the stream it leaves behind (Vaswani et al. 2017), sandwich what it reads and
    what it writes (Gemma 2 report, §2), reordered what it writes (OLMo 2 report, §3.1). In a
    parallel block attention and MLP read the same stream (Chowdhery et al. 2022, §2). There need be
    no norms, and no MLP (Elhage et al. 2021).

    A block that `crosses` attends to an encoder; in a `mixture`, experts take the MLP's place;
    without `attention_norm`, attention reads the stream as it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        crosses: bool = False,
        mixture: bool = False,
        attention_norm: bool = True,
    ):
        self.config = config
        written, normed = config.norms_written, config.norms_read or config.norm_position == "post"
        if normed and attention_norm:
            self.attention_norm = layers.Norm(config)
        self.attention = LatentAttention(config) if config.kv_rank else Attention(config)
        if written:
            self.attention_post_norm = layers.Norm(config)
        if crosses:
            if normed:
                self.cross_norm = layers.Norm(config)
            self.cross_attention = Attention(config)
            if written:
                self.cross_post_norm = layers.Norm(config)
        if not (mixture or config.feed_forward):
            return
        if normed and not config.shared_norm:
            self.mlp_norm = layers.Norm(config)
        self.mlp = Experts(config) if mixture else layers.MLP(config)
        if written:
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
          x_BTD, context, cache: the residual stream, and this layer's context, keys and values.
          source: keys and values of the encoder's output; made of `context.memory_BSD` if None.
          key: turns dropout on.
          tap: see `lm.models.hooks`.
        """
        config, keys = self.config, layers.split_key(key, 5)
        x_BTD = tap("residual_before", checkpoint_name(x_BTD, LAYER_INPUT))

        read = self._read("attention", x_BTD, tap)
        written, cache = self.attention(
            read, context, cache, dropout_key=keys[0], tap=within(tap, "attention")
        )
        if config.parallel:
            read = read if config.shared_norm else self._read("mlp", x_BTD, tap)
            also_written, router = self._feed_forward(read, context, tap)
            x_BTD += self._dropped(written, keys[1], context)
            x_BTD += self._dropped(also_written, keys[2], context)
            x_BTD = constrain(x_BTD, "batch", "norm_length", "embed")
            return tap("residual_after", x_BTD), cache, router
        x_BTD = self._add("attention", x_BTD, written, keys[1], context, tap)
        x_BTD = tap("residual_middle", x_BTD)

        if hasattr(self, "cross_attention"):
            across = within(tap, "cross_attention")
            read = self._read("cross", x_BTD, tap)
            source = source or self.cross_attention.remember(context.memory_BSD, across)
            written = self.cross_attention.recall(
                read, source, context.across, dropout_key=keys[3], tap=across
            )
            x_BTD = self._add("cross", x_BTD, written, keys[4], context, tap)
            x_BTD = tap("residual_crossed", x_BTD)

        if not hasattr(self, "mlp"):
            return tap("residual_after", x_BTD), cache, None
        read = self._read("mlp", x_BTD, tap)
        written, router = self._feed_forward(read, context, tap)
        x_BTD = self._add("mlp", x_BTD, written, keys[2], context, tap)
        return tap("residual_after", x_BTD), cache, router

    def _read(self, sublayer: str, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        """What a sublayer reads of the residual stream: whole sequences of it."""
        if self.config.norms_read and hasattr(self, f"{sublayer}_norm"):
            x_BTD = self._normed(f"{sublayer}_norm", x_BTD, tap)
        return constrain(x_BTD, "batch", "length", "embed")

    def _add(self, sublayer: str, x_BTD, written_BTD, key, context: Context, tap: Tap) -> jax.Array:
        """The residual stream after a sublayer has written to it."""
        if self.config.norms_written:
            written_BTD = self._normed(f"{sublayer}_post_norm", written_BTD, tap)
        x_BTD += self._dropped(written_BTD, key, context)
        if self.config.norm_position == "post":
            x_BTD = self._normed(f"{sublayer}_norm", x_BTD, tap)
        return constrain(x_BTD, "batch", "norm_length", "embed")

    def _normed(self, name: str, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        normed = getattr(self, name)(x_BTD, within(tap, name))
        return normed.astype(compute_dtype(self.config.compute_dtype))

    def _dropped(self, written_BTD, key, context: Context) -> jax.Array:
        if key is None:
            return written_BTD
        rows, slots = context.text.rows_B[:, None], context.text.slots_1T
        return layers.dropout(written_BTD, self.config.dropout, key, rows, slots)

    def _feed_forward(self, read_BTD, context: Context, tap: Tap):
        if isinstance(self.mlp, Experts):
            return self.mlp(read_BTD, within(tap, "mlp"), context.valid_BT)
        return self.mlp(read_BTD, within(tap, "mlp")), None


class Stack(nnx.Module):
    """Blocks one after the other, what their attention shares, and the norm after the last.

    Where it `encodes`, each token sees those after it too.
    """

    def __init__(
        self, config: ModelConfig, num_layers: int, encodes: bool = False, crosses: bool = False
    ):
        self.config, self.num_layers, self.encodes = config, num_layers, encodes
        mixture = config.num_experts > 0
        first = config.first_layers
        if first:
            block = Block(config, crosses, attention_norm=config.first_norm)
            self.dense_blocks = stack(block, first)
        self.blocks = stack(Block(config, crosses, mixture), num_layers - first)
        if config.positions == "relative":
            shape = (config.relative_buckets, config.num_heads)
            std = config.width**-0.5 if config.initializer == "t5" else config.initializer_std
            initializer = jax.nn.initializers.normal(std)
            self.relative_bias = declare(shape, ("distance", "heads"), initializer)
        if config.has_final_norm:
            self.final_norm = layers.Norm(config)

    def score_bias(self) -> ScoreBias | None:
        """What the layers add to attention scores, the same in all of them."""
        table = self.relative_bias[...] if self.config.positions == "relative" else None
        return score_bias(self.config, table, causal=not self.encodes)

    def context(
        self,
        text: Text,
        memory_BSD: jax.Array | None = None,
        source: Text | None = None,
        bias: ScoreBias | None = None,
        bias_BHTS: jax.Array | None = None,
    ) -> Context:
        """What the layers share of a whole text, and of the encoder's output and its text.

        The bias of attention scores can be given, where it is there already.
        """
        across = None
        if source is not None:
            across = Context(visible(text, source, causal=False), text, source)
        return Context.of(
            self.config,
            text,
            text,
            causal=not self.encodes,
            bias=bias or self.score_bias(),
            bias_BHTS=bias_BHTS,
            text=text,
            key_text=text,
            valid_BT=text.valid_BT,
            memory_BSD=memory_BSD,
            across=across,
        )

    def run(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: Cache | PagedCache | None = None,
        *,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, tuple | None, RouterStats | None]:
        """The residual stream after all blocks and the final norm.

        Returns:
          That, the cache's keys and values updated (or None), and the routers' statistics [layers].
        """
        keys = caches = None
        if dropout_key is not None and self.config.dropout:
            keys = jax.random.split(dropout_key, self.num_layers)
        stages = 1 if cache or tap is not no_tap else _stages(x_BTD.shape[0])
        if tap is not no_tap or not (self.scanned or stages > 1):
            x_BTD, caches, router = self._unroll(x_BTD, context, cache, keys, tap)
        elif cache is None:
            x_BTD, router = self._scan(x_BTD, context, keys, stages)
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
        first = self.config.first_layers
        if first:
            yield self.dense_blocks, 0, first
        yield self.blocks, first, self.num_layers - first

    def each_block(self) -> list[Block]:
        """The blocks in order, each with the parameters of its own layer."""
        return [b for group, _, count in self._groups() for b in unstack(group, count)]

    def _kinds(self, first: int, count: int) -> LayerKind:
        """What sets these layers apart; of a field that is the same for all, that one value."""
        kinds = [self.config.layer_kind(layer) for layer in range(first, first + count)]
        return LayerKind(*(v[0] if len(set(v)) == 1 else jnp.array(v) for v in zip(*kinds)))

    def _scan(self, x_BTD, context, keys, stages):
        for blocks, first, count in self._groups():
            part = None if keys is None else keys[first : first + count]
            kinds = self._kinds(first, count)
            if stages > 1 and blocks is self.blocks:
                x_BTD, routers = self._through_stages(x_BTD, context, part, kinds)
            else:
                x_BTD, routers = self._scan_blocks(blocks, x_BTD, context, part, kinds)
        return x_BTD, routers  # of the last group, which alone has experts

    def _scan_blocks(self, blocks, x_BTD, context, keys_L, kinds_L: LayerKind):
        def body(x, layer):
            block, key, varying = layer
            here = context.of_layer(_kind(kinds_L, varying))
            x, _, router = block(x, here, key=key)
            return x, router

        # Under a loop nothing can merge the recomputation with what it is to replace.
        body = rematerialized(body, self.config, prevent_cse=False)
        return jax.lax.scan(body, x_BTD, (blocks, keys_L, _varying(kinds_L)))

    def _scan_cached(self, x_BTD, context, cache):
        # The whole cache is carried and written in place; scanning over it would copy it.
        carry = x_BTD, cache.own
        for blocks, first, count in self._groups():
            kinds = self._kinds(first, count)

            def step(carry, layer, kinds=kinds):
                x, caches_LBSKC = carry
                block, index, varying = layer
                here = context.of_layer(_kind(kinds, varying))
                if here.paging is not None:
                    here = here.of_pool(index, caches_LBSKC, self.num_layers)
                    x, caches_LBSKC, router = block(x, here, caches_LBSKC, cache.layer(index)[1])
                    return (x, caches_LBSKC), router
                own = tuple(cache[index] for cache in caches_LBSKC)
                x, updated_BSKC, router = block(x, here, own, cache.layer(index)[1])
                new_BTKC = (
                    jax.lax.dynamic_slice_in_dim(u, context.slot, x.shape[1], 1)
                    for u in updated_BSKC
                )
                start = (index, 0, context.slot, 0, 0)
                caches_LBSKC = tuple(
                    jax.lax.dynamic_update_slice(cache, new[None], start)
                    for cache, new in zip(caches_LBSKC, new_BTKC)
                )
                return (x, caches_LBSKC), router

            layer = (blocks, jnp.arange(first, first + count), _varying(kinds))
            carry, routers = jax.lax.scan(step, carry, layer)
        return *carry, routers

    def _unroll(self, x_BTD, context, cache, keys, tap):
        """The same blocks one by one: for taps, and for a few layers without the loop's copies."""
        caches, routers = [], []
        for index, block in enumerate(self.each_block()):
            key = None if keys is None else keys[index]
            here = context.of_layer(self.config.layer_kind(index))
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
        join = tuple if isinstance(cache.own[0], tuple) else jnp.stack
        return x_BTD, tuple(map(join, zip(*caches))), routers

    def _through_stages(self, x_BTD, context: Context, keys_L, kinds_L: LayerKind):
        """As `_scan_blocks` of `blocks`, whose layers the devices share in a pipeline.

        Rows travel with their texts, and each stage makes its own `Context` of them; only the bias
        of attention scores, which all rows share, comes from outside: as a table of all pairs,
        unless a ring of devices shares the sequence, which never makes one. Of what happens in a
        layer, the backward pass keeps what `config.remat` says, for every micro-batch.
        """
        mesh, _ = automatic_axes()
        stages, layout = mesh.shape[AXIS], current_layout()
        ways = batch_ways(mesh) // stages
        texts = context.text, context.across and context.across.key_text
        slots = [None if text is None else text.slots_1T for text in texts]
        unread = dict.fromkeys(("slots_1T", "tokens_BT", "types_BT"))
        if not self.config.num_experts:
            unread["filled_BT"] = None
        rows = [None if text is None else text._replace(**unread) for text in texts]
        bias = context.bias, context.bias_BHTS if context_ways() == 1 else None

        def stage_fn(blocks, first, x_BTD, along, shared):
            rows, memory_BSD = along
            slots, by_layer, bias = shared
            text, source = (
                None if row is None else row._replace(slots_1T=slot)
                for row, slot in zip(rows, slots)
            )
            count = jax.tree.leaves(blocks)[0].shape[0]
            keys_L, varying_L = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), by_layer
            )
            here = self.context(text, memory_BSD, source, *bias)
            return self._scan_blocks(blocks, x_BTD, here, keys_L, _kind(kinds_L, varying_L))

        return pipeline(
            stage_fn,
            self.blocks,
            x_BTD,
            (rows, context.memory_BSD),
            (slots, (keys_L, _varying(kinds_L)), bias),
            microbatches=choose_microbatches(layout.microbatches, stages, x_BTD.shape[0], ways),
            rounds=layout.rounds,
            whole_axes=layout.whole_axes,
            policy=remat_policy(self.config.remat, LAYER_INPUT),
        )


def _varying(kinds_L: LayerKind) -> LayerKind:
    """What a loop over layers of these kinds hands each of them; None where they are alike."""
    return LayerKind(*(v if isinstance(v, jax.Array) else None for v in kinds_L))


def _kind(kinds_L: LayerKind, varying: LayerKind) -> LayerKind:
    """One layer's, or a part of the layers', in full."""
    return LayerKind(*(same if v is None else v for same, v in zip(kinds_L, varying)))


def _stages(rows: int) -> int:
    """How many stages share the layers in a call of so many rows.

    That is one, and every device gets all layers in turn, where the rows are too few for all.
    """
    mesh, names = automatic_axes()
    stages = mesh.shape[AXIS] if AXIS in names else 1
    return stages if rows % stages == 0 else 1

"""Attention of a sequence that several devices share, each with its part of queries and keys."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lm.config import ConfigError
from lm.models.attention import flash
from lm.models.attention.context import Context
from lm.models.attention.flash import LANES, Given, Rule, Seen, Tokens
from lm.models.config import ModelConfig
from lm.models.remat import HEADS
from lm.models.text import both_segments
from lm.parallel.platform import platform
from lm.parallel.reduce import axes_of
from lm.parallel.ring import around, context_ways
from lm.parallel.sharding import ACTIVATION_RULES, automatic_axes, partition


class HeadSharding(NamedTuple):
    """How the arrays of one attention lie on the mesh, for a `shard_map` over all of it."""

    names: frozenset[str] = frozenset()  # of the mesh axes to split by hand; empty: one device
    heads: PartitionSpec = PartitionSpec(None, None, None, None)  # of queries, keys and values

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes that split rows or tokens: sums over all tokens are sums over these."""
        return axes_of(self.heads[0]) + axes_of(self.heads[1])


class _Call(NamedTuple):
    """What is known of a call when tracing."""

    rule: Rule
    sharding: HeadSharding
    scale: float
    kernel: str  # "xla" or "pallas"


def ring_attention(
    config: ModelConfig,
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    context: Context,
    dropout_key: jax.Array | None = None,
    *,
    kernel: str = "auto",
) -> jax.Array:
    """Exact attention in which keys and values travel around the devices that share a sequence.

    Ring attention (Liu et al. 2023) over the mesh axis `context`; rows are split over the batch
    axes and heads over `tensor`. The backward pass goes round again, gradients travelling with
    their keys. No device holds more keys than its own and a neighbour's, nor the scores of more
    than a block of pairs, so memory a device falls as 1/context. Tokens may stand in any order:
    in zig-zag order (`lm.parallel.ring`) every device has the same work. Without a mesh it is
    attention block by block on one device.

    Of `context`, masks and biases of all pairs are not read: texts, window and `bias` say the same.
    Sinks join when all keys have been seen: a mean over them shrinks by σ(logsum - sink).

    Args:
      config, query_BTHC, key_BSKC, value_BSKC, context, dropout_key: as of `attend`.
      kernel: what computes a block: `xla`, `pallas` (TPU; without bias and dropout), or `auto`.

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype; zero for a query that sees no key.

    Raises:
      ConfigError: `context` does not divide the number of queries or of keys, or the kernel cannot
        do this.
    """
    bias, window = context.bias, context.window
    dropped = dropout_key is not None and config.dropout > 0
    rule = Rule(
        context.causal,
        float(config.attention_softcap),
        float(config.dropout) if dropped else 0.0,
        query_BTHC.shape[2],
        None if bias is None else bias.of,
    )
    ways, (tokens, others) = context_ways(), (query_BTHC.shape[1], key_BSKC.shape[1])
    if tokens % ways or others % ways:
        raise ConfigError(
            f"config.mesh.context={ways} must divide the number of tokens, which is {tokens}"
            + ("" if others == tokens else f" of queries and {others} of keys")
        )
    sharding, key_BSKC, value_BSKC = shard_heads(query_BTHC, key_BSKC, value_BSKC, "length")
    call = _Call(rule, sharding, config.score_scale, _kernel(kernel, rule, query_BTHC, key_BSKC))
    no_window = isinstance(window, int) and window == 0
    given = Given(
        None if no_window else jnp.asarray(window, jnp.int32),
        words=jax.random.key_data(dropout_key)[-2:] if dropped else None,
        rows_B=context.text.rows_B if dropped else None,
    )
    learned = (None if bias is None else bias.table, context.sinks_H)
    learned = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), learned)
    texts = _tokens(context)
    return _attention(call, query_BTHC, key_BSKC, value_BSKC, learned, *texts, given)


def shard_heads(
    query_BTHC: jax.Array, key_BSKC: jax.Array, value_BSKC: jax.Array, length: str | None
) -> tuple[HeadSharding, jax.Array, jax.Array]:
    """Where everything lies, and keys and values with as many heads as that needs.

    Where `tensor` splits the queries' heads but does not divide the keys', each of these is copied
    as few times as let every device have whole groups of heads.

    Args:
      query_BTHC, key_BSKC, value_BSKC: of every head; K divides H.
      length: the logical axis of tokens; None leaves sequences whole.
    """
    mesh, names = automatic_axes()
    if not names:
        return HeadSharding(), key_BSKC, value_BSKC
    axes = ("batch", length, "heads", None)
    spec = partition(axes, query_BTHC.shape, mesh, ACTIVATION_RULES)
    tensor = mesh.shape["tensor"] if spec[2] else 1
    heads = key_BSKC.shape[2]
    if heads % tensor:
        copies = math.lcm(heads, tensor) // heads
        key_BSKC, value_BSKC = (jnp.repeat(x, copies, 2) for x in (key_BSKC, value_BSKC))
    # One specification for both: a head of keys goes where its queries go.
    return HeadSharding(frozenset(names), spec), key_BSKC, value_BSKC


def _kernel(kernel: str, rule: Rule, query, key) -> str:
    possible = rule.bias is None and not rule.dropout_rate
    if kernel == "auto":
        fits = all(x.shape[1] // context_ways() % LANES == 0 for x in (query, key))
        return "pallas" if platform() == "tpu" and possible and fits else "xla"
    if kernel == "pallas" and not possible:
        raise ConfigError("kernel='pallas' cannot add a bias to scores nor drop them: use 'xla'")
    return kernel


def _tokens(context: Context) -> tuple[Tokens, Tokens]:
    segments = both_segments(context.text, context.key_text)
    prefix = context.key_text.prefix_BT if context.causal else None
    prefix = None if prefix is None else prefix.astype(jnp.int32)
    return (
        Tokens(context.text.slots_1T, segments[0]),
        Tokens(context.key_text.slots_1T, segments[1], prefix),
    )


# ---- The two passes, each a shard_map of its own, so that what is saved between them is sharded
# as ordinary arrays are and may be named to remat policies ---------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, query, key, value, learned, queries, keys, given):
    return _forward(call, query, key, value, learned, queries, keys, given)[0]


def _attention_forward(call, query, key, value, learned, queries, keys, given):
    heads, logsum = _forward(call, query, key, value, learned, queries, keys, given)
    heads, logsum = checkpoint_name(heads, HEADS), checkpoint_name(logsum, HEADS)
    return heads, (query, key, value, learned, queries, keys, given, heads, logsum)


def _attention_backward(call, saved, gradient):
    d_query, d_key, d_value, d_learned = _backward(call, *saved, gradient)
    return d_query, d_key, d_value, d_learned, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(call: _Call, *arrays):
    forward, _ = _passes(call)

    def local(query, key, value, learned, queries, keys, given):
        table, sinks = learned
        given = _complete(call, given, table, query)
        query, key, value = _heads_first(query * call.scale, key, value)

        def step(seen, block):
            key, value, keys = block
            return forward(call.rule, query, key, value, queries, keys, given, seen), ()

        seen, _ = _turns(call, step, Seen.nothing(query), (key, value, keys))
        if sinks is not None:
            logsum = jnp.logaddexp(seen.logsum_BHT, sinks[:, None])
            kept = jnp.exp(seen.logsum_BHT - logsum)
            seen = Seen(seen.heads_BHTC * kept[..., None], logsum)
        return seen.heads_BHTC.swapaxes(1, 2).astype(query.dtype), seen.logsum_BHT

    return _mapped(call, local, arrays, ("heads", "logsum"))


def _backward(call: _Call, query, key, value, learned, queries, keys, given, *rest):
    _, backward = _passes(call)
    dtypes = query.dtype, key.dtype, value.dtype

    def local(query, key, value, learned, queries, keys, given, heads, logsum, gradient):
        table, sinks = learned
        given = _complete(call, given, table, query)
        query, key, value = _heads_first(query * call.scale, key, value)
        along = jnp.einsum("bthc,bthc->bht", heads, gradient, preferred_element_type=jnp.float32)
        final = (gradient.swapaxes(1, 2), logsum, along)

        def step(so_far, block):
            key, value, keys = block
            return backward(call.rule, query, key, value, queries, keys, given, final, so_far)

        so_far = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (query, table))
        (d_query, d_table), sums = _turns(call, step, so_far, (key, value, keys))
        d_sinks = None
        if sinks is not None:
            d_sinks = -jnp.sum(jnp.exp(sinks[:, None] - logsum) * along, (0, 2))
        d_learned = (d_table, d_sinks)
        if call.sharding.token_axes:
            sum_up = functools.partial(jax.lax.psum, axis_name=call.sharding.token_axes)
            d_learned = jax.tree.map(sum_up, d_learned)
        gradients = _heads_first(d_query * call.scale, *sums)
        return *(g.astype(d) for g, d in zip(gradients, dtypes)), d_learned

    arrays = (query, key, value, learned, queries, keys, given, *rest)
    return _mapped(call, local, arrays, ("heads", "heads", "heads", "learned"))


def _heads_first(*arrays):
    """[B, T, H, C] as [B, H, T, C], and back."""
    return (x.swapaxes(1, 2) for x in arrays)


def _complete(call: _Call, given: Given, table, query) -> Given:
    tensor = call.sharding.heads[2]
    first = 0 if tensor is None else jax.lax.axis_index(tensor) * query.shape[2]
    return given._replace(table=table, first_head=first)


def _turns(call: _Call, step, state, block):
    if "context" in call.sharding.token_axes:
        return around(step, state, block)
    return step(state, block)


def _passes(call: _Call):
    """The two passes over a block of keys."""
    if call.kernel == "xla":
        return flash.forward, flash.backward
    from lm.models.attention import flash_tpu  # importing Pallas takes a third of a second

    interpret = platform() != "tpu"
    passes = flash_tpu.forward, flash_tpu.backward
    return tuple(functools.partial(f, interpret=interpret) for f in passes)


def _mapped(call: _Call, local, arrays, outputs: tuple[str, ...]):
    """`local` of each device's part of `arrays`; one device needs no mapping."""
    sharding, P = call.sharding, PartitionSpec
    if not sharding.names:
        return local(*arrays)
    rows, length, tensor = sharding.heads[:3]
    logsum = P(rows, tensor, length)
    learned = jax.tree.map(lambda x: P(*(None,) * (x.ndim - 1), tensor), arrays[3])
    tokens = Tokens(P(None, length), P(rows, length), P(rows, length))
    given = Given(P(), None, P(), P(rows), P())
    inputs = (sharding.heads, sharding.heads, sharding.heads, learned, tokens, tokens, given)
    inputs += (sharding.heads, logsum, sharding.heads)
    # An array that is not there has no specification either.
    inputs = tuple(
        type(spec)(*(None if x is None else s for x, s in zip(array, spec)))
        if isinstance(spec, Tokens | Given)
        else spec
        for spec, array in zip(inputs, arrays)
    )
    known = {"heads": sharding.heads, "logsum": logsum, "learned": learned}
    mapped = jax.shard_map(
        local,
        in_specs=inputs,
        out_specs=tuple(known[name] for name in outputs),
        axis_names=set(sharding.names),
        check_vma=False,
    )
    return mapped(*arrays)

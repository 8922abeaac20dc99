"""Attention of a sequence that several devices share, each with its part of queries and keys."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lm.config import ConfigError
from lm.models.attention import flash
from lm.models.attention.flash import LANES, Given, Rule, Seen, Tokens
from lm.models.text import Text
from lm.parallel.platform import platform
from lm.parallel.ring import around, context_ways
from lm.parallel.sharding import ACTIVATION_RULES, automatic_axes, partition

HEADS = "attention_heads"  # to remat policies, the name of what the backward pass starts from


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["of"])
@dataclasses.dataclass(frozen=True)
class ScoreBias:
    """What is added to scores as a function of distance alone.

    `of(table, distance [1, T, S])` gives it, [1, H, T, S]; `table` has the heads last, and those of
    one device where several share them. Distance is the key's slot less the query's.
    """

    table: jax.Array
    of: Callable[[jax.Array, jax.Array], jax.Array]


class Layout(NamedTuple):
    """How the arrays of one attention lie on the mesh, for a `shard_map` over all of it."""

    names: frozenset[str]  # of the mesh axes to split by hand; empty: there is one device
    query: PartitionSpec = PartitionSpec()  # of [B, T, H, C]
    key: PartitionSpec = PartitionSpec()  # of [B, S, K, C]

    @property
    def tensor(self) -> str | None:
        """The axis that splits heads, if any does."""
        return self.query[2] if self.names else None

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes that split rows or tokens: sums over all tokens are sums over these."""
        flat = []
        for entry in self.query[:2]:
            flat += [entry] if isinstance(entry, str) else entry or ()
        return tuple(flat)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is known of a call when tracing."""

    rule: Rule
    layout: Layout
    scale: float
    kernel: str  # "xla" or "pallas"
    interpret: bool = False


def ring_attention(
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    query_text: Text,
    key_text: Text,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | jax.Array = 0,
    bias: ScoreBias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Exact attention in which keys and values travel around the devices that share a sequence.

    Ring attention (Liu et al. 2023) over the mesh axis `context`; rows are split over the batch
    axes and heads over `tensor`. The backward pass goes round again, gradients travelling with
    their keys. No device holds more keys than its own and a neighbour's, nor the scores of more
    than a block of pairs, so memory a device falls as 1/context. Tokens may stand in any order:
    in zig-zag order (`lm.parallel.ring`) every device has the same work. Without a mesh it is
    attention block by block on one device.

    Args:
      query_BTHC, key_BSKC, value_BSKC: of every head; K divides H.
      query_text, key_text: of the tokens they are of.
      causal: keys of later slots are not seen, except those of `key_text.prefix_BT`.
      scale: multiplies the queries; C^-½ unless given.
      softcap: c in c·tanh(scores/c); 0: none.
      window: only this many keys up to the query's own are seen; 0: all. It may be traced.
      bias: added to the scores.
      dropout_rate, dropout_key: dropout of the pattern, the same as `attend`'s.
      kernel: what computes a block: `xla`, `pallas` (TPU; without bias and dropout), or `auto`.

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype; zero for a query that sees no key.

    Raises:
      ConfigError: `context` does not divide the number of queries or of keys, or the kernel cannot
        do this.
    """
    dropped = dropout_key is not None and dropout_rate > 0
    rule = Rule(
        causal,
        float(softcap),
        float(dropout_rate) if dropped else 0.0,
        query_BTHC.shape[2],
        None if bias is None else bias.of,
    )
    ways, (tokens, others) = context_ways(), (query_BTHC.shape[1], key_BSKC.shape[1])
    if tokens % ways or others % ways:
        raise ConfigError(
            f"config.mesh.context={ways} must divide the number of tokens, which is {tokens}"
            + ("" if others == tokens else f" of queries and {others} of keys")
        )
    layout, key_BSKC, value_BSKC = lay_out(query_BTHC, key_BSKC, value_BSKC, "length")
    scale = query_BTHC.shape[-1] ** -0.5 if scale is None else scale
    call = _Call(rule, layout, scale, *_kernel(kernel, rule, query_BTHC, key_BSKC))
    queries, keys = _tokens(query_text, key_text, causal)
    words = rows = None
    if dropped:
        words, rows = jax.random.key_data(dropout_key)[-2:], query_text.rows_B
    no_window = isinstance(window, int) and window == 0
    given = Given(None if no_window else jnp.asarray(window, jnp.int32), None, words, rows)
    table = None if bias is None else jnp.asarray(bias.table, jnp.float32)
    return _attention(call, query_BTHC, key_BSKC, value_BSKC, table, queries, keys, given)


def lay_out(
    query_BTHC: jax.Array, key_BSKC: jax.Array, value_BSKC: jax.Array, length: str | None
) -> tuple[Layout, jax.Array, jax.Array]:
    """Where everything lies, and keys and values with as many heads as that needs.

    Where `tensor` splits the queries' heads but does not divide the keys', each of these is copied
    as few times as let every device have whole groups of heads.

    Args:
      query_BTHC, key_BSKC, value_BSKC: of every head; K divides H.
      length: the logical axis of tokens; None leaves sequences whole.
    """
    mesh, names = automatic_axes()
    if not names:
        return Layout(frozenset()), key_BSKC, value_BSKC
    axes = ("batch", length, "heads", None)
    query_spec = partition(axes, query_BTHC.shape, mesh, ACTIVATION_RULES)
    tensor = mesh.shape["tensor"] if query_spec[2] else 1
    heads = key_BSKC.shape[2]
    if heads % tensor:
        copies = math.lcm(heads, tensor) // heads
        key_BSKC, value_BSKC = (jnp.repeat(x, copies, 2) for x in (key_BSKC, value_BSKC))
    # The two specifications are equal: a head of keys goes where its queries go.
    return Layout(frozenset(names), query_spec, query_spec), key_BSKC, value_BSKC


def _kernel(kernel: str, rule: Rule, query, key) -> tuple[str, bool]:
    possible = rule.bias is None and not rule.dropout_rate
    if kernel == "auto":
        fits = all(x.shape[1] // context_ways() % LANES == 0 for x in (query, key))
        return ("pallas" if platform() == "tpu" and possible and fits else "xla"), False
    if kernel == "pallas" and not possible:
        raise ConfigError("kernel='pallas' cannot add a bias to scores nor drop them: use 'xla'")
    return kernel, platform() != "tpu"


def _tokens(query_text: Text, key_text: Text, causal: bool) -> tuple[Tokens, Tokens]:
    segments = [text.segments_BT for text in (query_text, key_text)]
    if any(s is not None for s in segments):
        segments = [
            jnp.ones_like(text.positions_BT) if s is None else s
            for text, s in zip((query_text, key_text), segments)
        ]
    prefix = key_text.prefix_BT if causal else None
    return (
        Tokens(query_text.slots_1T, segments[0]),
        Tokens(
            key_text.slots_1T, segments[1], None if prefix is None else prefix.astype(jnp.int32)
        ),
    )


# ---- The two passes, each a shard_map of its own, so that what is saved between them is sharded
# as ordinary arrays are and may be named to remat policies ---------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, query, key, value, table, queries, keys, given):
    return _forward(call, query, key, value, table, queries, keys, given)[0]


def _attention_forward(call, query, key, value, table, queries, keys, given):
    heads, logsum = _forward(call, query, key, value, table, queries, keys, given)
    heads, logsum = checkpoint_name(heads, HEADS), checkpoint_name(logsum, HEADS)
    return heads, (query, key, value, table, queries, keys, given, heads, logsum)


def _attention_backward(call, saved, gradient):
    d_query, d_key, d_value, d_table = _backward(call, *saved, gradient)
    return d_query, d_key, d_value, d_table, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(call: _Call, *arrays):
    forward, _ = _kernels(call)

    def local(query, key, value, table, queries, keys, given):
        given = _complete(call, given, table, query)
        query, key, value = _heads_first(query * call.scale, key, value)

        def step(seen, block):
            key, value, keys = block
            return forward(call.rule, query, key, value, queries, keys, given, seen), ()

        seen, _ = _turns(call, step, Seen.nothing(query), (key, value, keys))
        return seen.heads_BHTC.swapaxes(1, 2).astype(query.dtype), seen.logsum_BHT

    return _mapped(call, local, arrays, ("heads", "logsum"))


def _backward(call: _Call, query, key, value, table, queries, keys, given, *rest):
    _, backward = _kernels(call)
    dtypes = query.dtype, key.dtype, value.dtype

    def local(query, key, value, table, queries, keys, given, heads, logsum, gradient):
        given = _complete(call, given, table, query)
        query, key, value = _heads_first(query * call.scale, key, value)
        along = jnp.einsum("bthc,bthc->bht", heads, gradient, preferred_element_type=jnp.float32)
        final = (gradient.swapaxes(1, 2), logsum, along)

        def step(so_far, block):
            key, value, keys = block
            return backward(call.rule, query, key, value, queries, keys, given, final, so_far)

        so_far = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (query, table))
        (d_query, d_table), sums = _turns(call, step, so_far, (key, value, keys))
        if table is not None and call.layout.token_axes:
            d_table = jax.lax.psum(d_table, call.layout.token_axes)
        gradients = _heads_first(d_query * call.scale, *sums)
        return *(g.astype(d) for g, d in zip(gradients, dtypes)), d_table

    arrays = (query, key, value, table, queries, keys, given, *rest)
    return _mapped(call, local, arrays, ("heads", "keys", "keys", "table"))


def _heads_first(*arrays):
    """[B, T, H, C] as [B, H, T, C], and back."""
    return (x.swapaxes(1, 2) for x in arrays)


def _complete(call: _Call, given: Given, table, query) -> Given:
    first = 0
    if call.layout.tensor is not None:
        first = jax.lax.axis_index(call.layout.tensor) * query.shape[2]
    return given._replace(table=table, first_head=first)


def _turns(call: _Call, step, state, block):
    if "context" in call.layout.token_axes:
        return around(step, state, block)
    return step(state, block)


def _kernels(call: _Call):
    """The two passes over a block of keys."""
    if call.kernel == "xla":
        return flash.forward, flash.backward
    from lm.models.attention import splash  # importing Pallas takes a third of a second

    passes = splash.forward, splash.backward
    return tuple(functools.partial(f, interpret=call.interpret) for f in passes)


def _mapped(call: _Call, local, arrays, outputs: tuple[str, ...]):
    """`local` of each device's part of `arrays`; one device needs no mapping."""
    layout = call.layout
    if not layout.names:
        return local(*arrays)
    rows, length, tensor = layout.query[:3]
    P = PartitionSpec
    table = None
    if arrays[3] is not None:
        table = P(*(None,) * (arrays[3].ndim - 1), tensor)
    known = {
        "heads": layout.query,
        "keys": layout.key,
        "logsum": P(rows, tensor, length),
        "table": table,
    }
    tokens = Tokens(P(None, length), P(rows, length), P(rows, length))
    given = Given(P(), None, P(), P(rows), P())
    inputs = (layout.query, layout.key, layout.key, table, tokens, tokens, given)
    inputs += (layout.query, known["logsum"], layout.query)
    # An array that is not there has no specification either.
    inputs = tuple(
        spec
        if isinstance(spec, P) or spec is None
        else type(spec)(*(None if x is None else s for x, s in zip(array, spec)))
        for spec, array in zip(inputs, arrays)
    )
    mapped = jax.shard_map(
        local,
        in_specs=inputs,
        out_specs=tuple(known[name] for name in outputs),
        axis_names=set(layout.names),
        check_vma=False,
    )
    return mapped(*arrays)

"""A ring of devices that share a sequence, and the order of tokens that gives each the same work.

The axis `context` splits a sequence: each device keeps its own queries while keys and values travel
around the ring, so that no device ever holds them all (Liu et al. 2023). What is done with each
block is the caller's; `lm.models.attention.ring` does attention with it.

Where later tokens see earlier ones alone, a device with the first tokens of a sequence would wait
for the one with the last. In zig-zag order each has a chunk from either end: device i of c holds
chunks i and 2c - 1 - i of 2c, and in every turn of the ring each has half the pairs to compute
(Brandon et al. 2023; Llama 3 report, §3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.config import check
from lm.parallel.sharding import ACTIVATION_RULES, automatic_axes, partition

State = TypeVar("State")
Block = TypeVar("Block")
Sums = TypeVar("Sums")


def around(
    step: Callable[[State, Block], tuple[State, Sums]],
    state: State,
    block: Block,
    axis: str = "context",
) -> tuple[State, Sums]:
    """Shows every device of the mesh axis `axis` the block of each; for use inside `shard_map`.

    A block is sent on before it is worked with, and sums follow it a turn behind, so that neither
    waits for the other: a turn takes as long as the longer of work and transfer. `step` takes
    (state, block) to the next state, which stays on its device, and to what is added to the block's
    sums. The first block that a device sees is its own.

    Returns:
      The state after all blocks, and for this device's block the sums over all devices.
    """
    ways = jax.lax.axis_size(axis)
    if ways == 1:
        return step(state, block)
    neighbours = [(i, (i + 1) % ways) for i in range(ways)]

    def send(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, neighbours), tree)

    def turn(carry, _):
        state, block, sums = carry
        following, sums = send(block), send(sums)
        state, more = step(state, block)
        return (state, following, jax.tree.map(jnp.add, sums, more)), None

    sums = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, state, block)[1]
    )
    (state, block, sums), _ = jax.lax.scan(turn, (state, block, sums), length=ways - 1)
    sums = send(sums)
    state, more = step(state, block)
    return state, send(jax.tree.map(jnp.add, sums, more))


def context_ways() -> int:
    """How many devices share a sequence, where this is traced."""
    mesh, names = automatic_axes()
    return mesh.shape["context"] if "context" in names else 1


def zigzag_divides(length: int) -> bool:
    """Whether devices share sequences here, and so many tokens divide into two chunks for each."""
    return context_ways() > 1 and length % (2 * context_ways()) == 0


def to_zigzag(x: jax.Array, axis: int = 1) -> jax.Array:
    """`x` with its tokens in zig-zag order: device i of c gets chunks i and 2c - 1 - i of 2c.

    Each half of a device's share goes to one other device; no device sees the whole sequence. x is
    [B, …], in natural order: rows split over the batch axes, tokens along `axis` over `context`.

    Raises:
      ConfigError: 2c does not divide the number of tokens.
    """
    return _exchange(x, axis, _scatter)


def from_zigzag(x: jax.Array, axis: int = 1) -> jax.Array:
    """The inverse of `to_zigzag`."""
    return _exchange(x, axis, _gather)


def zigzag_slots(length: int) -> jax.Array:
    """The place in natural order of each of `length` tokens in zig-zag order, int32 [1, length].

    It is `to_zigzag` of 0, 1, 2, …, computed where it is wanted.
    """
    ways, token = context_ways(), jnp.arange(length, dtype=jnp.int32)[None]
    if ways == 1:
        return token
    _check_chunks(length, ways)
    size = length // (2 * ways)
    device, within = token // (2 * size), token % (2 * size)
    late = 2 * (ways - 1 - device) * size  # how much later the second of its chunks is
    return device * size + jnp.where(within < size, within, within + late)


def _check_chunks(length: int, ways: int) -> None:
    check(
        length % (2 * ways) == 0,
        f"config.mesh.context={ways} gives each device two chunks of a sequence, and "
        f"{length} tokens are not a multiple of {2 * ways}",
    )


def _exchange(x: jax.Array, axis: int, exchange) -> jax.Array:
    ways, axis = context_ways(), axis % x.ndim
    if ways == 1:
        return x
    _check_chunks(x.shape[axis], ways)
    mesh, names = automatic_axes()
    logical: list[str | None] = [None] * x.ndim
    logical[0], logical[axis] = "batch", "length"
    spec: PartitionSpec = partition(logical, x.shape, mesh, ACTIVATION_RULES)
    mapped = jax.shard_map(
        lambda x: exchange(x, axis, ways),
        in_specs=spec,
        out_specs=spec,
        axis_names=names,
        check_vma=False,
    )
    return mapped(x)


def _routes(ways: int) -> tuple[list[tuple[int, int]], ...]:
    """Where the first, and the second, of each device's chunks in natural order goes."""
    return tuple(
        [(i, min(2 * i + half, 2 * ways - 1 - 2 * i - half)) for i in range(ways)]
        for half in (0, 1)
    )


def _scatter(x: jax.Array, axis: int, ways: int) -> jax.Array:
    chunks = jnp.split(x, 2, axis)
    even, odd = (jax.lax.ppermute(c, "context", r) for c, r in zip(chunks, _routes(ways)))
    # Chunk i is the first of an even device's, and the other, 2c - 1 - i, then odd.
    first = jax.lax.axis_index("context") % 2 == 0
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis)


def _gather(x: jax.Array, axis: int, ways: int) -> jax.Array:
    low, high = jnp.split(x, 2, axis)
    first = jax.lax.axis_index("context") % 2 == 0
    chunks = jnp.where(first, low, high), jnp.where(first, high, low)
    back = ([(there, here) for here, there in routes] for routes in _routes(ways))
    return jnp.concatenate([jax.lax.ppermute(c, "context", r) for c, r in zip(chunks, back)], axis)

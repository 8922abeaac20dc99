"""The optimizer's state in host memory: on the device only while it is updated, a layer at a time.

Adam keeps two numbers for every parameter and reads them once a step. With
`config.train.offload_optimizer` they live in the memory of the device's host (`pinned_host`), each
device's share with its own host. The update walks through the layers: what belongs to one comes to
the device, is updated, and goes back while the next one comes; then through the rows of the
embeddings. So the device holds the state of a few layers, and moves 16 bytes a parameter and step
of AdamW over the host's bus: time that must be worth the memory.

The numbers are those of the update without, and so are the checkpoints: either kind of run resumes
from the other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.parallel.sharding import WHOLE_RULES, ParamSpec, partition
from lm.training.optimizer import OptimizerConfig, make_optimizer
from lm.training.step import Update

VOCABULARY_STEPS = 16  # an embedding's state comes in this many parts, or the next fewer that fit
Specs = Mapping[str, ParamSpec]


def streamed_update(config: OptimizerConfig, total_steps: int, specs: Specs) -> Update:
    """The update of `make_optimizer(config, total_steps, specs)`, its state coming from the host.

    Of an optimizer that `lm.training.workload.check_offload` accepts.
    """
    clip = config.clip_norm
    unclipped = dataclasses.replace(config, clip_norm=0.0)  # the norm is that of all parts together

    def update(summed, weight, norm, state, params, skip, rate):
        scale = jnp.minimum(1.0, clip / (norm + 1e-6)) if clip else jnp.float32(1)
        clipping, state = (state[:1], state[1:]) if clip else ((), state)
        tables, close = _open(state, specs)

        def advance(part: Specs, summed, tables, params):
            """One part's parameters, tables and whole state after the step."""
            optimizer = make_optimizer(unclipped, total_steps, part)
            state = close(jax.device_put(tables, jax.memory.Space.Device))
            # Divided here: the mean of all gradients at once would be another copy of them.
            clipped = jax.tree.map(lambda g: g / weight * scale.astype(g.dtype), summed)
            updates, new_state = optimizer.update(clipped, state, params, learning_rate=rate)
            new = (optax.apply_updates(params, updates), new_state)
            params, state = jax.tree.map(
                lambda old, new: jnp.where(skip, old, new), (params, state), new
            )
            tables = jax.device_put(_open(state, specs)[0], jax.memory.Space.Host)
            return params, tables, state

        def through(names, walk):
            """Through all of some parameters, a slice of each at a time."""
            sliced = {name: (walk.ways * walk.rows, *specs[name].shape[1:]) for name in names}
            part = {name: dataclasses.replace(specs[name], shape=sliced[name]) for name in names}

            def step(index, carry):
                params, tables = carry
                here = _slice((_only(summed, names), tables, params), index, walk)
                return _with_slice(carry, advance(part, *here)[:2], index, walk)

            start = (_only(params, names), [_only(table, names) for table in tables])
            return jax.lax.fori_loop(0, walk.steps, step, start)

        walks = _walks(specs)
        outside = walks.pop(None, [])
        new_params, new_tables, state = advance(
            _only(specs, outside),
            _only(summed, outside),
            [_only(table, outside) for table in tables],
            _only(params, outside),
        )
        for walk, names in walks.items():
            more_params, more_tables = through(names, walk)
            new_params |= more_params
            new_tables = [a | b for a, b in zip(new_tables, more_tables)]
        _, close_new = _open(state, specs)
        return {name: new_params[name] for name in params}, (*clipping, *close_new(new_tables))

    return update


def _open(state, specs: Specs):
    """An optimizer state's tables, name → array, and a function that puts others in their place."""

    def is_table(x):
        return isinstance(x, dict) and x.keys() <= specs.keys()

    leaves, treedef = jax.tree.flatten(state, is_leaf=is_table)
    tables = [leaf for leaf in leaves if is_table(leaf)]

    def close(tables):
        left = iter(tables)
        return treedef.unflatten([next(left) if is_table(leaf) else leaf for leaf in leaves])

    return tables, close


def _only(table: Mapping[str, Any], names) -> dict[str, Any]:
    return {name: table[name] for name in table if name in names}


class _Walk(NamedTuple):
    """How to walk through the first dimension of an array that so many devices split."""

    steps: int
    rows: int  # of each device's share, at every step
    ways: int  # the devices


def _walks(specs: Specs) -> dict[_Walk | None, list[str]]:
    """The parameters that walk together: layer by layer, or through the rows of a vocabulary.

    Under None those taken whole: they are small, or an optimizer may see a matrix in them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    walks: dict[_Walk | None, list[str]] = {}
    for name, spec in specs.items():
        walk = None
        if spec.axes[0] in ("layers", "vocab"):
            axis = partition(spec.axes, spec.shape, mesh, WHOLE_RULES)[0] if mesh.shape else None
            ways = mesh.shape[axis] if axis else 1
            share = steps = spec.shape[0] // ways
            if spec.axes[0] == "vocab":
                steps = max(n for n in range(1, VOCABULARY_STEPS + 1) if share % n == 0)
            walk = _Walk(steps, share // steps, ways)
        walks.setdefault(walk, []).append(name)
    return walks


def _slice(tree, index, walk: _Walk):
    """What every array of `tree` has for one step: [ways · rows, …] of [ways · steps · rows, …]."""

    def cut(x):
        if walk.ways == 1:
            return jax.lax.dynamic_slice_in_dim(x, index * walk.rows, walk.rows)
        shares = x.reshape(walk.ways, -1, *x.shape[1:])
        rows = jax.lax.dynamic_slice_in_dim(shares, index * walk.rows, walk.rows, 1)
        return rows.reshape(-1, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _with_slice(tree, part, index, walk: _Walk):
    """`tree` with `part` in the place that `_slice` took it from."""

    def put(x, new):
        if walk.ways == 1:
            return jax.lax.dynamic_update_slice_in_dim(x, new, index * walk.rows, 0)
        shares = x.reshape(walk.ways, -1, *x.shape[1:])
        rows = new.reshape(walk.ways, -1, *x.shape[1:])
        shares = jax.lax.dynamic_update_slice_in_dim(shares, rows, index * walk.rows, 1)
        return shares.reshape(x.shape)

    return jax.tree.map(put, tree, part)

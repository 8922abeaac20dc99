"""The optimizer's state in host memory: on the device only while it is updated, a layer at a time.

Adam keeps two numbers for every parameter and reads them once a step. With
`config.train.offload_optimizer` they live in the memory of the device's host (`pinned_host`), each
device's share with its own host. The update walks through the stack of layers: what belongs to a
layer comes to the device, is updated, and goes back while the next one comes. Parameters outside
the stacks, the embedding among them, make one more round together. So the device holds the moments
of a few layers, and moves 16 bytes a parameter and step of AdamW over the host's bus, which is time
that more tokens a step make worth it.

The numbers are those of the update without, and so are the checkpoints: either kind of run resumes
from the other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.config import check
from lm.parallel.params import ParamSpec
from lm.parallel.sharding import WHOLE_RULES, partition
from lm.training.optimizer import OptimizerConfig, make_optimizer
from lm.training.step import Update

HOST = "pinned_host"
Specs = Mapping[str, ParamSpec]


def check_offload(config: OptimizerConfig, devices, prefix: str = "config.train") -> None:
    """Raises ConfigError unless this optimizer's state can live beside these devices."""
    check(
        config.name != "adafactor",
        f"{prefix}.offload_optimizer=True is no use to config.optimizer.name='adafactor', whose "
        "state is small: set it to False, or use adamw, lion, muon or sgd",
    )
    kinds = sorted(memory.kind for memory in devices[0].addressable_memories())
    check(
        HOST in kinds,
        f"{prefix}.offload_optimizer=True needs devices that reach {HOST} memory, and "
        f"{devices[0].device_kind} has only {', '.join(kinds)}",
    )


def streamed_update(config: OptimizerConfig, total_steps: int, specs: Specs) -> Update:
    """The update of `make_optimizer(config, total_steps, specs)`, its state coming from the host.

    Args:
      config: of an optimizer that `check_offload` accepts.
      total_steps: of the learning-rate schedule.
      specs: the parameters; those with a leading `layers` axis are updated layer by layer.
    """
    clip = config.clip_norm
    unclipped = dataclasses.replace(config, clip_norm=0.0)  # the norm is that of all parts together

    def update(gradients, norm, state, params, skip):
        scale = jnp.minimum(1.0, clip / (norm + 1e-6)) if clip else jnp.float32(1)
        clipping, state = (state[:1], state[1:]) if clip else ((), state)
        tables, close = _open(state, specs)

        def advance(part: Specs, gradients, tables, params):
            """One part's parameters, tables and whole state after the step."""
            optimizer = make_optimizer(unclipped, total_steps, part)
            state = close(jax.device_put(tables, jax.memory.Space.Device))
            gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
            updates, new_state = optimizer.update(gradients, state, params)
            new = (optax.apply_updates(params, updates), new_state)
            params, state = jax.tree.map(
                lambda old, new: jnp.where(skip, old, new), (params, state), new
            )
            tables = jax.device_put(_open(state, specs)[0], jax.memory.Space.Host)
            return params, tables, state

        def walk(names, ways):
            """Layer after layer; `ways` at once, one of every pipeline stage."""
            part = {
                n: dataclasses.replace(specs[n], shape=(ways, *specs[n].shape[1:])) for n in names
            }

            def step(index, carry):
                params, tables = carry
                layer = _layer((_only(gradients, names), tables, params), index, ways)
                return _with_layer(carry, advance(part, *layer)[:2], index, ways)

            start = (_only(params, names), [_only(table, names) for table in tables])
            return jax.lax.fori_loop(0, specs[names[0]].shape[0] // ways, step, start)

        outside, stacks = _stacks(specs)
        new_params, new_tables, state = advance(
            _only(specs, outside),
            _only(gradients, outside),
            [_only(table, outside) for table in tables],
            _only(params, outside),
        )
        for names in stacks:
            more_params, more_tables = walk(names, _ways(specs[names[0]]))
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


def _stacks(specs: Specs) -> tuple[list[str], list[list[str]]]:
    """The parameters outside all stacks of layers, and those of every depth of stack."""
    stacks: dict[int, list[str]] = {}
    for name, spec in specs.items():
        stacks.setdefault(spec.shape[0] if spec.axes[0] == "layers" else 0, []).append(name)
    outside = stacks.pop(0, [])
    return outside, list(stacks.values())


def _ways(spec: ParamSpec) -> int:
    """How many pipeline stages split a stack of layers."""
    mesh = jax.sharding.get_abstract_mesh()
    axis = partition(spec.axes, spec.shape, mesh, WHOLE_RULES)[0] if mesh.axis_names else None
    return mesh.shape[axis] if axis else 1


def _layer(tree, index, ways: int):
    """Of stacks [L, …]: layer `index` of each of `ways` equal runs of layers [ways, …]."""

    def cut(x):
        if ways == 1:
            return jax.lax.dynamic_slice_in_dim(x, index, 1)
        x = x.reshape(ways, -1, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False)

    return jax.tree.map(cut, tree)


def _with_layer(tree, layer, index, ways: int):
    """`tree` with `layer` in the place that `_layer` took it from."""

    def put(x, new):
        if ways == 1:
            return jax.lax.dynamic_update_slice_in_dim(x, new, index, 0)
        runs = x.reshape(ways, -1, *x.shape[1:])
        return jax.lax.dynamic_update_index_in_dim(runs, new, index, 1).reshape(x.shape)

    return jax.tree.map(put, tree, layer)

"""What a training step holds on a device, before anything is compiled."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from lm.models import ModelConfig, bind, param_specs, skeleton
from lm.models.adapters import AdapterConfig, adapter_specs, applied, freeze
from lm.models.matmul import compute_dtype
from lm.objectives.chunked import chunk_length
from lm.parallel.layout import Layout
from lm.parallel.mesh import batch_ways
from lm.parallel.platform import platform
from lm.parallel.sharding import ParamSpec, parameter_shardings, zero_rules
from lm.training.optimizer import OptimizerConfig, make_optimizer
from lm.training.setup import abstract_frozen
from lm.training.workload import Workload


def expected_memory(workload: Workload) -> dict[str, int]:
    """Bytes that a step of a workload that has a layout holds on one device, from shapes alone.

    parameters   those that are trained: float32, as sharded
    frozen       the base of adapters, in the types it is kept in, where there are any
    gradients    as sharded; twice with accumulation (the sum, and what is added to it)
    optimizer    its state's arrays, each sharded as the parameter it is of; not those that wait in
                 the host's memory
    activations  what the backward pass of all layers keeps of a micro-batch (`kept`); where a
                 policy recomputes, of one layer without it; under tensor parallelism what the two
                 products of a layer that gather their tokens read, and the gradients of that
    logits       one chunk of float32 logits and their gradient, and the head's gradient, if any

    A plan, not a promise: XLA reuses and fuses, mostly to less, and the CPU, which computes the
    elementwise part of bfloat16 in float32, keeps more of it than this. The one estimate there is:
    what a compiled program holds is in its `memory_analysis` (`lm.planning.programs`).
    """
    model, layout = workload.model, workload.layout
    mesh, accumulation = layout.mesh, workload.train.accumulation
    specs, state = arrays(model, workload.optimizer, workload.train.steps, workload.adapter)
    shardings = parameter_shardings(specs, mesh, zero_rules(layout.zero, "optimizer"))
    optimizer = 0
    for name, leaf in state:
        of_parameter = name in specs and leaf.shape == specs[name].shape
        if not (of_parameter and workload.train.offload_optimizer):
            shape = shardings[name].shard_shape(leaf.shape) if of_parameter else leaf.shape
            optimizer += math.prod(shape) * leaf.dtype.itemsize
    activations = kept(workload)[0]
    if model.remat != "none":
        one = dict(num_layers=1, num_encoder_layers=None, dense_layers=0, remat="none")
        one["first_norm"] = True
        layer = dataclasses.replace(model, **one)
        activations += kept(dataclasses.replace(workload, model=layer))[0]
    rows = -(-workload.microbatch // batch_ways(mesh))
    block, vocab = workload.block_size, _split(model.vocab_size, mesh)
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    stream = rows * block * model.width * compute_dtype(model.compute_dtype).itemsize // context
    activations += 4 * (stream - stream // tensor)
    chunk = workload.objective.chunk
    if 0 < workload.max_targets < block:
        chunk = chunk_length(rows, workload.max_targets, vocab)
    chunk = chunk or chunk_length(rows, -(-block // context), vocab)
    frozen = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_frozen(workload))
    )
    head = model.table_width * any("vocab" in spec.axes for spec in specs.values())
    return {
        "parameters": held(specs, layout, "parameters"),
        **({"frozen": frozen} if frozen else {}),
        "gradients": held(specs, layout, "gradients") * (2 if accumulation > 1 else 1),
        "optimizer": optimizer,
        "activations": activations,
        "logits": 4 * vocab * (2 * rows * chunk + head) * model.has_output_head,
    }


@functools.lru_cache(maxsize=8)
def arrays(
    model: ModelConfig, optimizer: OptimizerConfig, steps: int, adapter: AdapterConfig
) -> tuple[dict[str, ParamSpec], list[tuple[str | None, jax.ShapeDtypeStruct]]]:
    """What is trained, and of the optimizer's state each array with what it is named after."""
    specs = param_specs(skeleton(model))
    specs = specs if adapter.kind == "none" else adapter_specs(adapter, specs)
    shapes = {n: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for n, spec in specs.items()}
    state = jax.eval_shape(make_optimizer(optimizer, steps, specs).init, shapes)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    names = ([key.key for key in path if hasattr(key, "key")] for path, _ in leaves)
    return specs, [(name[-1] if name else None, leaf) for name, (_, leaf) in zip(names, leaves)]


def whole_state(workload: Workload) -> int:
    """Bytes of all parameters that are trained and of the optimizer's state, once."""
    train = workload.train
    specs, state = arrays(workload.model, workload.optimizer, train.steps, workload.adapter)
    optimizer = sum(leaf.size * leaf.dtype.itemsize for _, leaf in state)
    return 4 * sum(spec.size for spec in specs.values()) + optimizer


def held(specs: dict[str, ParamSpec], layout: Layout, what: str) -> int:
    """Bytes of all `parameters`, `gradients` or `optimizer` moments, in float32, on one device."""
    shardings = parameter_shardings(specs, layout.mesh, zero_rules(layout.zero, what))
    return sum(4 * math.prod(shardings[n].shard_shape(s.shape)) for n, s in specs.items())


def kept(workload: Workload) -> tuple[int, int]:
    """Bytes that the backward pass of all layers keeps of a micro-batch, for one device.

    A pipeline's stage keeps its share of the layers, for the rows of all stages.

    Returns:
      On the device, and in its host's memory.
    """
    mesh, model = workload.layout.mesh, workload.model
    texts = [workload.block_size]
    if model.architecture == "encoder_decoder":
        texts.insert(0, workload.source_length or workload.block_size)
    rows = -(-workload.microbatch // batch_ways(mesh))
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    local = _local(model, mesh)
    found = _kept(local, workload.adapter, rows, tuple(texts), tensor, context, platform())
    return found[0] // context, found[1] // context


@functools.lru_cache(maxsize=256)
def _kept(
    config: ModelConfig,
    adapter: AdapterConfig,
    rows: int,
    lengths: tuple[int, ...],
    tensor: int,
    context: int,
    platform: str,  # what is traced depends on it
) -> tuple[int, int]:
    """`kept` by the `context` devices that share these rows, of a device's share of a model.

    Counted, not estimated: the model is differentiated on abstract values, and what its backward
    pass closes over is added up, without parameters. The residual stream lies split over `tensor`.
    """
    # Layers that are not scanned would each keep their slice of the parameters.
    model = skeleton(dataclasses.replace(config, scan_layers=True))
    specs = param_specs(model)
    shapes = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in specs.items()}
    base = {}
    if adapter.kind != "none":
        dtype = compute_dtype(config.compute_dtype)
        base = jax.eval_shape(lambda params: freeze(adapter, specs, params, dtype), shapes)
        trained = adapter_specs(adapter, specs)
        shapes = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in trained.items()}
    texts = [jax.ShapeDtypeStruct((rows, length), jnp.int32) for length in lengths]

    def backward(params, base, texts):
        key = jax.random.key(0) if config.dropout else None

        def hidden(params):
            whole = applied(params, base) if base else params
            return bind(model, whole).hidden(*texts, dropout_key=key)

        return jax.vjp(hidden, params)[1]

    # As the devices that share a sequence compute it: a ring keeps no scores of all pairs.
    mesh = AbstractMesh((context,), ("context",), axis_types=(AxisType.Auto,))
    without = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))  # whatever mesh is set around it
    with without, jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(backward)(shapes, base, texts).jaxpr
    given = set(map(id, jaxpr.invars))
    values = {id(value): value.aval for value in jaxpr.outvars if id(value) not in given}
    sums = {True: 0, False: 0}  # by whether they wait in the host's memory
    for value in values.values():
        stream = value.shape[-1:] == (config.width,) and value.ndim > 2
        size = value.size * value.dtype.itemsize // (tensor if stream else 1)
        sums[value.memory_space == jax.memory.Space.Host] += size
    return sums[False], sums[True]


def _split(size: int, mesh) -> int:
    """A dimension's share of the `tensor` axis, which is left out where it does not divide."""
    ways = mesh.shape["tensor"]
    return size if size % ways else size // ways


def _local(config: ModelConfig, mesh) -> ModelConfig:
    """The model whose layers have the shapes that one device of `mesh` holds of a layer."""
    heads = _split(config.num_heads, mesh)
    return dataclasses.replace(
        config,
        num_heads=heads,
        # A key/value head that is not split is still read by the query heads of one device only.
        num_kv_heads=math.gcd(_split(config.kv_heads, mesh), heads),
        head_dim=config.head_width,
        mlp_width=_split(config.feed_forward, mesh),
    )

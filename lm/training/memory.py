"""What training holds on a device, before anything is compiled: parameters, and memory in all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from lm.models import ModelConfig, bind, param_specs, skeleton
from lm.models.attention.context import Context, score_bias
from lm.models.matmul import compute_dtype
from lm.models.remat import rematerialized
from lm.models.stack import Block
from lm.models.text import Text
from lm.objectives.cross_entropy import chunk_length
from lm.parallel.layout import Layout
from lm.parallel.mesh import batch_ways
from lm.parallel.sharding import ParamSpec, parameter_shardings, zero_rules

# ---- Parameters ------------------------------------------------------------------------------


class ParameterRow(NamedTuple):
    """One line of the parameter table."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    mesh_axes: tuple[tuple[str, ...], ...]  # the mesh axes that split each dimension
    count: int
    bytes: int  # on all devices together, each value counted once


def parameter_table(
    specs: Mapping[str, ParamSpec], mesh: Mesh | None = None, dtype: Any = "float32"
) -> list[ParameterRow]:
    """A `ParameterRow` for each parameter, in the model's order; without a mesh none is split."""
    itemsize = jnp.dtype(dtype).itemsize
    shardings = parameter_shardings(specs, mesh) if mesh is not None else {}
    rows = []
    for name, spec in specs.items():
        entries = (*shardings[name].spec,) if shardings else ()
        entries = (*entries, *(None,) * len(spec.shape))[: len(spec.shape)]
        split = tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)
        rows.append(
            ParameterRow(name, spec.shape, spec.axes, split, spec.size, spec.size * itemsize)
        )
    return rows


# ---- Memory ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that training is expected to hold on one device."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def expected_memory(
    config: ModelConfig,
    specs: Mapping[str, ParamSpec],
    layout: Layout,
    *,
    block_size: int,
    batch_size: int,
    optimizer_state: Any = None,
    accumulation: int = 1,
    chunk: int = 0,
    source_length: int | None = None,
    max_targets: int = 0,
) -> Memory:
    """The memory of a training step on one device, from shapes alone.

    parameters   float32, as sharded
    gradients    as sharded; twice with accumulation (the sum, and what is added to it)
    optimizer    its state's arrays, each sharded as the state says, or as the parameter it is of
    activations  rows × what the backward pass of all layers keeps for a row (`kept_by_row`), and
                 where a policy recomputes, of one block without it
    logits       one chunk of float32 logits and their gradient, and the head's gradient

    A plan, not a promise: XLA reuses and fuses, mostly to less, and the CPU, which computes the
    elementwise part of bfloat16 in float32, keeps more of it than this.

    Args:
      config: with vocab_size and max_length set.
      specs: the model's parameters.
      layout: of the devices.
      block_size: tokens a sequence.
      batch_size: sequences whose gradient is taken at once, over all devices.
      optimizer_state: abstract state, e.g. `jax.eval_shape(optimizer.init, abstract_params)`.
      accumulation: how many such batches make a step.
      chunk: objective.chunk.
      source_length: tokens of an encoder-decoder's source; `block_size` unless given.
      max_targets: of how many tokens of a row logits are made; 0: of all.
    """
    source_length = block_size if source_length is None else source_length
    mesh = layout.mesh
    parameters, gradients = (
        sum(4 * math.prod(shardings[name].shard_shape(spec.shape)) for name, spec in specs.items())
        for shardings in (_shardings(specs, layout, what) for what in ("parameters", "gradients"))
    )
    # A pipeline's stage keeps its share of the layers, for the rows of all stages.
    rows_here = -(-batch_size // batch_ways(mesh))
    ways = mesh.shape["context"]
    # Traced as the devices that share a sequence compute it: a ring keeps no scores of all pairs.
    with jax.set_mesh(_sharing_a_sequence(mesh)):
        activations = kept_by_row(local_config(config, mesh), block_size, source_length)
        if config.remat != "none":
            whole = local_config(dataclasses.replace(config, remat="none"), mesh)
            blocks = _blocks(whole, block_size, source_length)
            activations += max(kept_by_block(whole, *block) for _, *block in blocks)
    block_here = -(-block_size // ways)
    vocab_here = _split(config.vocab_size, mesh)
    if 0 < max_targets < block_size:
        chunk = chunk_length(rows_here, max_targets, vocab_here)
    chunk = chunk or chunk_length(rows_here, block_here, vocab_here)
    return Memory(
        parameters=parameters,
        gradients=gradients * (2 if accumulation > 1 else 1),
        optimizer=_state_bytes(optimizer_state, specs, _shardings(specs, layout, "optimizer")),
        activations=-(-rows_here * activations // ways),
        logits=4 * vocab_here * (2 * rows_here * chunk + config.width),
    )


def _sharing_a_sequence(mesh: Mesh) -> Mesh:
    """A mesh of `context` alone."""
    ways = mesh.shape["context"]
    return Mesh(mesh.devices.flat[:ways], ("context",), axis_types=(AxisType.Auto,))


def _shardings(specs: Mapping[str, ParamSpec], layout: Layout, what: str):
    return parameter_shardings(specs, layout.mesh, zero_rules(layout.zero, what))


def _split(size: int, mesh) -> int:
    """A dimension's share of the `tensor` axis, which is left out where it does not divide."""
    ways = mesh.shape.get("tensor", 1)
    return size if size % ways else size // ways


def local_config(config: ModelConfig, mesh) -> ModelConfig:
    """The model whose whole block has the shapes that one device of `mesh` holds of a block."""
    return dataclasses.replace(
        config,
        num_heads=_split(config.num_heads, mesh),
        # A key/value head that is not split is still read by the query heads of one device only.
        num_kv_heads=math.gcd(_split(config.kv_heads, mesh), _split(config.num_heads, mesh)),
        head_dim=config.head_width,
        mlp_width=_split(config.feed_forward, mesh),
    )


def kept_by_row(config: ModelConfig, length: int, source_length: int) -> int:
    """Bytes that the backward pass of all layers keeps for one row.

    Args:
      config: the model's.
      length: tokens of the row; of an encoder-decoder, of its target.
      source_length: of its source.
    """
    if config.cell != "attention":
        return _kept_by_recurrent(config, length, source_length)
    blocks = _blocks(config, length, source_length)
    kept = sum(count * kept_by_block(config, *block) for count, *block in blocks)
    if config.architecture == "encoder_decoder":  # the encoder's output, once for all layers
        kept += source_length * config.width * compute_dtype(config.compute_dtype).itemsize
    return kept


def _blocks(config: ModelConfig, length: int, source_length: int):
    """(how many, and what `kept_by_block` needs) of each kind of block."""
    mixture = config.num_experts > 0
    if config.architecture == "encoder_decoder":
        return [
            (config.encoder_layers, source_length, 0, False),
            (config.num_layers, length, source_length, False),
        ]
    dense = [(config.dense_layers, length, 0, False)] if config.dense_layers else []
    return [*dense, (config.num_layers - config.dense_layers, length, 0, mixture)]


def kept_by_block(
    config: ModelConfig, length: int, source_length: int = 0, mixture: bool = False
) -> int:
    """Bytes that the backward pass of one block keeps for one row of `length` tokens.

    Counted, not estimated: the block is differentiated on abstract values, and what its backward
    pass closes over is added up, without parameters, mask, rotary angles, position biases and the
    encoder's output, which all rows or layers share.

    Args:
      config: the model's.
      length: tokens a row.
      source_length: where the block also attends to an encoder, tokens of its output.
      mixture: whether experts take the MLP's place.
    """
    crosses = source_length > 0
    block = Block(config, crosses, mixture)
    params = _abstract_parameters(block)
    dtype = compute_dtype(config.compute_dtype)
    x_BTD = jax.ShapeDtypeStruct((1, length, config.width), dtype)
    context = _abstract_context(config, length, source_length, dtype)
    key = jax.random.key(0) if config.dropout else None

    def backward(x_BTD, params, context):
        known = {"window": 0, "slot": 0}  # as a layer's are: not traced
        across = context.across and context.across._replace(causal=False, **known)
        context = context._replace(causal=True, across=across, **known)
        body = rematerialized(lambda b, x: b(x, context, key=key)[0], config)
        return jax.vjp(lambda p, x: body(bind(block, p), x), params, x_BTD)[1]

    return _closed_over(backward, x_BTD, params, context)


def _abstract_context(
    config: ModelConfig, length: int, source_length: int, dtype: jnp.dtype
) -> Context:
    abstract = jax.ShapeDtypeStruct
    half = abstract((1, length, 1, config.rotary_dim // 2), jnp.float32)
    bias = score_bias(
        config, abstract((config.relative_buckets, config.num_heads), jnp.float32), causal=True
    )
    pairs = abstract((1, config.num_heads, length, length), jnp.float32)
    text, source = (
        jax.eval_shape(Text.of, abstract((1, n), jnp.int32)) for n in (length, source_length)
    )
    crossing = {
        "memory_BSD": abstract((1, source_length, config.width), dtype),
        "across": Context(abstract((1, length, source_length), bool), text, source),
    }
    return Context(
        abstract((1, length, length), bool),
        text=text,
        key_text=text,
        rotary=(half, half) if config.positions == "rotary" else None,
        bias_BHTS=pairs if bias else None,
        bias=bias,
        **(crossing if source_length else {}),
    )


def _kept_by_recurrent(config: ModelConfig, length: int, source_length: int) -> int:
    """`kept_by_row` of a recurrent model, differentiated whole."""
    model = skeleton(config)
    texts = [jax.ShapeDtypeStruct((1, length), jnp.int32)]
    if config.architecture == "encoder_decoder":
        texts.insert(0, jax.ShapeDtypeStruct((1, source_length), jnp.int32))
    key = jax.random.key(0) if config.dropout else None

    def backward(texts, params):
        return jax.vjp(lambda p: bind(model, p).hidden(*texts, dropout_key=key), params)[1]

    return _closed_over(backward, texts, _abstract_parameters(model))


def _abstract_parameters(model) -> dict[str, jax.ShapeDtypeStruct]:
    specs = param_specs(model)
    return {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}


def _closed_over(backward, x, *shared) -> int:
    """Bytes that `backward(x, *shared)`, a backward pass, has kept, without `shared` itself.

    Nor does what waits in the host's memory count.
    """
    jaxpr = jax.make_jaxpr(backward)(x, *shared).jaxpr
    without = set(map(id, jaxpr.invars[len(jax.tree.leaves(x)) :]))
    kept = {id(value): value.aval for value in jaxpr.outvars if id(value) not in without}
    return sum(
        aval.size * aval.dtype.itemsize
        for aval in kept.values()
        if aval.memory_space != jax.memory.Space.Host
    )


def _state_bytes(state: Any, specs: Mapping[str, ParamSpec], shardings) -> int:
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = next((key.key for key in reversed(path) if hasattr(key, "key")), None)
        sharding = getattr(leaf, "sharding", None)
        if sharding is None and name in specs and specs[name].shape == leaf.shape:
            sharding = shardings[name]
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total

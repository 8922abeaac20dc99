"""What decoding takes: prefill, and a step of it, compiled for a topology."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from lm.config import Size, SizeOrZero, check
from lm.inference.prepare import abstract_params, bound, cache_shardings, for_decoding
from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.models.matmul import compute_dtype
from lm.parallel.mesh import BATCH_AXES, MeshConfig, batch_ways, describe, make_mesh
from lm.parallel.platform import compiling_for
from lm.parallel.sharding import WHOLE_RULES, parameter_shardings
from lm.planning import report
from lm.planning.programs import Program, compile_program
from lm.planning.search import divisors
from lm.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Inference with the same model on the same devices."""

    enabled: bool = False  # compile prefill and a decoding step too
    batch_size: SizeOrZero = 0  # rows, over all devices; 0: 8 for each share of the mesh
    prompt_length: Size = 1024  # tokens read at once by prefill
    cache_length: SizeOrZero = 0  # tokens the cache has room for; 0: data.block_size
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # as it is: chosen


def decoding(
    plan: DecodePlan, model: ModelConfig, block_size: int, topology: Topology, console: Console
) -> dict[str, Any]:
    """Prints what prefill takes, and a token more of every row, and returns it in numbers.

    Raises:
      ConfigError: the model is no decoder, the prompt is longer than the cache, the mesh does not
        fit the devices, or the batch the mesh.
    """
    check(
        model.architecture == "decoder" and model.cell == "attention",
        f"config.decode.enabled=True is for decoders, not {model.architecture!r} of "
        f"{model.cell!r} cells",
    )
    config = plan.mesh if plan.mesh != MeshConfig() else decode_mesh(model, topology)
    mesh = make_mesh(config, topology.devices)
    ways, prompt = batch_ways(mesh), plan.prompt_length
    rows, length = plan.batch_size or 8 * ways, plan.cache_length or block_size
    check(
        prompt <= length,
        f"config.decode.prompt_length={prompt} is longer than the cache's {length}",
    )
    check(
        rows % ways == 0,
        f"config.decode.batch_size={rows} must be a multiple of the {ways} devices that share it",
    )
    results: dict[str, Any] = {"mesh": describe(mesh), "rows": rows, "cache_length": length}
    for name, tokens, context, seen in (
        ("prefill", prompt, f"{prompt:,} tokens", prompt),
        ("decoding step", 1, f"a cache of {length:,}", length),
    ):
        with jax.set_mesh(mesh), compiling_for(topology.platform):
            program = _program(name, model, mesh, topology, rows, tokens, length)
        console.print()
        title = f"{name}, {describe(mesh)}: {rows} rows, {context}"
        cache = costs.cache_bytes(model, seen, "bfloat16") * rows / mesh.size
        report.show(console, title, program, program.memory.parameters + cache)
        results[name] = program.figures()
    return results


def decode_mesh(model: ModelConfig, topology: Topology) -> MeshConfig:
    """Tensor parallel over as few devices as hold the weights twice over, the rest data."""
    devices = len(topology.devices)
    weights = 2 * costs.parameters(model).total
    fitting = [n for n in divisors(devices) if model.num_heads % n == 0]
    enough = [n for n in fitting if weights / n < topology.chip.memory / 2]
    tensor = enough[0] if enough else fitting[-1]
    grouped = [n for n in fitting if n >= tensor and model.kv_heads % n == 0]
    tensor = grouped[0] if grouped else tensor
    return MeshConfig(data=devices // tensor, tensor=tensor)


def _program(
    name: str, config: ModelConfig, mesh, topology: Topology, rows: int, length: int, cache: int
) -> Program:
    """Reads `length` tokens of every row into a cache of so many, to the logits of the last one.

    Parameters are in the compute dtype, split over `tensor` and `expert`; rows of the cache are
    split as a batch's, its heads over `tensor`.
    """
    dtype = compute_dtype(config.compute_dtype).name  # the platform's, not this machine's
    model = for_decoding(skeleton(dataclasses.replace(config, compute_dtype=dtype)))
    params = abstract_params(model, parameter_shardings(param_specs(model), mesh, WHOLE_RULES))
    empty = jax.eval_shape(lambda: model.new_cache(rows, cache))
    kept = cache_shardings(empty, mesh)
    tokens_BT = jax.ShapeDtypeStruct(
        (rows, length), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    )

    def extend(cache, params, tokens_BT, positions_BT):
        bound_model = bound(model, params)
        x_BTD, cache = bound_model.extend(tokens_BT, positions_BT, cache)
        return cache, bound_model.unembed(x_BTD[:, -1:])[:, 0]

    cached = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        empty,
        kept,
    )
    if name == "prefill":
        each = costs.prefill_flops_per_token(config, length)
    else:
        each = costs.decode_flops_per_token(config, cache)
    here = rows * length / mesh.size
    return compile_program(
        jax.jit(extend, donate_argnums=0, out_shardings=(kept, None)),
        (cached, params, tokens_BT, tokens_BT),
        (params, ()),
        topology,
        mesh,
        0.5,
        name=name,
        model_flops=each * here,
        tokens=here,
    )

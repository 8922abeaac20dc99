"""What decoding takes: the engine's own programs, compiled for a topology.

`read` reads a piece of one prompt, `decode` draws a token for every row; pages of keys and values
are as the engine keeps them (`lm.inference.programs`). Of what `decode` repeats for several tokens,
one round counts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lm.config import Size, SizeOrZero, check
from lm.inference import programs
from lm.inference.prepare import (
    Weights,
    abstract_params,
    bound,
    cache_shardings,
    for_decoding,
)
from lm.inference.requests import EngineConfig
from lm.inference.rows import LEVELS, Batch
from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.models.attention.paged import Paging
from lm.models.matmul import compute_dtype
from lm.parallel.mesh import MeshConfig, describe, make_mesh, replicated
from lm.parallel.platform import compiling_for
from lm.parallel.sharding import WHOLE_RULES, Rules, parameter_shardings
from lm.planning import report
from lm.planning.programs import Program, compile_program, device_bytes
from lm.planning.search import divisors
from lm.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Inference with the same model on the same devices."""

    enabled: bool = False  # compile prefill and a decoding step too
    only: bool = False  # compile these and no training step
    batch_sizes: tuple[Size, ...] = (8,)  # rows, over all devices: a decoding step for each
    prompt_length: Size = 1024  # tokens read at once by prefill
    cache_length: SizeOrZero = 0  # tokens of each row in the cache, which is full; 0: block_size
    weights: Weights = "compute"  # int8: matrices in eight bits
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # as it is: chosen


@dataclasses.dataclass(frozen=True)
class Planned:
    """What all programs share."""

    config: ModelConfig
    settings: programs.Settings
    params: Any  # abstract
    mesh: Mesh
    topology: Topology
    page_size: int


def decoding(
    plan: DecodePlan, model: ModelConfig, block_size: int, topology: Topology, console: Console
) -> dict[str, Any]:
    """Prints what prefill takes, and a token more of every row, and returns it in numbers.

    Raises:
      ConfigError: the model is no decoder, the prompt is longer than the cache, the mesh does not
        fit the devices, or the model has no eight-bit weights.
    """
    check(
        model.architecture == "decoder" and model.cell == "attention",
        f"config.decode.enabled=True is for decoders, not {model.architecture!r} of "
        f"{model.cell!r} cells",
    )
    check(len(plan.batch_sizes) > 0, "config.decode.batch_sizes=() must name at least one size")
    prompt, length = plan.prompt_length, plan.cache_length or block_size
    check(
        prompt <= length,
        f"config.decode.prompt_length={prompt} is longer than the cache's {length}",
    )
    config = plan.mesh
    if config == MeshConfig():
        config = decode_mesh(model, topology, 1 if plan.weights == "int8" else 2)
    mesh = make_mesh(config, topology.devices)
    with jax.set_mesh(mesh), compiling_for(topology.platform):
        planned = plan_engine(plan.weights, dataclasses.replace(model, max_length=length), topology)
        prefill = read(planned, prompt, pages_for(planned, 1))
        steps = {r: draw(planned, r, pages_for(planned, r)) for r in plan.batch_sizes}
        dtype = compute_dtype(model.compute_dtype)
    words = f"{describe(mesh)}, weights in {'int8' if plan.weights == 'int8' else dtype}"
    least = _read_weights(planned)

    def show(title: str, program: Program, rows: int, tokens: int) -> float:
        """Of one device, the bytes that must be read."""
        cache = costs.cache_bytes(model, tokens, dtype) * rows / mesh.size
        console.print()
        report.show(console, f"{title}, {words}", program, least + cache)
        return least + cache

    show(f"prefill of {prompt:,} tokens", prefill, 1, prompt)
    table = []
    for rows, program in steps.items():
        context = f"decoding step: {rows} rows, a cache of {length:,}"
        bytes_read = show(context, program, rows, length)
        table.append(_figures(rows, program, bytes_read / topology.chip.bandwidth))
    console.print()
    report.show_decoding(console, words, table)
    return {
        "mesh": describe(mesh),
        "weights": plan.weights,
        "cache_length": length,
        "prefill": prefill.figures(),
        "steps": table,
    }


def _figures(rows: int, program: Program, limit: float) -> dict[str, Any]:
    """A step in numbers; tokens a second are of all devices together."""
    found = program.estimate
    rates = {"limit": limit}
    if found is not None:
        rates |= {"roofline": found.roofline, "estimate": found.seconds}
    rates = {f"tokens_per_second_{name}": rows / seconds for name, seconds in rates.items()}
    return {"rows": rows, **rates, **program.figures()}


def decode_mesh(model: ModelConfig, topology: Topology, weight_bytes: int) -> MeshConfig:
    """Tensor parallel as wide as there are key/value heads, the rest data.

    Or over as few devices as hold the weights, of so many bytes each, twice over, if they are more.
    """
    devices = len(topology.devices)
    weights = weight_bytes * costs.parameters(model).total
    fitting = [n for n in divisors(devices) if model.num_heads % n == 0]
    enough = [n for n in fitting if weights / n < topology.chip.memory / 2]
    grouped = [n for n in fitting if model.kv_heads % n == 0]
    tensor = max(grouped[-1], enough[0] if enough else fitting[-1])
    return MeshConfig(data=devices // tensor, tensor=tensor)


def plan_engine(
    weights: Weights,
    config: ModelConfig,
    topology: Topology,
    rules: Rules = WHOLE_RULES,
    page_size: int = EngineConfig().page_size,
) -> Planned:
    """An engine on the current mesh, whose parameters are split as `rules` say."""
    mesh = jax.sharding.get_mesh()
    dtype = compute_dtype(config.compute_dtype).name  # the platform's, not this machine's
    config = dataclasses.replace(config, compute_dtype=dtype)
    model = for_decoding(skeleton(config), mesh)
    shardings = parameter_shardings(param_specs(model), mesh, rules)
    params = abstract_params(model, shardings, weights)
    settings = programs.Settings(model.config, config.vocab_size, weights)
    return Planned(config, settings, params, mesh, topology, page_size)


def pages_for(planned: Planned, rows: int, pages: int = 0) -> Any:
    """Pages, by default for so many texts of the whole length, and nobody's, as the mesh shares."""
    number = 1 + (pages or rows * _pages(planned))

    def new_pages(params):
        model = bound(planned.settings.model, params)
        return model.new_pages(number, planned.page_size, rows + 1)

    empty = jax.eval_shape(new_pages, planned.params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        empty,
        cache_shardings(empty, planned.mesh),
    )


def _pages(planned: Planned) -> int:
    """Of one text."""
    return -(-planned.config.max_length // planned.page_size)


def _compiled(
    planned: Planned, function, cache, rest, seen: float, flops: float, tokens: int
) -> Program:
    """One of the engine's functions, given the parameters, the cache and what `rest` is like.

    `seen` is the share of keys that tokens see.
    """
    whole = replicated(planned.mesh)
    kept = jax.tree.map(lambda leaf: leaf.sharding, cache)
    rest = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), np.result_type(x), sharding=whole), tuple(rest)
    )
    here = tokens / planned.mesh.size
    return compile_program(
        jax.jit(function, donate_argnums=1, out_shardings=(kept, whole)),
        (planned.params, cache, *rest),
        (planned.params, ()),
        planned.topology,
        planned.mesh,
        seen,
        name=function.func.__name__,
        model_flops=flops * here,
        tokens=here,
    )


def read(planned: Planned, length: int, cache: Any) -> Program:
    """Reads so many tokens of one text into the cache that `pages_for` makes."""
    tokens_1T = np.zeros((1, length), np.int32)
    table_1N = np.zeros((1, _pages(planned)), np.int32)
    paging = Paging(table_1N, tokens_1T, np.zeros(1, np.int32), np.int32(0))
    function = functools.partial(programs.read, planned.settings)
    flops = costs.prefill_flops_per_token(planned.config, length)
    rest = tokens_1T, paging
    return _compiled(planned, function, cache, rest, 0.5, flops, length)


def draw(planned: Planned, rows: int, cache: Any, least: programs.Level = LEVELS[0]) -> Program:
    """Draws a token for each of so many rows, whose texts fill their pages."""
    most = EngineConfig().decode_chunk
    batch = Batch(planned.config.vocab_size, (0,), rows, planned.config.max_length)
    level, texts = batch.rows([], rows, _pages(planned), lambda text: 0, least)
    function = functools.partial(programs.decode, planned.settings, level, most)
    flops = costs.decode_flops_per_token(planned.config, planned.config.max_length)
    rest = texts, np.int32(1)
    return _compiled(planned, function, cache, rest, 1.0, flops, rows)


def _read_weights(planned: Planned) -> float:
    """Bytes of one device's weights that every step reads: all but a table that is looked up."""
    table = 0.0
    if not planned.config.tie_embeddings:
        table = device_bytes(planned.params["embedding.tokens"])
    return device_bytes(planned.params) - table

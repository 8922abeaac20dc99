"""The programs that a plan compiles: the training step that runs, prefill, and a step of decoding.

Nothing is allocated: arguments are shapes with shardings, on devices that need not exist.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.config import check
from lm.inference.prepare import abstract_params, bound, cache_shardings, for_decoding
from lm.models import ModelConfig, param_specs, skeleton
from lm.models.matmul import compute_dtype
from lm.parallel.layout import Layout
from lm.parallel.mesh import BATCH_AXES, MeshConfig, batch_sharding, batch_ways, make_mesh
from lm.parallel.platform import compiling_for
from lm.parallel.sharding import WHOLE_RULES, parameter_shardings
from lm.planning import hlo
from lm.planning.hlo_runs import stacks
from lm.planning.roofline import Estimate, estimate
from lm.planning.topology import Topology
from lm.training.setup import set_up
from lm.training.workload import Workload, check_layout

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device while a program runs, by kind."""

    parameters: float
    optimizer: float  # its state
    arguments: float  # the batch, the cache, counters; and what tiles add to all arguments
    outputs: float  # that do not take an argument's place
    kept: float  # of the temporaries, what the forward pass stacks up for the backward pass
    temporaries: float  # all of them, with what is lost between them
    code: float
    limit: float  # what there is

    @property
    def total(self) -> float:
        """All of it."""
        given = self.parameters + self.optimizer + self.arguments
        return given + self.outputs + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether there is as much."""
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, or one that the compiler refused for its memory."""

    name: str
    memory: Memory
    estimate: Estimate | None  # None: refused
    compiler_flops: float  # by the compiler's analysis, which counts loop bodies once
    # `memory_analysis().temp_size_in_bytes`, which others report: a TPU's counts some room for each
    # of the arrays that lie there one after the other. What is refused is `memory.total`.
    compiler_temporaries: float
    compile_seconds: float
    text: str = dataclasses.field(repr=False, default="")

    @property
    def fits(self) -> bool:
        """Whether it was compiled and has room."""
        return self.estimate is not None and self.memory.fits


def train_program(workload: Workload, layout: Layout, topology: Topology) -> Program:
    """The training step of `lm.jobs.train`, compiled for the topology's devices.

    Raises:
      ConfigError: model and batch do not divide over the devices.
    """
    workload = dataclasses.replace(workload, layout=layout)
    check_layout(workload)
    with layout.active(), compiling_for(topology.platform):
        training = set_up(workload)
        abstract, mesh = training.abstract, layout.mesh
        batch = _batch(workload, mesh)
        given = (_bytes(abstract["params"]), _bytes(abstract["optimizer"]))
        rest = _bytes((batch, abstract["step"], abstract["loss_mean"]))
        return _compile(
            "training step",
            training.step,
            (abstract, batch),
            given,
            rest,
            topology,
            mesh,
            _seen(workload),
        )


def _seen(workload: Workload) -> float:
    """Of all pairs of a query and a key, the share that attention sees."""
    model, length = workload.model, workload.block_size
    if model.architecture == "encoder":
        return 1.0
    reach = [
        min(model.window or length, length) if model.is_local(i) else length
        for i in range(model.num_layers)
    ]
    pairs = [r * (r + 1) / 2 + (length - r) * r for r in reach]
    return sum(pairs) / len(pairs) / length**2


def _batch(workload: Workload, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of one step, as `lm.data` makes it."""
    sides = {"": ("inputs", "targets", "weights"), "source_": ("source",)}
    lengths = {"": workload.block_size, "source_": workload.source_length}
    batch = {}
    for side, names in sides.items():
        if not lengths[side]:
            continue
        if workload.packed:
            names = (*names, f"{side}segment_ids", f"{side}positions")
        shape = (1, workload.batch_size, lengths[side])
        for name in names:
            dtype = jnp.float32 if name == "weights" else jnp.int32
            batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, 1))
    return batch


def decode_programs(
    config: ModelConfig,
    mesh_config: MeshConfig,
    topology: Topology,
    batch_size: int,
    prompt_length: int,
    cache_length: int,
) -> list[Program]:
    """Prefill of a prompt, and one token more of every row: both compiled, logits included.

    Parameters are in the compute dtype, split over `tensor` and `expert`; rows of the cache are
    split as a batch's, its heads over `tensor`.

    Raises:
      ConfigError: the mesh does not fit the devices, or the batch the mesh.
    """
    mesh = make_mesh(mesh_config, topology.devices)
    check(
        batch_size % batch_ways(mesh) == 0,
        f"config.decode.batch_size={batch_size} must be a multiple of the {batch_ways(mesh)} "
        "devices that share it",
    )
    with jax.set_mesh(mesh), compiling_for(topology.platform):
        dtype = compute_dtype(config.compute_dtype).name  # the platform's, not this machine's
        model = for_decoding(skeleton(dataclasses.replace(config, compute_dtype=dtype)))
        shardings = parameter_shardings(param_specs(model), mesh, WHOLE_RULES)
        params = abstract_params(model, shardings)
        cache = _cache(model, mesh, batch_size, cache_length)
        programs = []
        for name, length in (("prefill", prompt_length), ("decoding step", 1)):
            tokens = jax.ShapeDtypeStruct(
                (batch_size, length),
                jnp.int32,
                sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES)),
            )

            def extend(cache, params, tokens_BT, positions_BT):
                bound_model = bound(model, params)
                x_BTD, cache = bound_model.extend(tokens_BT, positions_BT, cache)
                return cache, bound_model.unembed(x_BTD[:, -1:])[:, 0]

            kept = jax.tree.map(lambda leaf: leaf.sharding, cache)
            jitted = jax.jit(extend, donate_argnums=0, out_shardings=(kept, None))
            arguments = (cache, params, tokens, tokens)
            given = (_bytes(params), 0.0)
            rest = _bytes((cache, tokens, tokens))
            programs.append(_compile(name, jitted, arguments, given, rest, topology, mesh, 0.5))
        return programs


def _cache(model, mesh: Mesh, batch_size: int, length: int) -> Any:
    """An abstract cache, its rows and its heads split."""
    empty = jax.eval_shape(lambda: model.new_cache(batch_size, length))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        empty,
        cache_shardings(empty, mesh),
    )


def _bytes(tree: Any) -> float:
    """Bytes on one device of sharded abstract arrays, without those in its host's memory."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
            if leaf.sharding.memory_kind in (None, "device", "unpinned_host")
        )
    )


def _compile(name, jitted, arguments, given, rest, topology, mesh, share) -> Program:
    start = time.perf_counter()
    parameters, optimizer = given
    limit = topology.chip.memory
    lowered = jitted.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = _refused(str(error))
        if wanted is None:
            raise
        memory = Memory(parameters, optimizer, rest, 0.0, 0.0, wanted, 0.0, limit)
        return Program(name, memory, None, 0.0, wanted, time.perf_counter() - start)
    text = compiled.as_text()
    kept = stacks(hlo.parse(text)) if optimizer else 0.0
    stats = compiled.memory_analysis()
    temporaries = _temporaries(stats)
    memory = Memory(
        parameters=parameters,
        optimizer=optimizer,
        arguments=max(rest, stats.argument_size_in_bytes - parameters - optimizer),
        outputs=max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
        kept=min(kept, temporaries),
        temporaries=temporaries,
        code=stats.generated_code_size_in_bytes,
        limit=limit,
    )
    analysis: Mapping[str, float] = compiled.cost_analysis() or {}
    seconds = time.perf_counter() - start
    found = estimate(text, topology, mesh, share)
    flops, reported = analysis.get("flops", 0.0), stats.temp_size_in_bytes
    return Program(name, memory, found, flops, reported, seconds, text)


def _temporaries(stats) -> float:
    """Bytes that a program takes while it runs, besides what it is given and what it gives back."""
    given = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = getattr(stats, "total_allocation_bytes", 0)  # jax 0.12; its peak is right on TPUs alone
    return max(0, total - given) if total else stats.temp_size_in_bytes


def _refused(message: str) -> float | None:
    """Bytes that a program wanted for its temporaries, if the compiler refused it for them.

    `… total memory required for HLO temporaries (107.71G) exceeds available HBM (95.73G) …`
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\(([\d.]+)([KMGT]?)\)", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return float(found[1]) * _UNITS[found[2]] if found else math.inf

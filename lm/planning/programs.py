"""Programs that a plan compiles, and what they hold; the training step that runs is one.

Nothing is allocated: arguments are shapes with shardings, on devices that need not exist.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm.models import costs
from lm.parallel.mesh import batch_sharding
from lm.parallel.platform import compiling_for
from lm.planning.collectives import summed
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
    """A compiled program, or one that the compiler refused for its memory. Of one device."""

    name: str
    model_flops: float  # as every MFU of this project counts them (`lm.models.costs`)
    tokens: float
    memory: Memory
    compile_seconds: float
    # `memory_analysis().temp_size_in_bytes`, which others report: a TPU's counts some room for each
    # of the arrays that lie there one after the other. What is refused is `memory.total`.
    compiler_temporaries: float
    estimate: Estimate | None = None  # None: refused
    compiler_flops: float = 0.0  # by the compiler's analysis, which counts loop bodies once
    text: str = dataclasses.field(repr=False, default="")

    @property
    def fits(self) -> bool:
        """Whether it was compiled and has room."""
        return self.estimate is not None and self.memory.fits

    def figures(self) -> dict[str, Any]:
        """It in numbers, for plan.json. Times are in seconds."""
        figures = {
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total},
            "compiler_temporaries": self.compiler_temporaries,
            "fits": self.fits,
        }
        found = self.estimate
        if found is None:
            return figures
        names = ("flops", "bytes", "communicated", "ideal", "roofline", "seconds", "exposed")
        return figures | {name: getattr(found, name) for name in names} | {
            "terms": {
                "compute": found.compute_seconds,
                "memory": found.memory_seconds,
                "network": found.network_seconds,
                "compiler": found.compiler_seconds,
            },
            "collectives": [
                {"kind": c.kind, "axes": c.along, "times": c.trips, "bytes": c.bytes,
                 "received": c.total}
                for c in summed(found.collectives)
            ],
            "model_flops": self.model_flops,
            "mfu": found.mfu(self.model_flops),
            "tokens_per_second": self.tokens / found.seconds,
        }  # fmt: skip


def train_program(workload: Workload, topology: Topology) -> Program:
    """The training step of `lm.jobs.train`, compiled for the topology's devices.

    Args:
      workload: with a layout over these devices.

    Raises:
      ConfigError: model and batch do not divide over the devices.
    """
    check_layout(workload)
    layout = workload.layout
    with layout.active(), compiling_for(topology.platform):
        training = set_up(workload)
        abstract, mesh = training.abstract, layout.mesh
        tokens = workload.tokens / mesh.size
        return compile_program(
            training.step,
            (abstract, _batch(workload, mesh), training.frozen),
            (abstract["params"], abstract["optimizer"]),
            topology,
            mesh,
            seen(workload),
            name="training step",
            model_flops=workload.flops_per_token * tokens,
            tokens=tokens,
        )


def seen(workload: Workload) -> float:
    """Of all pairs of a query and a key, the share that attention sees."""
    model, length = workload.model, workload.block_size
    causal = model.architecture != "encoder"
    windows = [model.window if model.is_local(i) else 0 for i in range(model.num_layers)]
    keys = [costs.mean_keys(length, window or length, causal) for window in windows]
    return sum(keys) / len(windows) / length


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
        texts = (2,) if workload.objective.texts_per_row == 2 else ()
        shape = (1, workload.batch_size, *texts, lengths[side])
        sharding = batch_sharding(mesh, 1, len(shape) - 1)
        for name in names:
            dtype = jnp.float32 if name == "weights" else jnp.int32
            batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    if workload.objective.name == "kto":
        rows, sharding = (1, workload.batch_size), batch_sharding(mesh, 1, 1)
        batch["label"] = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=sharding)
    return batch


def device_bytes(tree: Any) -> float:
    """Bytes on one device of sharded abstract arrays, without those in its host's memory."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
            if leaf.sharding.memory_kind in (None, "device", "unpinned_host")
        )
    )


def compile_program(
    jitted, arguments, given, topology: Topology, mesh: Mesh, attention_share: float, **named
) -> Program:
    """The program of `jitted`, called with `arguments`, over the topology's devices.

    Args:
      jitted: what is compiled.
      arguments: abstract, sharded over `mesh`.
      given: of them the parameters, and the optimizer's state or ().
      topology, mesh: as for `lm.planning.roofline.estimate`, as is `attention_share`.
      named: the first fields of the `Program`.
    """
    start = time.perf_counter()
    parameters, optimizer = map(device_bytes, given)
    rest, limit = device_bytes(arguments) - parameters - optimizer, topology.chip.memory
    lowered = jitted.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = _refused(str(error))
        if wanted is None:
            raise
        memory = Memory(parameters, optimizer, rest, 0.0, 0.0, wanted, 0.0, limit)
        seconds = time.perf_counter() - start
        return Program(**named, memory=memory, compile_seconds=seconds, compiler_temporaries=wanted)
    text, stats = compiled.as_text(), compiled.memory_analysis()
    found = estimate(text, topology, mesh, attention_share)
    temporaries = _temporaries(stats)
    memory = Memory(
        parameters=parameters,
        optimizer=optimizer,
        arguments=max(rest, stats.argument_size_in_bytes - parameters - optimizer),
        outputs=max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
        kept=min(found.stacked, temporaries) if optimizer else 0.0,
        temporaries=temporaries,
        code=stats.generated_code_size_in_bytes,
        limit=limit,
    )
    return Program(
        **named,
        memory=memory,
        compile_seconds=time.perf_counter() - start,
        compiler_temporaries=stats.temp_size_in_bytes,
        estimate=found,
        compiler_flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
        text=text,
    )


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

"""An iteration of learning from rewards: does it fit, and how long does it take?

What `lm.jobs.align` runs is compiled, each program as its own code sets it up: the engine's two
that read a piece of a prompt and draw a token, the passes that score responses, the updates.
Models, optimizers and the engine's pages lie on the devices all the time; a phase needs what the
largest of its programs takes beside them.

Responses are as long as they may be, and prompts fill the rest of a block. Rewards that are
functions, and what else the host does, take no time here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from lm.alignment.config import AlignJob
from lm.alignment.loop import learned_from
from lm.alignment.rollouts import rows
from lm.alignment.scoring import Scorer
from lm.alignment.start import critic_training
from lm.alignment.support import needs_support
from lm.inference.fill import BATCH, scores_of_texts
from lm.models import ModelConfig, param_specs, skeleton
from lm.models.costs import forward_flops_per_token
from lm.parallel.layout import Layout
from lm.parallel.mesh import describe, replicated
from lm.parallel.platform import compiling_for
from lm.parallel.sharding import PARAMETER_RULES, parameter_shardings, zero_rules
from lm.planning import report
from lm.planning.decoding import draw, pages_for, plan_engine, read
from lm.planning.programs import Program, compile_program, device_bytes, seen
from lm.planning.search import advice
from lm.planning.topology import Topology
from lm.training.report import binary
from lm.training.setup import set_up
from lm.training.workload import Workload

PHASES = ("rollout", "scoring", "update")
CRITIC, PAGES = "critic and its optimizer", "engine: keys and values"
Shape = jax.ShapeDtypeStruct


class Part(NamedTuple):
    """A program, and how often an iteration runs it."""

    phase: str
    name: str
    times: int
    program: Program
    beside: float  # bytes of a device that it takes beside what lies there all the time

    @property
    def seconds(self) -> float:
        """All times together; infinite where the compiler refused it."""
        found = self.program.estimate
        return self.times * found.seconds if found else math.inf


class Iteration(NamedTuple):
    """What an iteration runs, and what lies on a device all the time, in bytes."""

    parts: list[Part]
    held: dict[str, float]
    policy: Workload
    limit: float  # bytes that a device has

    def total(self, phase: str) -> float:
        """Bytes of a device in a phase."""
        beside = max(part.beside for part in self.parts if part.phase == phase)
        return sum(self.held.values()) + beside

    def seconds(self, phase: str) -> float:
        """All of a phase's programs."""
        return sum(part.seconds for part in self.parts if part.phase == phase)

    def fits(self, phase: str) -> bool:
        """Whether all of a phase was compiled, and has room."""
        return self.total(phase) <= self.limit and self.seconds(phase) < math.inf

    def figures(self) -> dict[str, Any]:
        """It in numbers, for plan.json: bytes of a device, and seconds."""
        phases = {
            phase: {"memory": self.total(phase), "fits": self.fits(phase),
                    "seconds": self.seconds(phase)}
            for phase in PHASES
        }  # fmt: skip
        own = {
            p.name: {"times": p.times, "beside": p.beside, **p.program.figures()}
            for p in self.parts
        }
        fits, seconds = all(map(self.fits, PHASES)), sum(map(self.seconds, PHASES))
        mesh = describe(self.policy.layout.mesh)
        found = {"mesh": mesh, "fits": fits, "seconds": seconds, "phases": phases}
        return {**found, "held": self.held, "programs": own}


def plan_iteration(
    job: AlignJob, layout: Layout, reward: ModelConfig | None, topology: Topology
) -> Iteration:
    """Compiles what an iteration of a job runs.

    Args:
      job: with a value head, if its critic is shared.
      layout: over the topology's devices.
      reward: the model of a learned reward; None without one.
    """
    workload, rollout, mesh = job.workload(layout), job.rollout, layout.mesh
    block, known, parts = workload.block_size, job.model.vocab_size, []

    def part(phase: str, name: str, times: int, program: Program, lying: Any, more=0.0) -> None:
        beside = program.memory.total - device_bytes(lying) + more
        parts.append(Part(phase, name, times, program, beside))

    def compiled(name, function, arguments, given, own: Workload, flops: float, tokens: int):
        here = tokens / mesh.size
        named = {"name": name, "model_flops": flops * here, "tokens": here}
        return compile_program(function, arguments, given, topology, mesh, seen(own), **named)

    with layout.active(), compiling_for(topology.platform):
        policy = set_up(workload)
        critic = critic_training(job, layout, None) if job.critic == "separate" else None
        params, frozen = policy.abstract["params"], policy.frozen
        sizes = rollout.engine(block, job.model.max_length)
        # Tables of pages are as long as texts are on average while responses grow.
        average = dataclasses.replace(job.model, max_length=block - rollout.max_new_tokens // 2)
        rules = zero_rules(layout.zero, "parameters")
        engine = plan_engine("compute", average, topology, rules, sizes.page_size)
        cache = pages_for(engine, sizes.max_slots, sizes.num_pages)
        held = {
            "policy": params,
            "its optimizer": policy.abstract["optimizer"],
            "its frozen parameters": frozen,
            CRITIC: critic.abstract if critic else {},
            "reference": params if job.learning.reference else {},
            "reward model": {},
            "engine: weights": engine.params,
            PAGES: cache,
        }

        # ---- Rollout: prompts piece by piece, then a token for each of all slots
        prompt = max(block - rollout.max_new_tokens, 1)
        piece, lying = min(sizes.prefill_chunk, prompt), (engine.params, cache)
        # Adapters are added in for the engine.
        whole = device_bytes(_parameters(job.model, mesh, rules)) if frozen else 0.0
        pieces = rollout.prompts * -(-prompt // piece)
        part("rollout", "prefill", pieces, read(engine, piece, cache), lying, whole)
        draws = rollout.max_new_tokens * -(-rollout.responses // sizes.max_slots)
        program = draw(engine, sizes.max_slots, cache, rollout.level)
        part("rollout", "decode", draws, program, lying, whole)

        # ---- Scoring: micro-batches, as updates have them
        scorer = Scorer(policy, critic, rollout, known)
        experience = dict(rows((), (), block))
        batch = policy.shapes(_shaped(experience, workload.microbatch))

        def scoring(name: str, function, own: Workload, *arguments) -> Any:
            flops = forward_flops_per_token(own.model, own.block_size)
            tokens, given = own.microbatch * own.block_size, (arguments[0], ())
            program = compiled(name, function, arguments, given, own, flops, tokens)
            part("scoring", name, -(-rollout.responses // own.microbatch), program, arguments[:-1])
            return jax.eval_shape(function, *arguments)

        if needs_support(rollout, known, known):
            experience |= scoring("support", scorer.support, workload, params, frozen, batch)
        experience |= scoring("log-probabilities", scorer.read, workload, params, frozen, batch)
        experience["advantage"] = experience["return"] = experience["old_logprob"]
        if job.learning.reference:
            parts.append(parts[-1]._replace(name="the reference's"))
            experience["ref_logprob"] = experience["old_logprob"]
        if critic is not None:
            own = critic.abstract["params"], critic.frozen
            experience |= scoring("values", scorer.value, critic.workload, *own, batch)
        if reward is not None:
            head = {"classifier": "sequence", "num_labels": 1, "capacity_factor": 0.0}
            reward = dataclasses.replace(reward, **head)
            held["reward model"] = _parameters(reward, mesh)
            own = Workload(reward, min(block + 1, reward.max_length), BATCH)
            texts = Shape((BATCH, own.block_size), jnp.int32, sharding=replicated(mesh))
            function = jax.jit(lambda params, texts: scores_of_texts(reward, params, *texts))
            scoring("rewards", function, own, held["reward model"], (texts, texts))

        # ---- Update: all of an epoch's steps at once
        steps = rollout.responses // job.data.batch_size
        of_policy, of_critic = learned_from(experience, job.critic)
        learning = [("policy", policy, of_policy)]
        learning += [("critic", critic, of_critic)] if critic else []
        for name, training, of in learning:
            own, state = training.workload, training.abstract
            batches = training.shapes(_shaped(of, steps, own.batch_size), leading=1)
            arguments = state, batches, training.frozen
            given, tokens = (state["params"], state["optimizer"]), steps * own.tokens
            name, flops = f"epoch of the {name}", own.flops_per_token
            program = compiled(name, training.step, arguments, given, own, flops, tokens)
            part("update", name, job.learning.epochs, program, (state, training.frozen))
    sizes = {name: device_bytes(tree) for name, tree in held.items()}
    held = {name: size for name, size in sizes.items() if size}
    return Iteration(parts, held, workload, topology.chip.memory)


def _parameters(config: ModelConfig, mesh: Mesh, rules=PARAMETER_RULES) -> dict[str, Shape]:
    """A model's, in float32, split over a mesh."""
    specs = param_specs(skeleton(config))
    shardings = parameter_shardings(specs, mesh, rules)
    return {n: Shape(s.shape, jnp.float32, sharding=shardings[n]) for n, s in specs.items()}


def _shaped(arrays: dict[str, Any], *leading: int) -> dict[str, Shape]:
    """The shapes of rows [N, …], as many as `leading` says."""
    return {name: Shape((*leading, *x.shape[1:]), x.dtype) for name, x in arrays.items()}


def show_iteration(console: Console, found: Iteration, job: AlignJob, topology: Topology) -> None:
    """Prints what a device holds in each phase, what phases take, and what to change."""
    console.rule(f"an iteration: {report.LABEL}", align="left")
    table = report.plain_table("memory of a device", *PHASES)
    for name, size in found.held.items():
        table.add_row(name, *[binary(size)] * len(PHASES))
    totals, held = [found.total(phase) for phase in PHASES], sum(found.held.values())
    table.add_row("beside these, at most", *[binary(total - held) for total in totals])
    table.add_row("total", *map(binary, totals), style="bold")
    shares = [f"{total / found.limit:.1%}" for total in totals]
    table.add_row(f"of {binary(found.limit)} of HBM", *shares)
    fits = ["[green]fits" if found.fits(phase) else "[bold red]does not fit" for phase in PHASES]
    table.add_row("", *fits)
    console.print(table)
    console.print()

    table = report.plain_table("time", "times", "each", "together", "memory beside")
    for phase in PHASES:
        for part in (part for part in found.parts if part.phase == phase):
            times = part.seconds / part.times, part.seconds
            said = f"{part.times:,}", *map(report.seconds, times), binary(part.beside)
            table.add_row(f"  {part.name}", *said)
        table.add_row(phase, "", "", report.seconds(found.seconds(phase)), "", style="bold")
    whole = report.seconds(sum(map(found.seconds, PHASES)))
    table.add_row("iteration", "", "", whole, "", style="bold")
    console.print(table)

    if not all(map(found.fits, PHASES)):
        console.print()
        table = report.plain_table("to make it fit (on paper)", "memory", "of HBM", "")
        for change, size in sorted(_changes(found, job, topology), key=lambda one: one[1]):
            said = "fits" if size <= found.limit else "closer"
            table.add_row(change, binary(size), f"{size / found.limit:.0%}", said)
        console.print(table)


def _changes(found: Iteration, job: AlignJob, topology: Topology) -> Iterator[tuple[str, float]]:
    """Changes of the config, and what the fullest phase is then expected to hold."""
    fullest = max(PHASES, key=found.total)
    total, slots = found.total(fullest), job.rollout.engine(1, 1).max_slots
    if CRITIC in found.held:
        yield "config.learning.critic=shared", total - found.held[CRITIC]
    if slots > 1:
        yield f"config.rollout.slots={slots // 2}", total - found.held[PAGES] / 2
    if fullest == "update":
        policy = next(part for part in found.parts if part.name == "epoch of the policy")
        for change in advice(found.policy, topology, policy.program):
            yield change.change, change.memory + total - policy.program.memory.total

"""The loop of learning from rewards: roll out, score, update, and again.

An iteration is a function of the state at its start, the seed and its number: a run that goes on
from a checkpoint does what one without a break would have done, bit for bit. What takes time, a
rollout most of all, leaves nothing behind but the state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from lm.alignment.advantages import Estimate, adapted, estimate, explained_variance
from lm.alignment.config import AlignJob
from lm.alignment.page import Shown
from lm.alignment.prompts import Prompt, PromptOrder, fields_of
from lm.alignment.rewards import Rewards, Worth
from lm.alignment.rollouts import Sample, Sampler, rollout_seed, rows
from lm.alignment.scoring import Rows, Scorer, put
from lm.parallel import hosts
from lm.tokenizers import Tokenizer
from lm.training.checkpoints import Checkpointer
from lm.training.config import TrainingStopped
from lm.training.loop import due, termination_flag
from lm.training.metrics import MetricsWriter
from lm.training.progress import Progress
from lm.training.setup import Training
from lm.training.step import OF_A_STEP, State

READ = ("inputs", "targets", "weights", "segment_ids", "positions")  # what every update reads
OF_POLICY = ("advantage", "old_logprob", "ref_logprob", "rollout_logprob", "support")
OF_CRITIC = ("value", "return")
T = TypeVar("T")  # arrays, or their shapes


@dataclasses.dataclass(eq=False)
class Loop:
    """One run's loop; see `run`. To be used within `layout.active()`."""

    job: AlignJob
    policy: Training
    critic: Training | None  # of a critic with parameters of its own
    sampler: Sampler
    scorer: Scorer
    rewards: Rewards
    tokenizer: Tokenizer
    prompts: PromptOrder
    held_out: Sequence[Prompt]  # what evaluations answer
    reference: Any  # parameters; None without
    frozen: dict[str, Any]  # what the policy reads beside its own parameters
    checkpointer: Checkpointer
    writer: MetricsWriter
    progress: Progress

    left_by: int = 0  # the signal that ended the run before its last iteration
    last_eval: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self, state: State, start: int, extra: dict[str, Any]) -> tuple[State, int]:
        """Learns from iteration `start` to the last one, or until SIGTERM or Ctrl-C on any host.

        Args:
          state: the policy's training state, and its critic's as `critic`; donated.
          start: iterations already done.
          extra: what the checkpoint of that iteration held beside the state.

        Returns:
          The final state, and the iterations done.

        Raises:
          TrainingStopped: an update was not finite and the config says stop, or too often.
        """
        job, step, saved = self.job, start, start
        self._kl = extra.get("kl_coefficient", job.advantage.kl_coefficient)
        self._spikes = extra.get("spikes", 0)
        with termination_flag() as received:
            while step < job.train.steps and not hosts.agree(bool(received)):
                experience, measured = self._experience(state, step)
                if hosts.agree(bool(received)):  # a rollout takes long, and has changed nothing
                    break
                state, record = self._update(state, experience, step)
                step += 1
                record |= measured
                self._adapt(measured.get("kl", 0.0))
                if due(step, job.train.log_every):
                    self.writer.write(step, record)
                    self.progress.update(step, record)
                if due(step, job.checkpoint.every) or step == job.train.steps:
                    self._save(step, state)
                    saved = step
                evaluating = due(step, job.train.eval_every) or step == job.train.steps
                if evaluating and self.held_out:
                    self.last_eval = self.evaluate(state)
                    self.writer.write(step, self.last_eval)
                    self.progress.update(step, self.last_eval)
            if step < job.train.steps:
                self._leave(received, step, state if step > saved else None)
        self.checkpointer.wait()
        return state, step

    def evaluate(self, state: State) -> dict[str, float]:
        """Rewards of one response to each of the held-out prompts, drawn as rollouts are."""
        samples, worth = self._answered(state, self.held_out, self.job.seed)
        measured = {"reward": float(np.mean(worth.total_N)), **_lengths(samples)}
        return {f"eval_{name}": value for name, value in measured.items()}

    def shown(self, state: State, prompts: Sequence[Prompt]) -> list[Shown]:
        """The first response to each prompt, for a reader."""
        samples, worth = self._answered(state, prompts, self.job.seed)
        return [
            Shown(self._text(sample), float(total), sample.ended)
            for sample, total in zip(samples, worth.total_N)
        ]

    # ---- Rollout and score -------------------------------------------------------------------

    def _experience(self, state: State, iteration: int) -> tuple[Rows, dict[str, float]]:
        """What an iteration learns from, and what was measured of it."""
        job, seconds = self.job, {}
        rollout = job.rollout
        prompts = self.prompts.take(iteration * rollout.prompts, rollout.prompts)
        with _timed(seconds, "rollout_seconds"):
            seed = rollout_seed(job.seed, iteration)
            samples = self.sampler(self._whole(state), [p.ids for p in prompts], seed)
        with _timed(seconds, "scoring_seconds"):
            worth = self._worth(prompts, samples)
            written = rows([p.ids for p in prompts], samples, job.data.block_size)
            found = self.scorer(written, state, self.reference, self.frozen)
            made = estimate(
                job.advantage,
                worth.total_N,
                found["weights"],
                found["old_logprob"],
                found.get("ref_logprob"),
                ended_N=np.array([sample.ended for sample in samples]),
                value_NT=found.get("value"),
                group_size=rollout.samples,
                kl_coefficient=self._kl,
            )
            found["advantage"] = made.advantage_NT.astype(np.float32)
            found["return"] = made.return_NT.astype(np.float32)
        return found, {
            **worth.metrics(),
            **_lengths(samples),
            **self._measured(found, made),
            **seconds,
        }

    def _worth(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Worth:
        """The samples' rewards."""
        asked = [prompts[sample.prompt] for sample in samples]
        return self.rewards(
            [prompt.text for prompt in asked],
            [self._text(sample) for sample in samples],
            **fields_of(asked),
            response_ids=[sample.ids for sample in samples],
            finished=[sample.ended for sample in samples],
        )

    def _whole(self, state: State) -> dict[str, jax.Array]:
        """The policy's parameters, adapters added in."""
        return self.policy.whole(state["params"], self.frozen)

    def _text(self, sample: Sample) -> str:
        return self.tokenizer.decode(sample.ids[:-1] if sample.ended else sample.ids)

    def _answered(
        self, state: State, prompts: Sequence[Prompt], seed: int
    ) -> tuple[list[Sample], Worth]:
        """One sample of each prompt, and what they are worth."""
        samples = self.sampler(self._whole(state), [p.ids for p in prompts], seed, each=1)
        return samples, self._worth(prompts, samples)

    def _measured(self, found: Rows, made: Estimate) -> dict[str, float]:
        """Of an iteration's responses, before the first update."""
        mask_NT = found["weights"] > 0
        gap_NT = np.abs(found["old_logprob"] - found["rollout_logprob"])
        measured = {
            "entropy": float(np.mean(found["entropy"], where=mask_NT)),
            "rollout_gap": float(gap_NT.max(where=mask_NT, initial=0)),
        }
        if "ref_logprob" in found:
            measured |= {"kl": float(made.kl_N.mean()), "kl_coefficient": self._kl}
        if "value" in found:
            explained = explained_variance(found["value"], found["return"], mask_NT)
            measured["explained_variance"] = explained
        return measured

    # ---- Update ------------------------------------------------------------------------------

    def _update(
        self, state: State, experience: Rows, iteration: int
    ) -> tuple[State, dict[str, float]]:
        """The state after an iteration's epochs, and means of what all of their steps measured."""
        job, began, sums = self.job, time.perf_counter(), Counter()
        state = dict(state)
        critic = state.pop("critic", None)
        of_policy, of_critic = learned_from(experience, job.critic)
        order = np.random.default_rng([job.seed, iteration])
        for epoch in range(1, job.learning.epochs + 1):  # noqa: B007
            places = order.permutation(job.rollout.responses).reshape(-1, job.data.batch_size)
            batches = put(self.policy, of_policy, places)
            state, metrics = self.policy.step(state, batches, self.frozen)
            if critic is not None:
                batches = put(self.critic, of_critic, places)
                critic, of_values = self.critic.step(critic, batches, {})
                sums.update({f"critic_{n}": v for n, v in self._sums(of_values, iteration).items()})
            found = self._sums(metrics, iteration)
            sums.update(found)
            if 0 < job.learning.kl_stop < found["approx_kl"] / max(found["weight"], 1):
                break
        done = (iteration + 1) * job.updates  # as the schedule counts: epochs left out as well
        state = _at_step(state, self.policy, done)
        if critic is not None:
            state["critic"] = _at_step(critic, self.critic, done)
        return state, {
            **_means(sums),
            "learning_rate": float(np.asarray(metrics["learning_rate"])[-1]),
            "grad_norm": float(np.mean(metrics["grad_norm"])),
            "epochs": epoch,
            "spikes": self._spikes,
            "update_seconds": time.perf_counter() - began,
        }

    def _sums(self, metrics: dict[str, jax.Array], iteration: int) -> dict[str, float]:
        """A dispatch's metrics that are sums, over the steps that were not skipped.

        Raises:
          TrainingStopped: one was, and the config says stop, or it was one too many.
        """
        values = jax.device_get(metrics)
        good, train = values["skipped"] == 0, self.job.train
        self._spikes += int(np.sum(~good))
        stop = train.on_spike == "stop" and not good.all()
        if stop or self._spikes > train.max_spikes:
            raise TrainingStopped(
                f"iteration {iteration + 1}: an update was not finite, or its loss a spike, "
                f"{self._spikes} times so far; the last checkpoint is intact: lower "
                "optimizer.learning_rate, or set train.on_spike='skip' and a larger max_spikes"
            )
        return {
            name: float(np.sum(value, where=good))
            for name, value in values.items()
            if name not in OF_A_STEP
        }

    def _adapt(self, kl: float) -> None:
        """Moves the KL coefficient towards what keeps `kl` at its target."""
        advantage, responses = self.job.advantage, self.job.rollout.responses
        if target := advantage.kl_target:
            self._kl = adapted(self._kl, kl, target, responses, advantage.kl_horizon)

    def _save(self, step: int, state: State) -> None:
        extra = {"kl_coefficient": self._kl, "spikes": self._spikes}
        self.checkpointer.save(step, state, extra)

    def _leave(self, received: Sequence[int], step: int, state: State | None) -> None:
        if state is not None:
            self._save(step, state)
        self.left_by = received[0] if received else signal.SIGTERM
        name = "Ctrl-C" if self.left_by == signal.SIGINT else "SIGTERM"
        done = f"saved step {step}; the same command goes on there"
        self.progress.print(f"{name}: {done if step else 'no step was done yet'}")


def learned_from(experience: Mapping[str, T], critic: str) -> tuple[dict[str, T], dict[str, T]]:
    """Of an iteration's experience, what the policy's updates read, and what a critic's do."""
    shared = OF_CRITIC if critic == "shared" else ()
    return tuple(
        {name: experience[name] for name in (*READ, *names) if name in experience}
        for names in ((*OF_POLICY, *shared), OF_CRITIC)
    )


def _at_step(state: State, training: Training, step: int) -> State:
    """The state, whose schedule stands at `step`."""
    return {**state, "step": jax.device_put(np.int32(step), training.abstract["step"].sharding)}


def _means(sums: Counter[str]) -> dict[str, float]:
    """Of summed metrics, those of a critic by its own weight; the loss by its usual name."""
    means = {}
    for prefix in ("critic_", ""):
        own = {n: v for n, v in sums.items() if n.startswith("critic_") == (prefix != "")}
        weight = max(own.get(f"{prefix}weight", 1.0), 1.0)
        means |= {n.removeprefix(prefix): v / weight for n, v in own.items() if "nats" not in n}
    means["loss"] = sums["nats"] / max(sums["weight"], 1.0)
    return {name: mean for name, mean in means.items() if name not in ("weight", "tokens")}


def _lengths(samples: Sequence[Sample]) -> dict[str, float]:
    """How long responses are, and how many of them end by themselves."""
    return {
        "response_length": float(np.mean([len(sample.ids) for sample in samples])),
        "end_rate": float(np.mean([sample.ended for sample in samples])),
    }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began

"""What samples are worth: log-probabilities, values, rewards; from them advantages.

The scoring pass reads every response once with the policy that wrote it, with the reference and
with the critic, in micro-batches of the shape that updates have. What it finds is kept on the host
as rows [N, T] (`lm.data.batches`), and stays what it is in all updates of the iteration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.alignment.rollouts import RolloutConfig
from lm.alignment.support import needs_support, sampler_support
from lm.objectives.experience import read
from lm.objectives.tokens import text_of
from lm.parallel.mesh import batch_sharding, local_rows, replicated
from lm.training.setup import Training
from lm.training.step import Frozen, State, models

Rows = dict[str, np.ndarray]  # arrays [N, T] by name, of all hosts' rows


class Part(NamedTuple):
    """Rows of a batch, as `Training.put` knows them."""

    local_rows: np.ndarray
    batch_size: int

    @classmethod
    def of(cls, training: Training, size: int) -> Part:
        """Those of this host, of a batch of `size`."""
        return cls(local_rows(batch_sharding(training.workload.layout.mesh), size), size)


def put(training: Training, rows: Mapping[str, np.ndarray], places: np.ndarray) -> Any:
    """The rows at `places` [B], or batches of them [N, B], on the devices."""
    part = Part.of(training, places.shape[-1])
    mine = places[..., part.local_rows]
    batch = {name: value[mine] for name, value in rows.items()}
    return training.put(batch, part, leading=places.ndim - 1)


@dataclasses.dataclass(eq=False)
class Scorer:
    """The scoring pass, compiled once; call it within `layout.active()`.

    Args:
      policy: whose model reads, and the reference's.
      critic: of a critic with parameters of its own.
      rollout: how the responses were drawn.
      known: ids from here up are never drawn.

    Attributes:
      read, support, value: (parameters, frozen, micro-batch) → what `__call__` takes of it, jitted.
    """

    policy: Training
    critic: Training | None
    rollout: RolloutConfig
    known: int

    def __post_init__(self) -> None:
        policy, critic, workload = self.policy, self.critic, self.policy.workload
        whole = replicated(workload.layout.mesh)

        def reading(params, frozen, batch):
            found = read(models(policy.model, params, frozen)[0], batch, workload.objective)
            kept = {"old_logprob": found.logprob_BT, "entropy": found.entropy_BT}
            return kept | ({} if found.value_BT is None else {"value": found.value_BT})

        def supporting(params, frozen, batch):
            bound = models(policy.model, params, frozen)[0]
            return {"support": sampler_support(bound, batch, self.rollout, self.known)}

        def valuing(params, frozen, batch):
            bound = models(critic.model, params, frozen)[0]
            return {"value": bound.values(bound.forward(text_of(batch))[0])}

        self.read, self.support, self.value = (
            jax.jit(function, out_shardings=whole) for function in (reading, supporting, valuing)
        )

    def __call__(self, rows: Rows, state: State, reference: Any, frozen: Frozen) -> Rows:
        """`rows` with what the models make of them.

        That is `old_logprob`, `entropy` and, where there are any, `support` [N, T, W],
        `ref_logprob` and `value`: 0 where nothing is learned.

        Args:
          state: of the policy that wrote the rows; its critic's, as `critic`.
          reference: the reference's parameters; None without one.
          frozen: what both read beside their own.
        """
        rows = dict(rows)
        if needs_support(self.rollout, self.known, self.policy.model.config.vocab_size):
            rows |= self._all(self.support, self.policy, rows, state["params"], frozen)
        found = self._all(self.read, self.policy, rows, state["params"], frozen)
        if reference is not None:
            compared = self._all(self.read, self.policy, rows, reference, frozen)
            found["ref_logprob"] = compared["old_logprob"]
        if self.critic is not None:
            found |= self._all(self.value, self.critic, rows, state["critic"]["params"], {})
        mask_NT = rows["weights"] > 0
        return rows | {name: np.where(mask_NT, value, 0) for name, value in found.items()}

    def _all(
        self, function: Callable, training: Training, rows: Rows, params: Any, frozen: Any
    ) -> Rows:
        """A function of micro-batches, of all rows; the host reads one behind the devices."""
        size = training.workload.microbatch
        count = len(rows["inputs"])
        dispatched = [
            function(params, frozen, put(training, rows, np.arange(first, first + size)))
            for first in range(0, count, size)
        ]
        parts = jax.device_get(dispatched)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

"""The loss on all validation data."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm.data.batches import EvaluationBatches
from lm.models import skeleton
from lm.objectives import loss
from lm.training.setup import Training
from lm.training.step import Frozen, State, models

_PLAIN = dict(z_loss=0.0, label_smoothing=0.0, chunk=0)  # an objective without its regularisers
# Metrics of every batch of tokens, of which the loss alone is asked for.
_OF_TOKENS = {"nats", "weight", "tokens", "load_balancing", "router_z", "dropped", "max_load"}


def make_evaluate(
    training: Training, batches: EvaluationBatches, frozen: Frozen | None = None
) -> Callable[[State], dict[str, float]]:
    """A function from a training state to its loss on every validation target once.

    Without dropout and regularisers. It returns `eval_loss` (nats per target token), `eval_tokens`
    and, where all of a text is predicted, `eval_bits_per_byte` (all nats, end-of-text tokens'
    included, over the bytes of the text); of an objective that measures more, that too.

    Args:
      frozen: as `training.step` reads it.
    """
    workload = training.workload
    most = workload.max_targets
    objective = dataclasses.replace(workload.objective, **_PLAIN)
    teacher = workload.teacher and skeleton(workload.teacher)

    @jax.jit
    def measure(params, frozen, batch):
        model, reference = models(training.model, params, frozen, teacher)
        return loss(model, batch, objective, max_targets=most, reference=reference)[1]

    def evaluate(state: State) -> dict[str, float]:
        sums: Counter[str] = Counter()
        batch_sums = (
            measure(state["params"], frozen or {}, training.put(batch, batches))
            for batch in batches
        )
        for done in _one_behind(batch_sums):
            sums.update({name: float(total) for name, total in done.items()})
        nats, weight = sums["nats"], sums["weight"] or 1.0  # where there is nothing to predict
        more = {f"eval_{name}": sums[name] / weight for name in sums.keys() - _OF_TOKENS}
        results = {"eval_loss": nats / weight, "eval_tokens": weight, **more}
        if batches.num_bytes is not None:
            results["eval_bits_per_byte"] = nats / math.log(2) / max(1, batches.num_bytes)
        return results

    return evaluate


def _one_behind(dispatches: Iterator[Any]) -> Iterator[Any]:
    """Each of them when the next one is under way, so that the device never waits for the host."""
    before = next(dispatches)
    for dispatch in dispatches:
        yield before
        before = dispatch
    yield before

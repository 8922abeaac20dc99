"""The loss on all validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm.data.batches import EvaluationBatches
from lm.models import bind
from lm.objectives import ObjectiveConfig, token_loss
from lm.training.setup import Training
from lm.training.step import State


def make_evaluate(
    training: Training, batches: EvaluationBatches
) -> Callable[[State], dict[str, float]]:
    """A function from a training state to its loss on every validation target once.

    Without dropout and regularisers. It returns `eval_loss` (nats per target token), `eval_tokens`
    and, where all of a text is predicted, `eval_bits_per_byte` (all nats, end-of-text tokens'
    included, over the bytes of the text).
    """
    most = training.workload.max_targets

    @jax.jit
    def measure(params, batch):
        model = bind(training.model, params)
        return token_loss(model, batch, ObjectiveConfig(), max_targets=most)[1]

    def evaluate(state: State) -> dict[str, float]:
        nats = weight = 0.0
        sums = (measure(state["params"], training.put(batch, batches)) for batch in batches)
        for done in _one_behind(sums):
            nats, weight = nats + float(done["nats"]), weight + float(done["weight"])
        results = {"eval_loss": nats / weight, "eval_tokens": weight}
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

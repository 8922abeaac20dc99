"""The loss on all validation data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lm.data.batches import EvaluationBatches


def evaluate(
    eval_step: Callable[[Any, Any], dict[str, Any]],
    params: Any,
    batches: EvaluationBatches,
    put: Callable[[Any], Any],
) -> dict[str, float]:
    """Mean loss and bits per byte over every validation target once.

    Batch n+1 is dispatched before the result of batch n is read.

    Returns:
      `eval_loss` (nats per target token), `eval_tokens` and, where all of a text is predicted,
      `eval_bits_per_byte` (all nats, end-of-text tokens' included, over the bytes of the text).
    """
    nats = weight = 0.0
    pending = None
    for batch in batches:
        result = eval_step(params, put(batch))
        if pending is not None:
            nats, weight = nats + float(pending["nats"]), weight + float(pending["weight"])
        pending = result
    nats, weight = nats + float(pending["nats"]), weight + float(pending["weight"])
    results = {"eval_loss": nats / weight, "eval_tokens": weight}
    if batches.num_bytes is not None:
        results["eval_bits_per_byte"] = nats / math.log(2) / max(1, batches.num_bytes)
    return results

"""What a training run starts from, anew or going on: parameters, or adapters and their base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lm.models import param_specs
from lm.runs.inherited import Origin
from lm.training.setup import Training
from lm.training.step import Frozen


class Start(NamedTuple):
    """What is there before the first step, and beside every one."""

    params: Callable[[], dict[str, jax.Array] | None]  # that are trained; see `create_state`
    frozen: Frozen  # what steps read and do not change
    facts: dict[str, Any]  # config.json says them, to check the same when the run goes on


def begin(origin: Origin, training: Training) -> Start:
    """Reads what `training` starts from; of a run that goes on, what its steps read.

    The base of adapters is the model that `init_from` names; where that has adapters itself, they
    go on, and its base is theirs.

    Raises:
      ConfigError: there is no such model, or it is another than when the run began.
    """
    if training.workload.adapter.kind == "none":
        return Start(lambda: origin.parameters(training.abstract["params"]), {}, {})
    params, base = origin.base.read(param_specs(training.model), training.workload.layout.mesh)
    frozen, begun = training.adapt(params)

    def adapters() -> dict[str, jax.Array]:
        if origin.source.base is None:
            return begun
        shardings = {name: leaf.sharding for name, leaf in training.abstract["params"].items()}
        return origin.source.adapters(shardings=shardings)[1]

    return Start(adapters, {"base": frozen}, {"base": base.facts(origin.directory)})

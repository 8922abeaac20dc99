"""What a run of learning from rewards starts with: policy, reference and critic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.alignment.config import AlignJob
from lm.config import ConfigError, check
from lm.models import init
from lm.parallel.layout import Layout
from lm.runs.inherited import Origin
from lm.runs.sources import open_source
from lm.tokenizers import Tokenizer
from lm.training.setup import Training, set_up
from lm.training.step import State

Params = dict[str, jax.Array]


def critic_training(job: AlignJob, layout: Layout, tokenizer: Tokenizer) -> Training:
    """The training of a critic with parameters of its own: a reward model's, or the policy's.

    Raises:
      ConfigError: `learning.critic_from` is no reward model, or one of another tokenizer.
    """
    model = job.model
    if job.learning.critic_from:
        field = f"config.learning.critic_from={job.learning.critic_from!r}"
        try:
            source = open_source(job.learning.critic_from)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None
        same = (
            source.tokenizer is not None and source.tokenizer.fingerprint == tokenizer.fingerprint
        )
        check(same, f"{field} has another tokenizer than the policy: values are of its tokens")
        model = source.model
        check(
            model.architecture == "decoder" and model.num_labels == 1,
            f"{field} is no reward model: it has model.num_labels={model.num_labels}",
        )
    rate = job.learning.critic_rate or job.optimizer.learning_rate
    workload = job.workload(
        layout,
        model=dataclasses.replace(model, classifier="sequence", num_labels=1, dropout=0.0),
        objective=dataclasses.replace(job.objective, name="value"),
        optimizer=dataclasses.replace(job.optimizer, learning_rate=rate),
    )
    return set_up(workload)


def first_state(
    job: AlignJob, policy: Training, critic: Training | None, origin: Origin
) -> tuple[State, int]:
    """The state before the first iteration, and the step of `init_from` that it starts from."""
    step, theirs = origin.source.parameters(shardings=_shardings(policy))
    state = policy.create_state(_copied(_completed(policy, theirs, job.seed)))
    if critic is not None:
        if job.learning.critic_from:
            theirs = open_source(job.learning.critic_from).parameters(shardings=_shardings(critic))[
                1
            ]
        state["critic"] = critic.create_state(_copied(_completed(critic, theirs, job.seed)))
    return state, step


def reference_parameters(policy: Training, origin: Origin, step: int, seed: int) -> Params:
    """The policy's parameters at the start, as they were at that step of `init_from`.

    Raises:
      ConfigError: they are no longer there.
    """
    theirs = origin.source.parameters(step, _shardings(policy))[1]
    return _completed(policy, theirs, seed)


def _shardings(training: Training) -> dict[str, jax.sharding.Sharding]:
    return {name: leaf.sharding for name, leaf in training.abstract["params"].items()}


def _completed(training: Training, params: Mapping[str, Any], seed: int) -> Params:
    """The parameters that a model has, where `params` lacks a head: that one drawn."""
    new = {name: spec for name, spec in training.specs.items() if name not in params}
    shardings = {name: s for name, s in _shardings(training).items() if name in new}
    drawn = jax.jit(lambda key: init(new, key), out_shardings=shardings)(jax.random.key(seed))
    return {**{name: params[name] for name in training.specs if name in params}, **drawn}


def _copied(params: Params) -> Params:
    """Arrays of their own, which a step may take over."""
    return {name: jnp.copy(value) for name, value in params.items()}

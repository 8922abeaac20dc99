"""What a run of learning from rewards starts with: policy, reference and critic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from lm.alignment.config import AlignJob
from lm.config import check
from lm.models.adapters import AdapterConfig
from lm.parallel.layout import Layout
from lm.runs.inherited import Origin
from lm.runs.sources import open_source
from lm.runs.start import Start, open_beside
from lm.tokenizers import Tokenizer
from lm.training.setup import Training, set_up
from lm.training.step import State

Params = dict[str, jax.Array]


def critic_training(job: AlignJob, layout: Layout, tokenizer: Tokenizer) -> Training:
    """The training of a critic with parameters of its own: a reward model's, or the policy's.

    Raises:
      ConfigError: `learning.critic_from` is no reward model, or one of another tokenizer or with
        too short a context.
    """
    model = job.model
    if job.learning.critic_from:
        field = f"config.learning.critic_from={job.learning.critic_from!r}"
        what = "the policy: values are of its tokens"
        source = open_beside(field, job.learning.critic_from, tokenizer, what, job.ignore)
        model, length = source.model, job.data.block_size
        check(
            model.architecture == "decoder"
            and model.classifier == "sequence"
            and model.num_labels == 1,
            f"{field} is no reward model: it has model.classifier={model.classifier!r} and "
            f"model.num_labels={model.num_labels}, for 'sequence' and 1",
        )
        check(
            model.max_length >= length,
            f"config.data.block_size={length} is longer than the critic's "
            f"max_length={model.max_length}: lower it",
        )
    rate = job.learning.critic_rate or job.optimizer.learning_rate
    workload = job.workload(
        layout,
        model=dataclasses.replace(model, classifier="sequence", num_labels=1, dropout=0.0),
        objective=dataclasses.replace(job.objective, name="value"),
        adapter=AdapterConfig(),
        optimizer=dataclasses.replace(job.optimizer, learning_rate=rate),
    )
    return set_up(workload)


def first_state(
    job: AlignJob, policy: Training, critic: Training | None, origin: Origin, begun: Start
) -> State:
    """The state before the first iteration."""
    state = policy.create_state(_own(policy, begun.params()))
    if critic is not None:
        source = open_source(job.learning.critic_from or job.init_from, job.ignore)
        shardings = {name: leaf.sharding for name, leaf in critic.abstract["params"].items()}
        values = source.parameters(shardings=shardings)[1]
        state["critic"] = critic.create_state(_own(critic, values))
    return state


def whole_reference(policy: Training, begun: Start) -> Params | None:
    """What of the policy is trained, as it was at the start; of a new head, which nobody asks, 0.

    None where nothing is compared with.
    """
    if "reference" not in begun.frozen:
        return None
    params = _own(policy, begun.frozen["reference"])
    new = {n: leaf for n, leaf in policy.abstract["params"].items() if n not in params}
    zeros = {n: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for n, x in new.items()}
    return {**params, **zeros}


def _own(training: Training, params: Mapping[str, jax.Array]) -> Params:
    """What is trained, of all the parameters there are."""
    return {name: params[name] for name in training.specs if name in params}

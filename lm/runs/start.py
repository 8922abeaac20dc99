"""What a training run starts from, anew or going on: parameters, or adapters and their base.

And what it is compared with, frozen: as it started, or a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.config import ConfigError, check
from lm.models import param_specs, skeleton
from lm.models.adapters import AdapterConfig
from lm.runs.config import TrainJob
from lm.runs.inherited import Origin
from lm.runs.sources import Base, Source, open_source
from lm.tokenizers import Tokenizer
from lm.training.checkpoint_files import fingerprint
from lm.training.setup import Training
from lm.training.step import Frozen

Params = dict[str, jax.Array]


class Start(NamedTuple):
    """What is there before the first step, and beside every one."""

    params: Callable[[], Params | None]  # that are trained; see `create_state`
    frozen: Frozen  # what steps read and do not change
    facts: dict[str, Any]  # config.json says them, to check the same when the run goes on


def begin(
    origin: Origin,
    training: Training,
    teacher: Source | None = None,
    compares: bool | None = None,
) -> Start:
    """Reads what `training` starts from; of a run that goes on, what its steps read.

    The base of adapters is the model that `init_from` names; where that has adapters itself, they
    go on, and its base is theirs. A reference is what the run started from: of adapters, adapters.

    Args:
      teacher: what is compared with in its place.
      compares: whether there is a reference; None: as the objective says.

    Raises:
      ConfigError: there is no such model, or it is another than when the run began.
    """
    workload = training.workload
    adapts = workload.adapter.kind != "none"
    compares = workload.objective.has_reference if compares is None else compares
    frozen, facts = {}, {}
    if compares and (teacher or not adapts):
        frozen["reference"], facts["reference"] = _whole_reference(origin, training, teacher)
    if not adapts:
        if compares and not teacher:
            return Start(lambda: _copied(frozen["reference"]), frozen, facts)
        return Start(lambda: origin.parameters(training.abstract["params"]), frozen, facts)
    mesh = workload.layout.mesh
    params, base = origin.base.read(param_specs(training.model), mesh)
    held, begun = training.adapt(params)
    frozen["base"], facts["base"] = held, base.facts(origin.directory)

    def adapters(step: int | None = None) -> tuple[int | None, Params]:
        if origin.source.base is None:
            return None, begun
        shardings = {name: leaf.sharding for name, leaf in training.abstract["params"].items()}
        return origin.source.adapters(step, shardings)

    if not compares or teacher:
        return Start(lambda: adapters()[1], frozen, facts)
    said = _said(origin)
    step, reference = adapters(said.get("step"))
    found = fingerprint(reference)
    check(
        said.get("fingerprint") in (None, found),
        f"config.init_from={origin.init_from!r} has other adapters than when the run began: their "
        f"fingerprint is {found}, not {said.get('fingerprint')}; put those back",
    )
    frozen["reference"] = _copied(reference)
    facts["reference"] = {"step": step, "fingerprint": found}
    return Start(lambda: reference, frozen, facts)


def open_teacher(job: TrainJob, tokenizer: Tokenizer) -> Source | None:
    """The model that is distilled; None where none is.

    Raises:
      ConfigError: there is none, or its tokens are others than those of the run.
    """
    if job.objective.name != "distillation":
        return None
    teacher = job.objective.distillation.teacher
    field = f"config.objective.distillation.teacher={teacher!r}"
    what = "the run: what it predicts are other tokens"
    source = open_beside(field, teacher, tokenizer, what, job.ignore)
    theirs, ours = source.model, job.model
    check(
        theirs.vocab_size == ours.vocab_size and theirs.architecture == ours.architecture,
        f"{field} is a {theirs.architecture} with vocab_size={theirs.vocab_size}, and the run a "
        f"{ours.architecture} with {ours.vocab_size}: both must be the same",
    )
    check(
        theirs.max_length >= job.data.block_size,
        f"config.data.block_size={job.data.block_size} is longer than the teacher's "
        f"max_length={theirs.max_length}: lower it",
    )
    return source


def open_beside(
    field: str,
    directory: str,
    tokenizer: Tokenizer,
    what: str,
    ignore: str | Sequence[str] = (),
) -> Source:
    """Another model that reads the run's tokens.

    Args:
      field: what errors call it.
      directory: a run's, or Hugging Face's.
      tokenizer: the run's, which must be its own, too.
      what: than which it may have no other tokenizer, and why.
      ignore: see `open_source`.

    Raises:
      ConfigError: there is none, or it has another tokenizer.
    """
    try:
        source = open_source(directory, ignore)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None
    check(
        source.tokenizer is not None and source.tokenizer.fingerprint == tokenizer.fingerprint,
        f"{field} has another tokenizer than {what}",
    )
    return source


def _whole_reference(
    origin: Origin, training: Training, teacher: Source | None
) -> tuple[Params, dict[str, Any]]:
    """A model to compare with, and what config.json says of it."""
    workload, said = training.workload, _said(origin)
    specs = param_specs(skeleton(workload.teacher or workload.model))
    model = Base(teacher or origin.source, AdapterConfig(), said.get("step"))
    params, model = model.read(specs, workload.layout.mesh)
    check(
        said.get("fingerprint") in (None, model.fingerprint),
        f"{model.source.directory} is not the model that the run began to compare with: its "
        f"parameters' fingerprint is {model.fingerprint}, not {said.get('fingerprint')}; put that "
        "model back, or start in a new directory",
    )
    return params, model.facts(origin.directory)


def _said(origin: Origin) -> dict[str, Any]:
    """What a run that goes on has in its config.json of its reference."""
    return (origin.saved or {}).get("reference", {})


def _copied(params: Params) -> Params:
    """Arrays of their own, which a step may take over."""
    return {name: jnp.copy(value) for name, value in params.items()}

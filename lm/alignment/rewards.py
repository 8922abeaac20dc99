"""What replies are worth: functions of yours, built-in ones, learned rewards, and sums of these.

A reward is a function of a whole batch, and names the fields of the prompts' lines that it reads:

    def counts(prompts, responses, answer, **fields):
        return [1.0 if reply.strip() == right else 0.0 for reply, right in zip(responses, answer)]

`prompts` are as their lines have them, texts or lists of messages, and `responses` are texts; a
field is the list of its values, one for each response. Besides the lines' own there are
`response_ids`, the tokens of each response, and `finished`, whether it ended by itself. It returns
one finite number for each response; they stay floating-point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ConfigError, Count, check, nearest
from lm.models import param_specs, skeleton
from lm.parallel import hosts
from lm.parallel.sharding import parameter_shardings
from lm.runs.directory import CONFIG
from lm.runs.reward import Prompt
from lm.runs.run import Run
from lm.runs.sources import open_source

Function = Callable[..., Any]  # (prompts, responses, **fields) → a number for each response


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The section `rewards`: a reply is worth the weighted sum of what these functions return."""

    # Each is one of `BUILT_IN`, `module:function`, `file.py:function`, or the directory of a reward
    # model's run.
    functions: str | tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # of each function; (): 1
    # exact_match: the field of a prompt's line with the right answer, or with a list of them
    answer: str = "answer"
    # format: regular expression of a whole reply. exact_match: what its first group finds is the
    # answer; "": the whole reply, without space around it
    pattern: str = ""
    # length: tokens that a reply may have, and over how many before the last it comes to lose 1
    max_length: Count = 0
    length_buffer: Count = 0
    chat_template: str = ""  # of reward models that have none

    @property
    def names(self) -> tuple[str, ...]:
        """All of `functions`."""
        return (self.functions,) if isinstance(self.functions, str) else self.functions

    def validate(self, prefix: str = "config.rewards") -> None:
        """Raises ConfigError on the first field that makes no sense."""
        check(
            len(self.weights) in (0, len(self.names)),
            f"{prefix}.weights={self.weights!r} must have one number for each of the "
            f"{len(self.names)} in {prefix}.functions={self.functions!r}",
        )
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ConfigError(
                f"{prefix}.pattern={self.pattern!r} is not a regular expression: {error}"
            ) from None
        check(
            "format" not in self.names or bool(self.pattern),
            f"{prefix}.pattern='' must say what the reward 'format' looks for",
        )
        check(
            "exact_match" not in self.names or not self.pattern or groups > 0,
            f"{prefix}.pattern={self.pattern!r} must have a group, in which exact_match finds the "
            "answer",
        )
        check(
            "length" not in self.names or self.max_length > 0,
            f"{prefix}.max_length=0 must say which replies the reward 'length' finds too long",
        )
        check(
            self.length_buffer <= self.max_length,
            f"{prefix}.length_buffer={self.length_buffer} must not be more than max_length="
            f"{self.max_length}",
        )


class Worth(NamedTuple):
    """What N replies are worth."""

    total_N: np.ndarray  # the weighted sum, float32
    parts: dict[str, np.ndarray]  # function → what it returned, float32 [N], before its weight

    def metrics(self) -> dict[str, float]:
        """Mean and spread of the sum, and of each function where there are several."""
        found = {"reward": self.total_N}
        if len(self.parts) > 1:
            found |= {f"reward_{name}": values for name, values in self.parts.items()}
        means = {name: float(values.mean()) for name, values in found.items()}
        return means | {f"{name}_std": float(values.std()) for name, values in found.items()}


class Rewards:
    """The functions of a config, ready to be called; see `RewardsConfig`.

    Args:
      config: with one function at least.
      prefix: what errors call the section.
      mesh: the devices that share a reward model; None: the first one has it.
      length: tokens of most conversations: a reward model compiles once for all of up to these.

    Raises:
      ConfigError: a function that is not there, cannot be imported or called, or a directory
        without a reward model.
    """

    def __init__(
        self,
        config: RewardsConfig,
        prefix: str = "config.rewards",
        mesh: jax.sharding.Mesh | None = None,
        length: int = 0,
    ):
        choices = ", ".join(map(repr, BUILT_IN))
        check(
            bool(config.names),
            f"{prefix}.functions=() must name a reward: one of {choices}, 'module:function', "
            "'file.py:function', or the directory of a reward model's run",
        )
        numbers = [f"[{i}]" for i in range(len(config.names))] if len(config.names) > 1 else [""]
        self._where = [f"{prefix}.functions{i}={name!r}" for i, name in zip(numbers, config.names)]
        self.functions = [
            _found(name, config, where, mesh, length)
            for name, where in zip(config.names, self._where)
        ]
        runs = [number for number, name in enumerate(config.names) if _is_run(name)]
        self._shared = runs if mesh is not None else []  # by the devices of the mesh
        self.weights = config.weights or (1.0,) * len(config.names)
        self.names = _short(config.names)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], /, **fields: Sequence[Any]
    ) -> Worth:
        """What the responses are worth, on all processes; each must call.

        Args:
          prompts, responses: one of each for every reply, N in all.
          **fields: of the prompts' lines, N values each; with `response_ids` and `finished`.

        Raises:
          ConfigError: a function raises an error, or returns anything but N finite numbers.
        """
        for name in ("prompts", "responses"):
            check(
                name not in fields,
                f"the prompts' lines have a field {name!r}, which reward functions know as another "
                "thing: give it another name",
            )
        check(
            len(prompts) == len(responses),
            f"{len(prompts)} prompts and {len(responses)} responses: there must be one for each",
        )
        parts = {}
        for number, (function, where) in enumerate(zip(self.functions, self._where)):

            def ask(function=function, where=where) -> np.ndarray:
                return _values(function, where, list(prompts), list(responses), fields)

            if number in self._shared:  # all processes have a part of it
                found = ask()
            else:  # what process 0 finds, as a function need not be one
                said = hosts.from_first(lambda ask=ask: json.dumps(ask().tolist()))
                found = np.array(json.loads(said), np.float32)
            parts[self.names[number]] = found
        total_N = sum(weight * part for weight, part in zip(self.weights, parts.values()))
        return Worth(np.asarray(total_N, np.float32), parts)

    def try_out(self, prompts: Sequence[Prompt], /, **fields: Sequence[Any]) -> None:
        """Calls every function on an empty reply to each prompt, so that a mistake costs no work.

        Raises:
          ConfigError: as of a call.
        """
        count = len(prompts)
        own = {"response_ids": [[] for _ in prompts], "finished": [True] * count}
        self(prompts, [""] * count, **{**own, **fields})


# ---- Calling a function ----------------------------------------------------------------------


def _values(
    function: Function, where: str, prompts: list, responses: list[str], fields: Mapping[str, Any]
) -> np.ndarray:
    """What a function returns, float32 [N], found to be what it may."""
    try:
        returned = function(prompts=prompts, responses=responses, **fields)
        values = np.asarray(returned)
        if values.dtype.kind == "V" and jnp.issubdtype(values.dtype, jnp.floating):  # bfloat16
            values = values.astype(np.float32)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        given = ", ".join(("prompts", "responses", *fields))
        raise ConfigError(
            f"{where} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno}); it "
            f"was given {given}"
        ) from error
    wanted = f"it must return {len(responses)} finite numbers, one for each response"
    shown = f"{type(returned).__name__} {str(returned)[:80]!r}"
    numbers = values.dtype.kind in "fiub" and values.ndim == 1
    check(numbers or len(responses) == 0, f"{where} returned {shown}: {wanted}")
    check(
        values.size == len(responses),
        f"{where} returned {values.size} numbers for {len(responses)} responses: {wanted}",
    )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        first = int(wrong[0])
        raise ConfigError(
            f"{where} returned {values[first]} for response {first}, {responses[first][:80]!r}: "
            f"{wanted}"
        )
    return values


# ---- Finding a function ----------------------------------------------------------------------


def _found(
    name: str, config: RewardsConfig, where: str, mesh: jax.sharding.Mesh | None, length: int
) -> Function:
    """The function that `name` means."""
    if name in BUILT_IN:
        return BUILT_IN[name](config)
    if _is_run(name):
        return _learned(name, config, where, mesh, length)
    module, colon, attribute = name.rpartition(":")
    if not colon:
        raise ConfigError(
            f"{where} is neither one of {', '.join(map(repr, BUILT_IN))}{nearest(name, BUILT_IN)}, "
            "nor the directory of a run, nor 'module:function' or 'file.py:function'"
        )
    try:
        found = _file(module) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:  # whatever the module does
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where} cannot be imported: {reason}") from error
    function = getattr(found, attribute, None)
    check(
        callable(function),
        f"{where}: {module} has no function {attribute!r}{nearest(attribute, dir(found))}",
    )
    return function


def _is_run(name: str) -> bool:
    return (pathlib.Path(name).expanduser() / CONFIG).is_file()


def _file(path: str) -> Any:
    """The module in a file."""
    full = os.path.abspath(os.path.expanduser(path))
    spec = importlib.util.spec_from_file_location(pathlib.Path(full).stem, full)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _learned(
    directory: str, config: RewardsConfig, where: str, mesh: jax.sharding.Mesh | None, length: int
) -> Function:
    """The reward model of a run."""
    try:
        source = open_source(directory)
        check(
            source.model.architecture == "decoder" and source.model.classifier == "sequence",
            f"has model.classifier={source.model.classifier!r}: a reward model is a decoder with "
            "'sequence', as configs/align/reward.py trains it",
        )
        model = skeleton(source.model)
        shardings = mesh and parameter_shardings(param_specs(model), mesh)
        step, params = source.parameters(shardings=shardings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    run = Run(source.directory, source.config, source.tokenizer, model, dict(params), step)

    def learned(prompts, responses, finished=None, **fields):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            template = config.chat_template
            return run.score(prompts, responses, finished, chat_template=template, length=length)

    return learned


def _short(names: Sequence[str]) -> list[str]:
    """What metrics call the functions: the last part of each name, numbered if it comes again."""
    short, seen = [], {}
    for name in names:
        last = re.split(r"[:/]", name.rstrip("/"))[-1]
        seen[last] = seen.get(last, 0) + 1
        short.append(last if seen[last] == 1 else f"{last}_{seen[last]}")
    return short


# ---- Built-in functions ----------------------------------------------------------------------


def exact_match(config: RewardsConfig) -> Function:
    """1 where the reply, or what `pattern` finds last in it, is the answer; 0 elsewhere."""

    def matches(prompts, responses, **fields):
        check(config.answer in fields, f"the prompts' lines have no field {config.answer!r}")
        found = (_answer(config.pattern, reply) for reply in responses)
        return [float(said in _answers(right)) for said, right in zip(found, fields[config.answer])]

    return matches


def _answer(pattern: str, reply: str) -> str | None:
    if not pattern:
        return reply.strip()
    found = list(re.finditer(pattern, reply, re.DOTALL))
    return (found[-1].group(1) or "").strip() if found else None


def _answers(right: Any) -> list[str]:
    return [str(each).strip() for each in (right if isinstance(right, list | tuple) else [right])]


def format_match(config: RewardsConfig) -> Function:
    """1 where the whole reply is what `pattern` says, 0 elsewhere."""
    pattern = re.compile(config.pattern, re.DOTALL)
    return lambda prompts, responses, **fields: [
        float(pattern.fullmatch(reply) is not None) for reply in responses
    ]


def length_penalty(config: RewardsConfig) -> Function:
    """0 up to max_length − length_buffer tokens, then down to −1 at max_length (Yu et al. 2025)."""

    def penalties(prompts, responses, response_ids, **fields):
        over = np.array([len(ids) for ids in response_ids]) - (
            config.max_length - config.length_buffer
        )
        return -np.clip(over / max(config.length_buffer, 1), 0.0, 1.0)

    return penalties


BUILT_IN: dict[str, Callable[[RewardsConfig], Function]] = {
    "exact_match": exact_match,
    "format": format_match,
    "length": length_penalty,
}

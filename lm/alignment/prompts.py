"""Prompts of a corpus, each with what its reward is to be judged by, in an order without end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import ConfigError, check
from lm.data import DataConfig, Example
from lm.data.conversations import examples
from lm.tokenizers import ChatTemplate


class Prompt(NamedTuple):
    """A prompt as the reward functions and the policy see it."""

    text: Any  # the text of the only message, a user's, or all messages
    ids: list[int]
    fields: dict[str, Any]  # the other fields of its line


def read_prompts(
    config: DataConfig,
    seed: int,
    template: ChatTemplate,
    longest: int,
    say: Callable[[str], Any],
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of a corpus (`lm.data.conversations`), and those of them that are held out.

    Args:
      template: how they are written; the policy continues as the assistant.
      longest: the most tokens of a prompt; longer ones are left out, and counted.
      say: is told of what is left out.

    Raises:
      ConfigError: a corpus that cannot be read, or has no prompts; messages that cannot be written.
    """

    def prompt(one: Example) -> Prompt:
        messages = list(one.question)
        only = len(messages) == 1 and messages[0]["role"] == "user"
        try:
            ids = template.encode(messages, one.tools)
        except ConfigError as error:
            raise ConfigError(f"config.data.path: {messages!r:.200}: {error}") from None
        return Prompt(messages[0]["content"] if only else messages, ids, dict(one.fields))

    sides = [
        [prompt(one) for corpus in side for one in corpus]
        for side in examples(config, seed, "", say)
    ]
    found = [[one for one in side if len(one.ids) <= longest] for side in sides]
    total, kept = (sum(map(len, several)) for several in (sides, found))
    if kept < total:
        say(
            f"note: {total - kept} of {total} prompts are left out: longer than the {longest} "
            "tokens that data.block_size and rollout.max_new_tokens leave"
        )
    check(
        bool(found[0]),
        f"config.data.path={config.path!r} has no prompt of at most {longest} tokens, as "
        f"config.data.block_size={config.block_size} and config.rollout.max_new_tokens leave: the "
        f"shortest has {min((len(one.ids) for one in sides[0]), default=0)}",
    )
    return found[0], found[1]


def fields_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Every field of the prompts' lines, as the list of its values; None where a line lacks it."""
    names = {name for prompt in prompts for name in prompt.fields}
    return {name: [prompt.fields.get(name) for prompt in prompts] for name in sorted(names)}


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Tells one set of prompts from another, wherever it lies."""
    lines = (json.dumps([p.text, p.ids, p.fields], sort_keys=True) for p in prompts)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


class PromptOrder:
    """Prompts in rounds, each shuffled anew: which come when follows from the seed alone."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        self._prompts, self._seed = prompts, seed

    def take(self, first: int, count: int) -> list[Prompt]:
        """`count` prompts from place `first` on, of the order without end."""
        places = np.arange(first, first + count)
        rounds = {
            number: np.random.default_rng([self._seed, number]).permutation(len(self._prompts))
            for number in np.unique(places // len(self._prompts)).tolist()
        }
        return [self._prompts[rounds[n // len(self._prompts)][n % len(self._prompts)]]
                for n in places.tolist()]  # fmt: skip


def shown(text: Any) -> str:
    """A prompt for a reader."""
    return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, indent=1)

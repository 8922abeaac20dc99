"""Prompts from a file, each with what its reward is to be judged by, in an order without end.

A prompt is a text, or messages that the policy is to continue; all other fields of its line are
handed to the reward functions.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import ConfigError, check
from lm.data import DataConfig
from lm.files import parse_object, read_bytes
from lm.inference import Framing
from lm.tokenizers import Tokenizer, chat_template
from lm.tokenizers.settings import Settings


class Prompt(NamedTuple):
    """A prompt as the reward functions and the policy see it."""

    text: Any  # the text, or the messages
    ids: list[int]
    fields: dict[str, Any]  # the other fields of its line


class PromptReader:
    """Prompts of a corpus to what a policy reads.

    Where there is a chat template, its own or `template`, a text is a message of the user's and the
    policy continues as the assistant; else it is the start of a text.

    Args:
      longest: the most tokens of a prompt; longer ones are left out, and counted.

    Attributes:
      ends: ids that end a response besides end-of-text.

    Raises:
      ConfigError: no such template.
    """

    def __init__(self, tokenizer: Tokenizer, framing: Framing, template: str, longest: int):
        self._tokenizer, self._framing, self._longest = tokenizer, framing, longest
        self._template, self.ends = None, ()
        if template or Settings(tokenizer.extra_files()).templates:
            self._template = chat_template(tokenizer, template, framing.before or ())
            self.ends = self._template.ends[0]

    def read(
        self, config: DataConfig, seed: int, say: Callable[[str], Any]
    ) -> tuple[list[Prompt], list[Prompt]]:
        """The prompts of a corpus, and those of them, or of another, that are held out.

        Args:
          say: is told of prompts that are left out.

        Raises:
          ConfigError: a corpus that cannot be read, or none of prompts.
        """
        sides = [self._lines(paths) for paths in (config.paths, config.validation_paths)]
        found = [[p for p in side if len(p.ids) <= self._longest] for side in sides]
        total, kept = (sum(map(len, several)) for several in (sides, found))
        if kept < total:
            say(
                f"note: {total - kept} of {total} prompts are left out: longer than the "
                f"{self._longest} tokens that data.block_size and rollout.max_new_tokens leave"
            )
        check(bool(found[0]), f"config.data.path={config.path!r} has no prompt short enough")
        return found[0], found[1]

    def _lines(self, paths: Sequence[str]) -> list[Prompt]:
        prompts = []
        for path in paths:
            lines = read_bytes(pathlib.Path(path).expanduser()).splitlines()
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                fields = parse_object(line, where)
                check("prompt" in fields, f"{where} has no field 'prompt'")
                try:
                    prompts.append(self._prompt(fields.pop("prompt"), fields))
                except ConfigError as error:
                    raise ConfigError(f"{where}, field 'prompt': {error}") from None
        return prompts

    def _prompt(self, text: Any, fields: dict[str, Any]) -> Prompt:
        if self._template is None:
            return Prompt(text, self._framing.encode(self._tokenizer, text), fields)
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return Prompt(text, self._template.encode(messages), fields)


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

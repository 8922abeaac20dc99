"""A reward model's run: replies as the tokens that it reads, and the scale of its rewards."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import ConfigError, check
from lm.files import read_json, write_json
from lm.tokenizers import ChatTemplate, learned

FILE = "reward.json"
Prompt = str | Sequence[Mapping[str, Any]]  # what a user says, or messages


class Scale(NamedTuple):
    """Mean and spread of the rewards of reference replies: of both of each held-out pair.

    In a run directory it is `reward.json`. Rewards less this mean and over this spread are numbers
    that mean the same of any reward model (Ziegler et al. 2019, §2.2).
    """

    mean: float = 0.0
    std: float = 1.0
    replies: int = 0  # how many there were

    @classmethod
    def of(cls, rewards_N: np.ndarray) -> Scale:
        """That of these rewards; where all are the same, their spread is left alone."""
        std = float(rewards_N.std(dtype=np.float64))
        return cls(float(rewards_N.mean(dtype=np.float64)), std or 1.0, rewards_N.size)

    @classmethod
    def read(cls, directory: pathlib.Path) -> Scale:
        """The run's; of one without, no change."""
        if not (directory / FILE).exists():
            return cls()
        saved = read_json(directory / FILE)
        try:
            scale = cls(**saved)
            sound = bool(np.isfinite(scale.mean)) and 0 < scale.std < np.inf
        except TypeError:
            sound = False
        check(sound, f"{directory / FILE} must hold numbers 'mean' and 'std': restore it")
        return scale

    def write(self, directory: pathlib.Path) -> None:
        """Writes `reward.json`."""
        write_json(directory / FILE, self._asdict())

    def __call__(self, reward_N: np.ndarray) -> np.ndarray:
        """The rewards on this scale, float32."""
        return ((reward_N - self.mean) / self.std).astype(np.float32)


def reply_ids(
    template: ChatTemplate, prompt: Prompt, response: str, finished: bool = True
) -> list[int]:
    """The tokens of a conversation up to the end of its last reply: what a reward is read from.

    Args:
      template: writes it.
      prompt: what the user says, or the messages before the reply.
      response: the reply.
      finished: whether the reply ended by itself; else its last token is no end-of-turn.

    Raises:
      ConfigError: messages that the template refuses.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    reply = {"role": "assistant", "content": response}
    ids, learnt = learned(template, [*messages, reply], given=len(messages))
    ids = ids[: len(learnt) - learnt[::-1].index(True)]
    ends = template.ends[0] or (template.tokenizer.eos_id,)
    return ids[:-1] if not finished and ids[-1] in ends else ids


def pairs_of(
    prompts: Prompt | Sequence[Prompt], responses: str | Sequence[str]
) -> tuple[list[Prompt], list[str]]:
    """A prompt for each response: one alone is that of all.

    Raises:
      ConfigError: there are not as many of one as of the other, or a response is no text.
    """
    responses = [responses] if isinstance(responses, str) else list(responses)
    one = isinstance(prompts, str) or isinstance(next(iter(prompts), None), Mapping)
    prompts = [prompts] * len(responses) if one else list(prompts)
    check(
        len(prompts) == len(responses),
        f"{len(prompts)} prompts and {len(responses)} responses: there must be one for each, or "
        "one prompt for all",
    )
    for response in responses:
        if not isinstance(response, str):
            raise ConfigError(f"response={response!r} must be text, not {type(response).__name__}")
    return prompts, responses

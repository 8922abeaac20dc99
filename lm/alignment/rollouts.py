"""Prompts to samples: the inference engine writes with the weights of the moment.

Token in, token out: what is trained on is the ids that were drawn, never a text encoded again. The
token that ends a response is its last one; a response that `max_new_tokens` cut off has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.config import AboveZero, Positive, Share, Size, SizeOrZero
from lm.inference import Framing
from lm.inference.engine import Engine
from lm.inference.programs import Level
from lm.inference.requests import EngineConfig, Request
from lm.inference.rows import LEVELS
from lm.inference.sampling import SamplingConfig
from lm.models import Model
from lm.tokenizers import Tokenizer

PAGE = 16  # tokens whose keys and values stand together: responses are short


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What the policy writes in one iteration. The sampler's names are `SamplingConfig`'s."""

    prompts: Size = 16  # of an iteration
    samples: Size = 4  # responses to each prompt: the group of GRPO and RLOO
    max_new_tokens: Positive = 64  # of a response, end-of-text included
    temperature: AboveZero = 1.0  # divides the logits, when drawing and in training alike
    top_k: int | None = None  # draw from the k likeliest tokens only; 0 or less, None: from all
    top_p: Share | None = None  # the fewest that hold this share of the probability; 0, None: all
    min_p: Share = 0.0  # those at least so many times as likely as the likeliest
    slots: SizeOrZero = 0  # responses that are written at the same time; 0: up to 64

    @property
    def responses(self) -> int:
        """Of an iteration."""
        return self.prompts * self.samples

    def sampling(self) -> SamplingConfig:
        """How the engine draws."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
        drawn = {name: getattr(self, name) for name in names}
        return SamplingConfig(**drawn, truncate_prompt=False)

    @property
    def level(self) -> Level:
        """What the engine's programs must do for it."""
        return LEVELS[self.sampling().kind().draws == "filtered"]

    def engine(self, length: int, context: int) -> EngineConfig:
        """The engine's sizes for prompts with responses of `length` tokens, in a model's context.

        All of `slots` texts have room at the same time.
        """
        slots = self.slots or min(64, self.responses)
        each, whole = (-(-tokens // PAGE) for tokens in (length + 1, context))
        return EngineConfig(
            max_slots=slots,
            page_size=PAGE,
            num_pages=max(whole, slots * min(each + 1, whole)),
            prefill_chunk=16 * PAGE,
            max_queue=2**20,
            read_first=True,
        )


class Sample(NamedTuple):
    """One response."""

    prompt: int  # the number of its prompt
    ids: list[int]  # as drawn, the end included
    logprobs: list[float]  # of each, in the distribution it was drawn from
    ended: bool  # by a token that ends it, not by `max_new_tokens`


class Sampler:
    """An engine for rollouts: one shape of everything, so that it compiles once.

    Args:
      model: the skeleton, a decoder's.
      params: of it; on a mesh they stay split as they are, and keys and values lie on `tensor`.
      framing, tokenizer: see `lm.inference.engine.Engine`.
      config: how much is written, and how it is drawn.
      length: the most tokens of a prompt and its response.
    """

    def __init__(
        self,
        model: Model,
        params: Mapping[str, Any],
        framing: Framing,
        tokenizer: Tokenizer | None,
        config: RolloutConfig,
        length: int,
    ):
        self.config, self.sampling = config, config.sampling()
        sizes = config.engine(length, model.config.max_length)
        self.engine = Engine(model, params, framing, tokenizer, sizes)
        self.engine.warm_up([config.level])

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        prompts: Sequence[Sequence[int]],
        seed: int,
        each: int = 0,
    ) -> list[Sample]:
        """`config.samples` responses to each prompt, or `each`, side by side.

        Args:
          params: the weights to write with.
          prompts: token ids.
          seed: a response is a function of the weights, its prompt's ids, its number, and this.
        """
        self.engine.update(params)
        each = each or self.config.samples
        samples, rows = [], {}
        for row in range(len(prompts) * each):
            prompt, number = divmod(row, each)
            ids = tuple(prompts[prompt])
            request = Request(ids, self.sampling, seed, number, prompt=prompt)
            rows[self.engine.submit(request)] = row
            samples.append(Sample(prompt, [], [], False))
        while self.engine.under_way:
            for event in self.engine.step():
                sample = samples[rows[event.number]]
                sample.ids.extend(step.id for step in event.steps)
                sample.logprobs.extend(step.sampled_logprob for step in event.steps)
                if event.finish == "stop":
                    samples[rows[event.number]] = sample._replace(ended=True)
        return samples


def rollout_seed(seed: int, iteration: int) -> int:
    """The seed of an iteration's rollout: what is drawn again after an interruption is the same."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0])


def rows(
    prompts: Sequence[Sequence[int]], samples: Sequence[Sample], length: int
) -> dict[str, np.ndarray]:
    """Samples as rows to train on, one a row: what `lm.data.batches` calls a batch, [N, length].

    `weights` are 1 where the target is a token of the response; `rollout_logprob` is how likely it
    was when it was drawn.
    """
    shape = (len(samples), length)
    ints = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: np.zeros(shape, np.int32) for name in ints}
    batch |= {name: np.zeros(shape, np.float32) for name in ("weights", "rollout_logprob")}
    for row, sample in enumerate(samples):
        prompt = prompts[sample.prompt]
        ids = [*prompt, *sample.ids]
        read, first = len(ids) - 1, len(prompt) - 1
        batch["inputs"][row, :read] = ids[:-1]
        batch["targets"][row, :read] = ids[1:]
        batch["segment_ids"][row, :read] = 1
        batch["positions"][row, :read] = np.arange(read)
        batch["weights"][row, first:read] = 1
        batch["rollout_logprob"][row, first:read] = sample.logprobs
    return batch

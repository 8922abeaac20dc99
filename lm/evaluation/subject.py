"""A model under examination: how likely it finds texts, what it writes, what it answers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import ConfigError, check
from lm.evaluation.card import NotApplicable
from lm.evaluation.scoring import MaskedScorer, Scored, Scorer, windows
from lm.inference import SamplingConfig
from lm.runs.run import Run
from lm.tokenizers import ChatTemplate, Tokenizer

ROWS = 64  # texts that are written together


def spells(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a tokenizer can write every character of a text."""
    characters = "".join(sorted({*text}))
    return tokenizer.decode(tokenizer.encode(characters)) == characters


class Likely(NamedTuple):
    """What a model makes of a continuation."""

    scored: Scored
    truncated: bool  # the context was too short for what stands before


class Written(NamedTuple):
    """What a model wrote."""

    text: str
    logprob: float  # of its tokens together, nats, at temperature 1
    tokens: int
    ended: bool  # by itself, or by a stop text; else it was too long
    truncated: bool  # the context was too short for the prompt


def choices(
    likely: Callable[[list[tuple[str, str]]], Sequence[Likely]],
    asked: Iterable[tuple[str, Sequence[str]]],
) -> list[list[Likely]]:
    """What a model makes of each way in which each context may go on; `likely` as of `Subject`."""
    asked = list(asked)
    found = iter(likely([(context, one) for context, several in asked for one in several]))
    return [[next(found) for _ in several] for _, several in asked]


class Subject:
    """A run with all that an examination asks of it.

    Args:
      run: a decoder, or an encoder, with a tokenizer; its parameters on one device or split over
        a mesh. An encoder is asked for `shares` alone: all else raises NotApplicable.
      ways: devices that have rows of their own.
      chat_template: as of `Run.chat_template`.

    Raises:
      ConfigError: an encoder-decoder, or a model without a tokenizer or an output head; an
        encoder's tokenizer without a mask token.
    """

    def __init__(self, run: Run, ways: int = 1, chat_template: str = ""):
        check(run.tokenizer is not None, f"{run.directory} has no tokenizer: it reads no text")
        self.run, self.tokenizer = run, run.tokenizer
        self.encoder = run.skeleton.config.architecture == "encoder"
        if self.encoder:
            mask = self.tokenizer.mask_id
            check(mask is not None, f"{run.directory}: its tokenizer has no mask token")
            self.scorer = MaskedScorer(run.skeleton, run.params, mask, ways)
        else:
            self.scorer = Scorer(run.skeleton, run.params, ways)
        self.max_length = run.skeleton.config.max_length
        self._chosen = chat_template

    def at(self, run: Run) -> Subject:
        """The same model at another checkpoint, with the programs of this one."""
        other = copy.copy(self)
        other.run, other.scorer = run, copy.copy(self.scorer)
        other.scorer.params = run.params
        return other

    # ---- Tokens

    @property
    def prefix(self) -> int:
        """What stands before a text that has nothing before it: begin-of-text, else end-of-text."""
        before = self.run.framing.before
        return before[-1] if before else self.tokenizer.bos_id

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """How its conversations are written; None of a model that has none."""
        try:
            return self.run.chat_template(self._chosen)
        except ConfigError:
            if self._chosen:
                raise
            return None

    def text(self, text: str) -> list[int]:
        """A text's ids, what stands before texts once in front of them."""
        return [*(self.run.framing.before or ()), *self.tokenizer.encode(text)]

    def pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The ids of both together, and where the continuation begins.

        Space at the context's end belongs to the continuation, as tokens begin with it. A token
        that spans the join is of the continuation, which so has one at least unless it is empty.
        """
        if not context:
            return [self.prefix, *self.tokenizer.encode(continuation)], 1
        bare = context.rstrip()
        if bare:
            context, continuation = bare, context[len(bare) :] + continuation
        before, whole = self.text(context), self.text(context + continuation)
        start = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(before))
        start = min(start, len(whole) - bool(continuation))
        return (whole, start) if start else ([self.prefix, *whole], 1)

    def question(self, asked: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """A user's words, or messages, up to where the reply begins."""
        check(self.template is not None, f"{self.run.directory} has no chat template")
        said = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return self.template.encode(said)

    # ---- How likely

    def likely(self, pairs: Iterable[tuple[str, str]]) -> list[Likely]:
        """What it makes of each continuation, given its context."""
        return self.likely_ids([self.pair(*each) for each in pairs])

    def likely_ids(self, pairs: Sequence[tuple[Sequence[int], int]]) -> list[Likely]:
        """What it makes of each text from a token on; see `Scorer`.

        Where the context has no room for all, the text's beginning is left out; a continuation that
        is longer than the context alone is read in windows.
        """
        self.needs_decoder()
        texts, starts, of = [], [], []
        for number, (ids, start) in enumerate(pairs):
            cut = max(0, len(ids) - 1 - self.max_length)
            if start == len(ids):
                continue
            if cut < start:
                pieces = [(ids[cut:], start - cut)]
            else:
                pieces = windows(ids[start:], ids[start - 1], self.max_length)
            for piece, begin in pieces:
                texts.append(piece)
                starts.append(begin)
                of.append((number, cut > 0))
        found = [Likely(Scored.none(), False)] * len(pairs)  # of an empty continuation
        for scored, (number, cut) in zip(self.scorer(texts, starts), of):
            found[number] = Likely(found[number].scored.then(scored), cut)
        return found

    def shares(
        self, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> tuple[list[np.ndarray], int]:
        """log p of the tokens at `places` of each text, nats [n], and how many texts were cut.

        A decoder's given the tokens before; an encoder's, masked one by one, given all others.

        Args:
          texts: token ids, without what stands around them.
        """
        if not self.encoder:
            found = self.likely_ids([([self.prefix, *ids], 1) for ids in texts])
            some = [one.scored.logprob[list(at)] for one, at in zip(found, places)]
            return some, sum(one.truncated for one in found)
        before = len(self.run.framing.before or ())
        whole = [self.run.framing.around(ids) for ids in texts]
        longest = max(map(len, whole), default=0)
        if longest > self.max_length:
            raise NotApplicable(
                f"its context of {self.max_length} tokens does not hold a text of {longest}"
            )
        return self.scorer(whole, [[before + one for one in at] for at in places]), 0

    def needs_decoder(self) -> None:
        """Raises NotApplicable of an encoder."""
        if self.encoder:
            raise NotApplicable(
                "it is an encoder, which sees both sides of a token: it neither writes nor says "
                "how likely a text is from left to right"
            )

    # ---- What it writes

    def write(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingConfig,
        seed: int = 0,
    ) -> list[list[Written]]:
        """Continuations of each prompt, `sampling.num_samples` of them.

        Args:
          prompts: text, or token ids. Of one that leaves no room the beginning is left out.
          sampling: how to draw, and how much.
          seed: of the draws.

        Raises:
          ConfigError: `max_new_tokens` leaves no room for a prompt.
        """
        self.needs_decoder()
        room = self.max_length - sampling.max_new_tokens
        check(
            room > 0,
            f"max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the model's "
            f"context of {self.max_length} tokens: lower it",
        )
        sampling = dataclasses.replace(sampling, logprobs=sampling.logprobs or 0)
        ids = [(self.text(p) if isinstance(p, str) else list(p)) or [self.prefix] for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike in length together
        found: list[list[Written]] = [[] for _ in ids]
        each = sampling.num_samples
        for first in range(0, len(order), max(1, ROWS // each)):
            part = order[first : first + max(1, ROWS // each)]
            written = self.run.generator.generate([ids[i][-room:] for i in part], sampling, seed)
            texts = [""] * (len(part) * each)
            for row, text in written.texts():
                texts[row] += text
            for row, text in enumerate(texts):
                number, steps = part[row // each], written.steps[row]
                logprob, cut = sum(step.logprob for step in steps), len(ids[number]) > room
                found[number].append(
                    Written(text, float(logprob), len(steps), written.ended[row], cut)
                )
        return found

    def answer(
        self,
        asked: Sequence[str | Sequence[Mapping[str, Any]]],
        sampling: SamplingConfig,
        seed: int = 0,
    ) -> list[list[Written]]:
        """Replies to each question, up to the end of the turn; see `write` and `question`."""
        prompts = [self.question(one) for one in asked]
        return self.write(prompts, sampling.ending(*self.template.ends), seed)

"""Prompts as text, continuations as text that appears piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lm.inference.config import SamplingConfig
from lm.inference.framing import Framing
from lm.inference.generate import CHUNK, NOTHING, Generator, Timing
from lm.tokenizers import Tokenizer


class TextGenerator:
    """A `Generator` that reads and writes text.

    A decoder's prompt is the start of a text. An encoder-decoder's is the source: what comes is a
    text of its own, its translation or whatever else the model was trained to make of it.

    Args:
      generator: the model.
      tokenizer: the one the model was trained with.
      framing: what stands around a text; complete (`Framing.filled`).
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer, framing: Framing):
        self.generator, self.tokenizer, self.framing = generator, tokenizer, framing

    def encode(self, prompt: str) -> list[int]:
        """The tokens the model reads; see `Framing.encode`."""
        return self.framing.encode(self.tokenizer, prompt)

    def opening(self, prompt: str) -> str:
        """What of the prompt belongs to the text that is made: all, or nothing of a source."""
        return "" if self.generator.encodes else prompt

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig,
        seed: int = 0,
        chunk: int = CHUNK,
    ) -> TextGeneration:
        """Continues every prompt; iterate over the result. See `Generator.generate`."""
        return TextGeneration(self, prompts, sampling, seed, chunk)


class TextGeneration:
    """One call of `TextGenerator.generate`: iterates over `(row, text)` as the text comes.

    `text` is what row `row` has gained; the joined texts of a row are its continuation, without
    its prompt, or an encoder-decoder's target. When the iteration is over, `timing`, `ended` and
    `notices` are complete.

    Attributes:
      notices: what the reader should know, one line each.
      ended: for each row, whether it came to end-of-text.
      timing: see `Timing`.
    """

    def __init__(
        self,
        owner: TextGenerator,
        prompts: Sequence[str],
        sampling: SamplingConfig,
        seed: int,
        chunk: int,
    ):
        self._tokenizer, self._samples = owner.tokenizer, sampling.num_samples
        self._prompts = [owner.encode(prompt) for prompt in prompts]
        self._generator = generator = owner.generator
        self._tokens = generator.generate(self._prompts, sampling, seed, chunk)
        self._wanted = sampling.max_new_tokens
        self._end = set(generator.end_of_text)
        self._read = [[] if generator.encodes else ids for ids in self._prompts]
        self.notices: list[str] = []
        cut = [len(ids) for ids in self._prompts if len(ids) > generator.context]
        if cut:
            self.notices.append(
                f"the model reads only the last of the prompt's {max(cut)} tokens, as many as its "
                f"context of {generator.context} holds"
            )
        unknown = sum(ids.count(owner.tokenizer.unk_id) for ids in self._prompts)
        if unknown:
            self.notices.append(f"the tokenizer does not know {unknown} of the prompt's tokens")
        self.ended = [False] * (len(prompts) * self._samples)

    @property
    def timing(self) -> Timing:
        """How long it took."""
        return self._tokens.timing

    def __iter__(self) -> Iterator[tuple[int, str]]:
        drawn = [0] * len(self.ended)
        streams = [self._tokenizer.decode_stream() for _ in self.ended]
        for row, stream in enumerate(streams):
            # What a token adds to the text may depend on whether it is the first.
            for id in self._read[row // self._samples]:
                stream.push(id)
        for tokens_BN in self._tokens:
            for row, ids in enumerate(tokens_BN.tolist()):
                ids = [id for id in ids if id != NOTHING]
                drawn[row] += len(ids)
                self.ended[row] |= not self._end.isdisjoint(ids)
                text = "".join(map(streams[row].push, ids))
                if text:
                    yield row, text
        for row, stream in enumerate(streams):
            if text := stream.flush():
                yield row, text
        cut = [n for n, ended in zip(drawn, self.ended) if n < self._wanted and not ended]
        context = self._generator.context
        if self._tokens.slides:
            self.notices.append(
                f"the text outgrew the model's context of {context} tokens: from there on the "
                f"model read only the last {self._generator.kept} to {context}"
            )
        elif cut:
            self.notices.append(
                f"{len(cut)} of {len(drawn)} texts stopped short of max_new_tokens={self._wanted}, "
                f"where they filled the model's context of {context} tokens"
            )

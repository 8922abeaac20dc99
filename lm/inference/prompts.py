"""Prompts: the special tokens around a text, and texts of ids side by side in rows.

A model has seen texts framed in one way, and a prompt must be framed alike.

| architecture    | reads                                | writes                               |
|-----------------|--------------------------------------|--------------------------------------|
| decoder         | begin-of-text, text                  | what follows, up to end-of-text      |
| encoder         | begin-of-text, text, end-of-text     |                                      |
| encoder_decoder | text, end-of-text                    | after begin-of-text, to end-of-text  |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check, nearest, view
from lm.models import ModelConfig
from lm.tokenizers import Tokenizer

Sampling = TypeVar("Sampling")  # a `lm.inference.SamplingConfig`
NOTHING = -1  # in place of a token, where there is none: padding, and a row that has ended


@dataclasses.dataclass(frozen=True)
class Framing:
    """The section `framing` of a run's config, for models that do not follow the table above."""

    before: tuple[int, ...] | None = None  # ids in front of every text that is read; None: as above
    after: tuple[int, ...] | None = None  # ids behind it
    decoder_start: tuple[int, ...] | None = None  # what an encoder-decoder's decoder continues
    end_of_text: tuple[int, ...] | None = None  # each ends what is written
    empty: tuple[int, ...] | None = None  # what stands for a text without a token
    never: tuple[int, ...] | None = None  # ids that are never written

    @classmethod
    def of_run(
        cls, config: Mapping[str, Any], model: ModelConfig, tokenizer: Tokenizer, where: str
    ) -> Framing:
        """The framing of a run's texts, complete; `where` is what errors call the section."""
        begins = config.get("data", {}).get("end_of_text", True)
        return view(cls, config.get("framing", {}), where).filled(model, tokenizer, begins)

    def filled(self, model: ModelConfig, tokenizer: Tokenizer, begins: bool = True) -> Framing:
        """With the table's choice for each field that is None.

        `begins` is whether documents were told apart in training. If not, a decoder's or encoder's
        text is a part of one stream, with nothing around it.
        """
        bos, eos = (tokenizer.bos_id,), (tokenizer.eos_id,)
        both = model.architecture == "encoder_decoder"
        usual = Framing(
            before=() if both or not begins else bos,
            after=eos if both or (begins and model.architecture == "encoder") else (),
            decoder_start=bos if both else (),
            end_of_text=eos,
            empty=bos if begins else (),
        )
        given = {name: ids for name, ids in dataclasses.asdict(self).items() if ids is not None}
        return dataclasses.replace(usual, **given)

    def between(self, tokenizer: Tokenizer, source: str = "", target: str = "") -> Framing:
        """The framing of texts of other languages; "" leaves one as it is.

        mBART's stand beside the source (Liu et al. 2020, §2.2; behind it in the first models, where
        the target's alone begins what is written), and the target's is written first. Marian's
        target is named in front of the source (Tiedemann and Thottingal 2020, §2).

        Raises:
          ConfigError: a language that the tokenizer has no token of, or nowhere to put it.
        """
        ids = tokenizer.languages
        for field, code in (("source_language", source), ("target_language", target)):
            check(
                not code or code in ids,
                f"{field}={code!r} is none of the languages of this tokenizer"
                + (f"{nearest(code, ids)}: {', '.join(ids)}" if ids else ", which has none"),
            )
        own = {name: tuple(getattr(self, name) or ()) for name in ("before", "after")}
        start, codes = tuple(self.decoder_start or ()), set(ids.values())
        if source:
            check(
                not tokenizer.marks_target and not codes.isdisjoint(sum(own.values(), ())),
                f"source_language={source!r}: this model's sources do not name their language",
            )
            own = {name: tuple(ids[source] if id in codes else id for id in own[name])
                   for name in own}  # fmt: skip
        if target and tokenizer.marks_target:
            rest = [id for id in own["before"] if id not in codes]
            own["before"] = (ids[target], *rest)
        elif target:
            rest = [id for id in start if id not in codes]
            start = (*(rest if codes.isdisjoint(own["after"]) else ()), ids[target])
        return dataclasses.replace(self, **own, decoder_start=start)

    def allowed(self, sampling: Sampling) -> Sampling:
        """`sampling` that never draws what is never written."""
        if not self.never:
            return sampling
        biases = {**(sampling.logit_bias or {}), **dict.fromkeys(self.never, -100.0)}
        return dataclasses.replace(sampling, logit_bias=biases)

    def around(self, ids: Sequence[int]) -> list[int]:
        """A text's ids with what stands before and after them."""
        return [*(self.before or ()), *ids, *(self.after or ())]

    def window(self, ids: Sequence[int], length: int) -> list[int]:
        """The last `length` of `ids`, begin-of-text still in front of them."""
        begin = list(self.before or ())
        if len(ids) <= length or list(ids[: len(begin)]) != begin or len(begin) >= length:
            begin = []
        return begin + list(ids[max(len(begin), len(ids) - length + len(begin)) :])

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The tokens the model reads for `text`.

        For nothing at all that is begin-of-text, or, where documents were not told apart in
        training, a line break.

        Raises:
          ConfigError: nothing to start from, or what is no text.
        """
        check(isinstance(text, str), f"prompt={text!r} must be text, not {type(text).__name__}")
        check(
            text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text),
            f"prompt={text!r} is no text: it has bytes that are not UTF-8, or halves of characters",
        )
        ids = self.around(tokenizer.encode(text)) or list(self.empty or ())
        if not ids:
            newline = tokenizer.encode("\n")
            ids = newline if newline != [tokenizer.unk_id] else []
        check(
            bool(ids),
            f"prompt={text!r} has no tokens, and the model was trained without separators "
            "between documents (config.data.end_of_text=False): give it a prompt to start from",
        )
        return ids


def check_ids(name: str, ids: Sequence[int], config: ModelConfig) -> None:
    """Raises ConfigError unless the model can read `ids`; `name` says what they are."""
    check(len(ids) >= 1, f"{name}='' must have at least one token to start from")
    check(
        len(ids) <= config.max_length,
        f"{name} is {len(ids)} tokens long, but the model's context is {config.max_length}: "
        f"shorten it by {len(ids) - config.max_length}, or train with a larger "
        "config.model.max_length",
    )
    check(
        min(ids) >= 0 and max(ids) < config.vocab_size,
        f"{name} has token ids outside 0 … {config.vocab_size - 1}: they come from another "
        "tokenizer",
    )


def check_writes(config: ModelConfig, framing: Framing) -> None:
    """Raises ConfigError unless the model can write: no encoder, and a start for its decoder."""
    check(
        config.architecture != "encoder",
        "config.model.architecture='encoder' sees both sides of a token and cannot generate: "
        "ask it for vectors (Run.embed) or for what a mask hides (Run.fill)",
    )
    check(
        config.has_output_head,
        "config.model.classifier='sequence' stands in place of a decoder's output head, and the "
        "model cannot generate: ask it for rewards (Run.score)"
        if config.output_head
        else "config.model.output_head=False: the model is a body alone and cannot generate: "
        "ask it for vectors (Run.embed)",
    )
    check(
        config.architecture == "decoder" or bool(framing.decoder_start),
        "decoder_start=() must name the token that the decoder starts from",
    )


def kept_length(context: int) -> int:
    """How many tokens of a text the model reads on with when its window slides."""
    return context - context // 4


class Prompt(NamedTuple):
    """What a batch of P continuations starts from."""

    tokens_PT: np.ndarray  # what the decoder reads
    positions_PT: np.ndarray  # -1: padding
    source_PS: np.ndarray | None = None  # what an encoder-decoder's encoder reads
    segments_PS: np.ndarray | None = None  # 1, or 0: padding

    @property
    def read_PT(self) -> jax.Array:
        """The tokens, `NOTHING` for padding."""
        return jnp.where(self.positions_PT < 0, NOTHING, self.tokens_PT)


def padded(prompts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as rows of tokens and positions, int32 [P, T], padding (position -1) first.

    T is the longest prompt's length rounded up; see `rounded`.
    """
    length = rounded(max(map(len, prompts)), context)
    tokens_PT = np.zeros((len(prompts), length), np.int32)
    positions_PT = np.full((len(prompts), length), -1, np.int32)
    for row, ids in enumerate(prompts):
        tokens_PT[row, length - len(ids) :] = ids
        positions_PT[row, length - len(ids) :] = np.arange(len(ids))
    return tokens_PT, positions_PT


def padded_after(texts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """The texts as rows of tokens and segments (1, or 0 for padding), int32 [N, S], padding last.

    For what is read at once, an encoder's texts: a token's place in its row is its position.
    """
    length = rounded(max(map(len, texts)), context)
    tokens_NS = np.zeros((len(texts), length), np.int32)
    segments_NS = np.zeros((len(texts), length), np.int32)
    for row, ids in enumerate(texts):
        tokens_NS[row, : len(ids)] = ids
        segments_NS[row, : len(ids)] = 1
    return tokens_NS, segments_NS


def rounded(length: int, context: int) -> int:
    """`length`, up to a power of two and from 64 on to a multiple of 64, but not past `context`."""
    up = round_up(length, 64) if length > 32 else max(8, 1 << (length - 1).bit_length())
    return max(length, min(up, context))


def round_up(number: int, multiple: int) -> int:
    """The next multiple of `multiple` from `number` up."""
    return -(-number // multiple) * multiple

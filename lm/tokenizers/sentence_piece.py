"""SentencePiece, made lossless.

SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) by default normalises, trims and
collapses white space. Trained here it does none of that, and characters outside its vocabulary fall
back to their UTF-8 bytes. One loss remains by design: a space is written as "▁" inside the model,
so a "▁" in the text would come back as a space. Such characters are cut out of the text before
encoding and written as their bytes, which decode to themselves.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import sentencepiece

from lm.config import ConfigError
from lm.tokenizers.base import (
    Specials,
    Tokenizer,
    byte_piece,
    check_named,
    first_line,
    first_loss,
    roles,
    sentinels,
)
from lm.tokenizers.config import END_OF_TEXT, TokenizerConfig
from lm.tokenizers.settings import Settings

SPACE = "▁"
_MARKERS = re.compile(f"{SPACE}+")
_THREADS = 2

# The trainer skips sentences with NUL or its own markers, and reads a tab as a boundary.
_RESERVED = re.compile("[\0\t▁\u2585\u2047]+")
_CHUNK = 4000  # characters in one training "sentence"; a cut word in 4,000 characters is no loss


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, trained here or by others; `processor` is the library's tokenizer."""

    def __init__(
        self, kind: str, data: bytes, specials: Specials, lossy_because: str | None = None
    ):
        self._data = data
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = self.processor.get_piece_size()
        super().__init__(kind, max(size, *(i + 1 for i in specials.ids.values())), specials)
        first = self.processor.encode("a", out_type=str)[0]
        self.drops_first_space = first.startswith(SPACE)
        marker = [self.processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        # Cutting the text is only safe where nothing is added at the start of each part.
        cuts = not self.drops_first_space and all(self.processor.is_byte(id) for id in marker)
        self._marker = np.array(marker, np.int32) if cuts else None
        self.lossy_because = first_loss(self) if lossy_because is None else lossy_because

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if self._marker is None:
            return self._encode_parts(texts)
        # Each text as what lies between runs of "▁", and the lengths of the runs.
        parts = [_MARKERS.split(text) for text in texts]
        arrays = iter(self._encode_parts(list(itertools.chain.from_iterable(parts))))
        result = []
        for text, part in zip(texts, parts, strict=True):
            pieces = [next(arrays)]
            for run in _MARKERS.findall(text):
                pieces += [np.tile(self._marker, len(run)), next(arrays)]
            result.append(np.concatenate(pieces) if len(part) > 1 else pieces[0])
        return result

    def _encode_parts(self, texts: list[str]) -> list[np.ndarray]:
        batch = self.processor.encode(texts, out_type=int, num_threads=_THREADS)
        return [np.array(ids, np.int32) for ids in batch]

    def _table(self) -> list[bytes]:
        processor, table = self.processor, [b""] * self.vocab_size
        for id in range(processor.get_piece_size()):
            piece = processor.id_to_piece(id)
            if processor.is_byte(id):
                table[id] = byte_piece(piece)
            elif not (processor.is_control(id) or processor.is_unknown(id)):
                table[id] = piece.replace(SPACE, " ").encode()
        return table

    def model_files(self) -> dict[str, bytes]:
        """`tokenizer.model`, as the SentencePiece library reads it."""
        return {"tokenizer.model": self._data}

    def is_piece(self, name: str) -> bool:
        """Whether a text may be given the token of that name."""
        return self.processor.piece_to_id(name) != self.processor.unk_id()

    @classmethod
    def _opened(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        return cls(info["kind"], files["tokenizer.model"], specials, info["lossy_because"])

    @classmethod
    def from_model(cls, data: bytes, settings: Settings, config: TokenizerConfig):
        """A tokenizer from the bytes of any SentencePiece model.

        Specials that the model does not know, such as T5's sentinels, are those of the settings
        beside it. A vocabulary without an end-of-text token gets one, after its last id.

        Raises:
          ConfigError: not a model, or `config` names a token that it does not have.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:
            raise ConfigError(f"not a SentencePiece model: {first_line(error)}") from None
        added = settings.added_tokens(processor.get_piece_size())
        kind = "sentencepiece_unigram" if _is_unigram(processor) else "sentencepiece_bpe"
        return cls(kind, data, _specials(processor, added, config))

    @classmethod
    def train(
        cls, config: TokenizerConfig, texts: list[str], prefix: str
    ) -> SentencePieceTokenizer:
        """A lossless model: unknown, end-of-text and other specials first, then bytes.

        Raises:
          ConfigError: the corpus supports no vocabulary of that size.
        """
        eos, *others = config.specials
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=model,
                model_type=config.kind.removeprefix("sentencepiece_"),
                vocab_size=config.vocab_size,
                character_coverage=config.character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=8 * _CHUNK,  # in bytes; longer ones would be skipped
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                eos_piece=eos,
                control_symbols=others,
                num_threads=1,  # partial sums, and so the model, depend on the number of threads
                minloglevel=3,
            )
        except (RuntimeError, OSError) as error:
            raise ConfigError(_explain(config, str(error), prefix)) from None
        data = model.getvalue()
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        return cls(config.kind, data, _specials(processor, {}, config), "")


def _specials(
    processor: sentencepiece.SentencePieceProcessor,
    added: Mapping[str, int],
    config: TokenizerConfig,
) -> Specials:
    size = processor.get_piece_size()
    ids = {
        processor.id_to_piece(id): id
        for id in range(size)
        if processor.is_control(id) or processor.is_unknown(id)
    }
    ids |= {name: id for name, id in added.items() if id >= size}
    check_named(ids, config)
    eos, bos, pad = processor.eos_id(), processor.bos_id(), processor.pad_id()
    if config.eos_token:
        eos = ids[config.eos_token]
    elif eos < 0:
        free = max(size, *(id + 1 for id in ids.values()))
        eos = ids[END_OF_TEXT] = ids.get(END_OF_TEXT, free)
    if config.bos_token:
        bos = ids[config.bos_token]
    elif bos < 0 and added and sentinels(ids):
        bos = pad  # T5: its decoder starts with padding
    by_name = roles(ids, next(name for name, id in ids.items() if id == eos))
    return dataclasses.replace(
        by_name,
        bos=bos if bos >= 0 else None,
        pad=pad if pad >= 0 else by_name.pad,
        unk=processor.unk_id(),
    )


def _sentences(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for part in _RESERVED.split(text):
            for start in range(0, len(part), _CHUNK):
                yield part[start : start + _CHUNK]


def _explain(config: TokenizerConfig, message: str, prefix: str) -> str:
    """The trainer's complaint as a mistake in the config, with the remedy."""
    field = f"{prefix}.vocab_size={config.vocab_size!r}"
    too_large = re.search(r"value <= (\d+)", message)
    if too_large:
        return (
            f"{field} is too large for this corpus and kind {config.kind!r}: set it to at most "
            f"{too_large[1]}, or train on more or more varied text"
        )
    too_small = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return (
            f"{field} is too small for kind {config.kind!r}: the bytes and the characters of this "
            f"corpus need at least {too_small[1]}; or lower {prefix}.character_coverage"
        )
    if "sentences_.empty()" in message:
        return f"{prefix}: the corpus has no text to train on"
    return f"{field}, kind {config.kind!r}: the SentencePiece trainer says {message!r}"


def _is_unigram(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """BPE models score their pieces 0, −1, −2, …; unigram models by log probability."""
    scores = [
        processor.get_score(id)
        for id in range(processor.get_piece_size())
        if not (processor.is_control(id) or processor.is_unknown(id) or processor.is_byte(id))
    ]
    return any(score != int(score) for score in scores)

"""The one interface of all tokenizers: text ⇄ ids.

Whatever its kind, a tokenizer is a function from text to ids and a table from ids to bytes.
Decoding is concatenating the bytes of the tokens, so streaming, counting bytes per token and
showing what a token stands for need nothing from the library that does the encoding.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import ConfigError, check
from lm.files import parse_object, replacing

MASKS = ("[MASK]", "<mask>", "<|mask|>")
_LANGUAGE = re.compile("[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")  # a special that is a language's
SENTINEL = "<extra_id_{}>"  # T5's name for number 0, 1, ...

DESCRIPTION = "lm_tokenizer.json"  # in every saved tokenizer: what it is and what its ids mean

# Texts that catch the usual losses: trimmed and collapsed white space, dropped control characters,
# folded case, composed accents and compatibility forms, unknown characters, escaped spaces.
PROBES = (
    "The Cat sat, on “the” mat.",
    "  two  spaces \t tab ",
    "\n\none\ntwo\r\nthree\n",
    "nul\0 and bell\x07",
    "e\u0301 \u00e9 ﬁ Å \u212b ２",
    "שלום مرحبا 漢字 𠮷 🙂👩‍👩‍👧 \ue000",
    "a▁b\ufffd\u200b\ufeff c",
    "don't we 'll [UNK] <unk> ; ( x ) n't .",
)


def well_formed(text: str) -> str:
    """`text` with each lone surrogate replaced by U+FFFD.

    Lone surrogates are not Unicode text: no UTF-8 stands for them. They come from damaged JSON
    escapes, and one such document must not end a run. Surrogates in pairs become the character
    they stand for.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@dataclasses.dataclass(frozen=True)
class Specials:
    """The ids that stand for no text, by name, and the roles some of them play."""

    ids: Mapping[str, int]  # every special token: its name → its id
    eos: int  # end of text
    bos: int | None = None  # begin of text; None: the end-of-text token serves
    pad: int | None = None
    unk: int | None = None  # unknown text; only in vocabularies that do not cover all of it
    mask: int | None = None  # stands for a token to be guessed (BERT)
    sentinels: tuple[int, ...] = ()  # stand for the first, second, ... span to be guessed (T5)


class Tokenizer(abc.ABC):
    """Text ⇄ ids.

    Attributes:
      kind: one of `lm.tokenizers.KINDS`.
      vocab_size: the number of ids, specials included; ids are 0 … vocab_size − 1.
      eos_id, bos_id: end and begin of text; the same id unless the vocabulary has both.
      pad_id, unk_id, mask_id: None where the vocabulary has none.
      sentinel_ids: what stands for the first, second, ... hidden span; () where it has none.
      special_ids, special_names: every special token's name → its id, and its id → its name.
      lossless: whether `decode(encode(text)) == text` for any Unicode text.
      lossy_because: what is lost, in words, where `lossless` is False.
    """

    def __init__(self, kind: str, vocab_size: int, specials: Specials, lossy_because: str = ""):
        most = 1 << 24  # tables have an entry for each
        check(vocab_size <= most, f"its vocabulary has {vocab_size:,} ids, more than {most:,}")
        self.kind = kind
        self.vocab_size = vocab_size
        self.specials = specials
        self.special_ids = dict(specials.ids)
        self.special_names = {id: name for name, id in specials.ids.items()}
        self.eos_id = specials.eos
        self.bos_id = specials.eos if specials.bos is None else specials.bos
        self.pad_id = specials.pad
        self.unk_id = specials.unk
        self.mask_id = specials.mask
        self.sentinel_ids = tuple(specials.sentinels)
        self.lossy_because = lossy_because

    # What a kind defines.

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each (well-formed) text, int32, without specials."""

    @abc.abstractmethod
    def _table(self) -> list[bytes]:
        """For every id, the bytes it adds to the text; b"" for specials."""

    @abc.abstractmethod
    def model_files(self) -> dict[str, bytes]:
        """The files that hold the vocabulary, by name."""

    def options(self) -> dict[str, Any]:
        """Settings that the files do not hold, as JSON."""
        return {}

    @classmethod
    @abc.abstractmethod
    def _opened(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        """The tokenizer that `files()` describes, whose description is `info`."""

    @classmethod
    def train(cls, config: Any, texts: list[str], prefix: str) -> Tokenizer:
        """The tokenizer of a `TokenizerConfig`; see `lm.tokenizers.train`."""
        raise NotImplementedError(f"kind {config.kind!r} is read, not trained")

    # Files beside the vocabulary that do not change what ids mean: chat templates, for one.
    _extra: Mapping[str, bytes] = {}

    def extra_files(self) -> dict[str, bytes]:
        """Files beside the vocabulary; they do not change what the tokenizer does."""
        return dict(self._extra)

    def with_extra(self, files: Mapping[str, bytes]) -> Tokenizer:
        """The same tokenizer with these files beside it, too."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), _extra={**self.extra_files(), **files})
        return other

    # Whether decoding drops the space that encoding puts in front of the text.
    drops_first_space = False

    # What only translators' kinds have.

    marks_target = False  # whether it is the source that names the language to translate to

    @property
    def target(self) -> Tokenizer:
        """The tokenizer of what an encoder-decoder writes: of most kinds the same."""
        return self

    @property
    def languages(self) -> dict[str, int]:
        """Languages that have a token, by code ("en_XX"), and its id."""
        return {name: id for name, id in self.special_ids.items() if _LANGUAGE.fullmatch(name)}

    # What all kinds share.

    @property
    def lossless(self) -> bool:
        """Whether `decode(encode(text)) == text` for any Unicode text."""
        return not self.lossy_because

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without specials: names of specials in `text` are ordinary text.

        A lone surrogate, which is not Unicode text, is encoded as U+FFFD.
        """
        return self._encode([well_formed(text)])[0].tolist()

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of a text in parts: ids of specials stay, and the texts between are encoded."""
        return [
            id for part in parts for id in (self.encode(part) if isinstance(part, str) else [part])
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text as an int32 array, in parallel where the library can."""
        return self._encode([well_formed(text) for text in texts]) if len(texts) else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Specials are skipped; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ConfigError: an id that is not in the vocabulary.
        """
        table = self._bytes
        data = b"".join([table[i] for i in self._checked(ids)])
        if self.drops_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to the text: b"" for specials, perhaps part of a character."""
        return self._bytes[self._checked([id])[0]]

    def byte_lengths(self) -> np.ndarray:
        """The length of every token's bytes, int32 [vocab_size]."""
        return np.array([len(data) for data in self._bytes], np.int32)

    def word_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens begin a word, and after which one another begins: two bool [vocab_size].

        A word is a run of letters and digits with the white space before it; every other character
        is a word of its own. So a token begins a word if its first character is white space or
        punctuation ("▁the", "Ġthe", "the" after WordPiece's cuts), and ends one if its last is.
        Specials do both. Parts of characters count as letters.
        """
        begins = np.ones(self.vocab_size, bool)
        ends = np.ones(self.vocab_size, bool)
        for id, data in enumerate(self._bytes):
            if data:
                text = data.decode("utf-8", "replace")
                begins[id] = not _in_word(text[0])
                ends[id] = not _in_word(text[-1])
        return begins, ends

    def fits(self, rows: int) -> bool:
        """Whether an embedding with so many rows has one for every token that stands for text.

        Padding, say, may lie beyond: no text has it.
        """
        return self.vocab_size <= rows or not any(self._bytes[rows:])

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ConfigError(
                f"token id {bad} is not in this {self.kind} vocabulary of {self.vocab_size}: "
                "the ids come from another tokenizer"
            )
        return ids

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        table = self._table()
        for id in self.special_ids.values():
            table[id] = b""
        return table

    def is_piece(self, name: str) -> bool:
        """Whether a text may be given the token of that name."""
        return False

    def addable_id(self, name: str, free: int) -> int:
        """The id that `name` gets as a special of this vocabulary: `free`, unless it has one.

        Raises:
          ConfigError: it is a token of ordinary text.
        """
        check(
            not self.is_piece(name),
            f"{name!r} cannot be a special token, as it is one of ordinary text in this "
            "vocabulary: choose a name that no text has, such as '<|user|>'",
        )
        return free

    def with_specials(self, specials: Specials) -> Tokenizer:
        """The same tokenizer with other specials, each new one after its last id."""
        files = self.files()
        other = self._opened(files, specials, json.loads(files[DESCRIPTION]))
        return other.with_extra(self._extra)

    # Identity and storage.

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that decides what ids mean; unchanged by saving and loading."""
        files = {name: _digest(data) for name, data in self.model_files().items()}
        identity = {"description": self._description(), "files": files}
        return _digest(json.dumps(identity, sort_keys=True).encode())[:32]

    def _description(self) -> dict[str, Any]:
        specials = self.specials
        # Left out where there is none: tokenizers saved before there were any keep their identity.
        hidden: dict[str, Any] = {} if specials.mask is None else {"mask_id": specials.mask}
        if specials.sentinels:
            hidden["sentinel_ids"] = list(specials.sentinels)
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eos_id": specials.eos,
            "bos_id": specials.bos,
            "pad_id": specials.pad,
            "unk_id": specials.unk,
            **hidden,
            "special_tokens": self.special_ids,
            "lossy_because": self.lossy_because,
            "options": self.options(),
        }

    def files(self) -> dict[str, bytes]:
        """Everything `save` writes: file name → content."""
        description = {
            "about": "A tokenizer of lm; lm.tokenizers.load(this directory) opens it. A bos_id of "
            "null means that end-of-text also begins a text; lossy_because is empty where "
            "encoding keeps every Unicode text.",
            **self._description(),
            "model_files": sorted(self.model_files()),
            "fingerprint": self.fingerprint,
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        # The description comes last: a directory that has it is complete.
        return {**self.extra_files(), **self.model_files(), DESCRIPTION: text.encode()}

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer into `directory`, which is made if need be.

        Each file appears complete or not at all, so a reader never sees half a tokenizer.

        Raises:
          ConfigError: the directory cannot be written.
        """
        directory = Path(directory).expanduser()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, data in self.files().items():
                with replacing(directory / name) as file:
                    file.write(data)
        except OSError as error:
            raise ConfigError(
                f"cannot write a tokenizer into {directory}: {error.strerror}"
            ) from None

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Tokenizer:
        """The tokenizer of this class whose `files()` these are.

        Raises:
          ConfigError: a file is damaged, or is not the one that was saved.
        """
        info = parse_object(files[DESCRIPTION], DESCRIPTION)
        try:
            specials = Specials(
                {str(name): int(id) for name, id in info["special_tokens"].items()},
                *(info[f"{role}_id"] for role in ("eos", "bos", "pad", "unk")),
                mask=info.get("mask_id"),
                sentinels=tuple(info.get("sentinel_ids", ())),
            )
            kind, saved = str(info["kind"]), info["fingerprint"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{DESCRIPTION} is damaged: {error!r}") from None
        try:
            tokenizer = cls._opened(files, specials, info)
            found = tokenizer.fingerprint
        except ConfigError:
            raise
        except Exception as error:  # whatever a library says about bytes it cannot read
            raise ConfigError(
                f"the saved {kind} tokenizer is damaged: {first_line(error)}"
            ) from None
        check(
            found == saved,
            f"the saved {kind} tokenizer was changed or damaged: its fingerprint is {found}, "
            f"not {saved}",
        )
        beside = files.keys() - {DESCRIPTION, *info.get("model_files", files)}
        return tokenizer.with_extra({name: files[name] for name in sorted(beside)})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_files, (self.files(),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.kind!r}, vocab_size={self.vocab_size})"


def first_loss(tokenizer: Tokenizer, more: Sequence[str] = ()) -> str:
    """The first probe text that does not survive a round trip, in words; "" if all do."""
    probes = [*PROBES, *more]
    for probe, ids in zip(probes, tokenizer.encode_batch(probes)):
        text = tokenizer.decode(ids)
        if text != probe:
            return f"{probe!r} comes back as {text!r}"
    return ""


def roles(
    ids: Mapping[str, int], eos: str, bos: str | None = None, unk: str | None = None
) -> Specials:
    """Specials (name → id) with roles by name; padding, mask and sentinels have known ones."""
    return Specials(
        dict(ids),
        ids[eos],
        bos=None if bos is None else ids[bos],
        pad=next((ids[name] for name in ("<|pad|>", "<pad>", "[PAD]") if name in ids), None),
        unk=None if unk is None else ids[unk],
        mask=next((ids[name] for name in MASKS if name in ids), None),
        sentinels=sentinels(ids),
    )


def check_named(ids: Mapping[str, int], config: Any) -> None:
    """Raises ConfigError where the end- or begin-of-text that a config names is not in `ids`."""
    for field in ("eos_token", "bos_token"):
        name = getattr(config, field)
        check(
            not name or name in ids,
            f"{field}={name!r} is not one of {', '.join(map(repr, ids))}",
        )


def sentinels(ids: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, ... in this order, up to the first that lacks."""
    found: list[int] = []
    while (name := SENTINEL.format(len(found))) in ids:
        found.append(ids[name])
    return tuple(found)


def huggingface_config(tokenizer: Tokenizer) -> bytes:
    """A minimal `tokenizer_config.json`, with which transformers opens a `tokenizer.json`."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role in ("eos", "bos", "pad", "unk", "mask"):
        id = getattr(tokenizer, f"{role}_id")
        if id in tokenizer.special_names:
            config[f"{role}_token"] = tokenizer.special_names[id]
    config["clean_up_tokenization_spaces"] = False
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def byte_piece(name: str) -> bytes | None:
    """The byte that a piece such as `<0x41>` stands for; None of any other piece."""
    return bytes([int(name[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", name) else None


def first_line(error: BaseException) -> str:
    """What an error of some library says, in one line."""
    return (str(error).splitlines() or [repr(error)])[0]


def _in_word(character: str) -> bool:
    return (
        character.isalnum() or character in "_\ufffd" or unicodedata.category(character)[0] == "M"
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""Tokenizers that run on Hugging Face's Rust library: any `tokenizer.json`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

from lm.config import ConfigError
from lm.tokenizers.base import MASKS, SENTINEL, Specials, Tokenizer, first_loss, sentinels
from lm.tokenizers.config import END_OF_TEXT, TokenizerConfig

# Roles as tokenizer_config.json names them, then the usual names where it is silent.
_ROLES = {
    "eos": ("eos_token", "sep_token"),
    "bos": ("bos_token", "cls_token"),
    "pad": ("pad_token",),
    "unk": ("unk_token",),
    "mask": ("mask_token",),
}
USUAL_NAMES = {
    "eos": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>"),
    "unk": ("<unk>", "[UNK]", "<|unknown|>"),
    "mask": MASKS,
}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, without its templates: encoding adds no specials and parses none.

    The library would find the names of specials in the text, some of them even when told not to
    (a Unigram lattice contains them). So it is given a copy in which they have names no text has.
    """

    def __init__(
        self,
        kind: str,
        data: bytes,
        specials: Specials,
        lossy_because: str | None = None,
        extra: dict[str, bytes] | None = None,
    ):
        self._data = data
        self._extra = extra or {}
        description = json.loads(data)
        self._rust = _engine(description, specials)
        added = [token["content"] for token in description.get("added_tokens") or []]
        self._added_text = [name for name in added if name not in specials.ids]
        self._model = description["model"]
        self._decoder = json.dumps(description.get("decoder"))
        ids = [*self._rust.get_vocab(with_added_tokens=True).values(), *specials.ids.values()]
        super().__init__(kind, max(ids) + 1, specials, lossy_because or "")
        if lossy_because is None:
            around = ("a{}b", " {} ", "a {} b", "{0}{0}")
            probes = [text.format(name) for name in self._added_text for text in around]
            self.lossy_because = first_loss(self, probes)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._rust.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _table(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        names = {id: name for name, id in vocabulary.items()}
        if '"ByteLevel"' in self._decoder:
            values = byte_values()
            # Added tokens are found in the text as it is. One that the model has, too, is bytes.
            literal = set(self._added_text) - set(self._model["vocab"])
            for id, name in names.items():
                is_bytes = name not in literal and all(c in values for c in name)
                table[id] = bytes([values[c] for c in name]) if is_bytes else name.encode()
            return table
        suffix = self._model.get("end_of_word_suffix")
        if suffix:
            for id, name in names.items():
                table[id] = re.sub(re.escape(suffix) + "$", " ", name).encode()
            return table
        # Any other decoder is asked what the token adds after another one.
        anchor, before = self._anchor
        ids = sorted(set(names) - set(self.special_ids.values()))
        for id, text in zip(
            ids, self._rust.decode_batch([[anchor, id] for id in ids]), strict=True
        ):
            table[id] = text.removeprefix(before).encode()
            if self._model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", names[id]):
                table[id] = bytes([int(names[id][3:5], 16)])
        return table

    @functools.cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token that reads as a plain word at the start of a text, and that word."""
        for id in sorted(self._rust.get_vocab(with_added_tokens=True).values()):
            text = self._rust.decode([id]) if id not in self.special_ids.values() else ""
            if re.fullmatch("[A-Za-z]+", text):
                return id, text
        return 0, self._rust.decode([0])

    @functools.cached_property
    def drops_first_space(self) -> bool:
        """Whether a word's space is left out where the word begins the text."""
        if '"ByteLevel"' in self._decoder or self._model.get("end_of_word_suffix"):
            return False
        for id, data in enumerate(self._bytes):
            if re.fullmatch(rb" [A-Za-z]+", data):
                return not self._rust.decode([id]).startswith(" ")
        return False

    def is_piece(self, name: str) -> bool:
        """Whether a text may be given the token of that name."""
        return self._rust.token_to_id(name) is not None

    def addable_id(self, name: str, free: int) -> int:
        """See `Tokenizer.addable_id`; a token that was added as text becomes a special."""
        if name in self._added_text:
            return self._rust.token_to_id(name)
        return super().addable_id(name, free)

    def model_files(self) -> dict[str, bytes]:
        """`tokenizer.json`, as the Hugging Face libraries read it."""
        return {"tokenizer.json": self._data}

    def extra_files(self) -> dict[str, bytes]:
        """`tokenizer_config.json` and the like: those it came with, or a minimal one."""
        if self._extra:
            return self._extra
        names = {id: name for name, id in self.special_ids.items()}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for role in ("eos", "bos", "pad", "unk", "mask"):
            id = getattr(self, f"{role}_id")
            if id is not None:
                config[f"{role}_token"] = names[id]
        config["clean_up_tokenization_spaces"] = False
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer_config.json": text.encode()}

    @property
    def rust(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, with specials renamed."""
        return self._rust

    @property
    def model(self) -> dict[str, Any]:
        """The `model` section of tokenizer.json: type, vocabulary, merges."""
        return self._model

    @property
    def is_byte_level(self) -> bool:
        """Whether it merges bytes, as GPT-2's does."""
        return self._model.get("type") == "BPE" and '"ByteLevel"' in self._decoder

    @classmethod
    def from_files(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        """The tokenizer that `files()` describes."""
        extra = {n: d for n, d in files.items() if n not in ("tokenizer.json", "lm_tokenizer.json")}
        return cls(
            info["kind"], files["tokenizer.json"], specials, info["lossy_because"] or "", extra
        )

    @classmethod
    def from_json(
        cls,
        data: bytes,
        beside: dict[str, bytes],
        config: TokenizerConfig,
        end: int | None = None,
    ):
        """A tokenizer from the bytes of a `tokenizer.json` and the small files beside it.

        A vocabulary without an end-of-text token takes that of the model, whose id is `end`; or it
        gets one, after its last id.

        Raises:
          ConfigError: a file is damaged, or `config.eos_token` or `bos_token` is not in the
            vocabulary.
        """
        try:
            description = json.loads(data)
            engine = tokenizers.Tokenizer.from_str(data.decode())
            vocabulary = engine.get_vocab(with_added_tokens=True)
            named = named_roles(beside)
        except Exception as error:  # JSON, UTF-8, and whatever the library finds wrong
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise ConfigError(f"not a tokenizer.json that can be read: {reason}") from None
        added = {t["content"]: t for t in description.get("added_tokens") or []}
        ids = {name: vocabulary[name] for name, token in added.items() if token["special"]}
        for role, name in (("eos", config.eos_token), ("bos", config.bos_token)):
            if name:
                if name not in vocabulary:
                    raise ConfigError(f"{role}_token={name!r} is not in its vocabulary")
                if name not in added and name[0] not in "<[":
                    raise ConfigError(f"{role}_token={name!r} is an ordinary token: text has it")
                named[role] = name
        unk = description["model"].get("unk_token")
        if isinstance(unk, str):
            named.setdefault("unk", unk)
        unk_id = description["model"].get("unk_id")
        if isinstance(unk_id, int):
            named["unk"] = description["model"]["vocab"][unk_id][0]
        role_ids = {}
        for role, usual in USUAL_NAMES.items():
            names = [named[role]] if role in named else list(usual)
            for name in names:
                # A role played by an ordinary word, such as padding with "!", makes no special.
                if name in ids or (name in vocabulary and (name in added or name[0] in "<[")):
                    role_ids[role] = ids[name] = vocabulary[name]
                    break
        if "eos" not in role_ids:
            name = engine.id_to_token(end) if end is not None else None
            if name is None or (name not in added and name[:1] not in ("<", "[")):
                name = END_OF_TEXT if END_OF_TEXT not in vocabulary else "<|end of text|>"
                end = max(vocabulary.values()) + 1
            role_ids["eos"] = ids[name] = end
        hidden = sentinels(vocabulary)
        ids |= {SENTINEL.format(i): id for i, id in enumerate(hidden)}
        if hidden and "bos" not in role_ids and "pad" in role_ids:
            role_ids["bos"] = role_ids["pad"]  # T5: its decoder starts with padding
        specials = Specials(ids, **role_ids, sentinels=hidden)
        return cls("huggingface", data, specials, extra=beside)

    def with_specials(self, specials: Specials) -> HuggingFaceTokenizer:
        """The same with other specials. Those after its last id are written into its files.

        Raises:
          ConfigError: the library would give them other ids.
        """
        description = json.loads(self._data)
        added = description["added_tokens"] = description.get("added_tokens") or []
        known = self._rust.get_vocab_size(with_added_tokens=True)
        for token in added:
            token["special"] = token["special"] or token["content"] in specials.ids
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for name, id in sorted(specials.ids.items(), key=lambda item: item[1]):
            if id >= known:
                added.append({"id": id, "content": name, **plain, "special": True})
        data = json.dumps(description, ensure_ascii=False).encode()
        engine = tokenizers.Tokenizer.from_str(data.decode())
        for name, id in specials.ids.items():
            if engine.token_to_id(name) != id:
                raise ConfigError(f"{name!r} cannot be added to its vocabulary, which has gaps")
        extra = dict(self.extra_files())
        config = json.loads(extra["tokenizer_config.json"])
        if specials.mask is not None and not config.get("mask_token"):
            config["mask_token"] = engine.id_to_token(specials.mask)
            extra["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
        return type(self)(self.kind, data, specials, self.lossy_because, extra)


def named_roles(beside: dict[str, bytes]) -> dict[str, str]:
    """The names of specials by role, from tokenizer_config.json and special_tokens_map.json."""
    named: dict[str, str] = {}
    config = named_tokens(beside)
    for role, keys in _ROLES.items():
        token = next((config[key] for key in keys if config.get(key)), None)
        if token:
            named[role] = token
    return named


def named_tokens(beside: Mapping[str, bytes]) -> dict[str, str]:
    """Field, such as `cls_token` → a special's name, "" for none.

    special_tokens_map.json has the last word, unless tokenizer_config.json lists the added tokens
    itself: then transformers does not look at it.
    """
    files = ("tokenizer_config.json", "special_tokens_map.json")
    config, mapped = (json.loads(beside[f]) if f in beside else {} for f in files)
    settings = {**mapped, **config} if "added_tokens_decoder" in config else {**config, **mapped}
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    contents = {k: t.get("content") if isinstance(t, dict) else t for k, t in tokens.items()}
    return {key: str(name or "") for key, name in contents.items()}


def _engine(description: dict[str, Any], specials: Specials) -> tokenizers.Tokenizer:
    """The library's tokenizer in which no text contains the name of a special.

    Merges that would make a special of text are taken out of `description`.
    """
    hidden = {name: f"\0\ufdd0{id}\ufdd1\0" for name, id in specials.ids.items()}
    model = dict(description["model"])
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = description["model"]["merges"] = [
            (a, b) for a, b in pairs if hidden.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))
        ]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {hidden.get(name, name): id for name, id in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    added = [
        {**token, "content": hidden[token["content"]], "normalized": False, "special": True}
        if token["content"] in hidden
        else token
        for token in description.get("added_tokens") or []
    ]
    engine = tokenizers.Tokenizer.from_str(
        json.dumps({**description, "model": model, "added_tokens": added})
    )
    engine.encode_special_tokens = True
    engine.no_truncation()
    engine.no_padding()
    return engine


@functools.cache
def byte_values() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes → the bytes.

    Printable Latin-1 characters stand for themselves; the others are numbered from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_string(name: str) -> bytes:
    """The bytes that a byte-level vocabulary entry stands for."""
    return bytes(byte_values()[c] for c in name)

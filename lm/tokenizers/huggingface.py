"""Tokenizers that run on Hugging Face's Rust library: any `tokenizer.json`, and training BPE and
WordPiece.

BPE: Sennrich et al. 2016 (arXiv:1508.07909), over bytes as in GPT-2. WordPiece: Schuster and
Nakajima 2012, with BERT's word splitting; this trainer, like the library's, merges by frequency.
"""

from __future__ import annotations

import collections
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from lm.config import ConfigError, check
from lm.tokenizers.base import (
    DESCRIPTION,
    SENTINEL,
    Specials,
    Tokenizer,
    byte_piece,
    first_line,
    first_loss,
    huggingface_config,
    roles,
    sentinels,
    well_formed,
)
from lm.tokenizers.config import END_OF_TEXT, TokenizerConfig, pattern
from lm.tokenizers.settings import USUAL_NAMES, Settings

_UNKNOWN = "[UNK]"  # of WordPiece


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, without its templates: encoding adds no specials and parses none.

    The library would find the names of specials in the text, some of them even when told not to
    (a Unigram lattice contains them). So it is given a copy in which they have names no text has.

    Attributes:
      rust: the library's tokenizer, with specials renamed.
      model: the `model` section of tokenizer.json: type, vocabulary, merges.
    """

    def __init__(
        self,
        kind: str,
        data: bytes,
        specials: Specials,
        lossy_because: str | None = None,
        extra: dict[str, bytes] | None = None,
    ):
        self._data, self._extra = data, extra or {}
        description = json.loads(data)
        self.rust = _engine(description, _hidden(specials))
        self.model: dict[str, Any] = description["model"]
        self._has_bytes = '"ByteLevel"' in json.dumps(description.get("decoder"))
        added = [token["content"] for token in description.get("added_tokens") or []]
        self._added_text = [name for name in added if name not in specials.ids]
        ids = [*self.rust.get_vocab(with_added_tokens=True).values(), *specials.ids.values()]
        super().__init__(kind, max(ids) + 1, specials, lossy_because or "")
        if lossy_because is None:
            around = ("a{}b", " {} ", "a {} b", "{0}{0}")
            probes = [text.format(name) for name in self._added_text for text in around]
            self.lossy_because = first_loss(self, probes)

    @property
    def is_byte_level(self) -> bool:
        """Whether it merges bytes, as GPT-2's does."""
        return self.model.get("type") == "BPE" and self._has_bytes

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.rust.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """See `Tokenizer.encode_parts`; one text to the library, whose rules look past specials."""
        engine, hidden = self._parsing
        text = "".join(well_formed(p) if isinstance(p, str) else hidden[p] for p in parts)
        return engine.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _parsing(self) -> tuple[tokenizers.Tokenizer, dict[int, str]]:
        """The library's tokenizer, finding specials by names that nobody can guess."""
        hidden = _hidden(self.specials, secrets.token_hex(16))
        description = json.loads(self._data)
        engine = _engine(description, hidden)
        added = {token["content"] for token in description.get("added_tokens") or []}
        engine.add_special_tokens(
            [
                AddedToken(to, special=True, normalized=False)
                for name, to in hidden.items()
                if name not in added
            ]
        )
        engine.encode_special_tokens = False
        return engine, {id: hidden[name] for name, id in self.special_ids.items()}

    def _table(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        vocabulary = self.rust.get_vocab(with_added_tokens=True)
        names = {id: name for name, id in vocabulary.items()}
        if self._has_bytes:
            values = byte_values()
            # Added tokens are found in the text as it is. One that the model has, too, is bytes.
            literal = set(self._added_text) - set(self.model["vocab"])
            for id, name in names.items():
                is_bytes = name not in literal and all(c in values for c in name)
                table[id] = byte_string(name) if is_bytes else name.encode()
            return table
        if suffix := self.model.get("end_of_word_suffix"):
            for id, name in names.items():
                table[id] = re.sub(re.escape(suffix) + "$", " ", name).encode()
            return table
        # Any other decoder is asked what the token adds after another one.
        anchor, before = self._anchor
        ids = sorted(set(names) - set(self.special_names))
        texts = self.rust.decode_batch([[anchor, id] for id in ids])
        for id, text in zip(ids, texts, strict=True):
            fallback = byte_piece(names[id]) if self.model.get("byte_fallback") else None
            table[id] = fallback or text.removeprefix(before).encode()
        return table

    @functools.cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token that reads as a plain word at the start of a text, and that word."""
        for id in sorted(self.rust.get_vocab(with_added_tokens=True).values()):
            text = self.rust.decode([id]) if id not in self.special_names else ""
            if re.fullmatch("[A-Za-z]+", text):
                return id, text
        return 0, self.rust.decode([0])

    @functools.cached_property
    def drops_first_space(self) -> bool:
        """Whether a word's space is left out where the word begins the text."""
        if self._has_bytes or self.model.get("end_of_word_suffix"):
            return False
        for id, data in enumerate(self._bytes):
            if re.fullmatch(rb" [A-Za-z]+", data):
                return not self.rust.decode([id]).startswith(" ")
        return False

    def is_piece(self, name: str) -> bool:
        """Whether a text may be given the token of that name."""
        return self.rust.token_to_id(name) is not None

    def addable_id(self, name: str, free: int) -> int:
        """See `Tokenizer.addable_id`; a token that was added as text becomes a special."""
        if name in self._added_text:
            return self.rust.token_to_id(name)
        return super().addable_id(name, free)

    def model_files(self) -> dict[str, bytes]:
        """`tokenizer.json`, as the Hugging Face libraries read it."""
        return {"tokenizer.json": self._data}

    def extra_files(self) -> dict[str, bytes]:
        """`tokenizer_config.json` and the like: those it came with, or a minimal one."""
        return dict(self._extra) or {"tokenizer_config.json": huggingface_config(self)}

    @classmethod
    def _opened(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        extra = {n: d for n, d in files.items() if n not in ("tokenizer.json", DESCRIPTION)}
        return cls(
            info["kind"], files["tokenizer.json"], specials, info["lossy_because"] or "", extra
        )

    @classmethod
    def from_json(cls, data: bytes, settings: Settings, config: TokenizerConfig):
        """A tokenizer from the bytes of a `tokenizer.json` and the settings beside it.

        A vocabulary without an end-of-text token takes that of the model, `settings.end`; or it
        gets one, after its last id.

        Raises:
          ConfigError: a file is damaged, or `config.eos_token` or `bos_token` is not in the
            vocabulary.
        """
        named = settings.roles
        try:
            description = json.loads(data)
            engine = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # JSON, UTF-8, and whatever the library finds wrong
            raise ConfigError(
                f"not a tokenizer.json that can be read: {first_line(error)}"
            ) from None
        vocabulary = engine.get_vocab(with_added_tokens=True)
        added = {t["content"]: t for t in description.get("added_tokens") or []}
        ids = {name: vocabulary[name] for name, token in added.items() if token["special"]}

        def may_be_special(name: str) -> bool:
            # A role played by an ordinary word, such as padding with "!", makes no special.
            return name in added or name[:1] in ("<", "[")

        for role, name in (("eos", config.eos_token), ("bos", config.bos_token)):
            if name:
                check(name in vocabulary, f"{role}_token={name!r} is not in its vocabulary")
                check(
                    may_be_special(name),
                    f"{role}_token={name!r} is an ordinary token: text has it",
                )
                named[role] = name
        model = description["model"]
        if isinstance(model.get("unk_token"), str):
            named.setdefault("unk", model["unk_token"])
        if isinstance(model.get("unk_id"), int):
            named["unk"] = model["vocab"][model["unk_id"]][0]
        role_ids = {}
        for role, usual in USUAL_NAMES.items():
            for name in [named[role]] if role in named else usual:
                if name in ids or (name in vocabulary and may_be_special(name)):
                    role_ids[role] = ids[name] = vocabulary[name]
                    break
        if "eos" not in role_ids:
            end = settings.end
            name = engine.id_to_token(end) if end is not None else None
            if name is None or not may_be_special(name):
                name = END_OF_TEXT if END_OF_TEXT not in vocabulary else "<|end of text|>"
                end = max(vocabulary.values()) + 1
            role_ids["eos"] = ids[name] = end
        hidden = sentinels(vocabulary)
        ids |= {SENTINEL.format(i): id for i, id in enumerate(hidden)}
        if hidden and "bos" not in role_ids and "pad" in role_ids:
            role_ids["bos"] = role_ids["pad"]  # T5: its decoder starts with padding
        specials = Specials(ids, **role_ids, sentinels=hidden)
        return cls("huggingface", data, specials, extra=settings.kept)

    @classmethod
    def train(cls, config: TokenizerConfig, texts: list[str], prefix: str) -> HuggingFaceTokenizer:
        """Byte-level BPE or WordPiece, by `config.kind`."""
        trainer = _train_bpe if config.kind == "bpe" else _train_wordpiece
        return trainer(config, texts, prefix)

    def with_specials(self, specials: Specials) -> HuggingFaceTokenizer:
        """The same with other specials. Those after its last id are written into its files.

        Raises:
          ConfigError: the library would give them other ids.
        """
        description = json.loads(self._data)
        added = description["added_tokens"] = description.get("added_tokens") or []
        known = self.rust.get_vocab_size(with_added_tokens=True)
        for token in added:
            token["special"] = token["special"] or token["content"] in specials.ids
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for name, id in sorted(specials.ids.items(), key=lambda item: item[1]):
            if id >= known:
                added.append({"id": id, "content": name, **plain, "special": True})
        data = json.dumps(description, ensure_ascii=False).encode()
        engine = tokenizers.Tokenizer.from_str(data.decode())
        for name, id in specials.ids.items():
            check(
                engine.token_to_id(name) == id,
                f"{name!r} cannot be added to its vocabulary, which has gaps",
            )
        extra = dict(self.extra_files())
        config = json.loads(extra["tokenizer_config.json"])
        if specials.mask is not None and not config.get("mask_token"):
            config["mask_token"] = engine.id_to_token(specials.mask)
            extra["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
        return type(self)(self.kind, data, specials, self.lossy_because, extra)


def _hidden(specials: Specials, salt: str = "") -> dict[str, str]:
    """The name of each special → one that no text has."""
    return {name: f"\0\ufdd0{salt}{id}\ufdd1\0" for name, id in specials.ids.items()}


def _engine(description: dict[str, Any], hidden: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The library's tokenizer with the names of specials replaced by `hidden` ones.

    Merges that would make a special of text are taken out of `description`.
    """
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


def _train_bpe(config: TokenizerConfig, texts: list[str], prefix: str) -> HuggingFaceTokenizer:
    """Byte-level BPE: ids 0 … 255 are the bytes, then one id per merge, then the specials."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(pattern(config.pattern, f"{prefix}.pattern")), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(config.specials),
        min_frequency=config.min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, len(texts))
    ids = _add_specials(tokenizer, config.specials)
    specials = roles(ids, config.specials[0], config.bos_token)
    return HuggingFaceTokenizer("bpe", _json(tokenizer), specials, "")


def _train_wordpiece(
    config: TokenizerConfig, texts: list[str], prefix: str
) -> HuggingFaceTokenizer:
    """WordPiece: words cut at white space and punctuation, then into pieces; "##" continues a word.

    At most half the vocabulary goes to single characters; rarer ones are unknown.
    """
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.lowercase, strip_accents=config.lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()

    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    room = config.vocab_size - 1 - len(config.specials)
    alphabet: list[str] = []
    rare = []
    for character in sorted(sorted(counts), key=lambda c: -counts[c]):
        forms = [f for f in _forms(tokenizer, character) if f not in alphabet]
        if 2 * (len(alphabet) + len(forms)) <= room:
            alphabet += forms
        else:
            rare.append(character)
    if rare:
        blank = str.maketrans(dict.fromkeys(rare, " "))
        texts = [text.translate(blank) for text in texts]
    # The library numbers continuing characters in the order of a hash map, which differs from run
    # to run, and breaks ties between merges by number. Naming them first makes training repeatable.
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size - len(config.specials),
        min_frequency=config.min_frequency,
        special_tokens=[_UNKNOWN, *sorted(alphabet)],
        limit_alphabet=config.vocab_size,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, len(texts))
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []  # the characters were special to the trainer only
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    ids = _add_specials(tokenizer, (_UNKNOWN, *config.specials))
    case = "case, accents, " if config.lowercase else ""
    return HuggingFaceTokenizer(
        "wordpiece",
        _json(tokenizer),
        roles(ids, config.specials[0], config.bos_token, _UNKNOWN),
        f"{case}line breaks, repeated spaces and spaces around punctuation are normalised; unknown "
        "characters and words over 100 characters become unknown",
    )


def _forms(tokenizer: tokenizers.Tokenizer, character: str) -> list[str]:
    """The vocabulary entries `character` needs: itself, and its continuation inside a word."""
    forms = set()
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str(character)
    ):
        forms |= {word[0], *("##" + c for c in word[1:])}
    inside = tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str("a" + character)
    )
    if len(inside) == 1:
        forms |= {"##" + c for c in inside[0][0][1:]}
    return sorted(forms)


def _add_specials(tokenizer: tokenizers.Tokenizer, names: tuple[str, ...]) -> dict[str, int]:
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return {name: tokenizer.token_to_id(name) for name in names}


def _json(tokenizer: tokenizers.Tokenizer) -> bytes:
    return tokenizer.to_str(pretty=True).encode() + b"\n"

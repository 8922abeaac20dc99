"""Model directories without a `tokenizer.json`: vocabularies as they were published first.

`vocab.txt` is BERT's WordPiece (Devlin et al. 2019), `vocab.json` with `merges.txt` the byte-level
byte pairs of GPT-2, RoBERTa, BART and OPT, or GPT-1's with the ends of words marked. Both are
rewritten as the `tokenizer.json` they stand for. A SentencePiece `spiece.model` lacks the tokens
that were added around it, which the files beside it tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lm.config import ConfigError, check
from lm.tokenizers.base import SENTINEL
from lm.tokenizers.huggingface import USUAL_NAMES, named_roles

# Files that say how the vocabulary beside them is to be used.
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)

_END_OF_WORD = "</w>"  # GPT-1's
_T5_SENTINELS = 100  # what a T5 tokenizer adds where no file says how many


def wordpiece(vocab: bytes, beside: Mapping[str, bytes]) -> bytes:
    """The `tokenizer.json` of a BERT vocabulary, one token a line.

    Case is folded unless `tokenizer_config.json` has `do_lower_case` false, as in BERT's own code.

    Raises:
      ConfigError: a file is damaged, or there is no "[UNK]".
    """
    settings = _settings(beside, "tokenizer_config.json")
    # No strip: white space other than line ends may be a token.
    lines = vocab.decode("utf-8", "replace").split("\n")
    names = [line.removesuffix("\r") for line in lines]
    while names and not names[-1]:
        names.pop()
    unknown = named_roles(beside).get("unk", "[UNK]")
    check(unknown in names, f"vocab.txt is no WordPiece vocabulary: it has no {unknown!r}")
    ids = {name: id for id, name in enumerate(names)}
    check(len(ids) == len(names), "vocab.txt has a token twice")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_specials(tokenizer, beside)


def byte_pairs(vocab: bytes, merges: bytes, beside: Mapping[str, bytes]) -> bytes:
    """The `tokenizer.json` of a vocabulary of byte pairs.

    Raises:
      ConfigError: a file is damaged.
    """
    settings = _settings(beside, "tokenizer_config.json")
    ids = _object(vocab, "vocab.json")
    lines = merges.decode("utf-8", "replace").split("\n")
    pairs = [tuple(line.split()) for line in lines if line.strip() and line[:9] != "#version:"]
    marked = any(name.endswith(_END_OF_WORD) for name in ids)
    unknown = named_roles(beside).get("unk", "<unk>")
    words = {"unk_token": unknown, "end_of_word_suffix": _END_OF_WORD} if marked else {}
    try:
        model = models.BPE(ids, pairs, **words)
    except Exception as error:  # whatever the library finds wrong with it
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(f"vocab.json and merges.txt do not fit: {reason}") from None
    tokenizer = Tokenizer(model)
    if marked:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix=_END_OF_WORD)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=settings.get("add_prefix_space", False)
        )
        tokenizer.decoder = decoders.ByteLevel()
    return _with_specials(tokenizer, beside)


def added_tokens(beside: Mapping[str, bytes], size: int = 0) -> dict[str, int]:
    """Tokens added to a vocabulary, name → id, as the files beside it tell.

    Args:
      beside: the files, by name.
      size: of a SentencePiece vocabulary, after which T5's sentinels come, the last one first.
    """
    settings = _settings(beside, "tokenizer_config.json")
    found = {str(name): int(id) for name, id in _settings(beside, "added_tokens.json").items()}
    for id, token in (settings.get("added_tokens_decoder") or {}).items():
        found[str(token["content"])] = int(id)
    if size and SENTINEL.format(0) not in found:
        kind = str(settings.get("tokenizer_class", ""))
        model = str(_settings(beside, "config.json").get("model_type", ""))
        is_t5 = kind.startswith(("T5", "MT5")) or model in ("t5", "mt5", "umt5")
        count = settings.get("extra_ids", _T5_SENTINELS if is_t5 else 0)
        found |= {SENTINEL.format(i): size + count - 1 - i for i in range(count)}
    return found


def _with_specials(tokenizer: Tokenizer, beside: Mapping[str, bytes]) -> bytes:
    """`tokenizer` as JSON, in which the names of specials are marked as such."""
    vocabulary = tokenizer.get_vocab()
    usual = {name for names in USUAL_NAMES.values() for name in names}
    special = {name for name in (*named_roles(beside).values(), *usual) if name in vocabulary}
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in sorted(special, key=vocabulary.__getitem__)
        ]
    )
    added = added_tokens(beside)
    for name in sorted(added, key=added.__getitem__):  # the library numbers them as they come
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        found = tokenizer.token_to_id(name)
        check(
            found == added[name],
            f"the added token {name!r} cannot have the id {added[name]}: the next one is {found}",
        )
    return tokenizer.to_str().encode()


def _settings(beside: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return _object(beside[name], name) if name in beside else {}


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{name} is damaged: {error}") from None
    check(isinstance(value, dict), f"{name} is damaged: not a JSON object")
    return value

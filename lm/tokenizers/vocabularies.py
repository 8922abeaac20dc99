"""Tokenizers whose files leave something to the class that transformers opens them with.

`vocab.txt` is BERT's WordPiece (Devlin et al. 2019), `vocab.json` with `merges.txt` the byte-level
byte pairs of GPT-2, RoBERTa, BART, OPT, Qwen and GPT-NeoX, or GPT-1's with the ends of words
marked. Both are rewritten as the `tokenizer.json` they stand for, with the special tokens that the
class puts around a text. A SentencePiece model lacks the tokens that were added to it, which the
files beside it tell; and some settings in `tokenizer_config.json` overrule a `tokenizer.json`.

Where versions 4 and 5 of transformers agree, ids are theirs. Where they do not, the files are taken
at their word. A SentencePiece model is read as the library reads it that trained it: a text that
begins with spaces keeps them (for Llama as version 4 by default; version 5 drops the first), unless
the model itself says to strip them (T5). Llama and Gemma begin with a begin-of-text token unless
`add_bos_token` says otherwise (version 4; version 5 wants to be told).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from lm.config import ConfigError, check
from lm.files import parse_object
from lm.tokenizers.base import SENTINEL
from lm.tokenizers.config import END_OF_TEXT
from lm.tokenizers.huggingface import USUAL_NAMES, named_roles, named_tokens

# Files that say how the vocabulary beside them is to be used.
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)

# The tokenizer's class where no file names it, by `model_type`.
_CLASSES = {
    **dict.fromkeys(("gpt2", "opt"), "GPT2"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2"),
    **dict.fromkeys(("llama", "mistral", "mixtral"), "Llama"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "Gemma"),
    **dict.fromkeys(("t5", "mt5", "umt5"), "T5"),
    **{"bart": "Bart", "bert": "Bert", "gpt_neox": "GPTNeoX", "roberta": "Roberta"},
}
_FRAMING = ("Bart", "Roberta")  # of byte pairs, these put <s> and </s> around a text
# Of tokenizer_config.json: fields that these classes rebuild the parts of a tokenizer.json from.
_BERT = ("Bert", "DistilBert", "Electra")
_PREFIXED = ("GPT2", "GPTNeoX", *_FRAMING)
_QWEN_WORDS = (  # the pattern of Qwen2Tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
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
    tokenizer.normalizer = _bert_normalizer(settings)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_specials(tokenizer, beside, _around(beside, "[CLS]", "[SEP]"))


def byte_pairs(vocab: bytes, merges: bytes, beside: Mapping[str, bytes]) -> bytes:
    """The `tokenizer.json` of a vocabulary of byte pairs.

    Raises:
      ConfigError: a file is damaged.
    """
    settings = _settings(beside, "tokenizer_config.json")
    ids = parse_object(vocab, "vocab.json")
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
        return _with_specials(tokenizer, beside)
    kind, prefix = tokenizer_class(beside), bool(settings.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if kind in ("Qwen2", "GPTNeoX"):
        tokenizer.normalizer = normalizers.NFC()
    if kind == "Qwen2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    if kind in _FRAMING:
        around = _around(beside, "<s>", "</s>")
    else:
        usual = {"bos": "" if kind == "Qwen2" else END_OF_TEXT, "eos": END_OF_TEXT}
        names = {role: named_roles(beside).get(role, name) for role, name in usual.items()}
        around = tuple(names[r] if settings.get(f"add_{r}_token") else "" for r in names)
    return _with_specials(tokenizer, beside, around)


def settled(data: bytes, beside: Mapping[str, bytes]) -> bytes:
    """A `tokenizer.json` as the class beside it would change it: itself, most often.

    Case, accents and Chinese characters are BERT's classes' own choice, a space before the text is
    that of the byte-level ones; `tokenizer_config.json` or their defaults decide.
    """
    settings, kind = _settings(beside, "tokenizer_config.json"), tokenizer_class(beside)
    description = parse_object(data, "tokenizer.json")
    normalizer = description.get("normalizer") or {}
    words = description.get("pre_tokenizer") or {}
    if kind in _BERT and normalizer.get("type") == "BertNormalizer":
        wanted = json.loads(_bert_normalizer(settings).__getstate__())
        if wanted != normalizer:
            description["normalizer"] = wanted
            return json.dumps(description).encode()
    prefix = bool(settings.get("add_prefix_space"))
    if kind in _PREFIXED and words.get("add_prefix_space", prefix) != prefix:
        description["pre_tokenizer"] = {**words, "add_prefix_space": prefix}
        return json.dumps(description).encode()
    return data


def _bert_normalizer(settings: Mapping[str, Any]) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )


def tokenizer_class(beside: Mapping[str, bytes]) -> str:
    """The class that opens these files in transformers, less `Tokenizer` and `Fast`."""
    model = _settings(beside, "config.json")
    named = _settings(beside, "tokenizer_config.json").get("tokenizer_class")
    named = named or model.get("tokenizer_class") or _CLASSES.get(str(model.get("model_type")), "")
    return str(named).removesuffix("Fast").removesuffix("Tokenizer")


def end(beside: Mapping[str, bytes]) -> int | None:
    """The id at which the model beside the tokenizer ends a text, if its config.json tells."""
    ids = _settings(beside, "config.json").get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    return first if isinstance(first, int) and 0 <= first < 1 << 31 else None


def begins_and_ends(beside: Mapping[str, bytes]) -> tuple[bool, bool]:
    """Whether begin- and end-of-text stand around the ids of a SentencePiece model.

    Raises:
      ConfigError: a setting that such a model cannot follow.
    """
    settings, kind = _settings(beside, "tokenizer_config.json"), tokenizer_class(beside)
    check(
        settings.get("add_prefix_space") is not False or kind != "Llama",
        "tokenizer_config.json: add_prefix_space=False is not supported of a SentencePiece model: "
        "save a tokenizer.json with transformers, AutoTokenizer.from_pretrained(DIR)",
    )
    begins = settings.get("add_bos_token", kind in ("Llama", "Gemma"))
    return bool(begins), bool(settings.get("add_eos_token", kind in ("T5", "MT5")))


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


def _around(beside: Mapping[str, bytes], first: str, last: str) -> tuple[str, str]:
    """The names of what stands before and after a text, where the files are silent these."""
    names = named_tokens(beside)
    return names.get("cls_token") or first, names.get("sep_token") or last


def _with_specials(
    tokenizer: Tokenizer, beside: Mapping[str, bytes], around: tuple[str, str] = ("", "")
) -> bytes:
    """`tokenizer` as JSON, in which the names of specials are marked as such.

    Args:
      tokenizer, beside: the vocabulary, and the files that name its specials.
      around: the names of what is put before and after a text, "" for nothing.
    """
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
    names = [name for name in around if name]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    if names:
        before, after = around
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*filter(None, (before, "$A", after))],
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(names)],
        )
    return tokenizer.to_str().encode()


def _settings(beside: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return parse_object(beside[name], name) if name in beside else {}

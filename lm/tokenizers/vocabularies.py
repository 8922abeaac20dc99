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
from lm.tokenizers.base import first_line
from lm.tokenizers.config import END_OF_TEXT
from lm.tokenizers.settings import USUAL_NAMES, Settings

_FRAMING = ("Bart", "Roberta")  # of byte pairs, these put <s> and </s> around a text
# Of tokenizer_config.json: fields that these classes rebuild the parts of a tokenizer.json from.
_BERT = ("Bert", "DistilBert", "Electra")
_PREFIXED = ("GPT2", "GPTNeoX", *_FRAMING)
_QWEN_WORDS = (  # the pattern of Qwen2Tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

_END_OF_WORD = "</w>"  # GPT-1's


def wordpiece(vocab: bytes, settings: Settings) -> bytes:
    """The `tokenizer.json` of a BERT vocabulary, one token a line.

    Case is folded unless `tokenizer_config.json` has `do_lower_case` false, as in BERT's own code.

    Raises:
      ConfigError: a file is damaged, or there is no "[UNK]".
    """
    # No strip: white space other than line ends may be a token.
    lines = vocab.decode("utf-8", "replace").split("\n")
    names = [line.removesuffix("\r") for line in lines]
    while names and not names[-1]:
        names.pop()
    unknown = settings.roles.get("unk", "[UNK]")
    check(unknown in names, f"vocab.txt is no WordPiece vocabulary: it has no {unknown!r}")
    ids = {name: id for id, name in enumerate(names)}
    check(len(ids) == len(names), "vocab.txt has a token twice")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    tokenizer.normalizer = _bert_normalizer(settings)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_specials(tokenizer, settings, settings.around("[CLS]", "[SEP]"))


def byte_pairs(vocab: bytes, merges: bytes, settings: Settings) -> bytes:
    """The `tokenizer.json` of a vocabulary of byte pairs.

    Raises:
      ConfigError: a file is damaged.
    """
    ids = parse_object(vocab, "vocab.json")
    lines = merges.decode("utf-8", "replace").split("\n")
    pairs = [tuple(line.split()) for line in lines if line.strip() and line[:9] != "#version:"]
    marked = any(name.endswith(_END_OF_WORD) for name in ids)
    unknown = settings.roles.get("unk", "<unk>")
    words = {"unk_token": unknown, "end_of_word_suffix": _END_OF_WORD} if marked else {}
    try:
        model = models.BPE(ids, pairs, **words)
    except Exception as error:  # whatever the library finds wrong with it
        raise ConfigError(f"vocab.json and merges.txt do not fit: {first_line(error)}") from None
    tokenizer = Tokenizer(model)
    if marked:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix=_END_OF_WORD)
        return _with_specials(tokenizer, settings)
    kind, prefix = settings.kind, bool(settings.own.get("add_prefix_space"))
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
        around = settings.around("<s>", "</s>")
    else:
        usual = {"bos": "" if kind == "Qwen2" else END_OF_TEXT, "eos": END_OF_TEXT}
        names = {role: settings.roles.get(role, name) for role, name in usual.items()}
        around = tuple(names[r] if settings.own.get(f"add_{r}_token") else "" for r in names)
    return _with_specials(tokenizer, settings, around)


def settled(data: bytes, settings: Settings) -> bytes:
    """A `tokenizer.json` as the class beside it would change it: itself, most often.

    Case, accents and Chinese characters are BERT's classes' own choice, a space before the text is
    that of the byte-level ones; `tokenizer_config.json` or their defaults decide.
    """
    kind = settings.kind
    description = parse_object(data, "tokenizer.json")
    normalizer = description.get("normalizer") or {}
    words = description.get("pre_tokenizer") or {}
    if kind in _BERT and normalizer.get("type") == "BertNormalizer":
        wanted = json.loads(_bert_normalizer(settings).__getstate__())
        if wanted != normalizer:
            description["normalizer"] = wanted
            return json.dumps(description).encode()
    prefix = bool(settings.own.get("add_prefix_space"))
    if kind in _PREFIXED and words.get("add_prefix_space", prefix) != prefix:
        description["pre_tokenizer"] = {**words, "add_prefix_space": prefix}
        return json.dumps(description).encode()
    return data


def _bert_normalizer(settings: Settings) -> normalizers.BertNormalizer:
    config = settings.own
    return normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )


def _with_specials(
    tokenizer: Tokenizer, settings: Settings, around: tuple[str, str] = ("", "")
) -> bytes:
    """`tokenizer` as JSON, in which the names of specials are marked as such.

    `around` names what is put before and after a text, "" for nothing.
    """
    vocabulary = tokenizer.get_vocab()
    usual = {name for names in USUAL_NAMES.values() for name in names}
    special = {name for name in (*settings.roles.values(), *usual) if name in vocabulary}

    def add(*names: str) -> None:
        tokens = [AddedToken(name, special=True, normalized=False) for name in names]
        tokenizer.add_special_tokens(tokens)

    add(*sorted(special, key=vocabulary.__getitem__))
    added = settings.added_tokens()
    for name in sorted(added, key=added.__getitem__):  # the library numbers them as they come
        add(name)
        found = tokenizer.token_to_id(name)
        check(
            found == added[name],
            f"the added token {name!r} cannot have the id {added[name]}: the next one is {found}",
        )
    names = [name for name in around if name]
    add(*names)
    if names:
        before, after = around
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*filter(None, (before, "$A", after))],
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(names)],
        )
    return tokenizer.to_str().encode()

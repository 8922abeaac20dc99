"""Every kind of tokenizer in one table: trained, opened again, or read from what others wrote."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm.config import ConfigError, check, nearest, view
from lm.files import is_plain, parse_object, read_bytes, read_json
from lm.tokenizers import pieces, vocabularies
from lm.tokenizers.base import (
    DESCRIPTION,
    MASKS,
    SENTINEL,
    Tokenizer,
    check_named,
    first_line,
    sentinels,
    well_formed,
)
from lm.tokenizers.chat import read_template
from lm.tokenizers.config import KINDS, TokenizerConfig
from lm.tokenizers.huggingface import HuggingFaceTokenizer
from lm.tokenizers.pieces import PieceTokenizer
from lm.tokenizers.plain import ByteTokenizer, CharTokenizer
from lm.tokenizers.sentence_piece import SentencePieceTokenizer
from lm.tokenizers.settings import (
    HUGGING_FACE_FILES,
    TEMPLATE_FILE,
    Settings,
    template_files,
)
from lm.tokenizers.tiktoken_ranks import TiktokenTokenizer

# What trains and opens a kind.
CLASSES: dict[str, type[Tokenizer]] = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "bpe": HuggingFaceTokenizer,
    "wordpiece": HuggingFaceTokenizer,
    "sentencepiece_unigram": SentencePieceTokenizer,
    "sentencepiece_bpe": SentencePieceTokenizer,
    "tiktoken": TiktokenTokenizer,
    "huggingface": HuggingFaceTokenizer,
    "pieces": PieceTokenizer,
}
assert tuple(CLASSES) == KINDS

# What others write, in the order of preference.
_SOUGHT = (
    "tokenizer.json", "tokenizer.model", "spiece.model", pieces.SHIFTED, pieces.SOURCE,
    "vocab.json", "vocab.txt",
)  # fmt: skip


def train(
    config: TokenizerConfig, texts: Iterable[str], prefix: str = "config.tokenizer"
) -> Tokenizer:
    """The tokenizer that `config` describes, trained on the first `train_bytes` of `texts`.

    The same text gives the same tokenizer, with the same fingerprint, on any number of threads.
    With `config.path` the tokenizer is read from there, and `texts` is not touched.

    Raises:
      ConfigError: a field that makes no sense, no text, or a vocabulary that does not fit the text.
    """
    view(TokenizerConfig, config, prefix)
    if config.path:
        return open_path(config.path, config, prefix)
    sample = [] if config.kind == "byte" else list(_sample(texts, config.train_bytes))
    check(config.kind == "byte" or bool(sample), f"{prefix}: the corpus has no text to train on")
    trained = CLASSES[config.kind].train(config, sample, prefix)
    return _with_template(trained, config, prefix)


def _with_template(tokenizer: Tokenizer, config: TokenizerConfig, prefix: str) -> Tokenizer:
    """`tokenizer`, with the chat template that `config` chooses as its own."""
    if not config.chat_template:
        return tokenizer
    text = read_template(config.chat_template, f"{prefix}.chat_template")
    return tokenizer.with_extra({TEMPLATE_FILE: text.encode()})


def _sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` bytes of `texts`; the text that crosses the limit is cut."""
    for text in texts:
        text = well_formed(text)
        size = len(text) if text.isascii() else len(text.encode())
        if size > limit:
            text = text.encode()[:limit].decode("utf-8", "ignore")
        if text:
            yield text
        limit -= size
        if limit <= 0:
            return


def load(directory: str | Path) -> Tokenizer:
    """Opens a tokenizer.

    `directory` was written by `Tokenizer.save`, or is a Hugging Face directory with a
    `tokenizer.json` (with or without `tokenizer_config.json` and `special_tokens_map.json`), a
    SentencePiece `tokenizer.model` or `spiece.model`, a `vocab.json` with `merges.txt` or a
    `vocab.txt`, or one with a single `.tiktoken` file. The path of such a file itself will do.

    Raises:
      ConfigError: nothing there, no tokenizer in it, or a file that is damaged.
    """
    return open_path(str(directory), TokenizerConfig(), "tokenizer")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether `directory` holds any file that `load` would open."""
    where = Path(directory).expanduser()
    return any((where / name).is_file() for name in (DESCRIPTION, *_SOUGHT)) or any(
        where.glob("*.tiktoken")
    )


def framing_of_pieces(directory: str | Path) -> tuple[bool, bool]:
    """Whether begin- and end-of-text stand around what a SentencePiece model there encodes."""
    return Settings.beside(Path(directory).expanduser() / "tokenizer.model").begins_and_ends


def languages_of(directory: str | Path) -> tuple[str, str, bool]:
    """The languages that a translator's files there name, "" for none, and where theirs stand.

    Returns:
      source, target, and whether the source's stands behind the text (mBART's first model).
    """
    settings = Settings.beside(Path(directory).expanduser() / "tokenizer.model")
    is_mbart = settings.kind in ("MBart", "MBart50")
    source = settings.own.get("src_lang") or ("en_XX" if is_mbart else "")
    return source, settings.own.get("tgt_lang") or "", settings.kind == "MBart"


def open_path(path: str, config: TokenizerConfig, prefix: str) -> Tokenizer:
    """`load`, with the specials of `config`, and its pattern where the files do not say.

    Raises:
      ConfigError: as `load`; or a field of `config` that the tokenizer cannot follow.
    """
    where = Path(os.path.expanduser(path))
    name = f"{prefix}.path={path!r}"
    check(os.path.exists(where), f"{name} does not exist")
    try:
        if (found := _open(where, name, config)) is not None:
            return _with_template(_as_configured(found, config), config, prefix)
    except ConfigError as error:
        raise ConfigError(
            str(error) if str(error).startswith(name) else f"{name}: {error}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    except BaseException as error:  # whatever a library says; Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | AssertionError):
            raise
        raise ConfigError(
            f"{name} holds a tokenizer that cannot be used: {first_line(error)}"
        ) from None
    raise ConfigError(
        f"{name} holds no tokenizer: none of {DESCRIPTION}, tokenizer.json, tokenizer.model, "
        "vocab.json with merges.txt, vocab.txt, one .tiktoken file"
    )


def _open(where: Path, name: str, config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer in a file or directory; None: there is none."""
    if where.is_file():
        check(where.stat().st_size > 0, f"{name} is empty")
        return _open_file(where, config)
    if (where / DESCRIPTION).is_file():
        return from_files({f.name: read_bytes(f) for f in _model_files(where)})
    for file in _SOUGHT:
        if (where / file).is_file():
            return _open_file(where / file, config)
    ranks = sorted(where.glob("*.tiktoken"))
    return _open_file(ranks[0], config) if len(ranks) == 1 else None


# Kinds that a `tokenizer.json` may be of, by the type of its model.
_MODELS = {
    "BPE": ("bpe", "sentencepiece_bpe"),
    "WordPiece": ("wordpiece",),
    "Unigram": ("sentencepiece_unigram",),
    "WordLevel": ("char",),
}


def _as_configured(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """`tokenizer` with the specials that `config` asks for; those it lacks follow its last id.

    Raises:
      ConfigError: it is of another kind, has no such end- or begin-of-text, or takes for ordinary
        text what is to be special.
    """
    kinds = {tokenizer.kind, TokenizerConfig.kind}  # a default cannot be told from a choice
    if isinstance(tokenizer, HuggingFaceTokenizer):
        kinds |= {"huggingface", *_MODELS.get(tokenizer.model.get("type"), ())}
    check(
        config.kind in kinds,
        f"kind={config.kind!r} is not the kind of tokenizer that is there, {tokenizer.kind!r}: "
        f"set kind={tokenizer.kind!r}, or path='' to train one",
    )
    ids = dict(tokenizer.special_ids)
    wanted = [*config.special_tokens, *config.chat_specials]
    wanted += [MASKS[0]] * (config.mask_token and tokenizer.mask_id is None)
    wanted += map(SENTINEL.format, range(len(tokenizer.sentinel_ids), config.num_sentinels))
    last = tokenizer.vocab_size - 1
    for name in dict.fromkeys(wanted):
        if name not in ids:
            ids[name] = tokenizer.addable_id(name, last + 1)
            last = max(last, ids[name])
    check_named(ids, config)
    had = tokenizer.specials
    specials = dataclasses.replace(
        had,
        ids=ids,
        eos=ids[config.eos_token] if config.eos_token else had.eos,
        bos=ids[config.bos_token] if config.bos_token else had.bos,
        mask=ids.get(MASKS[0]) if had.mask is None else had.mask,
        sentinels=sentinels(ids),
    )
    return tokenizer if specials == had else tokenizer.with_specials(specials)


def _open_file(file: Path, config: TokenizerConfig) -> Tokenizer:
    data, settings = read_bytes(file), Settings.beside(file)
    if file.suffix == ".tiktoken":
        tokenizer = TiktokenTokenizer.from_ranks(data, file.stem, config)
        return tokenizer.with_extra(template_files(settings.templates))
    if file.name in (pieces.SHIFTED, pieces.SOURCE):
        names = [pieces.SOURCE, pieces.TARGET, pieces.VOCABULARY]
        names = names if file.name in names else [file.name]
        for name in names:
            check((file.parent / name).is_file(), f"{file.name} has no {name} beside it")
        found = {name: read_bytes(file.parent / name) for name in names}
        return PieceTokenizer.from_files_beside(found, settings, config)
    if file.suffix == ".model":
        tokenizer = SentencePieceTokenizer.from_model(data, settings, config)
        return tokenizer.with_extra(template_files(settings.templates))
    if file.name == "vocab.txt":
        data = vocabularies.wordpiece(data, settings)
    elif file.name == "vocab.json":
        merges = file.parent / "merges.txt"
        check(merges.is_file(), "vocab.json has no merges.txt beside it")
        data = vocabularies.byte_pairs(data, read_bytes(merges), settings)
    elif file.name == "tokenizer.json":
        data = vocabularies.settled(data, settings)
    else:  # one of several: the files beside it tell of another
        settings = Settings()
    return HuggingFaceTokenizer.from_json(data, settings, config)


def _model_files(directory: Path) -> list[Path]:
    described = read_json(directory / DESCRIPTION).get("model_files")
    check(isinstance(described, list), f"{DESCRIPTION} is damaged: it names no model_files")
    for name in described:
        check(is_plain(str(name)), f"{DESCRIPTION} names {name!r}, which is no file's name here")
    files = [directory / str(name) for name in described]
    for file in files:
        check(file.is_file(), f"{file.name} is missing")
    extra = [directory / name for name in HUGGING_FACE_FILES]
    return [directory / DESCRIPTION, *files, *(f for f in extra if f.is_file())]


def from_files(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer whose `files()` these are.

    Raises:
      ConfigError: a file is damaged, or is not the one that was saved.
    """
    kind = str(parse_object(files[DESCRIPTION], DESCRIPTION).get("kind"))
    check(kind in CLASSES, f"{DESCRIPTION}: kind {kind!r} is unknown{nearest(kind, CLASSES)}")
    return CLASSES[kind].from_files(files)

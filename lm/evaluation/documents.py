"""Documents a model is examined on, with the bytes they have on disk and the kind each is of."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm.config import ConfigError, check, view
from lm.data import CONVERSATIONAL, CorpusReport, DataConfig, TokenizedCorpus
from lm.data import files as data_files
from lm.data.cache import cached
from lm.data.corpora import num_training_characters, source, sources, splits
from lm.data.files import Span
from lm.data.source import Source
from lm.data.storage import read_bytes, suffix
from lm.evaluation.card import NotApplicable
from lm.files import read_json
from lm.runs.directory import CONFIG
from lm.runs.run import Run
from lm.tokenizers import Tokenizer

FIELD = "config.language.path"  # that names documents, unless another does
FAR = 1 << 32  # above every seed of a run, so that what is generated was not trained on


class Document(NamedTuple):
    """A document as its tokens."""

    ids: list[int]
    num_bytes: int  # of its file, or of its text as UTF-8
    kind: str  # "" where nothing is known of it
    key: str  # that tells its bytes from others

    @classmethod
    def of(cls, tokenizer: Tokenizer, data: bytes, kind: str) -> Document:
        """Of a file, or of a text as UTF-8."""
        key = hashlib.blake2b(data, digest_size=8).hexdigest()
        return cls(ids_of(tokenizer, data), len(data), kind, key)


class Reading(NamedTuple):
    """Documents, and what a reader needs to know of them."""

    documents: list[Document]
    about: str  # where they are from
    left_out: int  # documents that the limit on tokens left no room for


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run was trained on: its `data` section, and the seed of what is generated."""

    config: DataConfig
    seed: int
    directory: pathlib.Path
    field: str = FIELD  # that names documents where these will not do

    @classmethod
    def of(cls, run: Run, field: str = FIELD) -> Trained:
        """Of a run, or of the one it began from where its own data are conversations.

        Raises:
          NotApplicable: no config.json tells of documents.
        """
        config, directory, seen = run.config, run.directory, set()
        while directory not in seen:
            seen.add(directory)
            if learnt_documents(config):
                where = f"{directory / CONFIG}: data"
                data = view(DataConfig, config.get("data", {}), where)
                return cls(data, config.get("seed", 0), directory, field)
            origin = pathlib.Path(os.path.expanduser(config.get("init_from") or ""))
            if config.get("init_from") and (origin / CONFIG).is_file():
                config, directory = read_json(origin / CONFIG), origin
        raise NotApplicable(
            f"{directory / CONFIG} tells of no documents that it was trained on: give some by "
            f"{field}"
        )

    def tokens(self, tokenizer: Tokenizer) -> list[TokenizedCorpus]:
        """The tokens it was trained on, from the cache.

        Raises:
          NotApplicable: they are not there.
        """
        try:
            found = [cached(one, tokenizer) for one in sources(self.config, self.seed)[0]]
        except ConfigError as error:
            raise NotApplicable(f"what the run was trained on is not there: {error}") from None
        if not all(found):
            raise NotApplicable(
                "the tokens that the run was trained on are not in the cache of this machine "
                "(data.cache_dir, or $LM_CACHE_DIR)"
            )
        return [both["train"] for both in found]

    def held_out(self, tokenizer: Tokenizer, documents: int, tokens: int) -> Reading:
        """The first documents that it was not trained on; of several corpora as many of each.

        Raises:
          NotApplicable: it held none out, or they cannot be read.
        """
        config = self.config
        if not (config.validation_fraction or config.validation_paths):
            raise NotApplicable(f"its run held no documents out: give some by {self.field}")
        try:
            corpora, own = sources(config, self.seed)
            corpora, part = (own, "train") if own else (corpora, "validation")
            if any(corpus.pairs for corpus in corpora):
                raise NotApplicable(f"its data are pairs of texts: give documents by {self.field}")
            several = len(corpora) > 1
            each, found = -(-documents // len(corpora)), []
            for corpus in corpora:
                some = itertools.islice(_of_split(corpus, part), each)
                found += [(text, corpus.path if several else kind) for text, kind in some]
        except ConfigError as error:
            raise NotApplicable(f"what its run held out cannot be read: {error}") from None
        if not found:
            raise NotApplicable("its run held no documents out that can be read")
        encoded = [Document.of(tokenizer, text.encode(), kind) for text, kind in found]
        about = f"held out by {self.directory}, from {', '.join(c.path for c in corpora)}"
        return _within(encoded, about, tokens)


def learnt_documents(config: Mapping[str, Any]) -> bool:
    """Whether a run of this config.json was trained on documents, not on conversations."""
    objective = config.get("objective", {}).get("name", "causal")
    return config.get("job") == "train" and objective not in CONVERSATIONAL


def documents_of(run: Run, path: str, documents: int, tokens: int, seed: int) -> Reading:
    """Documents of `path`, the job's field `config.path`; "": those that the run held out.

    Raises:
      NotApplicable: it held none out.
      ConfigError: there is nothing to read.
    """
    field = "config.path"
    if path:
        return given(path, run.tokenizer, documents, tokens, seed, field)
    return Trained.of(run, field).held_out(run.tokenizer, documents, tokens)


def given(
    path: str, tokenizer: Tokenizer, documents: int, tokens: int, seed: int, field: str = FIELD
) -> Reading:
    """Documents of `path`, which is what `data.path` may be; `field` is what named it.

    A file of plain text is one document, byte for byte. Of more files than `documents` some are
    drawn; of other corpora the first documents are taken.

    Raises:
      ConfigError: there is nothing to read.
    """
    config = DataConfig(path=path, validation_fraction=0.0, num_documents=documents)
    corpus = source(path, config, FAR + seed, field)
    check(not corpus.pairs, f"{field}={path!r} holds pairs of texts, not documents")
    found: list[Document] = []
    if _of_files(corpus) and not any(map(suffix, corpus.files)):
        kinds, names = _kinds_of(corpus.files), corpus.files
        if len(names) > documents:
            drawn = np.random.default_rng(seed).choice(len(names), documents, replace=False)
            names = [names[i] for i in sorted(drawn)]
        for name in names:
            found.append(Document.of(tokenizer, read_bytes(name), kinds[name]))
    else:
        for text, kind in itertools.islice(_of_split(corpus, "train"), documents):
            found.append(Document.of(tokenizer, text.encode(), kind))
    found = [document for document in found if document.ids]
    check(bool(found), f"{field}={path!r} holds no text")
    return _within(found, f"from {path}", tokens)


def ids_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The tokens of bytes that may be no UTF-8.

    A byte that is none has the token of that byte, where the tokenizer has one, else that of
    U+FFFD.
    """
    text = data.decode("utf-8", "surrogateescape")
    if text.isascii() or not re.search("[\udc80-\udcff]", text):
        return tokenizer.encode(text)
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids: list[int] = []
    for part in re.split("([\udc80-\udcff])", text):
        byte = part.encode("utf-8", "surrogateescape") if len(part) == 1 else b""
        if byte and byte[0] >= 0x80 and byte in single:
            ids.append(single[byte])
        elif part:
            ids += tokenizer.encode(part)
    return ids


def _within(found: list[Document], about: str, tokens: int) -> Reading:
    """Whole documents of at most so many tokens together, but one at least."""
    sizes = np.cumsum([len(document.ids) for document in found])
    number = max(1, int(np.searchsorted(sizes, tokens, side="right")))
    return Reading(found[:number], about, len(found) - number)


def _of_split(corpus: Source, part: str) -> Iterator[tuple[str, str]]:
    """The documents of a split, and the kind of each."""
    report, now = CorpusReport(), [""]

    def items(report: CorpusReport) -> Iterator[tuple[str, ...]]:
        for now[0], item in _kinds(corpus, report):
            yield item

    left, watched = num_training_characters(corpus, report), copy.copy(corpus)
    watched.items = items
    for split, (text,) in splits(watched, report, left):
        if split == part:
            yield text, now[0]() if callable(now[0]) else now[0]


def _kinds(corpus: Source, report: CorpusReport) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """What `corpus.items` yields, each with its kind, or with a function that finds it."""
    if corpus.path == "storyworld":
        for number, item in enumerate(corpus.items(report)):
            yield (lambda number=number: _plot(corpus.seed, number)), item
    elif _of_files(corpus):
        kinds = _kinds_of(corpus.files)
        for name in corpus.files:
            for item in data_files.read(Span(name), corpus.config, report):
                report.num_documents += 1
                yield kinds[name], item
    else:
        for item in corpus.items(report):
            yield "", item


def _of_files(corpus: Source) -> bool:
    return bool(corpus.files) and not corpus.path.startswith("hf:")


def _kinds_of(names: list[str]) -> dict[str, str]:
    """The kind of each file: its suffix, or its folder where all have the same suffix."""
    for of in (lambda name: os.path.splitext(name)[1] or "none", os.path.dirname):
        kinds = {name: of(name) for name in names}
        if len({*kinds.values()}) > 1:
            root = os.path.commonpath([*kinds.values()]) if of is os.path.dirname else ""
            return {name: os.path.relpath(k, root) if root else k for name, k in kinds.items()}
    return dict.fromkeys(names, "")


def _plot(seed: int, number: int) -> str:
    """The plot of a story, as the lottery of `storyworld.generate` draws it."""
    # That file is part of the corpus' fingerprint: it stays as it is.
    from lm.data.storyworld import _PLOTS, Teller

    if not number:
        return "canonical"
    return Teller(seed << 64 | number).pick(_PLOTS).__name__.replace("_", " ")

"""Corpora by name → documents, and the split of documents into training and validation.

`source` turns a path of the `data` section into a `Source`: a name, a fingerprint that changes
when the content may have, and its documents in an order that never changes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.config import ConfigError, check, check_choice, printable
from lm.data import files, stdlib, storage
from lm.data.config import DataConfig
from lm.data.files import BadFileError, CorpusReport, Span
from lm.data.lines import LINES, Lines
from lm.data.source import Source

Split = str  # "train" or "validation"
_READER = 2  # raised when the same files give other documents, or others are held out


def source(path: str, config: DataConfig, seed: int, field: str = "data.path") -> Source:
    """The corpus that `path` names.

    Raises:
      ConfigError: no such corpus.
    """
    if path in ("storyworld", "translation"):
        return _Generated(path, config, field, seed)
    if path in LINES:
        return Lines(path, config, field, seed)
    kind = _StandardLibrary if path == "stdlib" else _Hub if path.startswith("hf:") else _Files
    return kind(path, config, field)


def sources(config: DataConfig, seed: int) -> tuple[list[Source], list[Source]]:
    """The corpora of `path`, and those of `validation_path`.

    Where there are any of the latter, nothing of the others is held out.

    Raises:
      ConfigError: one of them does not exist.
    """
    whole = dataclasses.replace(config, validation_fraction=0.0)
    held_out = [source(p, whole, seed, "data.validation_path") for p in config.validation_paths]
    return [source(p, whole if held_out else config, seed) for p in config.paths], held_out


# Digest of code that was only rewritten → of the code that first made the very same items, by which
# runs and caches know them. Whatever else is changed there gives a corpus of its own.
_SAME_ITEMS = {"596687b91b889a60dcb3674e6eab782e": "8b66d85b2e2eaa55b7afb353f06ea053"}
_TRANSLATION_FILES = ("language.py", "language_words.py")
_INSTRUCTION_FILES = ("asking.py", "instructions.py")
_GENERATED_BYTES = 512  # of a generated item, roughly


class _Generated(Source):
    """Items of `lm.data.storyworld`, numbered 0, 1, …: stories, or pairs of its `language`."""

    def __init__(self, path: str, config: DataConfig, field: str, seed: int):
        super().__init__(path, config, field)
        self.seed = seed
        self.numbers = range(config.num_documents)
        self.pairs = path == "translation"

    def items(self, report: CorpusReport) -> Iterator[tuple[str, ...]]:
        from lm.data.storyworld import generate, language

        for number in self.numbers:
            report.num_documents += 1
            if self.pairs:
                yield language.pair(self.seed, number)
            else:
                yield (generate(self.seed, number).text,)

    def fingerprint(self, sidecar: str | None = None) -> dict[str, Any]:
        import lm.data.storyworld as package

        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(Path(package.__file__).parent.glob("*.py")):
            if file.name in _INSTRUCTION_FILES:
                continue
            if (file.name in _TRANSLATION_FILES) == self.pairs:
                digest.update(file.read_bytes())
        generator = digest.hexdigest()
        return {
            "corpus": self.path,
            "generator": _SAME_ITEMS.get(generator, generator),
            "seed": self.seed,
            "num_documents": self.config.num_documents,
        }

    def parts(self, size: int) -> list[Source]:
        each = max(1, size // _GENERATED_BYTES)
        starts = range(0, len(self.numbers), each)
        return [_with(self, numbers=self.numbers[start : start + each]) for start in starts]


class _StandardLibrary(Source):
    """The running Python's documentation and source; see `stdlib`."""

    def items(self, report: CorpusReport) -> Iterator[tuple[str]]:
        return zip(stdlib.documents(report))

    def fingerprint(self, sidecar: str | None = None) -> dict[str, Any]:
        return stdlib.fingerprint()


def _with(corpus: Source, **changes: Any) -> Source:
    changed = copy.copy(corpus)
    vars(changed).update(changes)
    return changed


class _Files(Source):
    """A file, a directory or a glob."""

    def __init__(self, path: str, config: DataConfig, field: str):
        super().__init__(path, config, field)
        self.pairs = len(config.text_fields) == 2
        found, self.left_out = storage.find(path, field)
        self.spans = [Span(file) for file in found]

    @property
    def files(self) -> list[str]:
        """Their paths, in order."""
        return [span.path for span in self.spans]

    @property
    def notes(self) -> list[str]:
        """The files of a folder that are not read."""
        names = [
            printable(os.path.relpath(p, os.path.expanduser(self.path))) for p in self.left_out
        ]
        if not names:
            return []
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return [f"is read without what is no data: {', '.join(names[:5])}{more}"]

    def items(self, report: CorpusReport) -> Iterator[tuple[str, ...]]:
        for span in self.spans:
            for item in files.read(span, self.config, report):
                report.num_documents += 1
                yield item

    def records(self, report: CorpusReport, held_out: bool = False) -> Iterator[tuple[str, Any]]:
        for span in self.spans:
            yield from files.records(span, self.config, report)

    def parts(self, size: int) -> list[Source]:
        """Files together, or spans of one file."""
        sizes: list[tuple[Span, float]] = []
        for file in self.files:
            length = storage.size_or_nothing(file)
            spans = files.spans(file, length, size, self.config)
            sizes += [(span, length / len(spans)) for span in spans]
        return [_with(self, spans=group) for group in storage.grouped(sizes, size)]

    def fingerprint(self, sidecar: str | None = None) -> dict[str, Any]:
        hashes = storage.content_hashes(self.files, sidecar)
        # The suffix decides how the bytes are read, and nothing else of the name does.
        suffixes = map(storage.suffix, self.files)
        return {
            "corpus": "files",
            "reader": _READER,
            "contents": list(map(list, zip(suffixes, hashes))),
            "encoding": self.config.encoding,
            "document_separator": self.config.separator,
            "text_field": self.config.text_field,
        }


class _Hub(Source):
    """`hf:NAME[:CONFIG]`: the train split of a Hugging Face dataset, streamed.

    NAME may also be a directory: of data files, or written by `Dataset.save_to_disk`. A dataset on
    the hub is recognised by its name, so an entry in the token cache outlives changes to it.
    """

    def __init__(self, path: str, config: DataConfig, field: str):
        super().__init__(path, config, field)
        self.pairs = len(config.text_fields) == 2
        name = path.removeprefix("hf:")
        local = os.path.expanduser(name)
        if os.path.exists(local):
            self.name, self.subset = local, None
        else:
            self.name, _, subset = name.partition(":")
            self.subset = subset or None
            self.name = os.path.expanduser(self.name)
        check(bool(self.name), f"{field}={path!r} must be 'hf:NAME' or 'hf:NAME:CONFIG'")

    def items(self, report: CorpusReport) -> Iterator[tuple[str, ...]]:
        records = itertools.islice(self._records(), self.config.num_documents)
        try:
            for item in files.items(records, Span(self.path), self.config, report):
                report.num_documents += 1
                yield item
        except BadFileError as error:
            raise ConfigError(f"{self.field}={self.path!r}: {error}") from None

    def records(self, report: CorpusReport, held_out: bool = False) -> Iterator[tuple[str, Any]]:
        records = itertools.islice(self._records(), self.config.num_documents)
        for number, record in enumerate(records, 1):
            report.num_documents += 1
            yield f"{self.path} record {number}", record

    @property
    def files(self) -> list[str]:
        """Those of a directory."""
        return storage.find(self.name, self.field)[0] if os.path.isdir(self.name) else []

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                f"{self.field}={self.path!r} needs the package 'datasets': pip install 'lm[hub]'"
            ) from None
        try:
            saved = os.path.isfile(os.path.join(self.name, "state.json"))
            if saved or os.path.isfile(os.path.join(self.name, "dataset_dict.json")):
                dataset = datasets.load_from_disk(self.name)
                if isinstance(dataset, datasets.DatasetDict):
                    check(
                        "train" in dataset,
                        f"{self.field}={self.path!r} has no split 'train', only "
                        f"{', '.join(map(repr, dataset))}",
                    )
                    dataset = dataset["train"]
            else:
                dataset = datasets.load_dataset(
                    self.name, self.subset, split="train", streaming=True
                )
            yield from dataset
        except ConfigError:
            raise
        except Exception as error:  # the library raises many kinds: network, name, script, format
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{self.field}={self.path!r} cannot be read: {reason}") from error

    def fingerprint(self, sidecar: str | None = None) -> dict[str, Any]:
        return {
            "corpus": "hf",
            "reader": _READER,
            "contents": storage.content_hashes(self.files, sidecar) or [self.name, self.subset],
            "text_field": self.config.text_field,
            "num_documents": self.config.num_documents,
        }


def split_of(text: str, validation_fraction: float) -> Split:
    """The split of a document, decided by its text alone: equal texts are never in both."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < validation_fraction * 2.0**64
    return "validation" if held_out else "train"


def splits(
    corpus: Source, report: CorpusReport, left: int | None
) -> Iterator[tuple[Split, tuple[str, ...]]]:
    """Every item of `corpus` with its split, in order.

    A pair goes where its source belongs. With `left` None the text decides. Otherwise `left` is the
    number of characters, in `corpus` and after it where it is a part of another, that are for
    training: a document across the cut is cut, and a pair across it is held out.
    """
    for item in corpus.items(report):
        if left is None:
            yield split_of(item[0], corpus.config.validation_fraction), item
            continue
        if corpus.pairs:
            left -= sum(map(len, item))
            yield ("train" if left >= 0 else "validation"), item
            continue
        left = max(0, left)
        (text,) = item
        for split, part in (("train", text[:left]), ("validation", text[left:])):
            if part:
                yield split, (part,)
        left -= len(text)


def by_position(corpus: Source, report: CorpusReport) -> bool:
    """Whether documents are held out by their place in the corpus, as `config.split` says.

    Also where "hash" is asked for and there are too few: their hashes would hold out none of them,
    or much more or less than the share asked for. `report` gets a note of it.
    """
    config = corpus.config
    if config.split == "position" or not config.validation_fraction:
        return config.validation_fraction > 0
    found, number = set(), 0
    for number, item in enumerate(corpus.items(CorpusReport()), 1):
        found.add(split_of(item[0], config.validation_fraction))
        if len(found) == 2 and number * config.validation_fraction >= 1:
            return False
    few = "too few" if number * config.validation_fraction < 1 else "too few that differ"
    report.notes.append(
        f"has {number:,} {'pair' if corpus.pairs else 'document'}"
        f"{'s' * (number != 1)}, {few} to hold some out by data.split='hash': the last "
        f"{config.validation_fraction:.2%} of the text is held out instead"
    )
    return True


def num_training_characters(corpus: Source, report: CorpusReport) -> int | None:
    """How many of a corpus' characters come before the part held out by position, with a note.

    With n in all it is int(n * (1 - validation_fraction)). None: no part is held out by position.
    """
    if not by_position(corpus, report):
        return None
    return training_share(num_characters(corpus), corpus.config)


def num_characters(corpus: Source) -> int:
    """Characters in all documents."""
    return sum(map(len, corpus.documents(CorpusReport())))


def training_share(length: int, config: DataConfig) -> int:
    """How many of `length` characters are for training."""
    return int(length * (1 - config.validation_fraction))


def documents(
    config: DataConfig, split: Split, seed: int, report: CorpusReport | None = None
) -> Iterator[str]:
    """The documents of a split of all corpora in `config`, one corpus after the other.

    A corpus of pairs gives the source and then the target of each. What is skipped is noted in
    `report`.

    Raises:
      ConfigError: a corpus does not exist, cannot be read or holds no documents.
    """
    for _, item in _items(config, split, seed, report):
        yield from item


def pairs(
    config: DataConfig, split: Split, seed: int, report: CorpusReport | None = None
) -> Iterator[tuple[str, str]]:
    """The pairs (source, target) of a split, as `documents`.

    Raises:
      ConfigError: as `documents`; or a corpus holds documents, not pairs.
    """
    for corpus, item in _items(config, split, seed, report):
        check(
            corpus.pairs,
            f"data.path={corpus.path!r} holds documents, not pairs: use 'translation', or files of "
            "pairs with data.text_field=('source', 'target')",
        )
        yield item


def _items(
    config: DataConfig, split: Split, seed: int, report: CorpusReport | None
) -> Iterator[tuple[Source, tuple[str, ...]]]:
    """Every item of a split, and whose it is."""
    check_choice("split", split, ("train", "validation"))
    report = report if report is not None else CorpusReport()
    corpora, held_out = sources(config, seed)
    if held_out and split == "validation":
        corpora, split = held_out, "train"
    for corpus in corpora:
        before = report.num_documents
        left = num_training_characters(corpus, report)
        items = splits(corpus, report, left)
        yield from ((corpus, item) for name, item in items if name == split)
        if report.num_documents == before:
            raise no_documents(corpus, report)


def no_documents(corpus: Source, report: CorpusReport) -> ConfigError:
    """The error for a corpus in which nothing could be read."""
    reasons = "; ".join(report.skipped[:3])
    skipped = f": {report.num_skipped} skipped ({reasons})" if reasons else ""
    return ConfigError(f"{corpus.field}={corpus.path!r} holds no documents{skipped}")

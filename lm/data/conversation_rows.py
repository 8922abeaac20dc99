"""Conversations → tokens, and rows of them: whole, or two replies to the same prompt side by side.

A conversation is written as its chat template writes it, and weighs where the assistant speaks (see
`lm.tokenizers.learned`). It is a document here, whose first token is only read. What follows the
last token to be learnt is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from lm.config import ConfigError, check, printable
from lm.data import corpora, storage
from lm.data.cache import HASHES, TokenizedCorpus, cache_directory
from lm.data.config import DataConfig
from lm.data.conversations import Example, split
from lm.data.packing import Pieces, Placement, RowItems, Rows
from lm.data.shards import SPLITS
from lm.tokenizers import ChatTemplate, learned

_Document = tuple[np.ndarray, np.ndarray]  # tokens, and which of them are to be learnt
_ARRAYS = ("tokens", "learned", "offsets", "values")  # of `Conversations`
_VERSION = 2  # raised when the same examples give other tokens


@dataclasses.dataclass(frozen=True)
class Conversations(TokenizedCorpus):
    """One split of one corpus as tokens, each conversation a document.

    Of pairs documents 2i and 2i + 1 are the two of pair i.

    Attributes:
      learned: [num_tokens] bool, the tokens to be learnt.
      values: [pairs] float32: by how much the first is better; or, of a labelled reply and a
        mismatched one, whether it is desirable.
    """

    learned: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))


def prepare(
    config: DataConfig,
    template: ChatTemplate,
    seed: int,
    objective: str,
    notify: Callable[[str], None] = logging.info,
) -> tuple[tuple[Conversations, ...], tuple[Conversations, ...]]:
    """The training and validation corpora of `config`, from the cache where possible.

    Args:
      template: how conversations are written, and the tokenizer.
      seed: of generated corpora.
      objective: of `CONVERSATIONAL`.
      notify: receives one line for each thing worth knowing.

    Raises:
      ConfigError: a corpus cannot be read, or written by the template, or has nothing to learn.
    """
    training, held_out = corpora.sources(config, seed)
    both = [tokenize(source, template, objective, notify) for source in training]
    validation = [tokenize(source, template, objective, notify)["train"] for source in held_out]
    if not held_out and config.validation_fraction:
        validation = [found["validation"] for found in both]
    return tuple(found["train"] for found in both), tuple(v for v in validation if len(v.tokens))


def tokenize(
    source: corpora.Source,
    template: ChatTemplate,
    objective: str,
    notify: Callable[[str], None] = logging.info,
) -> dict[str, Conversations]:
    """The splits of a corpus as tokens, from the cache or made now; see `prepare`."""
    config, tokenizer = source.config, template.tokenizer
    folder = cache_directory(config)
    kind = {"sft": "whole", "distillation": "whole", "kto": "labelled"}.get(objective, "pairs")
    facts = {
        "version": _VERSION,
        "corpus": source.fingerprint(str(folder / HASHES)),
        "read": [config.format, config.on_bad_file, config.split, config.validation_fraction],
        "tokenizer": tokenizer.fingerprint,
        "beside": {n: d.decode("utf-8", "replace") for n, d in tokenizer.extra_files().items()},
        "template": [dict(template.texts), [*template.begin]],
        "kind": kind,
    }
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    entry = folder / "conversations" / f"{key}.npz"
    arrays = _opened(entry, notify)
    if arrays is None:
        notes: list[str] = []
        arrays = {}
        for side, found in zip(SPLITS, split(source, objective, notes.append)):
            notify(f"tokenising {printable(source.path)} ({side})")
            name = f"{source.field}: {printable(source.path)} ({side})"
            made = _arrays(found, config, template, kind, name, notes.append)
            arrays |= {f"{side}_{what}": array for what, array in made.items()}
        arrays["notes"] = np.array(notes, np.str_)
        try:
            storage.make_folder(entry.parent)
            with storage.create(str(entry)) as file:
                np.savez(file, **arrays)
        except OSError as error:
            notify(f"{entry} cannot be kept: {error.strerror or error}")
    for note in arrays["notes"]:  # each run hears what is done to its data
        notify(str(note))
    return {
        side: Conversations(
            **{what: arrays[f"{side}_{what}"] for what in _ARRAYS},
            num_bytes=0,
            first_token_bytes=0,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            end_of_text=True,
            name=f"{printable(source.path)} ({side})",
            key=f"{key}-{side}",
            pairs=kind != "whole",
        )
        for side in SPLITS
    }


def _opened(entry: Path, notify: Callable[[str], None]) -> dict[str, np.ndarray] | None:
    """The arrays of an entry of the cache, or None if there is none or it is damaged."""
    if not entry.exists():
        return None
    try:
        with np.load(entry) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile):
        notify(f"{entry} is damaged and is made again")
        return None


def _arrays(
    found: Sequence[Example],
    config: DataConfig,
    template: ChatTemplate,
    kind: str,
    name: str,
    notify: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """`Conversations`' own arrays."""
    if not found:
        types = {"tokens": np.int32, "learned": bool, "offsets": np.int64, "values": np.float32}
        return {what: np.zeros(int(what == "offsets"), types[what]) for what in _ARRAYS}
    bos = template.tokenizer.bos_id
    items: list[tuple[float, list[_Document]]] = []
    skipped = silent = 0
    for one in _singly(found) if kind == "labelled" else found:
        try:
            written = []
            for reply in one.replies if kind == "pairs" else one.replies[:1]:
                ids, flags = learned(
                    template, (*one.prompt, *reply), one.tools, given=len(one.prompt)
                )
                if flags and flags[0]:  # something must be read first
                    ids, flags = [bos, *ids], [False, *flags]
                last = len(flags) - flags[::-1].index(True) if any(flags) else 0
                written.append((np.array(ids[:last], np.int32), np.array(flags[:last], bool)))
        except ConfigError as error:
            if config.on_bad_file == "refuse" or not items:
                raise ConfigError(f"{name}: {one.place}: {error}") from None
            skipped += 1
            if skipped <= 20:
                notify(f"skipped {one.place}: {error}")
            continue
        if all(len(ids) for ids, _ in written):
            items.append((one.margin if kind == "pairs" else float(one.label), written))
        else:
            silent += 1
    check(bool(items), f"{name} has no word of an assistant to learn")
    if silent:
        notify(f"{name}: {silent:,} without a word to learn are left out")
    if skipped > 20:
        notify(f"skipped {skipped - 20:,} more, {skipped:,} in all")
    documents = [document for _, written in items for document in written]
    if kind == "labelled":
        documents = _with_mismatched(documents)
    lengths = [len(ids) for ids, _ in documents]
    return {
        "tokens": np.concatenate([ids for ids, _ in documents]),
        "learned": np.concatenate([flags for _, flags in documents]),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "values": np.array([value for value, _ in items], np.float32),
    }


def _singly(found: Sequence[Example]) -> list[Example]:
    """Examples of one reply each: of two the first is desirable and the second is not."""
    return [
        dataclasses.replace(one, replies=(reply,), label=number == 0 if pair else one.label)
        for one in found
        for pair in (len(one.replies) == 2,)
        for number, reply in enumerate(one.replies)
    ]


def _with_mismatched(documents: list[_Document]) -> list[_Document]:
    """After each document the same prompt with the reply of the next one (KTO's, for the KL)."""
    both = []
    for number, (ids, flags) in enumerate(documents):
        others, marks = documents[(number + 1) % len(documents)]
        border, other = flags.argmax(), marks.argmax()
        mixed = [ids[:border], others[other:]], [flags[:border], marks[other:]]
        both += [(ids, flags), tuple(map(np.concatenate, mixed))]
    return both


class ConversationRows(Rows):
    """Rows of whole conversations, packed, or one a row.

    Attributes:
      num_cut: conversations (or pairs) whose end is lost.
      num_dropped: those that are left out, as they are too long.

    Raises:
      ConfigError: some are too long and not to be cut, or none are left.
    """

    width = 1  # documents that stand side by side
    what = "conversations"

    def __init__(self, corpus: Conversations, config: DataConfig):
        super().__init__(corpus, config.block_size)
        size = config.block_size
        whole = np.diff(corpus.offsets) - 1  # places: the first token is only read
        lengths = np.minimum(whole, size)
        before = np.concatenate([[0], np.cumsum(corpus.learned)])
        first = corpus.offsets[:-1]
        left = before[first + lengths + 1] > before[first + 1]  # with something to learn
        long, left = (x.reshape(-1, self.width) for x in (whole > size, left))
        long = long.any(1)
        if config.long_conversations == "refuse":
            check(
                not long.any(),
                f"data.block_size={size} is shorter than {long.sum():,} {self.what} of "
                f"{corpus.name}, of which the longest takes {whole.max():,}: raise it, or set "
                "data.long_conversations='cut' or 'drop'",
            )
        kept = left.all(1) & ~(long & (config.long_conversations == "drop"))
        check(
            bool(kept.any()),
            f"data.block_size={size}: no {self.what} of {corpus.name} fit, the longest takes "
            f"{whole.max():,}: raise it",
        )
        self.num_dropped, self.num_cut = int((~kept).sum()), int((long & kept).sum())
        self.chosen = np.flatnonzero(kept)  # of `width` documents each
        documents = self.chosen[:, None] * self.width + np.arange(self.width)
        self._starts, self._lengths = first[documents], lengths[documents]
        packing = config.packing if self.width == 1 else "none"
        self._items = RowItems(self._lengths.max(1), size, packing)
        self.num_rows = self._items.num_rows
        self.num_targets = int(self._lengths.sum())

    @property
    def note(self) -> str:
        """What happened to those that are too long; "" where none are."""
        told = [(self.num_cut, "cut"), (self.num_dropped, "left out")]
        counts = [f"{count:,} {done}" for count, done in told if count]
        return (
            f"{' and '.join(counts)} of {len(self.chosen) + self.num_dropped:,} {self.what} that "
            f"are longer than data.block_size={self.block_size} (data.long_conversations)"
            if counts
            else ""
        )

    @property
    def padding_fraction(self) -> float:
        """Share of all places in the rows of an epoch that hold padding."""
        return 1 - self.num_targets / (self.num_rows * self.width * self.block_size)

    def pieces(self, rows: np.ndarray, epochs: np.ndarray) -> Pieces:
        """Index into `rows` × `width`, first token and places of each document."""
        del epochs  # every epoch has the same rows
        which, items = self._items.items(rows)
        side = np.arange(self.width)
        which = which[:, None] * self.width + side
        return which.ravel(), self._starts[items].ravel(), self._lengths[items].ravel()

    def fill(
        self,
        batch: dict[str, np.ndarray],
        places: np.ndarray,
        rows: np.ndarray,
        epochs: np.ndarray,
        keys: np.ndarray,
    ) -> None:
        """See `Rows.fill`."""
        del keys
        which, starts, lengths = self.pieces(rows, epochs)
        placed = Placement(which, lengths)
        at = np.repeat(starts, lengths) + placed.within
        fields = {
            "inputs": self.corpus.tokens[at],
            "targets": self.corpus.tokens[at + 1],
            "weights": self.corpus.learned[at + 1],
        }
        side_by_side = {
            name: batch[name].reshape(-1, self.block_size)
            for name in (*fields, "segment_ids", "positions")
        }
        beside = places[:, None] * self.width + np.arange(self.width)
        placed.write(side_by_side, beside.ravel(), fields)


class ReplyPairs(ConversationRows):
    """Two replies to one prompt a row, [2, block_size], and what is said of both: `value`."""

    width = 2
    what = "pairs"

    def __init__(self, corpus: Conversations, config: DataConfig, value: str):
        super().__init__(corpus, config)
        self._value = value

    def fill(
        self,
        batch: dict[str, np.ndarray],
        places: np.ndarray,
        rows: np.ndarray,
        epochs: np.ndarray,
        keys: np.ndarray,
    ) -> None:
        """See `Rows.fill`."""
        super().fill(batch, places, rows, epochs, keys)
        batch[self._value][places] = self.corpus.values[self.chosen[rows]]

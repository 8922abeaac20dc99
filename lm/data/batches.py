"""Tokenised corpora → batches: batch n is a function of the seed, n and the global row number.

The pipeline is a Grain `MapDataset` of row numbers: shuffled anew in every epoch, repeated, mixed,
cut into batches of which each host takes the rows its devices need (`lm.parallel.mesh`), and only
then turned into arrays, a host's part of a batch at a time. Every stage is random access, so a
position in it is one number, resuming costs nothing and is exact, and the number of hosts changes
who computes a row but not which rows there are.

A batch is a dict of arrays [rows of this host, block_size]: `inputs` and `targets` int32, `weights`
float32 (1 for a target, 0 for padding), `segment_ids` int32 (0 for padding, documents from 1) and
`positions` int32 (from 0 in each segment). Objectives for an encoder and a decoder have `source`,
`source_segment_ids` and `source_positions` besides, and prefix has `prefix`; see `transforms`.
Pairs of replies to a prompt have fields [rows, 2, block_size], and `margin` or `label` [rows].
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from lm.config import ConfigError, check
from lm.data import counter_rng
from lm.data.cache import TokenizedCorpus
from lm.data.config import CONVERSATIONAL, DataConfig
from lm.data.packing import Rows
from lm.data.transforms import Batch, Transform, transform
from lm.tokenizers import Tokenizer

_EMPTY_ROW = -1
_ENDLESS = 2**50  # rows; Grain's own endless repeat overflows where a batch is one row


class _Gather:
    """Row numbers of one batch → the batch.

    A number stands for (epoch, corpus, row): epoch * total + rows of earlier corpora + row.
    """

    def __init__(self, all_rows: Sequence[Rows], transform: Transform, seed: int):
        self.all_rows = all_rows
        self.transform = transform
        self.seed = seed
        self.bounds = np.cumsum([0] + [rows.num_rows for rows in all_rows])
        self.total = int(self.bounds[-1])

    def __call__(self, numbers: Sequence[int]) -> Batch:
        batch = self.transform.empty(len(numbers))
        numbers = np.asarray(numbers, np.int64)
        keys = counter_rng.keys(self.seed, numbers)
        epochs, numbers_in_epoch = np.divmod(numbers, self.total)
        corpora = np.searchsorted(self.bounds, numbers_in_epoch, side="right") - 1
        corpora[numbers == _EMPTY_ROW] = -1
        for index, rows in enumerate(self.all_rows):
            places = np.flatnonzero(corpora == index)
            if len(places):
                wanted = numbers_in_epoch[places] - self.bounds[index]
                rows.fill(batch, places, wanted, epochs[places], keys[places])
        self.transform.finish(batch, keys)
        return batch


class _Numbers(grain.MapDataset):
    """Row numbers, of which a subclass says which is where."""

    def __getitem__(self, index):
        return self.slice(index) if isinstance(index, slice) else self._number(index)


class _RowNumbers(_Numbers):
    """The numbers that `_Gather` understands, for `count` rows from `first`, in every epoch.

    Not a Grain source, because those forget which epoch an index lies in.
    """

    def __init__(self, first: int, count: int, total: int):
        super().__init__()
        self.first, self.count, self.total = first, count, total

    def __len__(self) -> int:
        return self.count

    def _number(self, index: int) -> int:
        epoch, row = divmod(index, self.count)
        return epoch * self.total + self.first + row


class _Limit(_Numbers):
    """The first `count` elements, then empty rows up to a multiple of the batch size."""

    def __init__(self, parent: grain.MapDataset, count: int, batch_size: int):
        super().__init__(parent)
        self.count = count
        self.length = math.ceil(count / batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def _number(self, index: int) -> int:
        return self._parent[index] if index < self.count else _EMPTY_ROW


class _Chosen(_Numbers):
    """Of every `batch_size` elements, those at `rows`."""

    def __init__(self, parent: grain.MapDataset, rows: np.ndarray, batch_size: int):
        super().__init__(parent)
        self.rows, self.batch_size = rows.tolist(), batch_size

    def __len__(self) -> int:
        return len(self._parent) // self.batch_size * len(self.rows)

    def _number(self, index: int) -> int:
        batch, row = divmod(index, len(self.rows))
        return self._parent[batch * self.batch_size + self.rows[row]]


# What a state that does not say otherwise was taken with.
_CAUSAL = {"objective": "causal", "corruption": None, "source_length": 0, "long_pairs": "refuse"}
_SHUFFLE, _OFFSETS, _HIDING = 0, 1, 2


def _seed(seed: int, index: int, purpose: int) -> int:
    """A 32-bit seed for one use in corpus `index`; nearby run seeds give unrelated ones.

    Grain adds the epoch to it, so seeds that differ by little would repeat each other's shuffles.
    """
    return int(np.random.SeedSequence([seed % 2**64, index, purpose]).generate_state(1)[0])


class _Batches:
    """What training and evaluation batches have in common.

    Attributes:
      rows: those of each corpus.
      batch_size: rows of a batch, of all hosts together.
      local_rows: which of them this host reads, int64.
      shapes: field → shape of its array in this host's part of a batch.
      block_size: length of `inputs` and `targets`.
      source_length: length of `source`; 0 for objectives without an encoder's rows.
      max_targets_per_row: the most positions of a row that can have a weight.
      single_segment: no row ever holds two segments, so attention needs no segment mask.
      num_dropped: pairs or conversations left out because they are too long.
      notes: what of the corpora the rows do not hold, one line each.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: Sequence[TokenizedCorpus],
        objective: str,
        tokenizer: Tokenizer | None,
        rows: Sequence[int] | None,
        seed: int | None,  # None: for evaluation
    ):
        chosen = np.arange(config.batch_size) if rows is None else np.asarray(rows, np.int64)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= config.batch_size:
            raise ValueError(f"rows={rows} must be rows of a batch of {config.batch_size}")
        self.batch_size, self.local_rows = config.batch_size, chosen
        self._transform = transform(objective, config, tokenizer)
        training = seed is not None
        self.rows = [
            self._transform.rows(c, _seed(seed, i, _OFFSETS) if training else 0, training)
            for i, c in enumerate(corpora)
        ]
        self._gather = _Gather(self.rows, self._transform, _seed(seed or 0, int(training), _HIDING))
        self.shapes = {name: (len(chosen), *s) for name, s in self._transform.shapes.items()}
        self.block_size = self._transform.block_size
        self.source_length = self._transform.source_length
        self.max_targets_per_row = self._transform.max_targets_per_row
        self.single_segment = self._transform.single_segment
        self.num_dropped = sum(getattr(rows, "num_dropped", 0) for rows in self.rows)
        noted = [(corpus.name, rows.note) for corpus, rows in zip(corpora, self.rows)]
        self.notes = [f"{name}: {note}" for name, note in noted if note]
        for note in self.notes:
            logging.warning("%s", note)


class BatchIterator(_Batches, Iterator[Batch]):
    """Training batches of this host from one corpus or several, mixed by `config.weights`.

    It has no end, or lasts `config.epochs` epochs, of which the last batch is filled up with rows
    of padding. Its position can be saved and set.

    Args:
      corpora: in the order of `config.paths`.
      seed: decides shuffles, window offsets and what is hidden.
      objective: what the batches are for, one of `OBJECTIVES`.
      tokenizer: the corpora's; objectives other than causal need it.
      rows: those of the `config.batch_size` rows of each batch that this host reads, rising; all
        by default.

    Attributes (and those of `_Batches`):
      batches_per_epoch: batches in which every row comes once (rounded up); with `weights`, the
        number that draws as many rows as there are.
      num_batches: batches until the end, or None where `epochs` is.
      padding_fraction: share of places that hold padding.

    Raises:
      ConfigError: a corpus is shorter than one block, or not what the objective needs.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: TokenizedCorpus | Sequence[TokenizedCorpus],
        *,
        seed: int,
        objective: str = "causal",
        tokenizer: Tokenizer | None = None,
        rows: Sequence[int] | None = None,
    ):
        self.corpora = (corpora,) if isinstance(corpora, TokenizedCorpus) else tuple(corpora)
        check(len(self.corpora) > 0, "data.path names no corpus to train on")
        super().__init__(config, self.corpora, objective, tokenizer, rows, seed)
        self._config = config
        self._seed = seed
        self._objective = objective
        gather, chosen = self._gather, self.local_rows
        self._rows_per_epoch = gather.total
        self.batches_per_epoch = math.ceil(gather.total / config.batch_size)
        self.num_batches = None
        padding = sum(rows.padding_fraction * rows.num_rows for rows in self.rows)
        self.padding_fraction = padding / gather.total

        if config.weights and len(self.rows) > 1:
            parts = [
                _RowNumbers(int(first), rows.num_rows, gather.total)
                for first, rows in zip(gather.bounds, self.rows)
            ]
        else:
            parts = [_RowNumbers(0, gather.total, gather.total)]
        if config.shuffle:
            parts = [part.shuffle(_seed(seed, i, _SHUFFLE)) for i, part in enumerate(parts)]
        parts = [part.repeat(_ENDLESS // len(part)) for part in parts]
        numbers = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, config.weights)
        if config.epochs is not None:
            numbers = _Limit(numbers, config.epochs * gather.total, config.batch_size)
            self.num_batches = len(numbers) // config.batch_size
        if len(chosen) < config.batch_size:
            numbers = _Chosen(numbers, chosen, config.batch_size)
        self._dataset = numbers.batch(len(chosen), batch_fn=gather)
        threads = config.num_threads if config.prefetch else 0
        options = grain.ReadOptions(
            num_threads=threads,
            prefetch_buffer_size=max(config.prefetch, threads) if threads else 0,
        )
        self._iterator = iter(self._dataset.to_iter_dataset(options))
        self._next = 0

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next += 1
        return batch

    def batch(self, n: int) -> Batch:
        """This host's rows of batch `n`, without moving the iterator."""
        return self._dataset[n]

    def position(self, n: int | None = None) -> tuple[int, int]:
        """(epoch, rows into it) where batch `n` starts; by default, the next one.

        With `weights`, an epoch is as many rows as the corpora have together.
        """
        n = self._next if n is None else n
        return divmod(n * self._config.batch_size, self._rows_per_epoch)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator is, and in what; ready for JSON. Any number of hosts may resume."""
        return {
            "batch": self._next,
            "grain": self._iterator.get_state(),
            "data": self._identity(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken: the next batches are bitwise the same.

        Raises:
          ConfigError: the state belongs to other data or other batch settings.
        """
        saved, here = _CAUSAL | state["data"], _CAUSAL | self._identity()
        for name, value in here.items():
            if saved.get(name) == value:
                continue
            remedy = "restore it, or start in a new directory"
            if name == "corpus":
                raise ConfigError(
                    "data.path: the text or the tokenizer is not the one the checkpoint was "
                    f"trained on; {remedy}"
                )
            field = {"seed": "seed", "objective": "objective.name"}.get(name, f"data.{name}")
            raise ConfigError(
                f"{field}={value!r} but the checkpoint was trained with {saved.get(name)!r}; "
                f"{remedy}"
            )
        self._iterator.set_state(state["grain"])
        self._next = state["batch"]

    def close(self) -> None:
        """Stops the threads that prepare batches."""
        self._iterator.close()

    def _identity(self) -> dict[str, Any]:
        """What the sequence of batches depends on."""
        keys = "\n".join(corpus.key for corpus in self.corpora)
        config = dataclasses.asdict(self._config)
        names = ("batch_size", "block_size", "packing", "end_of_text", "shuffle", "random_offset")
        hidden = {}
        if self._objective != "causal":
            hidden["objective"] = self._objective
        if self._objective in ("masked", "span_corruption"):
            hidden["corruption"] = config["corruption"]
        if self._objective == "seq2seq":
            hidden |= {name: config[name] for name in ("source_length", "long_pairs")}
        if self._objective in CONVERSATIONAL:
            hidden["long_conversations"] = config["long_conversations"]
        return {
            "corpus": hashlib.blake2b(keys.encode(), digest_size=16).hexdigest(),
            "weights": list(self._config.weights),
            "seed": self._seed,
            **{name: config[name] for name in names},
            **hidden,
        }


class EvaluationBatches(_Batches):
    """Every row of the corpora (the validation split) once, in order; any number of times.

    The last batch is filled up with rows of padding, so all batches have one shape. Rows of all
    hosts together hold every target exactly once. What is hidden is the same every time.
    Arguments are as for `BatchIterator`.

    Attributes (and those of `_Batches`):
      num_bytes: UTF-8 bytes of the text that the targets stand for. Bits per byte is the summed
        loss in nats / ln 2 / num_bytes. End-of-text tokens are predicted too, and cost bits, but
        stand for no bytes; of a tokenizer that loses some of a text, what is left of it counts.
        None where the targets are no code for a text: for masked, span corruption and prefix.
      num_targets: targets in all batches of all hosts; None where `num_bytes` is.

    Raises:
      ConfigError: there is nothing to evaluate on.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: TokenizedCorpus | Sequence[TokenizedCorpus],
        *,
        objective: str = "causal",
        tokenizer: Tokenizer | None = None,
        rows: Sequence[int] | None = None,
    ):
        corpora = (corpora,) if isinstance(corpora, TokenizedCorpus) else tuple(corpora)
        check(len(corpora) > 0, "data.validation_fraction=0.0 leaves nothing to evaluate on")
        super().__init__(config, corpora, objective, tokenizer, rows, None)
        self.num_bytes = self._transform.num_bytes(list(corpora), self.rows)
        self.num_targets = None
        if self.num_bytes is not None:
            self.num_targets = sum(rows.num_targets for rows in self.rows)

    def __len__(self) -> int:
        return math.ceil(self._gather.total / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for n in range(len(self)):
            numbers = self.local_rows + n * self.batch_size
            yield self._gather(np.where(numbers < self._gather.total, numbers, _EMPTY_ROW))


train_batches = BatchIterator
evaluation_batches = EvaluationBatches

"""Rows of a fixed length out of documents of any length.

A row is a list of *pieces*, each a stretch of the corpus that lies within one document. `Rows`
lists the pieces of any row without looking at the rows before it, which is what makes batch *n* a
function of *n* and resuming free; Grain's packing transforms (`ConcatThenSplitIterDataset`,
`BestFitPackIterDataset`) pack as they read and would have to read again from the start.

Positions in the corpus are positions of *targets*: position p has the target tokens[p], and its
input is the token before, or begin-of-text where a document starts. Objectives that see both sides
of a token count positions with a begin-of-text before every document.
"""

from __future__ import annotations

import abc
import functools
from typing import Any

import numpy as np

from lm.config import check
from lm.data.cache import TokenizedCorpus
from lm.data.config import DataConfig

Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]


class Rows(abc.ABC):
    """The rows that one corpus gives in an epoch.

    Inputs are the tokens before the targets, or, where not `shifted`, the targets themselves: a
    document then begins with a begin-of-text that has a place of its own.

    Attributes:
      num_rows: rows in an epoch, the same in every epoch.
      num_targets: tokens that are a target in an epoch (where `shifted`: that are predicted).
    """

    num_rows: int
    num_targets: int
    note = ""  # what of the corpus they do not hold, in words

    def __init__(
        self, corpus: TokenizedCorpus, block_size: int, shifted: bool = True, separate: bool = True
    ):
        self.corpus = corpus
        self.block_size = block_size
        self.shifted = shifted
        self.separate = separate  # each document is a segment; else all are one stream
        self.offsets = corpus.offsets
        if separate and not shifted:
            self.offsets = self.offsets + np.arange(len(corpus.offsets))
        self.num_tokens = int(self.offsets[-1])

    @property
    def padding_fraction(self) -> float:
        """Share of all places in the rows of an epoch that hold padding."""
        return 1 - self.num_targets / (self.num_rows * self.block_size)

    @abc.abstractmethod
    def pieces(self, rows: np.ndarray, epochs: np.ndarray) -> Pieces:
        """The pieces of `rows` [n], each as of the epoch in `epochs` [n].

        Three arrays with an entry per piece, in order: index into `rows`, first position in the
        corpus, length.
        """

    def fill(
        self,
        batch: dict[str, np.ndarray],
        places: np.ndarray,
        rows: np.ndarray,
        epochs: np.ndarray,
        keys: np.ndarray,
    ) -> None:
        """Writes the given rows into the rows `places` of `batch`, which must be zero there.

        `keys` [n] are for rows that draw random numbers (see `counter_rng`); these do not.
        """
        del keys
        which, starts, lengths = self.pieces(rows, epochs)
        if not lengths.sum():
            return
        placed = Placement(which, lengths)
        if self.shifted:
            inputs, targets = self._shifted(starts, placed)
            fields = {"inputs": inputs, "targets": targets, "weights": 1}
        else:
            fields = {"inputs": self._unshifted(starts, placed)}
        placed.write(batch, places, fields)

    def _shifted(self, starts: np.ndarray, placed: Placement) -> tuple[np.ndarray, np.ndarray]:
        corpus = self.corpus
        target_at = np.repeat(starts, placed.lengths) + placed.within
        targets = corpus.tokens[target_at].astype(np.int32)
        inputs = np.empty_like(targets)
        inputs[1:] = targets[:-1]
        # The input of a piece's first place is not the target to its left: look it up.
        before = corpus.tokens[np.maximum(starts - 1, 0)]
        inputs[placed.before] = np.where(self._starts_document(starts), corpus.bos_id, before)
        return inputs, targets

    def _unshifted(self, starts: np.ndarray, placed: Placement) -> np.ndarray:
        begins = self._starts_document(starts)
        if self.separate:  # leave out the begin-of-texts before the piece, its own included
            starts = starts - np.searchsorted(self.offsets, starts, side="right")
        token_at = np.repeat(starts, placed.lengths) + placed.within
        tokens = self.corpus.tokens[np.maximum(token_at, 0)].astype(np.int32)
        tokens[placed.before[begins]] = self.corpus.bos_id
        return tokens

    def _starts_document(self, starts: np.ndarray) -> np.ndarray:
        if not self.separate:
            return np.zeros(len(starts), bool)
        return self.offsets[np.searchsorted(self.offsets, starts)] == starts


class Placement:
    """Where pieces and their tokens lie when the pieces of each row stand one after the other.

    Attributes:
      which: [pieces] the row of each, ascending.
      lengths: [pieces] in tokens.
      columns: [pieces] where each begins in its row.
      segments: [pieces] its number in its row, from 1.
      before: [pieces] tokens in all pieces before it.
      within: [tokens] each one's place in its piece.
    """

    def __init__(self, which: np.ndarray, lengths: np.ndarray):
        self.which, self.lengths = which, lengths
        self.before = np.cumsum(lengths) - lengths
        first = np.ones(len(which), bool)
        first[1:] = which[1:] != which[:-1]
        first_piece = np.flatnonzero(first)[np.cumsum(first) - 1]
        self.columns = self.before - self.before[first_piece]
        self.segments = np.arange(len(which)) - first_piece + 1
        self.within = np.arange(int(lengths.sum())) - np.repeat(self.before, lengths)

    def write(
        self, batch: dict[str, np.ndarray], places: np.ndarray, fields: dict, side: str = ""
    ) -> None:
        """Writes fields of a batch, and its segments and positions, for all tokens.

        Args:
          batch: of arrays [rows, length].
          places: where in it the rows are.
          fields: name → values, [tokens] or one for all.
          side: what the names of an encoder's segments and positions begin with.
        """
        fields = fields | {
            f"{side}segment_ids": np.repeat(self.segments, self.lengths),
            f"{side}positions": self.within,
        }
        num_rows, length = batch[f"{side}positions"].shape
        at: Any = slice(None)
        if len(self.within) < num_rows * length:  # else there is no padding
            row_starts = places[self.which] * length
            at = np.repeat(row_starts + self.columns, self.lengths) + self.within
        for name, values in fields.items():
            batch[name].reshape(-1)[at] = values


class Concatenated(Rows):
    """The corpus as one stream of documents, cut into windows of `block_size`.

    With end-of-text between documents each is a segment of its own. Without, the corpus is one
    stream in which every token but the first is predicted from those before it in its window.

    With a `seed`, windows start elsewhere in each epoch, so that a token is not always predicted
    from the same distance: the first window of an epoch is cut short, by an amount that changes.
    No token is lost, no window is empty, and there are at most two windows more than without.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        block_size: int,
        seed: int | None = None,
        shifted: bool = True,
    ):
        super().__init__(corpus, block_size, shifted, separate=corpus.end_of_text)
        self.seed = seed
        self.first_target = 1 if shifted and not self.separate else 0
        self.num_targets = max(self.num_tokens - self.first_target, 0)
        whole, rest = divmod(self.num_targets, block_size)
        # The first window may have any length in this range without changing how many there are.
        # Of the two such ranges, take the longer: it has at least half of all lengths.
        self.first_lengths = (block_size, block_size)
        self.num_rows = whole + (rest > 0)
        if seed is not None and whole and block_size >= 4:
            if rest <= block_size // 2:
                self.first_lengths = (max(rest, 1), block_size - 1)
                self.num_rows = whole + 1
            else:
                self.first_lengths = (1, rest - 1)
                self.num_rows = whole + 2

    @functools.lru_cache(maxsize=8)  # noqa: B019 (rows live as long as the run)
    def first_length(self, epoch: int) -> int:
        """Places used in the first window of an epoch."""
        low, high = self.first_lengths
        if low == high:
            return high
        return int(np.random.default_rng([self.seed, epoch]).integers(low, high, endpoint=True))

    def pieces(self, rows: np.ndarray, epochs: np.ndarray) -> Pieces:
        """One piece per document in the window; see `Rows.pieces`."""
        first = np.array([self.first_length(int(epoch)) for epoch in epochs], np.int64)
        starts = np.where(rows == 0, 0, first + (rows - 1) * self.block_size)
        lengths = np.where(rows == 0, first, self.block_size)
        lengths = np.minimum(lengths, self.num_targets - starts)
        starts = starts + self.first_target
        if not self.separate:
            return np.arange(len(rows)), starts, lengths
        # Cut every window where a document starts inside it.
        offsets = self.offsets
        low = np.searchsorted(offsets, starts, side="right")
        high = np.searchsorted(offsets, starts + lengths, side="left")
        counts = high - low + 1
        which, within = spread(counts)
        begin = np.cumsum(counts) - counts
        cut = within + np.repeat(low, counts) - 1
        piece_starts = offsets[cut]
        piece_starts[begin] = starts
        piece_ends = np.empty_like(piece_starts)
        piece_ends[:-1] = piece_starts[1:]
        piece_ends[begin + counts - 1] = starts + lengths
        return which, piece_starts, piece_ends - piece_starts


class RowItems:
    """Which items go into which row, looked up by row: "best_fit", or "none" for one item a row.

    Attributes:
      num_rows: rows in all.
    """

    def __init__(self, lengths: np.ndarray, size: int, packing: str):
        rows = np.arange(len(lengths))
        if packing == "best_fit":
            rows = best_fit_decreasing(lengths, size)
        self._order = np.argsort(rows, kind="stable")
        self.num_rows = int(rows.max()) + 1 if len(rows) else 0
        self._bounds = np.searchsorted(rows[self._order], np.arange(self.num_rows + 1))

    def items(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items of `rows`, in order: index into `rows` and number of the item."""
        low = self._bounds[rows]
        counts = self._bounds[rows + 1] - low
        which, within = spread(counts)
        return which, self._order[within + np.repeat(low, counts)]


class Packed(Rows):
    """Rows that are listed in advance: best-fit packing, or one document a row.

    Documents longer than `block_size` are first cut into pieces of that length. Which go together
    depends on the corpus and `block_size` only, so it is found once and serves every epoch.
    """

    def __init__(
        self, corpus: TokenizedCorpus, block_size: int, packing: str, shifted: bool = True
    ):
        super().__init__(corpus, block_size, shifted)
        self.num_targets = self.num_tokens
        self._starts, self._lengths = cut_documents(self.offsets[:-1], self.offsets[1:], block_size)
        self._items = RowItems(self._lengths, block_size, packing)
        self.num_rows = self._items.num_rows

    def pieces(self, rows: np.ndarray, epochs: np.ndarray) -> Pieces:
        """See `Rows.pieces`."""
        del epochs  # every epoch has the same rows
        which, piece = self._items.items(rows)
        return which, self._starts[piece], self._lengths[piece]


def cut_documents(starts: np.ndarray, ends: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces of all documents: whole blocks, then what is left."""
    counts = -(-(ends - starts) // size)
    which, number = spread(counts)
    pieces = starts[which] + number * size
    return pieces, np.minimum(ends[which] - pieces, size)


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of sum(counts) things in order, whose it is, and which of its owner's, from 0."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def best_fit_decreasing(lengths: np.ndarray, size: int) -> np.ndarray:
    """Packs items into rows: longest first, each where it leaves the least space.

    Best-fit decreasing never needs more than 11/9 of the fewest rows possible, plus one (Johnson
    et al., 1974). Rows with equal space left are interchangeable, so they are kept in one list per
    amount, and all items of one length are placed at once: the cost is a few array operations per
    pair of length and space, not per item.

    `lengths` [n] are from 1 to `size`, that of a row. Returns the row of each item, [n]; rows are
    numbered by the first item in them.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of_item = np.empty(len(lengths), np.int64)
    rows_with_space: dict[int, list[np.ndarray]] = {}
    spaces = 0  # bit s is set when some row has s places left
    num_rows = 0
    distinct, counts = np.unique(lengths, return_counts=True)
    end = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist()):
        items = order[end : end + count]
        end += count
        while len(items):
            large_enough = spaces >> length
            if large_enough:
                space = length + (large_enough & -large_enough).bit_length() - 1
                rows = np.concatenate(rows_with_space.pop(space))
                spaces ^= 1 << space
            else:  # open as many rows as all the items need
                space = size
                needed = -(-len(items) // (space // length))
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            # An item leaves its row with the least space, so the next of this length follows it
            # there as long as it fits.
            each = space // length
            taken = min(len(items), len(rows) * each)
            placed, items = items[:taken], items[taken:]
            full, partial = divmod(taken, each)
            row_of_item[placed] = np.repeat(rows[: full + (partial > 0)], each)[:taken]
            remaining = (
                (rows[:full], space - each * length),
                (rows[full : full + 1] if partial else rows[:0], space - partial * length),
                (rows[full + (partial > 0) :], space),
            )
            for group, left in remaining:
                if len(group) and left:
                    rows_with_space.setdefault(left, []).append(group)
                    spaces |= 1 << left
    first = np.full(num_rows, len(lengths))
    np.minimum.at(first, row_of_item, np.arange(len(lengths)))
    rank = np.empty(num_rows, np.int64)
    rank[np.argsort(first)] = np.arange(num_rows)
    return rank[row_of_item]


def rows_of(
    corpus: TokenizedCorpus,
    config: DataConfig,
    seed: int,
    *,
    training: bool = True,
    shifted: bool = True,
) -> Rows:
    """The rows of `corpus` under `config.packing`; `shifted` as in `Rows`.

    Raises:
      ConfigError: the corpus is empty or, for training, shorter than one block.
    """
    check(corpus.num_tokens > 0, f"data.path: {corpus.name} holds no tokens")
    if config.packing == "concat":
        offset_seed = seed if training and config.random_offset else None
        rows = Concatenated(corpus, config.block_size, offset_seed, shifted)
    else:
        rows = Packed(corpus, config.block_size, config.packing, shifted)
    if training and config.packing == "concat":
        check(
            rows.num_targets >= config.block_size,
            f"data.block_size={config.block_size} is longer than the corpus {corpus.name}, which "
            f"has {rows.num_targets} tokens to predict; give more text or a smaller block",
        )
    check(rows.num_rows > 0, f"data.path: {corpus.name} is too short to predict anything")
    return rows

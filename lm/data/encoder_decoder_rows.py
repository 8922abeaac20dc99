"""Rows for an encoder and a decoder: pairs of documents, and documents with hidden spans.

A row holds whole items side by side. Item number k of a row is segment k on both sides, so a
decoder's cross-attention finds its own source by the segment. Both sides end with end-of-text; the
decoder's inputs are its targets moved one to the right, after begin-of-text.
"""

from __future__ import annotations

import abc

import numpy as np

from lm.config import check
from lm.data import counter_rng
from lm.data.cache import TokenizedCorpus
from lm.data.config import CorruptionConfig, DataConfig
from lm.data.packing import Pieces, Placement, RowItems, Rows, cut_documents, spread

_NOISE, _KEPT, _ROTATION = 1, 2, 3  # purposes of random numbers


class EncoderDecoderRows(Rows):
    """Rows of items with a source and a target length each.

    Items are packed by the larger of the shares that their two sides take of a row, so neither
    side of a row can overflow.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        source_lengths: np.ndarray,
        target_lengths: np.ndarray,
        source_length: int,
        target_length: int,
        packing: str,
    ):
        super().__init__(corpus, target_length)
        self.source_length, self.first_id = source_length, corpus.bos_id
        self._source_lengths, self._target_lengths = source_lengths, target_lengths
        size = max(source_length, target_length)
        shares = np.maximum(
            -(-source_lengths * size // source_length), -(-target_lengths * size // target_length)
        )
        self._items = RowItems(shares, size, packing)
        self.num_rows = self._items.num_rows
        self.num_targets = int(target_lengths.sum())
        self._used = int(source_lengths.sum()) + self.num_targets

    @property
    def padding_fraction(self) -> float:
        """Share of all places, on both sides, that hold padding."""
        return 1 - self._used / (self.num_rows * (self.source_length + self.block_size))

    def pieces(self, rows: np.ndarray, epochs: np.ndarray) -> Pieces:
        """Index into `rows`, number and target length of each item."""
        del epochs  # every epoch has the same rows
        which, items = self._items.items(rows)
        return which, items, self._target_lengths[items]

    def fill(
        self,
        batch: dict[str, np.ndarray],
        places: np.ndarray,
        rows: np.ndarray,
        epochs: np.ndarray,
        keys: np.ndarray,
    ) -> None:
        """See `Rows.fill`."""
        which, items, _ = self.pieces(rows, epochs)
        if not len(items):
            return
        source = Placement(which, self._source_lengths[items])
        target = Placement(which, self._target_lengths[items])
        source_tokens, target_tokens = self._sides(items, source, target, keys)
        inputs = np.empty_like(target_tokens)
        inputs[1:] = target_tokens[:-1]
        inputs[target.before] = self.first_id
        source.write(batch, places, {"source": source_tokens}, side="source_")
        target.write(batch, places, {"inputs": inputs, "targets": target_tokens, "weights": 1})

    @abc.abstractmethod
    def _sides(
        self,
        items: np.ndarray,
        source: Placement,
        target: Placement,
        keys: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All tokens of the items' sources, and of their targets, as they are placed."""


class Pairs(EncoderDecoderRows):
    """Pairs of documents: even ones are sources, each followed by its target.

    Attributes:
      num_dropped: pairs left out because a side does not fit into a row.

    Raises:
      ConfigError: the corpus does not hold pairs, or some are too long and not to be dropped, or
        all are.
    """

    def __init__(self, corpus: TokenizedCorpus, config: DataConfig, source_length: int):
        target_length = config.block_size
        check(
            corpus.pairs,
            f"data.path: {corpus.name} holds documents, and objective 'seq2seq' needs pairs: use "
            "'translation', or files of pairs with data.text_field=('source', 'target')",
        )
        check(
            corpus.end_of_text,
            "data.end_of_text=False: objective 'seq2seq' must learn where targets end; set it True",
        )
        sources, targets = np.diff(corpus.offsets).reshape(-1, 2).T
        first, *learnt = config.target_start or (corpus.bos_id,)
        self._around = (config.source_before, config.source_after), (learnt, ())
        sources, targets = (
            lengths + len(before) + len(after)
            for lengths, (before, after) in zip((sources, targets), self._around, strict=True)
        )
        fits = (sources <= source_length) & (targets <= target_length)
        if config.long_pairs == "refuse" and not fits.all():
            first = int(np.flatnonzero(~fits)[0])
            long_source = sources[first] > source_length
            side, length = ("source", sources) if long_source else ("target", targets)
            field = "source_length" if long_source else "block_size"
            check(
                False,
                f"data.{field}={source_length if long_source else target_length} is shorter than "
                f"the {side} of pair {first} of {corpus.name}, which has {length[first]} tokens; "
                f"{(~fits).sum()} pairs do not fit, the longest source has {sources.max()} tokens "
                f"and the longest target {targets.max()}: raise data.source_length and "
                "data.block_size, or set data.long_pairs='drop'",
            )
        self._first = 2 * np.flatnonzero(fits)
        self.num_dropped = int((~fits).sum())
        super().__init__(
            corpus, sources[fits], targets[fits], source_length, target_length, config.packing
        )
        self.first_id = first
        check(
            self.num_rows > 0,
            f"data.path: {corpus.name} has no pair that fits into data.source_length="
            f"{source_length} and data.block_size={target_length}",
        )

    @property
    def note(self) -> str:
        """What is left out; "" for nothing."""
        return (
            f"{self.num_dropped:,} pairs are left out: longer than data.source_length="
            f"{self.source_length} or data.block_size={self.block_size}"
            if self.num_dropped
            else ""
        )

    def target_tokens(self) -> np.ndarray:
        """Every target token of an epoch, end-of-texts included."""
        starts = self.corpus.offsets[self._first + 1]
        placed = Placement(np.arange(len(starts)), self._target_lengths)
        return self._tokens(starts, placed, *self._around[1])

    def _sides(self, items, source, target, keys):
        first = self._first[items]
        return (
            self._tokens(self.corpus.offsets[first], source, *self._around[0]),
            self._tokens(self.corpus.offsets[first + 1], target, *self._around[1]),
        )

    def _tokens(self, starts, placed: Placement, before=(), after=()) -> np.ndarray:
        """Documents' tokens with these ids before and after each."""
        within = placed.within - len(before)
        last = np.repeat(placed.lengths - len(before) - len(after) - 1, placed.lengths)
        at = np.repeat(starts, placed.lengths) + np.clip(within, 0, last)
        tokens = self.corpus.tokens[at].astype(np.int32)
        for ids, outside in ((before, within < 0), (after, within > last)):
            if ids:  # they take turns, document by document
                tokens[outside] = np.tile(np.array(ids, np.int32), len(starts))
        return tokens


class HiddenSpans(EncoderDecoderRows):
    """Documents from which spans are hidden (Raffel et al. 2020, §3.1.4).

    A document is cut into pieces of at most `raw_length` tokens. In each, spans are replaced by
    sentinels 0, 1, ...; the target is each sentinel with the tokens it stands for. Lengths depend
    on the number of tokens alone, and which are hidden is drawn anew for every row of every epoch:
    the hidden tokens and those kept are each divided at random into as many parts as there are
    spans, and the parts take turns.

    Attributes:
      raw_length: tokens of the longest piece, chosen as the longest whose source fits into a row.
    """

    def __init__(self, corpus: TokenizedCorpus, config: DataConfig, sentinel_ids: np.ndarray):
        size, corruption = config.block_size, config.corruption
        self.raw_length = raw_length(size, corruption)
        self._corruption = corruption
        self._sentinels = sentinel_ids
        # Documents' own end-of-texts are left out: both sides of every piece get one.
        ends = corpus.offsets[1:] - corpus.end_of_text
        self._starts, self._lengths = cut_documents(corpus.offsets[:-1], ends, self.raw_length)
        sources, targets = both_lengths(self._lengths, corruption)
        length = target_length(size, corruption)
        super().__init__(corpus, sources, targets, size, length, config.packing)
        check(self.num_rows > 0, f"data.path: {corpus.name} holds no tokens")

    def _sides(self, items, source, target, keys):
        lengths = self._lengths[items]
        raw = Placement(source.which, lengths)
        tokens = self.corpus.tokens[np.repeat(self._starts[items], lengths) + raw.within]
        hidden, spans = noise_spans(lengths, self._corruption)
        # A token's counter is its place in the row, so that pieces of a row differ.
        counters = np.repeat(raw.columns, lengths) + raw.within
        row_keys = np.repeat(keys[raw.which], lengths)
        kept, gone = _partitions(lengths, hidden, spans, row_keys, counters)
        # Part by part, what is kept, a mark, and what it stands for. The published order ends with
        # a hidden span, so that a piece with one would always lose its end: some of the first part
        # goes behind the last mark, end-of-text.
        first = np.cumsum(spans) - spans
        draw = counter_rng.uniform(keys[raw.which], raw.columns, _ROTATION)
        rest = (draw * (kept[first] + 1)).astype(np.int64)
        kept[first] -= rest
        kept = np.insert(kept, first + spans, rest)
        gone = np.insert(gone, first + spans, 0)
        _, number = spread(spans + 1)
        is_last = number == np.repeat(spans, spans + 1)
        marks = np.where(is_last, self.corpus.eos_id, self._sentinels[number * ~is_last])

        is_hidden = np.repeat(np.tile([False, True], len(gone)), np.stack([kept, gone], 1).ravel())
        before = np.arange(len(marks))  # marks before each part
        source_tokens = np.empty(len(source.within), np.int32)
        source_tokens[np.arange(kept.sum()) + np.repeat(before, kept)] = tokens[~is_hidden]
        source_tokens[np.cumsum(kept) + before] = marks
        target_tokens = np.empty(len(target.within), np.int32)
        target_tokens[np.arange(gone.sum()) + np.repeat(before + 1, gone)] = tokens[is_hidden]
        target_tokens[np.cumsum(gone) - gone + before] = marks
        return source_tokens, target_tokens


def _partitions(
    lengths: np.ndarray,
    hidden: np.ndarray,
    spans: np.ndarray,
    row_keys: np.ndarray,
    counters: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Random lengths of the kept and of the hidden part of every span, [all spans] each.

    Each is a partition into non-empty parts, all equally likely; what is kept of a piece of one
    token is empty.
    """
    results = []
    piece, within = spread(lengths)
    for sizes, purpose in ((lengths - hidden, _KEPT), (hidden, _NOISE)):
        chosen = within < np.repeat(sizes, lengths)  # one number per token to be divided
        owner, place = piece[chosen], within[chosen]
        draw = counter_rng.bits(row_keys[chosen], counters[chosen], purpose)
        # Of a piece's tokens the first begins a part, and so do those of the smallest numbers.
        draw = np.where(place == 0, np.uint64(0), (draw >> np.uint64(24)) + np.uint64(1))
        order = np.argsort(owner.astype(np.uint64) << np.uint64(41) | draw)
        begins = np.empty(len(owner), bool)
        begins[order] = place < np.repeat(spans, sizes)
        part = np.cumsum(begins) - 1
        # A piece of one token keeps nothing: its only part is empty, and counts all the same.
        missing = np.cumsum(spans * (sizes == 0))
        part = part + missing[owner]
        results.append(np.bincount(part, minlength=int(spans.sum())))
    return results[0], results[1]


def noise_spans(lengths: np.ndarray, config: CorruptionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Hidden tokens and spans in pieces of `lengths` (at least 1), as in T5's own code.

    At least one token is hidden, and one is kept where there are two.
    """
    hidden = np.rint(lengths * config.rate).astype(np.int64)
    hidden = np.clip(hidden, 1, np.maximum(lengths - 1, 1))
    spans = np.rint(hidden / config.span_length).astype(np.int64)
    kept = np.maximum(lengths - hidden, 1)
    return hidden, np.clip(spans, 1, np.minimum(hidden, kept))


def both_lengths(lengths: np.ndarray, config: CorruptionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in the sources and targets of pieces of `lengths`, end-of-text included."""
    hidden, spans = noise_spans(lengths, config)
    return lengths - hidden + spans + 1, hidden + spans + 1


def raw_length(source_length: int, config: CorruptionConfig) -> int:
    """The most tokens whose source, with sentinels and end-of-text, fits into `source_length`.

    For 512 at the published settings it is 568.

    Raises:
      ConfigError: not even two tokens fit.
    """
    lengths = np.arange(1, int(2 * source_length / (1 - config.rate)) + 4)
    sources, _ = both_lengths(lengths, config)
    fitting = int(np.searchsorted(sources > source_length, True))
    check(
        fitting >= 2,
        f"data.block_size={source_length} must be at least 3 for objective 'span_corruption'",
    )
    return fitting


def target_length(source_length: int, config: CorruptionConfig) -> int:
    """Places that the decoder needs for what is hidden in a row of `source_length`.

    That of one piece that fills the row, rounded up to a multiple of 8, which leaves room for the
    end-of-texts and sentinels of a few more pieces.
    """
    _, targets = both_lengths(np.array([raw_length(source_length, config)]), config)
    return -(-int(targets[0]) // 8) * 8

"""What each objective makes of a corpus: the rows, the fields of a batch, and what is hidden.

    causal            every token from those before it
    prefix            the same, but the beginning of each segment is given and seen by all of it
    masked            some tokens from all others (Devlin et al. 2019)
    span_corruption   hidden spans from what is left (Raffel et al. 2020)
    seq2seq           the target of a pair from its source
    sft, distillation  what the assistant says in a conversation
    dpo, orpo, reward  which of two replies to a prompt is preferred
    kto               whether a reply is desirable

What is random is drawn by `counter_rng` from the number of the row, which differs in every epoch.
"""

from __future__ import annotations

import math

import numpy as np

from lm.config import check, check_choice
from lm.data import counter_rng
from lm.data.cache import TokenizedCorpus
from lm.data.config import OBJECTIVES, DataConfig
from lm.data.conversation_rows import ConversationRows, Conversations, ReplyPairs
from lm.data.encoder_decoder_rows import HiddenSpans, Pairs, noise_spans, raw_length, target_length
from lm.data.packing import Rows, rows_of
from lm.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]
_REAL = ("weights", "margin", "label")  # fields that are float32
_CHOICE, _REPLACEMENT, _WORD, _SPLIT, _ROUNDING = range(8, 13)  # purposes of random numbers


class Transform:
    """Predicting every token from those before it; others change what they do differently.

    Attributes:
      lengths: field of a batch → its length in a row. All are int32 but `weights`, float32.
      block_size: length of `inputs` and `targets`.
      source_length: length of the encoder's rows, 0 without one.
      max_targets_per_row: the most positions of a row that can have a weight.
      single_segment: no row ever holds two segments or padding that a token could see.
    """

    source_length = 0
    codes_text = True  # whether the targets are a code for the text, whose bytes can be counted

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None):
        self.config, self._tokenizer = config, tokenizer
        self.block_size = config.block_size
        self.max_targets_per_row = self.block_size
        self.single_segment = config.packing == "none" or (
            config.packing == "concat" and not config.end_of_text
        )
        self.lengths = dict.fromkeys(
            ("inputs", "targets", "weights", "segment_ids", "positions"), self.block_size
        )

    def rows(self, corpus: TokenizedCorpus, seed: int, training: bool) -> Rows:
        """The rows of one corpus."""
        return rows_of(corpus, self.config, seed, training=training)

    def finish(self, batch: Batch, keys: np.ndarray) -> None:
        """Changes in place what the rows have filled in. `keys` are those of the rows, uint64."""

    def num_bytes(self, corpora: list[TokenizedCorpus], rows: list[Rows]) -> int | None:
        """UTF-8 bytes that all targets stand for; None where they are no code for it.

        A tokenizer that loses some of the text, case or words it does not know, predicts what is
        left: those bytes are counted that it would decode.
        """
        if not self.codes_text:
            return None
        total = sum(corpus.num_bytes for corpus in corpora)
        if self._tokenizer is not None and not self._tokenizer.lossless:
            total = sum(_decoded_bytes(corpus, self._tokenizer) for corpus in corpora)
        if self.config.packing == "concat" and not self.config.end_of_text:
            total -= sum(corpus.first_token_bytes for corpus in corpora)
        return total

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Field of a batch → its shape in a row."""
        return {name: (length,) for name, length in self.lengths.items()}

    def empty(self, num_rows: int) -> Batch:
        """A batch of padding: zeros, weighing nothing."""
        return {
            name: np.zeros((num_rows, *shape), np.float32 if name in _REAL else np.int32)
            for name, shape in self.shapes.items()
        }


def _decoded_bytes(corpus: TokenizedCorpus, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of all documents as the tokenizer decodes them."""
    lengths, step = tokenizer.byte_lengths(), 1 << 22
    tokens = corpus.tokens
    total = sum(int(lengths[tokens[i : i + step]].sum()) for i in range(0, len(tokens), step))
    return total - tokenizer.drops_first_space * (len(corpus.offsets) - 1)


class Prefix(Transform):
    """A prefix of each segment, of 1 up to all of its tokens, is given; the rest is predicted.

    `prefix` marks the inputs that belong to it. Its last token predicts the first that does not.
    """

    codes_text = False  # how much is predicted is drawn

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None):
        super().__init__(config, tokenizer)
        self.lengths["prefix"] = self.block_size

    def finish(self, batch: Batch, keys: np.ndarray) -> None:
        """Draws the prefixes."""
        positions, used = batch["positions"], batch["segment_ids"] > 0
        row, column = np.nonzero((positions == 0) & used)  # where segments start
        last_of_row = np.append(row[1:] != row[:-1], True)
        ends = np.where(last_of_row, used.sum(1)[row], np.append(column[1:], 0))
        draw = counter_rng.uniform(keys[row], column, _SPLIT)
        prefix_lengths = 1 + (draw * (ends - column)).astype(np.int64)
        given = np.zeros(positions.shape, np.int64)
        given[used] = np.repeat(prefix_lengths, ends - column)
        batch["prefix"][:] = positions < given
        batch["weights"][positions < given - 1] = 0


class Masked(Transform):
    """Some tokens of each row are hidden and predicted from all others of their segment.

    A document is begin-of-text, its tokens, end-of-text ([CLS] ... [SEP]). `rate` of the tokens in
    each row that are not special are selected, to the nearest that chance rounds to, but at least
    one. With `whole_words`, words are selected in random order; one that would exceed the number
    is left out, as in BERT's own code. A selected token becomes the mask, a random token that is
    not special, or stays.
    """

    codes_text = False  # a guess from both sides is none

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None):
        super().__init__(config, tokenizer)
        check(
            tokenizer.mask_id is not None,
            "objective 'masked' needs a mask token, which the tokenizer does not have: set "
            "tokenizer.mask_token=True",
        )
        self.single_segment = False  # tokens would see the padding
        self.max_targets_per_row = min(
            self.block_size, max(1, math.ceil(config.corruption.rate * self.block_size))
        )
        self._mask_id = tokenizer.mask_id
        self._special = np.zeros(tokenizer.vocab_size, bool)
        self._special[list(tokenizer.special_ids.values())] = True
        self._ordinary = np.flatnonzero(~self._special).astype(np.int32)
        self._edges = tokenizer.word_edges() if config.corruption.whole_words else None

    def rows(self, corpus: TokenizedCorpus, seed: int, training: bool) -> Rows:
        """The rows of one corpus, inputs and targets at the same places."""
        return rows_of(corpus, self.config, seed, training=training, shifted=False)

    def finish(self, batch: Batch, keys: np.ndarray) -> None:
        """Selects tokens and hides them."""
        tokens = batch["inputs"]
        candidates = (batch["segment_ids"] > 0) & ~self._special[tokens]
        num = candidates.sum(1)
        wanted = num * self.config.corruption.rate + counter_rng.uniform(keys, 0, _ROUNDING)
        wanted = np.minimum(np.maximum(wanted.astype(np.int64), 1), num)
        wanted = np.minimum(wanted, self.max_targets_per_row)
        if self._edges is None:
            selected = _smallest(keys, candidates, wanted)
        else:
            words = _words(tokens, batch["positions"], candidates, self._edges)
            selected = _whole_words(keys, words, wanted)
        row, column = np.nonzero(selected)
        originals = tokens[row, column]
        batch["targets"][row, column] = originals
        batch["weights"][row, column] = 1
        draw = counter_rng.uniform(keys[row], column, _REPLACEMENT)
        share = self.config.corruption
        # What is left of the draw between the two thresholds is uniform too: it picks the token.
        chance = (draw - share.mask_share) / max(share.random_share, 1e-12)
        chance = np.clip(chance, 0, np.nextafter(1, 0))
        random = self._ordinary[(chance * len(self._ordinary)).astype(np.int64)]
        shown = np.where(draw < share.mask_share + share.random_share, random, originals)
        tokens[row, column] = np.where(draw < share.mask_share, self._mask_id, shown)


def _smallest(keys: np.ndarray, candidates: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [n, T]: `wanted` [n] of each row's `candidates` [n, T], all sets equally likely."""
    columns = np.arange(candidates.shape[1])
    numbers = counter_rng.bits(keys[:, None], columns, _CHOICE)
    numbers[~candidates] = np.iinfo(np.uint64).max
    ordered = np.sort(numbers, 1)
    limit = ordered[np.arange(len(keys)), np.maximum(wanted - 1, 0)]
    return candidates & (numbers <= limit[:, None]) & (wanted > 0)[:, None]


def _words(
    tokens: np.ndarray,
    positions: np.ndarray,
    candidates: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """int [n, T]: the column in which each candidate's word begins, -1 elsewhere."""
    begins, ends = edges
    starts = begins[tokens] | (positions == 0)
    starts[:, 1:] |= ends[tokens[:, :-1]]
    columns = np.arange(tokens.shape[1])
    return np.where(candidates, np.maximum.accumulate(np.where(starts, columns, 0), 1), -1)


def _whole_words(keys: np.ndarray, words: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [n, T]: words in random order, each taken if no more than `wanted` tokens result."""
    width = words.shape[1]
    flat = (np.arange(len(words))[:, None] * width + words)[words >= 0]
    first = np.flatnonzero(np.append(True, flat[1:] != flat[:-1])[: len(flat)])
    word, length = flat[first], np.diff(first, append=len(flat))
    row, column = np.divmod(word, width)
    draw = counter_rng.bits(keys[row], column, _WORD) >> np.uint64(24)
    order = np.argsort(row.astype(np.uint64) << np.uint64(40) | draw)
    row, length, word = row[order], length[order], word[order]
    left = wanted.copy()
    taken = np.zeros(words.size, bool)
    while True:  # as many times as a word is left out and a later, shorter one is not
        fits = length <= left[row]
        row, length, word = row[fits], length[fits], word[fits]
        if not len(row):
            break
        so_far = np.cumsum(length)
        first = np.searchsorted(row, row)
        within = so_far - (so_far - length)[first] <= left[row]
        taken[word[within]] = True
        left -= np.bincount(row[within], length[within], len(left)).astype(np.int64)
        row, length, word = row[~within], length[~within], word[~within]
    rows = np.arange(len(words))[:, None] * width
    return (words >= 0) & taken[rows + np.maximum(words, 0)]


class _EncoderDecoder(Transform):
    """An encoder's rows and a decoder's."""

    def __init__(self, config: DataConfig, objective: str, source_length: int, block_size: int):
        super().__init__(config, None)
        check(
            config.packing != "concat",
            f"data.packing='concat' cuts anywhere, which objective {objective!r} cannot: use "
            "'best_fit' or 'none'",
        )
        self.source_length, self.block_size = source_length, block_size
        self.max_targets_per_row = block_size
        self.single_segment = False  # the encoder would see the padding
        self.lengths = dict.fromkeys(self.lengths, block_size) | dict.fromkeys(
            ("source", "source_segment_ids", "source_positions"), source_length
        )


class SpanCorruption(_EncoderDecoder):
    """Spans of each document are replaced by sentinels and predicted; see `HiddenSpans`."""

    codes_text = False  # sentinels stand for no text, and what is left of it is given

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None):
        size = config.block_size
        raw = raw_length(size, config.corruption)
        super().__init__(config, "span_corruption", size, target_length(size, config.corruption))
        _, spans = noise_spans(np.array([raw]), config.corruption)
        check(
            len(tokenizer.sentinel_ids) >= spans[0],
            f"objective 'span_corruption' hides up to {spans[0]} spans in "
            f"data.block_size={size}, and the tokenizer has {len(tokenizer.sentinel_ids)} "
            f"sentinels: set tokenizer.num_sentinels={spans[0]}, or choose shorter blocks",
        )
        self._sentinels = np.array(tokenizer.sentinel_ids, np.int32)

    def rows(self, corpus: TokenizedCorpus, seed: int, training: bool) -> Rows:
        """The rows of one corpus."""
        return HiddenSpans(corpus, self.config, self._sentinels)


class Seq2Seq(_EncoderDecoder):
    """The target of each pair is predicted from its source; see `Pairs`."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None):
        super().__init__(
            config, "seq2seq", config.source_length or config.block_size, config.block_size
        )
        self._byte_lengths = tokenizer.byte_lengths()

    def rows(self, corpus: TokenizedCorpus, seed: int, training: bool) -> Rows:
        """The rows of one corpus."""
        return Pairs(corpus, self.config, self.source_length)

    def num_bytes(self, corpora: list[TokenizedCorpus], rows: list[Rows]) -> int:
        """Bytes of the target texts."""
        return sum(int(self._byte_lengths[each.target_tokens()].sum()) for each in rows)


class Conversation(Transform):
    """Every token of the assistant's is predicted, and what ends its turns."""

    codes_text = False  # what the others say is given

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None):
        super().__init__(config, tokenizer)
        check(
            config.packing != "concat",
            "data.packing='concat' cuts anywhere, which conversations do not bear: use 'best_fit' "
            "or 'none'",
        )

    def rows(self, corpus: Conversations, seed: int, training: bool) -> Rows:
        """The rows of one corpus."""
        return ConversationRows(corpus, self.config)


class Pair(Transform):
    """Two replies to the same prompt stand side by side: fields are [2, block_size] a row.

    The first is the preferred one, and `margin` says by how much (0 where nobody does).
    """

    codes_text = False
    value = "margin"

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None):
        super().__init__(config, tokenizer)
        self.single_segment = True

    def rows(self, corpus: Conversations, seed: int, training: bool) -> Rows:
        """The rows of one corpus."""
        return ReplyPairs(corpus, self.config, self.value)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Field of a batch → its shape in a row."""
        return {name: (2, length) for name, length in self.lengths.items()} | {self.value: ()}


class Labelled(Pair):
    """The first is a reply to its prompt, `label` 1 where it is desirable; the second another's."""

    value = "label"


_TRANSFORMS = {
    "causal": Transform,
    "masked": Masked,
    "span_corruption": SpanCorruption,
    "seq2seq": Seq2Seq,
    "prefix": Prefix,
    **dict.fromkeys(("sft", "distillation"), Conversation),
    **dict.fromkeys(("dpo", "orpo", "reward"), Pair),
    "kto": Labelled,
}
assert set(_TRANSFORMS) == set(OBJECTIVES)


def transform(objective: str, config: DataConfig, tokenizer: Tokenizer | None) -> Transform:
    """What `objective` makes of corpora tokenised by `tokenizer`.

    Raises:
      ConfigError: no such objective, or settings or a vocabulary that it cannot use.
    """
    check_choice("objective.name", objective, OBJECTIVES)
    check(
        config.source_length == 0 or objective == "seq2seq",
        f"data.source_length={config.source_length} is for objective 'seq2seq', not {objective!r}",
    )
    needs = ("masked", "span_corruption", "seq2seq")
    if tokenizer is None and objective in needs:
        raise ValueError(f"objective {objective!r} needs the tokenizer")
    return _TRANSFORMS[objective](config, tokenizer)

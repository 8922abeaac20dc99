"""The texts that tell recurrence and attention apart: to repeat, to copy, to translate.

Every batch is a function of the seed and its number, so that all models see the same ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lm import tokenizers
from lm.data.storyworld import language
from lm.tokenizers import TokenizerConfig

Batch = dict[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]  # ids of source and target, without begin and end
BEGIN, END = 0, 1  # of symbols' vocabularies; symbols are 2, 3, …
TEST = 1 << 20  # batches from this number on are for testing
PARTS = 6  # lengths that a task is tested at


def repeated(seed: int, number: int, batch_size: int, length: int, symbols: int) -> Batch:
    """Batch `number` for a language model: random symbols, END, and the same symbols again.

    Only the repetition counts in the loss.
    """
    rng = np.random.default_rng((seed, number))
    text_BN = rng.integers(2, 2 + symbols, (batch_size, length), np.int32)
    begin_B1, end_B1 = (np.full((batch_size, 1), id, np.int32) for id in (BEGIN, END))
    tokens = np.concatenate([begin_B1, text_BN, end_B1, text_BN], 1)
    weights = np.zeros((batch_size, 2 * length + 1), np.float32)
    weights[:, length + 1 :] = 1
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@dataclasses.dataclass(frozen=True)
class Task:
    """Pairs of texts, as ids."""

    name: str
    vocab_size: int
    length: int  # places that the longest text takes on either side
    draw: Callable[[int], Iterator[Pair]]  # number of a batch → its training pairs, without end
    test: dict[float, list[Pair]]  # length → held-out pairs whose sources have it, or about it
    show: Callable[[int], str]  # id → text
    begin: int = BEGIN
    end: int = END

    def packed(self, number: int, rows: int, length: int) -> Batch:
        """Training batch `number`: rows of `length` places with as many pairs as fit."""
        groups, used = [[]], 0
        for source, target in self.draw(number):
            size = 1 + max(len(source), len(target))
            if used + size > length:
                if len(groups) == rows:
                    break
                groups.append([])
                used = 0
            groups[-1].append((source, target))
            used += size
        return self.batch(groups, length)

    def batch(self, groups: Sequence[Sequence[Pair]], length: int = 0) -> Batch:
        """A sequence-to-sequence batch: each group's pairs side by side in one row."""
        shape = (len(groups), length or self.length)
        names = ("source", "source_segment_ids", "source_positions")
        names += ("inputs", "targets", "segment_ids", "positions")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        for row, pairs in enumerate(groups):
            s = t = 0
            for segment, (source, target) in enumerate(pairs, 1):
                at, to = slice(s, s + len(source) + 1), slice(t, t + len(target) + 1)
                s, t = at.stop, to.stop
                batch["source"][row, at] = [*source, self.end]
                batch["inputs"][row, to] = [self.begin, *target]
                batch["targets"][row, to] = [*target, self.end]
                for name, where in (("source_", at), ("", to)):
                    batch[f"{name}segment_ids"][row, where] = segment
                    batch[f"{name}positions"][row, where] = np.arange(where.stop - where.start)
        return {**batch, "weights": (batch["segment_ids"] > 0).astype(np.float32)}


def copying(seed: int, symbols: int, length: int, test_pairs: int) -> Task:
    """Random symbols, up to `length` of them, to be written again."""

    def text(rng: np.random.Generator, size: int) -> Pair:
        symbols_N = rng.integers(2, 2 + symbols, size, np.int32)
        return symbols_N, symbols_N

    def draw(number: int) -> Iterator[Pair]:
        rng = np.random.default_rng((seed, number))
        while True:
            yield text(rng, rng.integers(1, length + 1))

    rng = np.random.default_rng((seed, TEST))
    lengths = [round(length * part / PARTS) for part in range(1, PARTS + 1)]
    test = {float(size): [text(rng, size) for _ in range(test_pairs)] for size in lengths}
    return Task("copy", 2 + symbols, length + 1, draw, test, lambda id: f"{id}")


def translation(
    seed: int, words: int, many: int, settings: TokenizerConfig, test_pairs: int
) -> Task:
    """English sentences of up to `words` words into Ilvani (`lm.data.storyworld.language`).

    `many` pairs to train on; test sources are none of theirs, and are sorted by their number of
    words into parts of `test_pairs` each.
    """
    known: dict[str, str] = {}
    for source, target in (language.pair(seed, index) for index in itertools.count()):
        if len(source.split()) <= words:
            known[source] = target
        if len(known) == many + PARTS * test_pairs:
            break
    texts = list(known.items())
    held_out, texts = texts[: PARTS * test_pairs], texts[PARTS * test_pairs :]
    tokenizer = tokenizers.train(settings, [side for pair in texts for side in pair])

    def encoded(pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        sides = [tokenizer.encode_batch(list(side)) for side in zip(*pairs, strict=True)]
        return [(np.array(s, np.int32), np.array(t, np.int32)) for s, t in zip(*sides, strict=True)]

    training = encoded(texts)
    held_out.sort(key=lambda pair: len(pair[0].split()))
    test: dict[float, list[Pair]] = {}
    for part in range(PARTS):
        pairs = held_out[part * test_pairs : (part + 1) * test_pairs]
        mean = float(np.mean([len(source.split()) for source, _ in pairs]))
        test.setdefault(round(mean, 2), []).extend(encoded(pairs))

    def draw(number: int) -> Iterator[Pair]:
        rng = np.random.default_rng((seed, number))
        while True:
            yield training[rng.integers(len(training))]

    everything = itertools.chain(training, *test.values())
    length = 1 + max(len(side) for pair in everything for side in pair)
    return Task(
        "translation",
        tokenizer.vocab_size,
        length,
        draw,
        test,
        lambda id: tokenizer.decode([id]),
        tokenizer.bos_id,
        tokenizer.eos_id,
    )

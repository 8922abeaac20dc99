"""Masked, span-corruption, sequence-to-sequence and prefix batches, against the text itself."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_vocabulary import Vocabulary, corpus_of

from lm.config import ConfigError, defaults, view
from lm.data import CorruptionConfig, DataConfig, evaluation_batches, train_batches
from lm.data.encoder_decoder_rows import both_lengths, noise_spans, raw_length, target_length

VOCABULARY = Vocabulary()
EOS, BOS, MASK = Vocabulary.eos_id, Vocabulary.bos_id, Vocabulary.mask_id
FIRST = Vocabulary.first
CONFIG = DataConfig(batch_size=4, block_size=24, prefetch=0, validation_fraction=0.0)
CORPUS = corpus_of([5, 1, 40, 17, 3, 90, 8, 8, 2, 31])
PAIRS = corpus_of([5, 4, 1, 9, 20, 18, 3, 0, 0, 7, 8, 8, 2, 3, 11, 12], pairs=True)
PACKING = {"masked": "concat", "prefix": "concat", "span_corruption": "best_fit"}
ALL = ("masked", "span_corruption", "seq2seq", "prefix")
MANY = settings(max_examples=30, deadline=None)
LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=20)


def config_for(objective, **changes):
    changes = {"packing": PACKING.get(objective, "best_fit"), **changes}
    return dataclasses.replace(CONFIG, **changes)


def corpus_for(objective):
    return PAIRS if objective == "seq2seq" else CORPUS


def batches_of(objective, config, corpus, seed=0, **hosts):
    return train_batches(
        config, corpus, seed=seed, objective=objective, tokenizer=VOCABULARY, **hosts
    )


def stacked(batches):
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def epoch(objective, config, corpus, seed=0):
    return stacked(list(batches_of(objective, dataclasses.replace(config, epochs=1), corpus, seed)))


def many_rows(number, objective, config, corpus):
    """Rows of as many epochs as it takes, in one batch."""
    return batches_of(objective, config, corpus)._gather(range(number))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def segments(batch, ids="segment_ids"):
    """(row, columns) of every segment, in order, checked to be contiguous and numbered from 1."""
    for row, numbers in enumerate(batch[ids]):
        assert list(dict.fromkeys(numbers[numbers > 0])) == list(range(1, numbers.max() + 1))
        for number in range(1, numbers.max() + 1):
            (columns,) = np.nonzero(numbers == number)
            assert (np.diff(columns) == 1).all()
            yield row, columns


# All objectives.


EVERY = pytest.mark.parametrize(
    "objective, packing",
    [*(("causal", packing) for packing in ("concat", "best_fit", "none")), *((o, "") for o in ALL)],
)


def case(objective, packing, **changes):
    config = config_for(objective, **{"packing": packing} if packing else {}, **changes)
    return objective, config, corpus_for(objective)


@EVERY
@pytest.mark.parametrize("rows", [[3], [0, 2, 3], [0, 1, 2, 3]])
def test_a_host_reads_its_rows_of_the_same_batches(objective, packing, rows):
    objective, config, corpus = case(objective, packing, epochs=3)

    def part(batches):
        return [{name: array[rows] for name, array in batch.items()} for batch in batches]

    iterator = batches_of(objective, config, corpus, 1, rows=rows)
    assert 0 <= iterator.padding_fraction < 1
    read = list(iterator)
    assert_same(part(batches_of(objective, config, corpus, 1)), read)
    assert {name: array.shape for name, array in read[0].items()} == iterator.shapes
    assert all(a.dtype == (np.float32 if n == "weights" else np.int32) for n, a in read[0].items())
    assert read[0]["inputs"].shape == (len(rows), iterator.block_size)
    assert read[0].get("source", np.zeros((4, 0))).shape[1] == iterator.source_length
    settings = {"objective": objective, "tokenizer": VOCABULARY}
    whole = evaluation_batches(config, corpus, **settings)
    assert_same(part(whole), list(evaluation_batches(config, corpus, **settings, rows=rows)))


@EVERY
@pytest.mark.parametrize("stop", [0, 7, 23])
def test_resuming_is_bitwise_even_mid_epoch_and_on_other_hosts(objective, packing, stop):
    objective, config, corpus = case(objective, packing)
    uninterrupted = batches_of(objective, config, corpus, 3)
    expected = [next(uninterrupted) for _ in range(stop + 10)][stop:]
    first = batches_of(objective, dataclasses.replace(config, prefetch=4), corpus, 3)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert len(json.dumps(state)) < 1000
    first.close()
    resumed = batches_of(objective, config, corpus, 3)
    next(resumed)
    resumed.set_state(state)
    assert resumed.position() == uninterrupted.position(stop)
    assert_same([next(resumed) for _ in range(10)], expected)
    assert_same([resumed.batch(stop)], expected[:1])
    share = batches_of(objective, config, corpus, 3, rows=[1, 3])
    share.set_state(state)
    assert_same([next(share)], [{name: array[1::2] for name, array in expected[0].items()}])


def test_a_state_of_another_objective_or_corruption_is_refused():
    causal, masked = config_for("causal", packing="concat"), config_for("masked")
    state = batches_of("masked", masked, CORPUS).get_state()
    with pytest.raises(ConfigError, match=r"objective\.name='causal' but .* with 'masked'"):
        batches_of("causal", causal, CORPUS).set_state(state)
    other = dataclasses.replace(masked, corruption=CorruptionConfig(rate=0.3))
    with pytest.raises(ConfigError, match=r"data\.corruption="):
        batches_of("masked", other, CORPUS).set_state(state)
    # What earlier versions wrote does not name an objective, and means causal.
    state = batches_of("causal", causal, CORPUS).get_state()
    assert "objective" not in state["data"]
    with pytest.raises(ConfigError, match=r"objective\.name='masked' but .* with 'causal'"):
        batches_of("masked", masked, CORPUS).set_state(state)


@pytest.mark.parametrize("objective", ["masked", "span_corruption", "prefix"])
def test_what_is_hidden_differs_in_every_epoch_and_is_fixed_in_evaluation(objective):
    config = config_for(objective, shuffle=False, random_offset=False, batch_size=1, epochs=4)
    iterator = batches_of(objective, config, CORPUS)
    rows = iterator.rows[0].num_rows
    batches = list(iterator)
    name = "source" if objective == "span_corruption" else "weights"
    epochs = [stacked(batches[e * rows : (e + 1) * rows])[name] for e in range(4)]
    assert len({epoch.tobytes() for epoch in epochs}) == 4
    other = epoch(objective, config, CORPUS, seed=1)
    assert other[name].tobytes() != epochs[0].tobytes()
    evaluation = evaluation_batches(config, CORPUS, objective=objective, tokenizer=VOCABULARY)
    assert_same(list(evaluation), list(evaluation))
    assert evaluation.num_bytes is None and evaluation.num_targets is None


@pytest.mark.parametrize("objective", ALL)
def test_mixtures_and_rows_that_fill_up_work(objective):
    config = config_for(objective, weights=(2.0, 1.0), epochs=1, batch_size=3)
    corpora = (corpus_for(objective), corpus_for(objective))
    batch = stacked(list(batches_of(objective, config, corpora)))
    assert batch["weights"].any()
    evaluation = evaluation_batches(
        config_for(objective, batch_size=64),
        corpora,
        objective=objective,
        tokenizer=VOCABULARY,
    )
    (batch,) = evaluation
    assert not batch["segment_ids"][-1].any() and not batch["weights"][-1].any()
    assert not batch["inputs"][-1].any()


# Masked language modelling.


@MANY
@given(
    lengths=LENGTHS,
    block_size=st.integers(4, 40),
    packing=st.sampled_from(["concat", "best_fit", "none"]),
    end_of_text=st.booleans(),
    whole_words=st.booleans(),
    rate=st.sampled_from([0.15, 0.4, 0.9]),
)
def test_masked_rows_hold_the_text_and_hide_only_what_is_to_be_predicted(
    lengths, block_size, packing, end_of_text, whole_words, rate
):
    corpus = corpus_of(lengths, end_of_text=end_of_text)
    plain = packing == "concat" and not end_of_text
    if corpus.num_tokens + (0 if plain else len(lengths)) < block_size or not corpus.num_tokens:
        return
    corruption = CorruptionConfig(rate=rate, whole_words=whole_words)
    config = config_for(
        "masked",
        block_size=block_size,
        packing=packing,
        end_of_text=end_of_text,
        corruption=corruption,
        shuffle=False,
    )
    iterator = batches_of("masked", dataclasses.replace(config, epochs=1), corpus)
    batch = stacked(list(iterator))
    hidden = batch["weights"] > 0
    restored = np.where(hidden, batch["targets"], batch["inputs"])
    assert not batch["targets"][~hidden].any(), "no target but where one is asked for"
    assert (batch["targets"][hidden] >= FIRST).all(), "specials and padding are never selected"
    assert (hidden.sum(1) <= iterator.max_targets_per_row).all()
    # Putting the targets back gives every document once: begin-of-text, tokens, end-of-text.
    pieces = [restored[row, columns] for row, columns in segments(batch)]
    for (row, columns), _ in zip(segments(batch), pieces, strict=True):
        np.testing.assert_array_equal(batch["positions"][row, columns], np.arange(len(columns)))
    expected = [
        np.concatenate([[] if plain else [BOS], corpus.tokens[low:high]])
        for low, high in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    ]
    if packing == "best_fit":
        assert sorted(np.concatenate(pieces)) == sorted(np.concatenate(expected))
    else:
        np.testing.assert_array_equal(np.concatenate(pieces), np.concatenate(expected))
    if not plain:
        assert all(BOS not in piece[1:] and EOS not in piece[:-1] for piece in pieces)
    # The number that is hidden in each row is the rate's, rounded either way.
    ordinary = ((batch["segment_ids"] > 0) & (restored >= FIRST)).sum(1)
    count = hidden.sum(1)
    assert (count <= np.maximum(np.ceil(rate * ordinary), 1)).all()
    if not whole_words:
        assert (
            count >= np.minimum(np.maximum(np.floor(rate * ordinary + 1e-9), 1), ordinary)
        ).all()


def masked_epoch(**changes):
    config = config_for(
        "masked", block_size=128, batch_size=8, corruption=CorruptionConfig(**changes)
    )
    return epoch("masked", config, corpus_of([400] * 150))


def test_masked_rates_are_those_of_bert():
    batch = masked_epoch()
    hidden = batch["weights"] > 0
    tokens = (batch["inputs"] >= FIRST) | hidden
    assert hidden.sum() / tokens.sum() == pytest.approx(0.15, abs=0.002)
    shown, originals = batch["inputs"][hidden], batch["targets"][hidden]
    kept, masked = shown == originals, shown == MASK
    assert masked.mean() == pytest.approx(0.8, abs=0.015)
    assert kept.mean() == pytest.approx(0.1, abs=0.015)
    random = shown[~kept & ~masked]
    assert (random >= FIRST).all(), "a random token is never special"
    # Random tokens are spread over the whole vocabulary, selected ones over the whole row.
    assert np.histogram(random, 10, (FIRST, 70_000))[0].min() > 0.7 * len(random) / 10
    columns = np.nonzero(hidden)[1]
    assert np.histogram(columns, 8, (0, 128))[0].min() > 0.9 * len(columns) / 8


def test_the_shares_of_masks_and_random_tokens_can_be_set():
    batch = masked_epoch(mask_share=0.0, random_share=1.0)
    hidden = batch["weights"] > 0
    assert MASK not in batch["inputs"]
    assert (batch["inputs"][hidden] == batch["targets"][hidden]).mean() < 0.01
    batch = masked_epoch(mask_share=1.0, random_share=0.0)
    assert (batch["inputs"][batch["weights"] > 0] == MASK).all()


def test_whole_words_are_hidden_whole():
    # Odd tokens begin a word, and a document may begin in the middle of one.
    batch = masked_epoch(whole_words=True)
    hidden = batch["weights"] > 0
    restored = np.where(hidden, batch["targets"], batch["inputs"])
    assert hidden.mean() == pytest.approx(0.15, abs=0.003)
    inside = (restored[:, 1:] % 2 == 0) & (restored[:, 1:] >= FIRST) & (restored[:, :-1] >= FIRST)
    inside &= batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    assert inside.any()
    assert (hidden[:, 1:] == hidden[:, :-1])[inside].all()


# Prefix.


@MANY
@given(lengths=LENGTHS, packing=st.sampled_from(["concat", "best_fit", "none"]))
def test_a_prefix_is_given_and_the_rest_predicted(lengths, packing):
    corpus = corpus_of(lengths)
    if corpus.num_tokens < CONFIG.block_size:
        return
    config = config_for("prefix", packing=packing)
    batch, causal = epoch("prefix", config, corpus), epoch("causal", config, corpus)
    for name in ("inputs", "targets", "segment_ids", "positions"):
        np.testing.assert_array_equal(batch[name], causal[name])
    assert set(np.unique(batch["prefix"])) <= {0, 1}
    assert not batch["prefix"][batch["segment_ids"] == 0].any()
    for row, columns in segments(batch):
        prefix, weights = batch["prefix"][row, columns], batch["weights"][row, columns]
        length = prefix.sum()
        assert 1 <= length <= len(columns)
        assert prefix[:length].all()
        # A target with a weight is not among the inputs that all can see.
        assert not weights[: length - 1].any() and weights[length - 1 :].all()


def test_prefixes_have_every_length_equally_often():
    config = config_for("prefix", packing="none", block_size=11)
    batch = many_rows(6000, "prefix", config, corpus_of([10] * 100))
    counts = np.bincount(batch["prefix"].sum(1), minlength=12)
    assert counts[0] == 0 and counts[1:].min() > 0.8 * counts[1:].mean()


# Span corruption.


def restore(source, target):
    """The text and the hidden spans that a source and a target stand for."""
    assert source[-1] == EOS and target[-1] == EOS
    text, spans, at = [], [], 0
    sentinels = [token for token in source if 10 <= token < FIRST]
    assert sentinels == list(Vocabulary.sentinel_ids[: len(sentinels)]), "in order, each once"
    assert [token for token in target if 10 <= token < FIRST] == sentinels
    for token in source[:-1]:
        if token not in sentinels:
            text.append(token)
            continue
        assert target[at] == token
        at += 1
        spans.append([])
        while target[at] >= FIRST:
            text.append(target[at])
            spans[-1].append(target[at])
            at += 1
    assert at == len(target) - 1
    return text, spans


@MANY
@given(
    lengths=LENGTHS,
    block_size=st.integers(4, 60),
    packing=st.sampled_from(["best_fit", "none"]),
    end_of_text=st.booleans(),
    rate=st.sampled_from([0.15, 0.5, 0.8]),
    span_length=st.sampled_from([1.0, 3.0, 8.0]),
)
def test_sentinels_and_targets_give_the_text_back(
    lengths, block_size, packing, end_of_text, rate, span_length
):
    if not any(lengths):
        return
    corpus = corpus_of(lengths, end_of_text=end_of_text)
    corruption = CorruptionConfig(rate=rate, span_length=span_length)
    config = config_for(
        "span_corruption",
        block_size=block_size,
        packing=packing,
        end_of_text=end_of_text,
        corruption=corruption,
    )
    batch = epoch("span_corruption", config, corpus)
    sides = list(segments(batch, "source_segment_ids"))
    targets = list(segments(batch))
    assert [row for row, _ in sides] == [row for row, _ in targets], "segments are on both sides"
    texts = []
    for (row, source_columns), (_, columns) in zip(sides, targets, strict=True):
        source, target = batch["source"][row, source_columns], batch["targets"][row, columns]
        text, spans = restore(source.tolist(), target.tolist())
        texts.append(text)
        hidden_tokens = set(itertools.chain(*spans))
        assert not hidden_tokens & set(source.tolist()), "what is hidden is not in the source"
        assert all(spans), "no span is empty"
        hidden, number = noise_spans(np.array([len(text)]), corruption)
        assert (sum(map(len, spans)), len(spans)) == (hidden[0], number[0])
        assert len(source) == len(text) - hidden[0] + number[0] + 1
        assert batch["inputs"][row, columns].tolist() == [BOS, *target[:-1]]
        for name, places in (("source_positions", source_columns), ("positions", columns)):
            np.testing.assert_array_equal(batch[name][row, places], np.arange(len(places)))
    np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)
    # All pieces together are the corpus: nothing is lost, nothing comes twice.
    assert sorted(itertools.chain(*texts)) == list(range(FIRST, FIRST + sum(lengths)))
    assert all((np.diff(text) == 1).all() for text in texts), "a piece is consecutive text"


def test_the_lengths_are_those_of_t5():
    published = CorruptionConfig()
    assert raw_length(512, published) == 568
    assert [side.tolist() for side in both_lengths(np.array([568]), published)] == [[512], [114]]
    assert target_length(512, published) == 120


def test_long_documents_leave_little_padding():
    config = config_for("span_corruption", block_size=128)
    lengths = np.random.default_rng(0).integers(50, 900, 60).tolist()
    assert batches_of("span_corruption", config, corpus_of(lengths)).padding_fraction < 0.08


def test_all_divisions_are_equally_likely():
    # 12 tokens, 4 hidden in 2 spans: 3 ways to divide those by 7 ways to divide the 8 kept ones.
    corruption = CorruptionConfig(rate=1 / 3, span_length=2.0)
    config = config_for("span_corruption", block_size=11, packing="none", corruption=corruption)
    batch = many_rows(6000, "span_corruption", config, corpus_of([12] * 100))
    counts = np.zeros((4, 8), int)
    source, target = ((b >= 10) & (b < FIRST) for b in (batch["source"], batch["targets"]))
    (between,) = np.diff(np.nonzero(source)[1].reshape(-1, 2)).T - 1
    (length,) = np.diff(np.nonzero(target)[1].reshape(-1, 2)).T - 1
    np.add.at(counts, (length, between), 1)
    assert counts.sum() == counts[1:, 1:].sum()
    assert counts[1:, 1:].min() > 0.7 * 6000 / 21 and counts.max() < 1.3 * 6000 / 21


def test_a_single_span_lies_anywhere():
    config = config_for("span_corruption", block_size=12, packing="none")
    batch = many_rows(4500, "span_corruption", config, corpus_of([10] * 100))
    counts = np.bincount(np.nonzero(batch["source"] == 109)[1])
    assert len(counts) == 9 and counts.min() > 0.8 * counts.mean()


# Sequence to sequence.


@MANY
@given(
    lengths=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 11)), min_size=1, max_size=40),
    packing=st.sampled_from(["best_fit", "none"]),
    source_length=st.sampled_from([0, 16, 33]),
)
def test_pairs_come_back_whole(lengths, packing, source_length):
    corpus = corpus_of([length for both in lengths for length in both], pairs=True)
    config = config_for("seq2seq", packing=packing, source_length=source_length, block_size=20)
    batch = epoch("seq2seq", config, corpus)
    assert batch["source"].shape[1] == (source_length or 20)
    documents = [
        corpus.tokens[low:high].tolist()
        for low, high in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    ]
    expected = sorted(zip(documents[::2], documents[1::2], strict=True))
    found = []
    sources = list(segments(batch, "source_segment_ids"))
    for (row, source_columns), (other, columns) in zip(sources, segments(batch), strict=True):
        assert row == other, "a pair's sides share row and segment"
        target = batch["targets"][row, columns].tolist()
        found.append((batch["source"][row, source_columns].tolist(), target))
        assert batch["inputs"][row, columns].tolist() == [BOS, *target[:-1]]
        np.testing.assert_array_equal(batch["positions"][row, columns], np.arange(len(columns)))
    assert sorted(found) == expected
    np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)


def test_evaluation_counts_the_bytes_of_the_targets():
    evaluation = evaluation_batches(
        config_for("seq2seq"), PAIRS, objective="seq2seq", tokenizer=VOCABULARY
    )
    batch = stacked(list(evaluation))
    targets = batch["targets"][batch["weights"] > 0]
    assert evaluation.num_targets == len(targets)
    assert evaluation.num_bytes == (targets >= FIRST).sum()


def test_pairs_too_long_are_named_or_dropped_and_counted():
    config = config_for("seq2seq", block_size=12)
    with pytest.raises(ConfigError, match=r"data\.source_length=12 .*source of pair 2 .* 21 to"):
        batches_of("seq2seq", config, PAIRS)
    with pytest.raises(ConfigError, match=r"data\.block_size=12 .*target of pair 2 .* 2 pairs"):
        batches_of("seq2seq", dataclasses.replace(config, source_length=30), PAIRS)
    iterator = batches_of("seq2seq", dataclasses.replace(config, long_pairs="drop"), PAIRS)
    assert iterator.num_dropped == 2
    batch = epoch("seq2seq", dataclasses.replace(config, long_pairs="drop"), PAIRS)
    assert (batch["targets"] == EOS).sum() == 6
    with pytest.raises(ConfigError, match="has no pair that fits"):
        only_long = corpus_of([50, 50], pairs=True)
        batches_of("seq2seq", dataclasses.replace(config, long_pairs="drop"), only_long)


# What cannot be.


class NoSpecials(Vocabulary):
    mask_id = None
    sentinel_ids = ()


@pytest.mark.parametrize(
    "objective, changes, message",
    [
        ("maskd", {}, r"objective\.name='maskd' .*did you mean 'masked'"),
        ("masked", {}, r"needs a mask token.*tokenizer\.mask_token=True"),
        ("span_corruption", {}, r"tokenizer\.num_sentinels=1"),
        ("span_corruption", {"packing": "concat"}, r"data\.packing='concat' .*'best_fit'"),
        ("span_corruption", {"block_size": 2}, r"data\.block_size=2 must be at least 3"),
        ("seq2seq", {}, r"test holds documents, .*'translation'"),
        ("prefix", {"source_length": 8}, r"data\.source_length=8 is for objective 'seq2seq'"),
    ],
)
def test_what_an_objective_cannot_do_is_said(objective, changes, message):
    config = config_for(objective, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        train_batches(config, CORPUS, seed=0, objective=objective, tokenizer=NoSpecials())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rate", 0.0),
        ("rate", 1.0),
        ("mask_share", 1.1),
        ("random_share", 0.3),
        ("span_length", 0.5),
    ],
)
def test_impossible_corruption_is_named(field, value):
    config = defaults(DataConfig)
    config.corruption[field] = value
    with pytest.raises(ConfigError, match=rf"config\.corruption\..*{field}={value}"):
        view(DataConfig, config)


def test_rows_do_not_depend_on_their_company():
    """A row alone is what it is in a batch: masks are drawn for the row, not for the batch."""
    for objective in ALL:
        iterator = batches_of(objective, config_for(objective), corpus_for(objective))
        gather = iterator._gather
        numbers = [3, 0, 1, gather.total + 1]
        together = gather(numbers)
        assert_same([together], [stacked([gather([number]) for number in numbers])])

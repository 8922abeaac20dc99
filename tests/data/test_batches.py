import collections
import dataclasses

import grain
import numpy as np
import objective_vocabulary
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.data import evaluation_batches, prefetch_to_device, train_batches
from lm.data.config import DataConfig
from lm.data.packing import best_fit_decreasing, rows_of

BOS = objective_vocabulary.Vocabulary.bos_id


def corpus_of(lengths, end_of_text=True, first=0):
    """A corpus in which every token occurs once, so that tokens can be counted and located."""
    return objective_vocabulary.corpus_of(
        lengths, end_of_text=end_of_text, first=first, distinct_ends=True
    )


CORPUS = corpus_of([5, 1, 40, 17, 3, 90, 8, 8, 2, 31])
CONFIG = DataConfig(batch_size=4, block_size=16, validation_fraction=0.0)
PACKINGS = ("concat", "best_fit", "none")


def epoch(config, corpora):
    return list(train_batches(dataclasses.replace(config, epochs=1), corpora, seed=0))


def stacked(batches):
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def targets_of(batches):
    batch = stacked(batches)
    return batch["targets"][batch["weights"] > 0]


def check_rows(batch, corpus, plain_stream=False):
    """The contract, row by row, against the corpus itself."""
    place = {int(token): p for p, token in enumerate(corpus.tokens)}
    document = np.repeat(np.arange(corpus.num_documents), np.diff(corpus.offsets))
    assert {name: array.dtype for name, array in batch.items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "segment_ids": np.int32,
        "positions": np.int32,
    }
    for row in range(len(batch["inputs"])):
        inputs, targets, weights, segments, positions = (
            batch[name][row]
            for name in ("inputs", "targets", "weights", "segment_ids", "positions")
        )
        used = int((weights > 0).sum())
        assert set(weights[:used]) <= {1.0} and not weights[used:].any()
        assert (segments[:used] > 0).all() and not segments[used:].any()
        assert list(dict.fromkeys(segments[:used])) == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            (columns,) = np.nonzero(segments == segment)
            assert (np.diff(columns) == 1).all()
            np.testing.assert_array_equal(positions[columns], np.arange(len(columns)))
            places = np.array([place[int(t)] for t in targets[columns]])
            assert (np.diff(places) == 1).all()
            if not plain_stream:
                assert len(set(document[places])) == 1, "a segment holds one document only"
            starts = places[0] in corpus.offsets and not plain_stream
            expected = BOS if starts else corpus.tokens[places[0] - 1]
            assert inputs[columns[0]] == expected
            # Shifted by one: what a target is, the next input is.
            np.testing.assert_array_equal(inputs[columns[1:]], targets[columns[:-1]])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=25),
    block_size=st.integers(1, 20),
    packing=st.sampled_from(PACKINGS),
    end_of_text=st.booleans(),
    random_offset=st.booleans(),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_every_token_is_a_target_exactly_once_an_epoch(
    lengths, block_size, packing, end_of_text, random_offset, batch_size, seed
):
    corpus = corpus_of(lengths, end_of_text)
    plain_stream = packing == "concat" and not end_of_text
    if corpus.num_tokens - plain_stream < block_size:
        return
    config = DataConfig(
        batch_size=batch_size,
        block_size=block_size,
        packing=packing,
        end_of_text=end_of_text,
        random_offset=random_offset,
        epochs=2,
        prefetch=0,
    )
    iterator = train_batches(config, corpus, seed=seed)
    batches = list(iterator)
    batch = stacked(batches)
    check_rows(batch, corpus, plain_stream)
    counts = collections.Counter(targets_of(batches).tolist())
    expected = corpus.tokens[1:] if plain_stream else corpus.tokens
    assert counts == {int(token): 2 for token in expected}
    rows = iterator.rows[0].num_rows
    assert len(batches) == iterator.num_batches == -(-2 * rows // batch_size)
    empty = (batch["weights"].sum(axis=1) == 0).sum()
    assert empty == len(batches) * batch_size - 2 * rows, "only rows that fill up are empty"
    if iterator.single_segment:
        assert batch["segment_ids"].max() == 1


def test_a_plain_stream_is_the_textbook_window():
    corpus = corpus_of([30, 35], end_of_text=False)
    config = dataclasses.replace(
        CONFIG, block_size=8, end_of_text=False, shuffle=False, random_offset=False
    )
    batch = stacked(epoch(config, corpus))
    for i in range(8):
        np.testing.assert_array_equal(batch["inputs"][i], corpus.tokens[i * 8 : i * 8 + 8])
        np.testing.assert_array_equal(batch["targets"][i], corpus.tokens[i * 8 + 1 : i * 8 + 9])
    assert batch["weights"].all() and batch["segment_ids"].max() == 1


def test_random_offsets_move_the_windows_between_epochs():
    corpus = corpus_of([1000])
    config = dataclasses.replace(CONFIG, shuffle=False, epochs=None)
    rows = rows_of(corpus, config, seed=5)
    starts = {int(rows.pieces(np.array([1]), np.array([epoch]))[1][0]) for epoch in range(40)}
    assert len(starts) >= 6
    still = rows_of(corpus, dataclasses.replace(config, random_offset=False), seed=5)
    assert still.pieces(np.array([1]), np.array([3]))[1][0] == 16


def test_rows_that_no_batch_has_are_refused():
    for rows in ([], [4], [-1]):
        with pytest.raises(ValueError, match="rows of a batch of 4"):
            train_batches(CONFIG, CORPUS, seed=0, rows=rows)


def test_a_state_from_other_data_is_refused():
    state = train_batches(CONFIG, CORPUS, seed=0).get_state()
    with pytest.raises(ConfigError, match=r"data\.batch_size=8 but .* trained with 4"):
        train_batches(dataclasses.replace(CONFIG, batch_size=8), CORPUS, seed=0).set_state(state)
    with pytest.raises(ConfigError, match=r"^seed=1 but"):
        train_batches(CONFIG, CORPUS, seed=1).set_state(state)
    with pytest.raises(ConfigError, match=r"data\.path: the text or the tokenizer"):
        train_batches(CONFIG, corpus_of([100]), seed=0).set_state(state)


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_are_shuffled_differently_and_seeds_too(packing):
    config = dataclasses.replace(CONFIG, packing=packing, random_offset=False, epochs=2)
    corpus = corpus_of([30] * 50)

    def order(seed):
        return targets_of(list(train_batches(config, corpus, seed=seed)))

    once = order(0)
    first, second = np.split(once, 2)
    assert sorted(first) == sorted(second) and list(first) != list(second)
    assert list(once) != list(order(1))
    np.testing.assert_array_equal(once, order(0))
    # An epoch of one seed is not an epoch of the next.
    assert list(second) != list(np.split(order(1), 2)[0])


def test_mixtures_keep_their_shares_and_visit_every_row():
    big, small = corpus_of([2000]), corpus_of([300], first=10_000)
    config = dataclasses.replace(CONFIG, weights=(3.0, 1.0), batch_size=8, random_offset=False)
    iterator = train_batches(config, (big, small), seed=0)
    batches = [next(iterator) for _ in range(40)]
    is_small = (stacked(batches)["targets"][:, 0] >= 10_000) & (
        stacked(batches)["targets"][:, 0] != 1_000_000
    )
    assert is_small.mean() == pytest.approx(0.25, abs=0.01)
    for batch in batches:
        assert (batch["targets"][:, 0] >= 10_000).sum() in (1, 2, 3), "mixed within every batch"
    small_rows = stacked(batches)["inputs"][is_small][:38]
    assert len(set(small_rows[:19, 0].tolist())) == 19, "an epoch of the small corpus"
    # Without weights an epoch is every row of every corpus, once.
    everything = targets_of(epoch(dataclasses.replace(config, weights=()), (big, small)))
    expected = np.concatenate([big.tokens, small.tokens])
    assert sorted(everything.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("end_of_text", [True, False])
def test_evaluation_covers_the_split_in_order_and_counts_its_bytes(packing, end_of_text):
    corpora = [corpus_of([50, 3, 20], end_of_text), corpus_of([7, 41], end_of_text, first=5000)]
    config = dataclasses.replace(CONFIG, packing=packing, end_of_text=end_of_text)
    batches = evaluation_batches(config, corpora)
    seen = targets_of(list(batches))
    plain_stream = packing == "concat" and not end_of_text
    expected = np.concatenate([c.tokens[1:] if plain_stream else c.tokens for c in corpora])
    if packing == "best_fit":
        seen, expected = np.sort(seen), np.sort(expected)
    np.testing.assert_array_equal(seen, expected)
    assert len(seen) == batches.num_targets and len(list(batches)) == len(batches)
    # Every id below a million stands for one byte here, end-of-text for none.
    assert batches.num_bytes == (seen < 1_000_000).sum()
    assert {b["inputs"].shape for b in batches} == {(4, 16)}


def test_a_corpus_shorter_than_a_block_is_named():
    with pytest.raises(ConfigError, match=r"data\.block_size=16 .*test.* 6 tokens"):
        train_batches(CONFIG, corpus_of([5]), seed=0)
    with pytest.raises(ConfigError, match="no tokens"):
        train_batches(CONFIG, corpus_of([]), seed=0)
    assert len(list(evaluation_batches(CONFIG, corpus_of([5])))) == 1


def test_position_tells_where_a_batch_lies():
    iterator = train_batches(CONFIG, CORPUS, seed=0)
    rows = iterator.rows[0].num_rows
    assert iterator.position(0) == (0, 0)
    assert iterator.position(rows) == (4, 0)
    assert iterator.batches_per_epoch == -(-rows // 4)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), size=st.integers(30, 40))
def test_best_fit_decreasing_is_what_its_name_says(lengths, size):
    rows = best_fit_decreasing(np.array(lengths), size)
    spaces = []
    for length in sorted(lengths, reverse=True):  # one item at a time
        fitting = [(space, i) for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting)[1]] -= length
        else:
            spaces.append(size - length)
    used = np.bincount(rows, weights=lengths)
    assert sorted(size - used) == sorted(spaces)
    first = [list(rows).index(row) for row in range(len(used))]
    assert first == sorted(first), "rows come in the order of the corpus"


def test_planned_packing_is_at_least_as_dense_as_packing_while_reading():
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    ours = best_fit_decreasing(lengths, 256).max() + 1
    documents = grain.MapDataset.source(
        [{"x": np.ones(length, np.int32)} for length in lengths]
    ).to_iter_dataset()
    packed = grain.experimental.BestFitPackIterDataset(
        documents, length_struct={"x": 256}, num_packing_bins=32
    )
    assert ours <= sum(1 for _ in packed)
    assert ours <= 1.02 * lengths.sum() / 256 + 1


def test_prefetching_to_the_device_reports_what_was_consumed():
    plain = train_batches(CONFIG, CORPUS, seed=2)
    expected = [next(plain)["targets"] for _ in range(12)]
    sent = []

    def put(batch):
        sent.append(batch)
        return batch["targets"]

    ahead = prefetch_to_device(train_batches(CONFIG, CORPUS, seed=2), put, depth=3)
    np.testing.assert_array_equal([next(ahead) for _ in range(4)], expected[:4])
    assert len(sent) == 7
    state = ahead.get_state()
    assert state["batch"] == 4
    np.testing.assert_array_equal([next(ahead) for _ in range(4)], expected[4:8])
    ahead.set_state(state)
    np.testing.assert_array_equal([next(ahead) for _ in range(8)], expected[4:])
    finite = train_batches(dataclasses.replace(CONFIG, epochs=1), CORPUS, seed=2)
    assert len(list(prefetch_to_device(finite, put))) == finite.num_batches

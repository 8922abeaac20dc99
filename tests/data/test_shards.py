import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import tokenizers
from lm.data import entry, prepare, train_batches
from lm.data.config import DataConfig
from lm.data.shards import Sharded, ShardWriter, load_shards, read_shards, right_sizes, shard_name
from lm.tokenizers import TokenizerConfig


def write(folder, items, size, pieces=3):
    writer = ShardWriter(folder, "x", items.dtype, size)
    for piece in np.array_split(items, pieces):
        writer.append(piece)
    writer.close()
    assert writer.length == len(items)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_sharded_array_reads_like_the_array(tmp_path_factory, data):
    length = data.draw(st.integers(0, 50))
    size = data.draw(st.integers(1, 60))
    items = np.arange(7, 7 + length, dtype=np.uint16)
    folder = tmp_path_factory.mktemp("shards")
    write(folder, items, size, data.draw(st.integers(1, 5)))
    assert len(list(folder.iterdir())) == -(-length // size)
    x = read_shards(folder, "x", "uint16", length, size)
    assert isinstance(x, Sharded) == (length > size) and x.dtype == items.dtype
    np.testing.assert_array_equal(np.asarray(x), items)
    np.testing.assert_array_equal(load_shards(folder, "x", "uint16", length, size), items)
    bounds = st.one_of(st.none(), st.integers(-60, 60))
    cut = slice(data.draw(bounds), data.draw(bounds), data.draw(st.sampled_from([None, 1, 2, -1])))
    np.testing.assert_array_equal(x[cut], items[cut])
    if length:
        index = np.array(data.draw(st.lists(st.integers(-length, length - 1), max_size=20)), int)
        np.testing.assert_array_equal(x[index], items[index])
        square = np.resize(np.arange(length), (2, 3))
        np.testing.assert_array_equal(x[square], items[square])
        assert x[length - 1] == items[-1] and x[-length] == items[0]


def test_an_index_outside_is_an_error(tmp_path):
    write(tmp_path, np.arange(10), 4)
    x = read_shards(tmp_path, "x", "int64", 10, 4)
    for index in (10, -11, np.array([3, 10])):
        with pytest.raises(IndexError, match="10 items"):
            x[index]


def test_missing_or_cut_files_are_noticed(tmp_path):
    write(tmp_path, np.arange(10), 4)
    assert right_sizes(tmp_path, "x", "int64", 10, 4)
    assert not right_sizes(tmp_path, "x", "int32", 10, 4)
    (tmp_path / shard_name("x", 1)).unlink()
    with pytest.raises(FileNotFoundError):
        right_sizes(tmp_path, "x", "int64", 10, 4)


@pytest.mark.parametrize(
    "packing, objective",
    [("concat", "causal"), ("best_fit", "causal"), ("best_fit", "span_corruption")],
)
def test_batches_do_not_depend_on_the_size_of_files(tmp_path, monkeypatch, packing, objective):
    def batches(shard_items, name):
        monkeypatch.setattr(entry, "SHARD_ITEMS", shard_items)
        config = DataConfig(
            path="storyworld",
            num_documents=30,
            validation_fraction=0.2,
            block_size=64,
            batch_size=4,
            packing=packing,
            num_threads=0,
            cache_dir=str(tmp_path / name),
        )
        tokenizer = tokenizers.train(TokenizerConfig(kind="byte", num_sentinels=20), [])
        corpora, _ = prepare(config, tokenizer, 0)
        assert isinstance(corpora[0].tokens, Sharded) == (shard_items < 1000)
        rows = train_batches(config, corpora, seed=1, objective=objective, tokenizer=tokenizer)
        return [next(rows) for _ in range(10)]

    for whole, cut in zip(batches(1 << 28, "whole"), batches(100, "cut"), strict=True):
        assert whole.keys() == cut.keys()
        for key in whole:
            np.testing.assert_array_equal(whole[key], cut[key])

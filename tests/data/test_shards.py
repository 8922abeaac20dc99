import json
import os
import pathlib

import numpy as np
import pytest
from bytes_tokenizer import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import tokenizers
from lm.data import cache, prepare, train_batches
from lm.data.config import DataConfig
from lm.data.shards import ShardedArray
from lm.tokenizers import TokenizerConfig

STORIES = DataConfig(path="storyworld", num_documents=30, validation_fraction=0.2)


def sharded(folder, items, sizes):
    paths = [folder / str(number) for number in range(len(sizes))]
    for path, part in zip(paths, np.split(items, np.cumsum(sizes)[:-1])):
        part.tofile(path)
    return ShardedArray(paths, sizes, items.dtype)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_arrays_in_several_files_read_like_one(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    length = sum(sizes)
    items = np.arange(7, 7 + length, dtype=np.uint16)
    x = sharded(tmp_path_factory.mktemp("shards"), items, sizes)
    assert len(x) == length and x.dtype == items.dtype
    np.testing.assert_array_equal(np.asarray(x), items)
    bounds = st.one_of(st.none(), st.integers(-60, 60))
    cut = slice(data.draw(bounds), data.draw(bounds), data.draw(st.sampled_from([None, 1, 2, -1])))
    np.testing.assert_array_equal(x[cut], items[cut])
    index = np.array(data.draw(st.lists(st.integers(-length, length - 1), max_size=20)), int)
    np.testing.assert_array_equal(x[index], items[index])
    square = np.resize(np.arange(length), (2, 3))
    np.testing.assert_array_equal(x[square], items[square])
    assert x[length - 1] == items[-1] and x[-length] == items[0]


def test_an_index_outside_is_an_error(tmp_path):
    x = sharded(tmp_path, np.arange(10), [4, 4, 2])
    for index in (10, -11, np.array([3, 10])):
        with pytest.raises(IndexError, match="10 items"):
            x[index]


@pytest.mark.parametrize(
    "packing, objective",
    [("concat", "causal"), ("best_fit", "causal"), ("best_fit", "span_corruption")],
)
def test_batches_do_not_depend_on_the_size_of_shards(tmp_path, monkeypatch, packing, objective):
    def batches(shard_bytes):
        monkeypatch.setattr(cache, "SHARD_BYTES", shard_bytes)
        config = DataConfig(
            path="storyworld",
            num_documents=30,
            validation_fraction=0.2,
            block_size=64,
            batch_size=4,
            packing=packing,
            num_threads=0,
            cache_dir=str(tmp_path / str(shard_bytes)),
        )
        tokenizer = tokenizers.train(TokenizerConfig(kind="byte", num_sentinels=20), [])
        corpora, _ = prepare(config, tokenizer, 0)
        assert isinstance(corpora[0].tokens, ShardedArray) == (shard_bytes < 3000)
        rows = train_batches(config, corpora, seed=1, objective=objective, tokenizer=tokenizer)
        return corpora[0].key, [next(rows) for _ in range(10)]

    (whole_key, whole), (cut_key, cut) = batches(64 << 20), batches(1024)
    assert whole_key == cut_key
    for one, other in zip(whole, cut, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_entries_of_the_format_before_are_read_or_made_again(tmp_path):
    """Their arrays were in files of 2**28 items, whatever the documents, and none without items."""
    config = DataConfig(path="storyworld", num_documents=9, cache_dir=str(tmp_path), split="hash",
                        validation_fraction=0.0)  # fmt: skip
    ((expected,), _) = prepare(config, ByteTokenizer(), 0)
    (path,) = tmp_path.glob("*/meta.json")
    meta = json.loads(path.read_text())
    (splits,) = meta.pop("shards")
    for facts in splits.values():
        facts["first_token_bytes"] = 1
    old = {**meta, "version": 2, "shard_items": 1 << 28, "splits": splits}
    del old["notes"]  # as entries were before there were any
    path.write_text(json.dumps(old))
    os.remove(path.parent / "validation.tokens-00000.bin")
    notes = []
    ((found,), _) = prepare(config, ByteTokenizer(), 0, notes.append)
    assert not notes and found.key == expected.key
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    splits["train"]["num_tokens"] = 1 << 30  # in four files
    path.write_text(json.dumps(old))
    ((again,), _) = prepare(config, ByteTokenizer(), 0, notes.append)
    assert "older format, and is made again" in notes[0]
    np.testing.assert_array_equal(again.tokens, expected.tokens)
    assert json.loads(path.read_text())["version"] == 3 and pathlib.Path(path).exists()

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from bytes_tokenizer import ByteTokenizer, SeparateBosTokenizer

from lm.config import ConfigError
from lm.data import cache, entry, prepare, shards
from lm.data.config import DataConfig

TEXTS = [f"document {i}: " + "höher 🎈 " * (i % 7) for i in range(300)]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(TEXTS))
    return DataConfig(path=str(path), validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def texts_of(corpus):
    """The documents again, from the tokens."""
    result = []
    for start, end in zip(corpus.offsets[:-1], corpus.offsets[1:]):
        ids = np.array(corpus.tokens[start:end])
        if corpus.end_of_text:
            assert ids[-1] == corpus.eos_id
            ids = ids[:-1]
        result.append(bytes(ids.astype(np.uint8)).decode())
    return result


def prepared(config, tokenizer=None, seed=0):
    notes = []
    train, validation = prepare(config, tokenizer or ByteTokenizer(), seed, notes.append)
    return train[0], validation[0], notes


@pytest.mark.parametrize("end_of_text", [True, False])
def test_tokens_give_back_every_document(config, end_of_text):
    config = dataclasses.replace(config, end_of_text=end_of_text)
    train, validation, _ = prepared(config)
    assert sorted(texts_of(train) + texts_of(validation)) == sorted(TEXTS)
    assert train.num_bytes == sum(len(text.encode()) for text in texts_of(train))
    assert train.num_tokens == train.num_bytes + end_of_text * train.num_documents
    assert validation.num_bytes == sum(len(text.encode()) for text in texts_of(validation))


def test_written_once_and_keyed_by_what_matters(config):
    train, _, notes = prepared(config)
    assert any("tokenising" in note for note in notes)
    again, _, notes = prepared(dataclasses.replace(config, batch_size=3, packing="best_fit"))
    assert not notes and again.key == train.key
    np.testing.assert_array_equal(again.tokens, train.tokens)
    for change in (
        {"validation_fraction": 0.3},
        {"split": "position"},
        {"end_of_text": False},
    ):
        assert prepared(dataclasses.replace(config, **change))[0].key != train.key
    other, _, _ = prepared(config, SeparateBosTokenizer())
    assert other.key != train.key
    assert (train.tokens.dtype, other.tokens.dtype) == (np.uint16, np.uint32)
    with open(config.path, "w") as file:
        json.dump(TEXTS[1:], file)
    assert prepared(config)[0].key != train.key


def test_chunks_and_parts_do_not_show(config, monkeypatch):
    whole, _, _ = prepared(config)
    monkeypatch.setattr(entry, "_CHUNK_CHARS", 17)
    monkeypatch.setattr(entry, "_parts", lambda text: cut_parts(text, 17))
    config = dataclasses.replace(config, cache_dir=config.cache_dir + "2")
    small, _, _ = prepared(config)
    np.testing.assert_array_equal(whole.tokens, small.tokens)
    np.testing.assert_array_equal(whole.offsets, small.offsets)


cut_parts = entry._parts


def test_parts_end_with_lines_and_lose_nothing():
    text = "".join("x" * n + "\n" for n in range(50))
    parts = cut_parts(text, 60)
    assert "".join(parts) == text and max(map(len, parts)) <= 60
    assert all(part.endswith("\n") for part in parts[:-1])
    assert "".join(cut_parts("y" * 500, 60)) == "y" * 500


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry / "train.tokens-00000.bin", 100),
        lambda entry: os.truncate(entry / "validation.offsets-00000.bin", 16),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: (entry / "train.tokens-00000.bin").unlink(),
    ],
)
def test_a_damaged_entry_is_made_again_with_a_notice(config, damage):
    train, _, _ = prepared(config)
    expected = np.array(train.tokens)
    folder = cache.cache_directory(config)
    (made,) = [p for p in folder.iterdir() if (p / "meta.json").exists()]
    damage(made)
    again, _, notes = prepared(config)
    assert any("damaged" in note for note in notes)
    np.testing.assert_array_equal(again.tokens, expected)
    assert not prepared(config)[2]
    assert not list(folder.glob(".tmp*"))


class SlowTokenizer(ByteTokenizer):
    def encode_batch(self, texts):
        time.sleep(0.3)
        return super().encode_batch(texts)


def _write_concurrently(config, locks, barrier, queue):
    if not locks:
        cache.fcntl = None
    barrier.wait()
    train, validation, notes = prepared(config, SlowTokenizer())
    wrote = any("tokenising" in note for note in notes)
    queue.put((wrote, train.tokens.tobytes(), validation.tokens.tobytes()))


@pytest.mark.parametrize("locks", [True, False])
def test_concurrent_writers_agree(config, locks):
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    workers = [
        context.Process(target=_write_concurrently, args=(config, locks, barrier, queue))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len({result[1:] for result in results}) == 1
    if locks:  # the others waited instead of doing the work again
        assert sum(wrote for wrote, *_ in results) == 1
    assert not list(cache.cache_directory(config).glob(".tmp*"))


KILLED_WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from bytes_tokenizer import ByteTokenizer
from lm.data import prepare
from lm.data.config import DataConfig
class Stuck(ByteTokenizer):
    def encode_batch(self, texts):
        print("writing", flush=True)
        time.sleep(60)
prepare(DataConfig(path=sys.argv[2], validation_fraction=0.2, cache_dir=sys.argv[3]), Stuck(), 0)
"""


def test_a_killed_writer_leaves_no_entry_no_lock_and_no_litter(config):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", KILLED_WRITER, here, config.path, config.cache_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    folder = cache.cache_directory(config)
    assert len(list(folder.glob(".tmp*"))) == 1
    train, validation, _ = prepared(config)
    assert sorted(texts_of(train) + texts_of(validation)) == sorted(TEXTS)
    assert not list(folder.glob(".tmp*"))


def test_a_failing_writer_leaves_no_litter(config):
    class Failing(ByteTokenizer):
        def encode_batch(self, texts):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        prepared(config, Failing())
    assert not list(cache.cache_directory(config).glob(".tmp*"))


def test_a_full_disk_is_one_line(config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "sync", full)
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*No space left"):
        prepared(config)


def test_an_impossible_cache_directory_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir="):
        prepared(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache")))


def test_too_few_documents_to_hold_any_out(config):
    with open(config.path, "w") as file:
        json.dump(["only one"], file)
    with pytest.raises(ConfigError, match=r"data\.split='hash'.*data\.split='position'"):
        prepared(dataclasses.replace(config, validation_fraction=0.001))
    train, validation, _ = prepared(dataclasses.replace(config, split="position"))
    assert texts_of(train) + texts_of(validation) == ["only o", "ne"]
    train, validation = prepare(
        dataclasses.replace(config, validation_fraction=0.0), ByteTokenizer(), 0
    )
    assert texts_of(train[0]) == ["only one"] and validation == ()


def test_validation_may_be_a_corpus_of_its_own(config, tmp_path):
    shutil.copy(config.path, tmp_path / "train.json")
    (tmp_path / "other.txt").write_text("held out")
    config = dataclasses.replace(config, validation_path=str(tmp_path / "other.txt"))
    train, validation, _ = prepared(config)
    assert texts_of(train) == TEXTS
    assert texts_of(validation) == ["held out"]


def test_skipped_files_are_reported_once(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "good.txt").write_text("good text\n" * 10)
    (folder / "bad.txt").write_bytes(b"\0\1\2")
    config = dataclasses.replace(config, path=str(folder), split="position")
    train, _, notes = prepared(config)
    assert [note for note in notes if "bad.txt: binary" in note] == list(train.skipped)
    assert len(train.skipped) == 1
    assert not prepared(config)[2]

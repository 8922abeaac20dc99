import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf_tokenizers
from bytes_tokenizer import ByteTokenizer, SeparateBosTokenizer

from lm import files, tokenizers
from lm.config import ConfigError, view
from lm.data import cache, evaluation_batches, prepare, shards, train_batches
from lm.data.config import DataConfig
from lm.jobs.train import TrainJob
from lm.tokenizers import TokenizerConfig

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
    (meta,) = pathlib.Path(config.cache_dir).glob("*/meta.json")
    described = json.loads(meta.read_text())
    assert described.pop("notes") == []  # as entries were before there were any
    meta.write_text(json.dumps(described))
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


def test_groups_of_documents_do_not_show(config, monkeypatch):
    whole, _, _ = prepared(config)
    monkeypatch.setattr(shards, "_CHUNK_CHARS", 1700)
    config = dataclasses.replace(config, cache_dir=config.cache_dir + "2")
    small, _, _ = prepared(config)
    np.testing.assert_array_equal(whole.tokens, small.tokens)
    np.testing.assert_array_equal(whole.offsets, small.offsets)


DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("abcdeé🎈漢", k=DRAW.randrange(1, 9))) for _ in range(300)]
LONG = {  # texts in which places where a cut does not show are of one kind, or rare, or nowhere
    "lines": "".join(DRAW.choice(["  ", "", "\n"]) + f"{word}\n" for word in WORDS * 9),
    "one line": "".join(word + DRAW.choice(["  ", " ", "\t"]) for word in WORDS * 9),
    "no spaces": "".join(DRAW.choices(WORDS, k=4000)),
    "repeats": "漢字かな" * 3000 + "Some words.\n" * 900 + "e\u0301\u00e9" * 5000,
    "runs": "x" + "a" * 20_001 + " " * 9001 + "\n" * 5000 + "b",
}


def dummy_prefix_tokenizers(folder):
    """Two that write a space before every text they are given, and one that folds case."""
    texts = [text[:2000] for text in LONG.values()]
    with open(folder / "t5.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=300, minloglevel=3,
            byte_fallback=True, hard_vocab_limit=False,
        )  # fmt: skip
    yield tokenizers.load(folder / "t5.model")
    engine = hf_tokenizers.Tokenizer(
        hf_tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>")
    )
    engine.normalizer = hf_tokenizers.normalizers.Sequence(
        [hf_tokenizers.normalizers.Prepend("▁"), hf_tokenizers.normalizers.Replace(" ", "▁")]
    )
    steps = [("Replace", ("▁", " ")), ("ByteFallback", ()), ("Fuse", ()), ("Strip", (" ", 1, 0))]
    engine.decoder = hf_tokenizers.decoders.Sequence(
        [getattr(hf_tokenizers.decoders, name)(*given) for name, given in steps]
    )
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=names)
    engine.train_from_iterator([text[:300] for text in texts], trainer)
    engine.save(str(folder / "tokenizer.json"))
    yield tokenizers.load(folder / "tokenizer.json")
    kinds = ("wordpiece", "bpe", "sentencepiece_unigram", "char")
    for kind in kinds:
        config = TokenizerConfig(kind=kind, vocab_size=290, lowercase=kind == "wordpiece")
        yield tokenizers.train(config, texts)


def test_where_a_long_document_is_cut_does_not_show_in_its_tokens(tmp_path, monkeypatch):
    whole = [LONG[name] for name in LONG] + ["".join(LONG.values())]
    monkeypatch.setattr(shards, "_CHUNK_CHARS", 5000)
    (tmp_path / "x.json").write_text(json.dumps(whole))
    config = DataConfig(
        path=str(tmp_path / "x.json"), cache_dir=str(tmp_path / "cache"), validation_fraction=0.0
    )
    asked = []
    for tokenizer in dummy_prefix_tokenizers(tmp_path):
        encode = tokenizer.encode_batch
        monkeypatch.setattr(
            tokenizer, "encode_batch", lambda texts, e=encode: asked.extend(texts) or e(texts)
        )
        ((corpus,), _) = prepare(config, tokenizer, 0)
        for number, ids in enumerate(encode(whole)):
            low, high = corpus.offsets[number : number + 2]
            found = np.array(corpus.tokens[low : high - 1])
            assert tokenizer.decode(found) == tokenizer.decode(ids)
            if tokenizer.kind == "sentencepiece_unigram":  # sums of scores round, and decide ties
                found, ids = np.sort(found), np.sort(ids)
            np.testing.assert_array_equal(found, ids, f"{tokenizer}, {number}")
    assert max(map(len, asked)) < len(whole[-1])


@pytest.mark.slow
def test_a_document_of_nine_megabytes_comes_back_as_it_was(tmp_path):
    text = LONG["one line"] * (9 * 2**20 // len(LONG["one line"]) + 1)
    (tmp_path / "book.txt").write_text(text)
    config = DataConfig(
        path=str(tmp_path / "book.txt"), cache_dir=str(tmp_path / "cache"), validation_fraction=0.0
    )
    engine = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    engine.pre_tokenizer = hf_tokenizers.pre_tokenizers.Metaspace()  # "▁" before every text
    engine.decoder = hf_tokenizers.decoders.Metaspace()
    trainer = hf_tokenizers.trainers.BpeTrainer(special_tokens=["</s>"])
    engine.train_from_iterator([LONG["one line"]], trainer)
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load(tmp_path / "tokenizer.json")
    ((corpus,), _) = prepare(config, tokenizer, 0)
    assert tokenizer.decode(corpus.tokens) == text


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
        files.fcntl = None
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
    results = [queue.get(timeout=300) for _ in workers]
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

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*No space left"):
        prepared(config)


def test_an_impossible_cache_directory_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir="):
        prepared(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache")))


def test_too_few_documents_to_hold_any_out_are_cut_and_it_says_so(config):
    for texts, train, validation in (
        (["only one"], ["only on"], ["e"]),
        (["first", "second"], ["first", "secon"], ["d"]),
    ):
        with open(config.path, "w") as file:
            json.dump(texts, file)
        few = dataclasses.replace(config, validation_fraction=0.02)
        for _ in range(2):  # made, and found in the cache
            found = prepared(few)
            assert (texts_of(found[0]), texts_of(found[1])) == (train, validation)
            (line,) = [note for note in found[2] if "held out" in note]
            assert "data.split='hash'" in line and f"{len(texts)} document" in line
            assert "2.00%" in line
    with open(config.path, "w") as file:
        json.dump(["x"], file)
    with pytest.raises(ConfigError, match=r"leaves no documents.*data.validation_path"):
        prepared(few)
    nothing = dataclasses.replace(config, validation_fraction=0.0)
    ((corpus,), validation) = prepare(nothing, ByteTokenizer(), 0)
    assert texts_of(corpus) == ["x"] and validation == ()


@pytest.mark.parametrize("number", [1, 2, 12])
def test_any_number_of_texts_suits_every_config(tmp_path, number):
    cells = [f"A line of file {i % number}, number {i}.\tAnother." for i in range(300 * number)]
    for i in range(number):
        (tmp_path / f"{i}.txt").write_text("\n".join(cells[i::number]))
        (tmp_path / f"{i}.tsv").write_text("\n".join(cells[i::number]))
    tokenizer = tokenizers.train(
        TokenizerConfig(kind="byte", mask_token=True, num_sentinels=99), []
    )
    for path in sorted(pathlib.Path("configs").glob("*.py")):
        config = runpy.run_path(str(path))["get_config"]()
        if config.job != "train":
            continue
        config.data.path = f"{tmp_path}/*.{'tsv' if path.stem == 'translate' else 'txt'}"
        if path.stem == "translate":
            config.data.text_field = "source,target"
        config.data.cache_dir = str(tmp_path / "cache")
        data = view(TrainJob, config).data
        corpora = prepare(data, tokenizer, 0, lambda line: None)
        assert bool(corpora[1]) == bool(data.validation_fraction)
        for some, batches in zip(filter(None, corpora), (train_batches, evaluation_batches)):
            given = {"seed": 0} if batches is train_batches else {}
            batch = next(iter(batches(data, some, objective=config.objective.name,
                                      tokenizer=tokenizer, **given)))  # fmt: skip
            assert batch["weights"].sum() > 0, path


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
    _, _, notes = prepared(config)
    assert len([note for note in notes if "bad.txt: binary" in note]) == 1
    assert not prepared(config)[2]

"""Shards written by many workers: here, as a loop in place of Apache Beam, and on Beam itself."""

import dataclasses
import json
import os
import pathlib
import re
import sys

import pytest
from corpus_files import contents, write_all_kinds

from lm import tokenizers
from lm.config import ConfigError, defaults, view
from lm.data import cache, corpora, files, parallel_tokenize, prepare, storage
from lm.data.config import DataConfig
from lm.data.parallel_tokenize import BeamConfig, each
from lm.jobs import corpus as job
from lm.tokenizers import TokenizerConfig

GOOD = '{"text": "good"}'
BYTES = tokenizers.train(TokenizerConfig(kind="byte"), [])
ONE_WORKER = BeamConfig(workers=1, part_bytes=1500)


@pytest.fixture
def shard_bytes(monkeypatch):
    """Sets how much input a shard takes; files are recognised by the workers, too."""
    monkeypatch.setattr(parallel_tokenize, "_SMALL", 0)
    return lambda size: monkeypatch.setattr(cache, "SHARD_BYTES", size)


@pytest.fixture
def here(monkeypatch, shard_bytes):
    """Does what Beam's workers would, through the files that tell them, last task first."""

    def run(numbers, folder, beam):
        parallel_tokenize._do(reversed(numbers), folder)

    monkeypatch.setattr(parallel_tokenize, "_run", run)
    monkeypatch.setattr(parallel_tokenize, "check_runner", lambda config: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # for thousands of tiny files
    shard_bytes(700)


@pytest.fixture
def apache_beam():
    return pytest.importorskip("apache_beam", reason="needs Apache Beam: pip install 'lm[beam]'")


def one_process(config, folder, tokenizer=BYTES):
    prepare(dataclasses.replace(config, cache_dir=str(folder)), tokenizer, 0, lambda line: None)
    return entries(folder)


def many(config, folder, beam=ONE_WORKER, tokenizer=BYTES):
    config = dataclasses.replace(config, cache_dir=str(folder))
    parallel_tokenize.prepare(config, tokenizer, 0, beam, lambda line: None)
    return entries(folder)


def entries(folder):
    """Everything but locks and remembered digests."""
    found = contents(pathlib.Path(folder))
    return {k: v for k, v in found.items() if not k.startswith(("locks/", "hashes.json"))}


def meta_of(found):
    (meta,) = (json.loads(data) for name, data in found.items() if name.endswith("meta.json"))
    return meta


@pytest.mark.parametrize(
    "path, settings, size",
    [
        ("files", {"split": "hash"}, 40),  # shorter than most lines
        ("files", {"split": "position"}, 700),
        ("pairs", {"split": "hash", "text_field": ("source", "target")}, 700),
        ("pairs", {"split": "position", "text_field": ("source", "target")}, 3000),
        ("storyworld", {"num_documents": 23}, 2048),
        ("translation", {"num_documents": 23}, 2048),
        # of so few some are held out by position
        ("storyworld", {"num_documents": 23, "validation_fraction": 0.02}, 2048),
        ("translation", {"num_documents": 23, "validation_fraction": 0.02}, 2048),
    ],
)
def test_many_workers_write_the_bytes_of_one_process(
    tmp_path, here, shard_bytes, path, settings, size
):
    config = DataConfig(**{"path": path, "validation_fraction": 0.3, **settings})
    if path in ("files", "pairs"):
        folder = write_all_kinds(tmp_path / "files", pairs=path == "pairs")
        config = dataclasses.replace(config, path=str(folder))
    shard_bytes(size)
    parts = corpora.source(config.path, config, 0).parts(size)
    expected = one_process(config, tmp_path / "one")
    found = many(config, tmp_path / "many")
    assert found == expected
    assert len(found) == 1 + 4 * len(parts) > 20
    if path in ("files", "pairs"):
        cut = {span.path[-8:] for part in parts for span in part.spans if span.start}
        assert size > 2000 or cut >= {"/a.jsonl", "c.ndjson", ".parquet"}
        assert "more" in meta_of(found)["skipped"][-1]  # so the skipped lines were counted, too


def test_several_paths_are_entries_of_their_own_that_training_finds(tmp_path, here, monkeypatch):
    (tmp_path / "b.txt").write_text("held out")
    config = DataConfig(
        path=(str(write_all_kinds(tmp_path / "files")), "storyworld"),
        validation_path=str(tmp_path / "b.txt"),
        num_documents=20,
        cache_dir=str(tmp_path / "cache"),
    )
    made = parallel_tokenize.prepare(config, BYTES, 0, ONE_WORKER, lambda line: None)
    monkeypatch.setattr(cache, "write_shard", None)
    monkeypatch.setattr(storage, "digest", None)
    train, validation = prepare(config, BYTES, 0)
    assert [corpus.num_tokens for corpus in (*train, *validation)] == [
        corpus.splits["train"]["num_tokens"] for corpus in made
    ]
    assert made[2].splits["train"]["num_bytes"] == len("held out")


def error_of(function, *args):
    with pytest.raises(ConfigError) as error:
        function(*args)
    return str(error.value)


@pytest.mark.parametrize(
    "lines, on_bad_file, reason",
    [
        ([GOOD] * 90 + ["{bad"], "refuse", "line 2 from byte 1,500 on is bad: not JSON"),
        ([GOOD, ""] * 40 + ["{}"], "refuse", "record 2 from byte 700 on is bad: no text"),
        ([GOOD] * 50 + ["{}"] * 9, "refuse", r"from byte 850 on is bad: data\.text_field='te"),
        (['{"other": 1}'] * 90, "skip", r"a\.jsonl: data\.text_field='text' .* are 'other'"),
        (["{bad"] * 60 + ['{"text": 3}'] * 30, "skip", r"skipped .*a\.jsonl line 1: not JSON"),
        (["{bad"] * 90, "skip", "holds no documents: 90 skipped"),
    ],
)
def test_the_same_error_wherever_the_mistake_is(
    tmp_path, here, shard_bytes, lines, on_bad_file, reason
):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        path=str(tmp_path / "a.jsonl"), on_bad_file=on_bad_file, validation_fraction=0.0
    )
    shard_bytes(50)
    expected = error_of(one_process, config, tmp_path / "one")
    assert error_of(many, config, tmp_path / "many") == expected
    assert re.search(reason, expected), expected
    assert not entries(tmp_path / "one") and not list((tmp_path / "many").rglob("meta.json"))


def test_every_span_of_a_file_is_judged_like_a_file(tmp_path, monkeypatch, here, shard_bytes):
    monkeypatch.setattr(files, "FEW", 20)
    good, bad, empty = GOOD, '{"other": 1}', '{"text": ""}'
    lines = {
        "a": [bad] * 3 + [good] * 30,
        "b": [good] * 10 + [bad] * 20,
        "c": [bad] * 19 + [good] * 5,
        "d": [bad] * 20 + [good] * 5,
        "e": [empty] * 30 + [good] * 5,
        "f": [empty] * 30 + [bad, good],
        "g": [bad] * 7,
        "h": [good, bad],
    }
    folder = tmp_path / "files"
    folder.mkdir()
    for name, of_file in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(of_file))
    config = DataConfig(path=str(folder), validation_fraction=0.0)
    shard_bytes(1 << 20)
    meta = meta_of(one_process(config, tmp_path / "whole files"))
    assert meta["shards"][0]["train"]["num_documents"] == 30 + 10 + 5 + 5 + 1, "no d, f, g"
    shard_bytes(170)
    found = one_process(config, tmp_path / "one")
    assert many(config, tmp_path / "many") == found
    shards = [shard["train"]["num_documents"] for shard in meta_of(found)["shards"]]
    assert sum(shards) == 30 + 10 + 5 + 5 + 5 + 1 + 1, "also what is in the last spans of d and f"
    skipped = meta_of(found)["skipped"]
    assert any("b.jsonl from byte 170 on: data.text_field='text' is" in line for line in skipped)


def test_an_interrupted_job_leaves_no_entry_and_goes_on(tmp_path, here, monkeypatch):
    config = DataConfig(path=str(write_all_kinds(tmp_path / "files")))
    expected = one_process(config, tmp_path / "one")
    done = []

    def finish(numbers, folder, beam):
        parallel_tokenize._do(numbers, folder)
        done.extend(f"{folder} {number}" for number in numbers)

    def run_some(numbers, folder, beam):
        if folder.endswith("/tokens"):
            finish(numbers[:5], folder, beam)
            # Another worker that was given the same task, and one that was killed.
            parallel_tokenize._do(numbers[:1], folder)
            shards = pathlib.Path(folder).parent / "shards"
            (shards / "train.tokens-00000.bin.0123456789ab").write_bytes(b"half")
            raise KeyboardInterrupt
        finish(numbers, folder, beam)

    monkeypatch.setattr(parallel_tokenize, "_run", run_some)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            many(config, tmp_path / "many")
        assert not list((tmp_path / "many").rglob("meta.json"))
    monkeypatch.setattr(parallel_tokenize, "_run", finish)
    assert many(config, tmp_path / "many") == expected
    shards = [name for name in done if "/tokens " in name]
    assert len(shards) == len(set(shards)) > 10  # nothing was done twice


def test_results_are_data_and_what_is_none_is_made_again(tmp_path, here):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "0.json").write_bytes(b"cos\nsystem\n(S'touch HERE'\ntR.")  # a planted pickle
    (folder / "1.json").write_text('{"result": 7}')
    (folder / "2.json").write_text('{"error": "no"}')
    assert each(abs, [-1, -2, -3], str(folder), BeamConfig()) == [1, 7, 3]
    assert not (tmp_path / "HERE").exists()


def test_results_that_nobody_can_see_are_one_line(tmp_path, here, monkeypatch):
    monkeypatch.setattr(parallel_tokenize, "_run", lambda *args: None)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"left no .*cache_dir must be storage that all workers"):
        many(DataConfig(path=str(tmp_path / "a.txt")), tmp_path / "many")


def test_from_an_object_store_to_an_object_store(tmp_path, here):
    texts = write_all_kinds(tmp_path / "files")
    for path in texts.iterdir():
        storage.write_bytes(f"memory://bucket/files/{path.name}", path.read_bytes())
    notes = []
    config = DataConfig(path="memory://bucket/files", cache_dir="memory://bucket/cache")
    (made,) = parallel_tokenize.prepare(config, BYTES, 0, ONE_WORKER, notes.append)
    assert storage.names("memory://bucket/cache") == [pathlib.Path(made.entry).name, "hashes.json"]
    # One process reads the same store, and its entry is the same.
    local = dataclasses.replace(config, cache_dir=str(tmp_path / "one"))
    for name, data in one_process(local, tmp_path / "one").items():
        assert storage.read_bytes(f"memory://bucket/cache/{name}") == data
    # Again, there is nothing to do. Training cannot map a store into memory, and says so.
    del notes[:]
    (again,) = parallel_tokenize.prepare(config, BYTES, 0, ONE_WORKER, notes.append)
    assert again == made and not [note for note in notes if "tokenising" in note]
    with pytest.raises(ConfigError, match=r"cache_dir=.*must be a directory"):
        prepare(config, BYTES, 0)
    with pytest.raises(ConfigError, match=r"data\.path='memory://bucket/nothing' does not exist"):
        prepare(dataclasses.replace(local, path="memory://bucket/nothing"), BYTES, 0)
    storage.remove_tree("memory://bucket")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_beams_workers_write_the_bytes_of_one_process(tmp_path, apache_beam, shard_bytes, workers):
    config = DataConfig(path=str(write_all_kinds(tmp_path / "files")), validation_fraction=0.3)
    tokenizer = tokenizers.train(
        TokenizerConfig(kind="bpe", vocab_size=300), ["some text to train on"]
    )
    shard_bytes(700)
    found = many(config, tmp_path / "many", BeamConfig(workers=workers), tokenizer)
    assert found == one_process(config, tmp_path / "one", tokenizer) and len(found) > 40


def fails(task):
    raise RuntimeError(f"task {task} cannot be done")


def test_a_failed_pipeline_is_one_line_that_says_how_to_go_on(tmp_path, apache_beam):
    folder = str(tmp_path / "tasks")
    with pytest.raises(ConfigError, match=r"runner='DirectRunner' failed: .*cannot be done") as e:
        each(fails, [1, 2], folder, BeamConfig(workers=1))
    assert "\n" not in str(e.value) and f"go on with what is in {folder}" in str(e.value)
    assert each(abs, [-1, -2], folder + "2", BeamConfig(workers=1)) == [1, 2]


def test_an_unknown_runner_is_one_line(apache_beam):
    with pytest.raises(ConfigError, match=r"config\.beam\.runner='NoSuchRunner' cannot be used"):
        parallel_tokenize.check_runner(BeamConfig(runner="NoSuchRunner"))


def test_without_apache_beam_the_job_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm\[beam\]'"):
        job.run(defaults(job.CorpusJob), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_options_reach_the_runner():
    options = "--project=p --region='a b'"
    assert BeamConfig(runner="DataflowRunner", options=options).arguments()[:3] == [
        "--runner=DataflowRunner",
        "--project=p",
        "--region=a b",
    ]
    assert "--direct_num_workers=3" in BeamConfig(workers=3).arguments()
    for wrong, message in (
        ({"options": "project=p"}, r"options='project=p' has 'project=p': write --NAME=VALUE"),
        ({"options": "--a='"}, r"options=.* No closing quotation"),
        ({"workers": -1}, r"workers=-1 must be at least 0"),
        ({"part_bytes": 0}, r"part_bytes=0 must be at least 1"),
        ({"runner": ""}, r"runner='' must name a runner"),
    ):
        config = defaults(BeamConfig)
        config.update(wrong)
        with pytest.raises(ConfigError, match=message):
            view(BeamConfig, config, "config.beam")


def test_the_job_makes_what_training_with_its_tokenizer_finds(tmp_path, apache_beam, capsys):
    config = defaults(job.CorpusJob)
    config.data.path = str(write_all_kinds(tmp_path / "files"))
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.validation_fraction = 0.3
    config.tokenizer.kind = "char"
    config.beam.workers = 1
    (made,) = job.run(config, str(tmp_path / "run"))
    assert "token cache" in capsys.readouterr().out
    notes = []
    tokenizer = tokenizers.load(tmp_path / "run" / "tokenizer")
    train, _ = prepare(view(DataConfig, config.data), tokenizer, 0, notes.append)
    assert not notes and train[0].num_tokens == made.splits["train"]["num_tokens"]
    job.run(config, str(tmp_path / "run"))
    assert "tokenising" not in capsys.readouterr().out
    config.tokenizer.kind = "byte"
    with pytest.raises(ConfigError, match=r"--workdir=.*tokenizer\.kind='char'"):
        job.run(config, str(tmp_path / "run"))

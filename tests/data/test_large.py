"""Corpora tokenised in parts, here without Apache Beam: `each` is an ordinary loop."""

import dataclasses
import json
import os
import pathlib

import pytest
from corpus_files import contents, write_all_kinds

from lm import tokenizers
from lm.config import ConfigError
from lm.data import beam, cache, entry, files, large, parts, paths, prepare, storage
from lm.data.beam import BeamConfig
from lm.data.config import DataConfig
from lm.tokenizers import TokenizerConfig

BYTES = tokenizers.train(TokenizerConfig(kind="byte"), [])
TINY = BeamConfig(part_bytes=700)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Does what Beam's workers would, through the files that tell them, last task first."""

    def run(numbers, folder, beam_config):
        for number in reversed(numbers):
            beam._do(number, folder)

    monkeypatch.setattr(beam, "_run", run)
    monkeypatch.setattr(large, "check_runner", lambda config: None)
    monkeypatch.setattr(large, "_SMALL", 0)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # for thousands of tiny files


@pytest.fixture
def tiny_shards(monkeypatch):
    monkeypatch.setattr(entry, "SHARD_ITEMS", 100)
    monkeypatch.setattr(large, "SHARD_ITEMS", 100)


def one_process(config, folder):
    prepare(dataclasses.replace(config, cache_dir=str(folder)), BYTES, 0, lambda line: None)
    return entries(folder)


def in_parts(config, folder, beam_config=TINY):
    config = dataclasses.replace(config, cache_dir=str(folder))
    made = large.prepare(config, BYTES, 0, beam_config, lambda line: None)
    return made, entries(folder)


def entries(folder):
    """Everything but locks and remembered digests."""
    found = contents(pathlib.Path(folder))
    return {k: v for k, v in found.items() if not k.startswith(("locks/", "hashes.json"))}


def test_tiny_parts_really_cut_files(tmp_path):
    config = DataConfig(path=str(write_all_kinds(tmp_path / "files")))
    corpus = large.corpora.source(config.path, config, 0)
    cut = [span.path[-8:] for part in corpus.parts(700) for span in part.spans if span.start]
    assert {"/a.jsonl", "c.ndjson", ".parquet"} <= set(cut) and len(cut) > 10


@pytest.mark.parametrize(
    "split, pairs, part_bytes",
    [
        ("hash", False, 40),  # shorter than most lines
        ("hash", True, 700),
        ("position", False, 700),
        ("position", True, 1 << 30),
    ],
)
def test_the_same_bytes_as_one_process(tmp_path, tiny_shards, split, pairs, part_bytes):
    files = write_all_kinds(tmp_path / "files", pairs=pairs)
    config = DataConfig(
        path=str(files),
        split=split,
        validation_fraction=0.3,
        text_field=("source", "target") if pairs else "text",
    )
    expected = one_process(config, tmp_path / "one")
    _, found = in_parts(config, tmp_path / "many", BeamConfig(part_bytes=part_bytes))
    assert found == expected
    assert sum("train.tokens" in name for name in found) > 3  # several shards
    (meta,) = (json.loads(data) for name, data in found.items() if name.endswith("meta.json"))
    assert "more" in meta["skipped"][-1]  # so the skipped lines were counted, too


def test_training_finds_the_entry_without_reading_or_writing(tmp_path, monkeypatch):
    files = write_all_kinds(tmp_path / "files")
    config = DataConfig(path=(str(files), "storyworld"), num_documents=20, cache_dir=str(tmp_path))
    made = large.prepare(config, BYTES, 0, TINY, lambda line: None)
    monkeypatch.setattr(entry, "write_splits", None)
    monkeypatch.setattr("lm.data.hashes.digest", None)
    train, _ = prepare(config, BYTES, 0)
    assert [corpus.num_tokens for corpus in train] == [
        corpus.splits["train"]["num_tokens"] for corpus in made
    ]


@pytest.mark.parametrize("path", ["storyworld", "translation"])
@pytest.mark.parametrize("fraction", [0.3, 0.02])  # of so few the latter is cut by position
def test_generated_corpora_are_made_in_parts(tmp_path, path, fraction):
    config = DataConfig(path=path, num_documents=23, validation_fraction=fraction)
    expected = one_process(config, tmp_path / "one")
    assert in_parts(config, tmp_path / "many", BeamConfig(part_bytes=2048))[1] == expected


def test_a_validation_corpus_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("for training")
    (tmp_path / "b.txt").write_text("held out")
    config = DataConfig(path=str(tmp_path / "a.txt"), validation_path=str(tmp_path / "b.txt"))
    expected = one_process(config, tmp_path / "one")
    made, found = in_parts(config, tmp_path / "many")
    assert found == expected and [corpus.splits["train"]["num_bytes"] for corpus in made] == [12, 8]


def error_of(function, *args):
    with pytest.raises(ConfigError) as error:
        function(*args)
    return str(error.value)


@pytest.mark.parametrize(
    "lines, changes",
    [
        (['{"text": "good"}'] * 90 + ["{bad"], {"on_bad_file": "refuse"}),
        (['{"text": "good"}', ""] * 40 + ["{}"], {"on_bad_file": "refuse"}),
        (['{"other": "x"}'] * 90, {}),
        (["{bad"] * 60 + ['{"text": 3}'] * 30, {}),
        (["{bad"] * 90, {}),
    ],
)
def test_the_same_error_as_one_process_wherever_the_mistake_is(tmp_path, lines, changes):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=str(tmp_path / "a.jsonl"), **changes)
    expected = error_of(one_process, config, tmp_path / "one")
    assert error_of(in_parts, config, tmp_path / "many", BeamConfig(part_bytes=50)) == expected
    assert not entries(tmp_path / "one") and not list((tmp_path / "many").rglob("meta.json"))


def test_a_file_without_its_field_is_found_wherever_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FEW", 20)
    good, bad, empty = '{"text": "good"}', '{"other": 1}', '{"text": ""}'
    lines = {
        "a": [bad] * 3 + [good] * 30,
        "b": [bad] * 90,
        "c": [bad] * 19 + [good] * 5,
        "d": [bad] * 20 + [good] * 5,
        "e": [empty] * 30 + [good] * 5,
        "f": [empty] * 30 + [bad, good],
        "g": [bad] * 7,
        "h": [good, bad],
        "i": [bad],
    }
    folder = tmp_path / "files"
    folder.mkdir()
    for name, of_file in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(of_file))
    for split in ("hash", "position"):
        config = DataConfig(path=str(folder), split=split, validation_fraction=0.3)
        expected = one_process(config, tmp_path / f"one {split}")
        for size in (40, 300):
            found = in_parts(config, tmp_path / f"{size} {split}", BeamConfig(part_bytes=size))[1]
            assert found == expected
    (meta,) = [json.loads(data) for name, data in expected.items() if name.endswith("meta.json")]
    documents = sum(split["num_documents"] for split in meta["splits"].values())
    assert documents == 30 + 5 + 5 + 1 + 1, "of a, c, e, h, and a document that the cut divides"


def test_an_interrupted_job_leaves_no_entry_and_goes_on(tmp_path, monkeypatch):
    config = DataConfig(path=str(write_all_kinds(tmp_path / "files")))
    expected = one_process(config, tmp_path / "one")
    done = []

    def finish(numbers, folder, beam_config):
        for number in numbers:
            beam._do(number, folder)
            done.append(f"{folder} {number}")

    def run_some(numbers, folder, beam_config):
        if "/tokens" not in folder:
            finish(numbers, folder, beam_config)
            return
        finish(numbers[:5], folder, beam_config)
        raise KeyboardInterrupt

    monkeypatch.setattr(beam, "_run", run_some)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            in_parts(config, tmp_path / "many")
        assert not list((tmp_path / "many").rglob("meta.json"))
    monkeypatch.setattr(beam, "_run", finish)
    _, found = in_parts(config, tmp_path / "many")
    of_parts = [name for name in done if "/tokens " in name]
    assert len(of_parts) == len(set(of_parts)) > 10  # nothing was done twice
    assert found == expected


def test_two_workers_at_one_task_do_not_disturb_each_other(tmp_path, monkeypatch):
    config = DataConfig(path=str(write_all_kinds(tmp_path / "files")))

    def run(numbers, folder, beam_config):
        for number in [*numbers, *numbers]:
            beam._do(number, folder)

    monkeypatch.setattr(beam, "_run", run)
    expected = one_process(config, tmp_path / "one")
    assert in_parts(config, tmp_path / "many")[1] == expected


def test_a_worker_that_died_while_writing_leaves_nothing_in_the_entry(tmp_path, monkeypatch):
    config = DataConfig(path=str(write_all_kinds(tmp_path / "files")))
    expected = one_process(config, tmp_path / "one")

    def assemble(output):
        pathlib.Path(f"{output.path}.0123456789ab").write_bytes(b"half")
        parts.assemble(output)

    monkeypatch.setattr(large, "assemble", assemble)
    monkeypatch.setattr(large, "_SMALL", 1 << 30)  # done here, where the change is seen
    assert in_parts(config, tmp_path / "many")[1] == expected


def test_arrays_that_were_cut_short_are_not_used(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"12345678")
    piece = parts.Piece(str(path), 0, 5, 0)
    with pytest.raises(OSError, match="cut short"):
        parts.assemble(parts.Output(str(tmp_path / "out"), "uint16", (piece,)))
    assert os.listdir(tmp_path) == ["x.bin"]


def test_results_that_nobody_can_see_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(beam, "_run", lambda *args: None)
    (tmp_path / "a.txt").write_text("text")
    config = DataConfig(path=str(tmp_path / "a.txt"))
    with pytest.raises(ConfigError, match=r"left no .*cache_dir must be storage that all workers"):
        in_parts(config, tmp_path / "many")


def test_from_an_object_store_to_an_object_store(tmp_path):
    files = write_all_kinds(tmp_path / "files")
    for path in files.iterdir():
        storage.write_bytes(f"memory://bucket/files/{path.name}", path.read_bytes())
    notes = []
    config = DataConfig(path="memory://bucket/files", cache_dir="memory://bucket/cache")
    (made,) = large.prepare(config, BYTES, 0, TINY, notes.append)
    assert storage.names("memory://bucket/cache") == [pathlib.Path(made.entry).name, "hashes.json"]
    # One process reads the same store, and its entry is the same but for the paths it mentions.
    local = dataclasses.replace(config, cache_dir=str(tmp_path / "one"))
    prepare(local, BYTES, 0)
    (key,) = (path for path in (tmp_path / "one").iterdir() if (path / "meta.json").exists())
    assert key.name == pathlib.Path(made.entry).name
    for path in key.iterdir():
        assert storage.read_bytes(f"{made.entry}/{path.name}") == path.read_bytes()
    # Again, there is nothing to do. Training cannot map a store into memory, and says so.
    del notes[:]
    assert large.prepare(config, BYTES, 0, TINY, notes.append)[0].splits == made.splits
    assert not [note for note in notes if "tokenising" in note]
    with pytest.raises(ConfigError, match=r"cache_dir=.*must be a directory"):
        prepare(config, BYTES, 0)
    with pytest.raises(ConfigError, match=r"data\.path='memory://bucket/nothing' does not exist"):
        prepare(dataclasses.replace(local, path="memory://bucket/nothing"), BYTES, 0)
    storage.remove_tree("memory://bucket")


def test_a_store_is_read_as_a_folder_of_this_machine_is():
    for name in ("README.md", "lr[1e-3]/a.jsonl", "lr[1e-3]/.hidden.jsonl", "b.jsonl"):
        storage.write_bytes(f"memory://snapshot/{name}", b'{"text": "x"}')
    names = {"": "ab", "/lr[1e-3]": "a", "/lr[1e-3]/a.jsonl": "a", "/*.jsonl": "b", "/*.md": "R"}
    for path, expected in names.items():
        found, left_out = paths.find(f"memory://snapshot{path}", "data.path")
        assert sorted(name.split("/")[-1][0] for name in found) == list(expected)
        assert len(left_out) == (path == "")
    storage.remove_tree("memory://snapshot")


def test_unknown_stores_are_one_line():
    with pytest.raises(ConfigError, match="paths that start with nosuch:// cannot be used"):
        cache.corpora.source("nosuch://bucket/x", DataConfig(), 0)

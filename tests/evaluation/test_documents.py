"""Documents have the bytes that lie on disk, and the kinds that their corpus knows."""

import dataclasses
import json
import types

import numpy as np
import pytest

from lm.config import ConfigError
from lm.data import DataConfig, documents
from lm.data.storyworld import _PLOTS, Teller, generate
from lm.data.storyworld.story import record
from lm.evaluation.card import NotApplicable
from lm.evaluation.documents import Trained, given, ids_of
from lm.tokenizers import TokenizerConfig, train

BYTES = train(TokenizerConfig(kind="byte"), [])
HOSTILE = b"\xef\xbb\xbfcaf\xc3\xa9 \xff\xfe and \xe2\x82 \xed\xa0\x80 \x80."


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_invalid_bytes_keep_their_tokens(kind):
    tokenizer = train(TokenizerConfig(kind=kind, vocab_size=300), ["some text and more text"] * 9)
    ids = ids_of(tokenizer, HOSTILE)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == HOSTILE


def test_bytes_without_a_token_are_replaced_and_still_counted(tmp_path):
    tokenizer = train(TokenizerConfig(kind="char"), ["abc \ufffd"])
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    (document,) = given(str(tmp_path / "a.txt"), tokenizer, 9, 9, 0).documents
    assert document.ids == tokenizer.encode("a\ufffdb") and document.num_bytes == 3


def test_files_of_a_directory_are_documents_byte_for_byte(tmp_path):
    for folder, name, data in (
        ("one", "a.txt", b"one"),
        ("one", "b.txt", HOSTILE),
        ("two", "c.txt", b"three"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(data)
    found = given(str(tmp_path), BYTES, 9, 1000, 0)
    assert [d.num_bytes for d in found.documents] == [3, len(HOSTILE), 5]
    assert [d.kind for d in found.documents] == ["one", "one", "two"]
    assert len({d.key for d in found.documents}) == 3 and found.left_out == 0
    assert len(given(str(tmp_path), BYTES, 2, 1000, 0).documents) == 2
    found = given(str(tmp_path), BYTES, 9, 10, 0)  # room for the first alone: none is cut
    assert [d.num_bytes for d in found.documents] == [3] and found.left_out == 2
    (tmp_path / "two" / "d.py").write_text("pass")
    kinds = [d.kind for d in given(str(tmp_path), BYTES, 9, 1000, 0).documents]
    assert kinds == [".txt", ".txt", ".txt", ".py"]


def test_records_and_generated_documents_are_read_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "caf\u00e9"}\n{"text": "two"}\n')
    found = given(str(tmp_path / "a.jsonl"), BYTES, 9, 1000, 0).documents
    assert [d.num_bytes for d in found] == [5, 3]
    stories = given("storyworld", BYTES, 3, 9999, 0).documents
    trained = list(documents(DataConfig(num_documents=3, validation_fraction=0.0), "train", 0))
    texts = [BYTES.decode(d.ids) for d in stories]
    assert texts[1:] != trained[1:]  # no run has the seed that these have


@pytest.mark.parametrize("path, message", [("none.txt", "does not exist"), ("", "no text")])
def test_what_cannot_be_read_is_refused(tmp_path, path, message):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=rf"config.language.path=.*{message}"):
        given(str(tmp_path / (path or "empty.txt")), BYTES, 9, 9, 0)


def run(directory, **config):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"job": "train", "seed": 3, **config}))
    return types.SimpleNamespace(directory=directory, config=config | {"job": "train", "seed": 3})


STORIES = {"path": "storyworld", "num_documents": 300, "validation_fraction": 0.1}


def test_held_out_are_the_documents_of_the_validation_split_with_their_plots(tmp_path):
    trained = Trained.of(run(tmp_path, data=STORIES))
    found = trained.held_out(BYTES, 12, 10**6).documents
    texts = list(documents(DataConfig(**STORIES), "validation", 3))[:12]
    assert [BYTES.decode(d.ids) for d in found] == texts
    plots = {plot.__name__.replace("_", " "): plot for plot in _PLOTS}
    numbers = {generate(3, number).text: number for number in range(300)}
    for document, text in zip(found, texts):
        told = Teller(3 << 64 | numbers[text])
        told.pick(_PLOTS)
        plots[document.kind](told)  # the plot that it is said to be of
        assert record(told, 3, 0).text == text


def test_held_out_by_position_is_the_end_of_the_text(tmp_path):
    for name, text in (("a.txt", "x" * 60), ("b.md", "y" * 40)):
        (tmp_path / name).write_text(text)
    data = {"path": str(tmp_path / "[ab].*"), "validation_fraction": 0.5, "split": "position"}
    found = Trained.of(run(tmp_path / "run", data=data)).held_out(BYTES, 9, 999).documents
    assert [(d.num_bytes, d.kind) for d in found] == [(10, ".txt"), (40, ".md")]


def test_a_run_on_conversations_is_asked_about_the_documents_of_its_source(tmp_path):
    run(tmp_path / "base", data=STORIES)
    tuned = run(
        tmp_path / "tuned",
        init_from=str(tmp_path / "base"),
        objective={"name": "sft"},
        data={"path": "storyworld_instructions"},
    )
    assert Trained.of(tuned).directory == tmp_path / "base"
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(NotApplicable, match=r"tells of no documents .* config.language.path"):
        Trained.of(tuned)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"validation_fraction": 0.0}, "held no documents out"),
        ({"path": "/none/there"}, "cannot be read: data.path='/none/there' does not exist"),
        ({"path": "translation", "num_documents": 99}, "pairs of texts"),
    ],
)
def test_a_run_without_documents_to_be_examined_on_says_why(tmp_path, data, message):
    trained = Trained.of(run(tmp_path, data={**STORIES, **data}))
    with pytest.raises(NotApplicable, match=message):
        trained.held_out(BYTES, 9, 999)


def test_tokens_are_those_of_the_cache_or_missing(tmp_path):
    from lm.data import prepare

    trained = Trained.of(run(tmp_path, data={**STORIES, "cache_dir": str(tmp_path / "cache")}))
    with pytest.raises(NotApplicable, match="not in the cache"):
        trained.tokens(BYTES)
    train_corpora, _ = prepare(trained.config, BYTES, 3)
    (found,) = trained.tokens(BYTES)
    np.testing.assert_array_equal(found.tokens[:], train_corpora[0].tokens[:])
    other = dataclasses.replace(trained, seed=4)
    with pytest.raises(NotApplicable, match="not in the cache"):
        other.tokens(BYTES)

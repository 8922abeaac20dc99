"""The comparison, and the explanation of one word."""

import importlib.util
import json
from pathlib import Path

import pytest
from trained_tokenizers import corpus, trained

from lm.config import ConfigError
from lm.jobs.tokenizer import run
from lm.tokenizers import explain, load

CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer.py"
MERGING = ["bpe", "tiktoken", "sentencepiece_bpe"]
WORDS = ["together", " together", "Zoë didn't 🙂 find  ▁room 12.\n"]


def config(tmp_path, **changes):
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.get_config()
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus()))
    result.data.path = str(file)
    result.tokenizer.vocab_size = 400
    for name, value in changes.items():
        result[name] = value
    return result


def test_the_comparison_is_printed_saved_and_true(tmp_path, capsys):
    rows = run(config(tmp_path, word=" together"), str(tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "tokenizers.json").read_text())
    assert [row["kind"] for row in saved] == [row.kind for row in rows]
    printed = capsys.readouterr().out
    for row in rows:
        assert row.kind in printed
        assert load(tmp_path / "run" / row.kind).fingerprint == row.fingerprint
        assert row.round_trip_rate == 1 or not row.lossless
    by_kind = {row.kind: row for row in rows}
    assert by_kind["byte"].bytes_per_token == 1
    assert by_kind["bpe"].bytes_per_token > 2
    assert by_kind["wordpiece"].round_trip_rate < 1
    assert "merge 0" in printed and "wordpiece does not keep every text" in printed


def test_an_unknown_kind_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"kinds\[0\]='wordpeice'.*did you mean 'wordpiece'"):
        run(config(tmp_path, kinds=("wordpeice",)), str(tmp_path / "run"))


def test_a_corpus_without_validation_text_is_refused(tmp_path):
    changed = config(tmp_path)
    changed.data.validation_fraction = 0.0
    with pytest.raises(ConfigError, match="validation"):
        run(changed, str(tmp_path / "run"))


@pytest.mark.parametrize("kind", MERGING)
@pytest.mark.parametrize("word", WORDS)
def test_the_merges_end_in_the_tokens(kind, word):
    tokenizer = trained(kind)
    pieces = []
    for start, steps in explain.merges(tokenizer, word):
        assert all(step.merged in step.pieces for step in steps)
        pieces += steps[-1].pieces if steps else start
    tokens = [segment.text for segment in explain.segments(tokenizer, word)]
    assert b"".join(pieces) == b"".join(tokens) == word.encode()
    if kind != "sentencepiece_bpe":  # there, unknown characters fall back to bytes afterwards
        assert pieces == tokens


def test_the_most_probable_segmentation_is_the_one_encoded():
    tokenizer = trained("sentencepiece_unigram")
    for word in ("the cat", " the cat didn't", " room"):
        ranked = explain.alternatives(tokenizer, word)
        assert [s.id for s in ranked[0]] == tokenizer.encode(word)
        totals = [sum(s.score for s in choice) for choice in ranked]
        assert totals == sorted(totals, reverse=True) and len(ranked) > 1

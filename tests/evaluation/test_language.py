"""Perplexity and bits per byte are what they are by hand, however text is cut into windows."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import write_tiny_run

import lm
from lm.config import ConfigError, defaults, view
from lm.data import DataConfig, documents, prepare
from lm.evaluation import language
from lm.evaluation.documents import Document, Reading
from lm.evaluation.language import LanguageSettings, measure
from lm.evaluation.subject import Subject
from lm.jobs import evaluate
from lm.tokenizers import TokenizerConfig, train

HOSTILE = b"caf\xc3\xa9 \xff\xfe and \xe2\x82 more than a context holds"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on files whose tokens are cached, and documents of which one was trained on."""
    root = tmp_path_factory.mktemp("language")
    (root / "corpus").mkdir()
    texts = list(documents(DataConfig(num_documents=20, validation_fraction=0.0), "train", 1))
    for number, text in enumerate(texts):
        (root / "corpus" / f"{number:02}.txt").write_text(text)
    data = {"path": str(root / "corpus"), "cache_dir": str(root / "cache")}
    data |= {"validation_fraction": 0.3}
    tokenizer = write_tiny_run(root / "run")
    config = json.loads((root / "run" / "config.json").read_text())
    (root / "run" / "config.json").write_text(json.dumps(config | {"data": data}))
    train_corpora, _ = prepare(view(DataConfig, data), tokenizer, 0)
    known = train_corpora[0]
    planted = tokenizer.decode(known.tokens[: known.offsets[1] - 1])
    (root / "asked").mkdir()
    (root / "asked" / "planted.txt").write_text(planted)
    (root / "asked" / "fresh.txt").write_bytes(HOSTILE)
    return root


def card(place, name, **settings):
    config = defaults(evaluate.EvaluateJob)
    config.init_from, config.suites = str(place / "run"), ("language",)
    config.language.update(settings)
    evaluate.run(config, str(place / name))
    section = json.loads((place / name / "card.json").read_text())["sections"]["language"]
    scores = {score["name"]: score["estimate"] for score in section["scores"]}
    return scores, {table["title"].split(" (")[0]: table for table in section["tables"]}


def test_the_card_has_perplexity_and_bits_over_the_files_and_what_was_trained_on(place):
    scores, tables = card(place, "card", path=str(place / "asked"), spans=(13,))
    run = lm.load(place / "run")
    data = [(place / "asked" / name).read_bytes() for name in ("fresh.txt", "planted.txt")]
    nats = []
    for text in data:  # in windows of 32 bytes, after end-of-text
        ids = [run.tokenizer.bos_id, *text]
        total = 0.0
        for done in range(1, len(ids), 32):
            end = min(len(ids), done + 32)
            window = ids[max(0, end - 33) : end]
            logits = np.asarray(run.model([window[:-1]])[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            new = np.arange(len(window) - 1)[done - end :]
            total -= log_p[new, np.array(window[1:])[done - end :]].sum()
        nats.append(total)
    size = sum(map(len, data))
    assert scores["loss"]["value"] == pytest.approx(sum(nats) / size, rel=1e-5)
    assert scores["perplexity"]["value"] == pytest.approx(math.exp(sum(nats) / size), rel=1e-4)
    bits = scores["bits_per_byte"]
    assert bits["value"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    assert bits["low"] < bits["value"] < bits["high"] and bits["items"] == 2
    assert tables["What was read"]["rows"][2][1].startswith(f"{size:,}, ")
    (row,) = tables["Seen in training"]["rows"]
    span, number, _, clean, clean_loss, dirty, dirty_loss = row
    assert (span, number, clean, dirty) == (13, 2, 1, 1)
    assert float(clean_loss) == pytest.approx(nats[0] / len(data[0]), abs=1e-3)
    assert float(dirty_loss) == pytest.approx(nats[1] / len(data[1]), abs=1e-3)


def test_without_a_path_the_documents_that_the_run_held_out_are_read(place):
    scores, tables = card(place, "own", documents=3, contamination=False)
    config = view(DataConfig, json.loads((place / "run" / "config.json").read_text())["data"])
    texts = list(documents(config, "validation", 0))[:3]
    size = sum(len(text.encode()) for text in texts)
    assert tables["What was read"]["rows"][2][1].startswith(f"{size:,}, of which")
    assert scores["loss"]["items"] == 3 and "Seen in training" not in tables
    counted = tables["Loss by position, nats a token"]["rows"]
    assert sum(row[1] for row in counted) == size and counted[0][:2] == ["0", 3]
    frequency = tables["Loss by frequency, nats a token"]
    assert sum(row[1] for row in frequency["rows"]) == size and "training" in frequency["head"][0]


def test_what_is_not_there_is_said_and_not_guessed(place, tmp_path):
    config = json.loads((place / "run" / "config.json").read_text())
    other = tmp_path / "run"
    write_tiny_run(other)
    data = config["data"] | {"cache_dir": str(tmp_path / "none")}
    (other / "config.json").write_text(json.dumps(config | {"data": data}))
    scores, tables = card(tmp_path, "card", path=str(place / "asked" / "fresh.txt"))
    assert "not in the cache" in tables["What was read"]["rows"][-1][1]
    assert "Seen in training" not in tables and "seen_13" not in scores
    assert scores["loss"]["error"] is None  # one document tells nothing of others
    (other / "config.json").write_text(json.dumps(config | {"data": data, "job": "imported"}))
    with pytest.raises(ConfigError, match=r"config.suites='language': .* config.language.path"):
        card(tmp_path, "card")
    with pytest.raises(ConfigError, match=r"config.language.stride=33 must be at most .* 32"):
        card(tmp_path, "card", stride=33)
    with pytest.raises(ConfigError, match=r"config.language.spans=\(\)"):
        card(tmp_path, "card", spans=())


@pytest.mark.parametrize("stride", [0, 8])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(place, stride):
    run = lm.load(place / "run")
    run = dataclasses.replace(run, params={n: jnp.zeros_like(p) for n, p in run.params.items()})
    settings = LanguageSettings(str(place / "asked"), stride=stride)
    found = measure(Subject(run), settings, 0)
    assert found.score("perplexity").estimate.value == pytest.approx(257, rel=1e-6)
    size = sum(path.stat().st_size for path in (place / "asked").iterdir())
    assert sum(row[1] for row in found.tables[1].rows) == size  # each token once
    counts = {row[0]: row[1] for row in found.tables[1].rows}
    assert counts["0"] == 2  # whatever the window, a document begins once
    assert (counts["1"] == 2) == (stride == 8)  # later tokens have 24 others before them, or none


def test_bits_per_byte_do_not_depend_on_the_tokenizer(place):
    text = b"so many words, so many words, and a few more"
    bits = []
    for kind in ("byte", "bpe"):
        tokenizer = train(TokenizerConfig(kind=kind, vocab_size=280), [text.decode()])
        document = Document.of(tokenizer, text, "")
        loss = tokenizer.byte_lengths()[document.ids] * math.log(256)  # every byte is as likely
        nothing = np.zeros(len(loss), int)
        tokens = language._Tokens(np.array(document.ids), loss, nothing, nothing, nothing)
        subject = dataclasses.make_dataclass("_", ["tokenizer"])(tokenizer)
        scores = language._whole(subject, Reading([document], "", 0), tokens)
        bits.append({score.name: score for score in scores})
    assert len({each["loss"].estimate.value for each in bits}) == 2
    for each in bits:
        assert each["bits_per_byte"].estimate.value == pytest.approx(8)
    assert bits[0]["bits_per_byte"].asked == bits[1]["bits_per_byte"].asked
    assert bits[0]["loss"].asked != bits[1]["loss"].asked

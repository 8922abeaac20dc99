"""Needles and pairs stand where they are said to, and readers who lose some are found out."""

import dataclasses
import functools
import json
import re
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_run import write_tiny_run

import lm
from lm.__main__ import run
from lm.config import ConfigError
from lm.evaluation import position
from lm.evaluation.documents import Trained
from lm.evaluation.position import PositionSettings, answers, ends_over_middle, key_values, needles
from lm.evaluation.scoring import Scored
from lm.evaluation.subject import Likely
from lm.jobs import evaluate
from lm.models import bind, skeleton
from lm.parallel.layout import lay_out

SETTINGS = PositionSettings(items=6, depths=5)


def words(text):
    return len(text.split())


def said(total, greedy):
    """A continuation of one token."""
    rank = np.array([0 if greedy else 3], np.int32)
    return Likely(Scored(np.array([total], np.float32), rank, np.zeros(1, np.float32)), False)


def reader(finds):
    """Knows a place that it reads, where `finds(share of the text before it)`, else guesses."""

    def likely(pairs):
        for context, place in pairs:
            at = context.find(place.strip())
            read = at >= 0 and finds(at / len(context))
            yield said(0.0 if read else -1.0 - (place < " in"), read)

    return lambda pairs: list(likely(pairs))


def test_a_needle_stands_once_at_its_depth_and_no_other_place_does():
    items = list(needles(words, 200, 1.0, SETTINGS, 3))
    assert len(items) == 6 * 5 and len({item.number for item in items}) == 6
    for item in items:
        right, *others = item.choices
        put = re.search(rf"(\w+) put the (\w+){right}\. ?", item.context)
        assert item.context.count(right.strip()) == 1 and len({*item.choices}) == 4
        assert not any(place.strip() in item.context for place in others)
        asked = re.search(r'"Where is my (\w+)\?" asked (\w+)\. "I put it$', item.context)
        assert asked[1] == put[2] and item.context.count(put[2]) == 2 and asked[2] != put[1]
        rest = item.context[: put.start()] + item.context[put.end() : asked.start()]
        assert put.start() / len(rest) == pytest.approx(item.depth, abs=0.1)
        assert 150 < words(item.context + right) <= 200
    # The same sentences at every depth, and in longer texts.
    assert len({len(item.context) for item in items if item.number == 2}) == 1
    longer = list(needles(words, 300, 1.0, SETTINGS, 3))
    assert (
        longer[0].context[:200] == items[0].context[:200] and longer[0].choices == items[0].choices
    )
    assert not list(needles(words, 30, 1.0, SETTINGS, 3))  # no room


def test_keys_have_their_values():
    items = list(key_values(len, 400, 1.0, SETTINGS, 0))
    assert len(items) == 6 * 5
    for item in items:
        pairs = json.loads(re.search(r"\{.*\}", item.context, re.DOTALL)[0])
        key = re.search(r'Key: "(\w+)"\nCorresponding value: "$', item.context)[1]
        assert f'{pairs[key]}"' == item.choices[0] and len({*pairs, *pairs.values()}) == 2 * len(
            pairs
        )
        assert all(choice[:-1] in pairs.values() for choice in item.choices)
        assert [*pairs].index(key) / (len(pairs) - 1) == pytest.approx(item.depth, abs=0.1)
        assert 350 < len(item.context + item.choices[0]) - 1 <= 400


def test_who_reads_all_places_alike_has_no_curve_and_who_loses_the_middle_has():
    items = list(needles(words, 300, 1.0, SETTINGS, 1))
    blind = answers(reader(lambda share: True), items)
    assert all(one.right and one.greedy and one.p > 1 / 3 for one in blind)
    assert ends_over_middle(items, [one.right for one in blind]).value == 0
    lost = answers(reader(lambda share: share < 0.15 or share > 0.85), items)
    assert [one.right for one in lost] == [item.depth in (0, 1) for item in items]
    assert [one.greedy for one in lost] == [one.right for one in lost]
    gap = ends_over_middle(items, [one.right for one in lost])
    assert gap.value == 1 and gap.clusters == 6
    last = answers(reader(lambda share: share > 0.85), items)  # as one who forgets
    assert ends_over_middle(items, [one.right for one in last]).value == pytest.approx(0.5)
    # Of two that are alike none is found: a guess is not right.
    assert not any(
        one.right for one in answers(lambda pairs: [said(0.0, False)] * len(pairs), items)
    )


def job(folder, **fields):
    fields = {
        "init_from": folder / "run",
        "suites": "position",
        "position.items": 2,
        "position.depths": 3,
        "position.lengths": 1.0,
        "position.beyond": 1.5,
        "position.windows": 2,
        **fields,
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    one = functools.partial(lay_out, devices=jax.devices()[:1])  # each device computes its padding
    with mock.patch.object(evaluate, "lay_out", one):
        run(["--config=configs/evaluate.py", f"--workdir={folder / 'card'}", *given])
    return json.loads((folder / "card" / "card.json").read_text())["sections"]["position"]


def test_rotary_positions_go_on_beyond_the_training_length(tmp_path):
    (tmp_path / "run").mkdir()
    write_tiny_run(tmp_path / "run", max_length=400)
    found = job(tmp_path)
    scores = {score["name"]: score for score in found["scores"]}
    assert scores["needle, 1×"]["estimate"]["clusters"] == 2
    assert scores["needle, 1×"]["chance"] == 0.25 and scores["needle, 1×"]["truncated"] == 0
    assert {"needle, greedy, 1.5×", "key–value, 1×", "needle, ends over middle, 1×"} <= {*scores}

    loaded = lm.load(tmp_path / "run")
    documents = Trained.of(loaded).held_out(loaded.tokenizer, 13, 10_000).documents
    bos, eos = loaded.tokenizer.bos_id, loaded.tokenizer.eos_id
    ids = [i for document in documents for i in (*document.ids, eos)]
    model = skeleton(dataclasses.replace(loaded.skeleton.config, max_length=600))
    logits_of = jax.jit(lambda params, tokens_BT: bind(model, params)(tokens_BT))
    gaps = []
    for window in (ids[:600], ids[600:1200]):
        logits = np.asarray(logits_of(loaded.params, np.array([[bos, *window[:-1]]])), np.float64)[
            0
        ]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        loss = -log_p[np.arange(600), window]
        gaps.append(loss[400:].mean() - loss[200:400].mean())
    assert scores["loss beyond"]["items"] == pytest.approx(gaps, abs=1e-4)


def test_learned_positions_end_where_they_end(tmp_path):
    (tmp_path / "run").mkdir()
    write_tiny_run(tmp_path / "run", max_length=400, positions="learned")
    found = job(tmp_path)
    assert "positions are learned, and there are none beyond its 400 tokens" in found["about"]
    names = {score["name"] for score in found["scores"]}
    assert "needle, 1×" in names and not any("1.5" in name or "loss" in name for name in names)
    with pytest.raises(ConfigError, match=r"context of 400 tokens has no room for a question"):
        job(tmp_path, **{"position.lengths": 0.2})
    with pytest.raises(ConfigError, match=r"position\.lengths=\(1\.2,\) must be at most 1"):
        job(tmp_path, **{"position.lengths": 1.2})
    with pytest.raises(ConfigError, match=r"position\.choices=12 must be at most 9"):
        job(tmp_path, **{"position.choices": 12})


def test_a_row_in_training_may_be_shorter_than_the_context(tmp_path):
    write_tiny_run(tmp_path, max_length=64)
    loaded = lm.load(tmp_path)
    subject = mock.Mock(run=loaded, max_length=64)
    assert position.trained_length(subject) == 64
    shorter = {**loaded.config, "data": {"block_size": 48}}
    subject = mock.Mock(run=dataclasses.replace(loaded, config=shorter), max_length=64)
    assert position.trained_length(subject) == 48

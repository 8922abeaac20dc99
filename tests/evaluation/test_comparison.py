"""Cards side by side: pairs where there are any, and the price of asking often."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
from scipy import stats
from test_main import main
from tiny_run import write_tiny_run

from lm.evaluation import language
from lm.evaluation.card import Score, Section, digest
from lm.evaluation.comparison import compare, read_card, tables
from lm.evaluation.page import write_card
from lm.evaluation.statistics import Estimate, mean, share
from lm.jobs import evaluate

RIGHT = np.random.default_rng(0).random(300) < 0.5


def right(items, asked="these", name="right", better="higher", clusters=()):
    found = share(items, clusters or None)
    asked = digest([asked])
    return Score(name, found, better, items=[*map(float, items)], asked=asked, clusters=clusters)


def write(directory, *scores, name=None, section="tasks"):
    facts = {"model": name or directory.name, "directory": str(directory), "step": "7"}
    write_card(directory, facts, "python main.py", [Section(section, "Tasks", "", scores)], {})
    return directory


@pytest.fixture
def folders(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    return folders


def compared(folders, *cards):
    for folder, scores in zip(folders, cards):
        write(folder, *scores)
    return compare([read_card(folder) for folder in folders[: len(cards)]])


def test_the_same_items_are_compared_in_pairs(folders):
    better = RIGHT.copy()
    better[np.flatnonzero(~RIGHT)[:12]] = True  # twelve more are right, none less
    found = compared(folders, [right(RIGHT)], [right(better)])
    (one,) = found["tasks", "right"]
    assert one.paired and one.verdict == "better"
    assert one.difference.value == pytest.approx(12 / 300)
    by_scipy = stats.ttest_rel(better.astype(float), RIGHT.astype(float)).pvalue
    assert one.p == pytest.approx(by_scipy)
    # The intervals of the two shares overlap by far: without pairs there would be nothing to tell.
    assert share(RIGHT).high > share(better).low
    (one,) = compared(folders, [right(RIGHT)], [right(better, "others")])["tasks", "right"]
    assert not one.paired and math.isnan(one.p) and one.verdict == ""
    (one,) = compared(folders, [right(better)], [right(RIGHT, better="lower")])["tasks", "right"]
    assert one.verdict == "worse"  # the first card says which way is good


def test_items_that_share_a_story_are_no_evidence_of_their_own(folders):
    other = RIGHT.copy()
    other[:10] = ~RIGHT[:10]
    alone, in_stories = (), tuple(i // 10 for i in range(300))
    pair = [right(RIGHT, clusters=alone)], [right(other, clusters=alone)]
    (one,) = compared(folders, *pair)["tasks", "right"]
    assert one.difference.clusters == 300
    pair = [right(RIGHT, clusters=in_stories)], [right(other, clusters=in_stories)]
    (one,) = compared(folders, *pair)["tasks", "right"]
    assert one.paired and one.difference.clusters == 30
    (one,) = compared(folders, pair[0], [right(other)])["tasks", "right"]
    assert not one.paired


def test_many_tests_make_each_of_them_harder(folders):
    rng = np.random.default_rng(1)
    first = [right(RIGHT, name=f"score {i}") for i in range(8)]
    others = [
        [
            right(np.where(rng.random(300) < 0.05, ~RIGHT, RIGHT), name=f"score {i}")
            for i in range(8)
        ]
        for _ in range(2)
    ]
    found = compared(folders, first, *others)
    alone = [
        compared(folders, [first[i]], [others[j][i]])["tasks", f"score {i}"][0].p
        for i in range(8)
        for j in range(2)
    ]
    adjusted = [each.p for row in found.values() for each in row]
    assert min(adjusted) == pytest.approx(min(1.0, 16 * min(alone)))
    assert all(b >= a for a, b in zip(alone, adjusted))


def test_scores_without_items_are_told_apart_by_their_intervals(folders):
    def perplexity(value):
        return Score("perplexity", Estimate(value, 0.1, value - 0.2, value + 0.2, 9, 9), "lower")

    single = Score("one", mean([0.5]), "higher")
    found = compared(folders, [perplexity(3.0), single], [perplexity(3.3)], [perplexity(2.5)])
    near, far = found["tasks", "perplexity"]
    assert (near.paired, near.verdict) == (False, "") and far.verdict == "better"
    assert far.difference.error == pytest.approx(math.sqrt(0.02))
    assert found["tasks", "one"] == [None, None]


def test_a_table_has_every_score_of_every_card(folders):
    write(folders[0], right(RIGHT), name="same")
    write(folders[1], right(RIGHT), right(RIGHT, name="more"), name="same")
    cards = [read_card(folder) for folder in folders[:2]]
    (table,) = tables(cards, compare(cards))
    assert table.head[1:3] == [str(folder) for folder in folders[:2]]  # their names are alike
    assert [row[0] for row in table.rows] == ["right", "more"]
    value = f"{RIGHT.mean():.3f} "
    assert table.rows[0][1].startswith(value) and table.rows[0][2].startswith(value)
    assert table.rows[0][3:] == ["0.000 [0.000,\xa00.000]", "1.000"]
    assert table.rows[1][1] == "–" and table.rows[1][3:] == ["–", "–"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for name, steps in (("one", (3,)), ("two", (4,))):
        (place / name).mkdir()
        write_tiny_run(place / name, steps=steps, max_length=64)
    return place


def measure(subject, settings, seed):
    """The suite of language on six documents."""
    return language.measure(subject, dataclasses.replace(settings, documents=6), seed)


def test_runs_are_examined_and_then_compared(runs, monkeypatch):
    monkeypatch.setattr(evaluate, "SUITES", {"language": __name__})
    monkeypatch.setattr(
        evaluate, "lay_out", functools.partial(evaluate.lay_out, devices=jax.devices()[:1])
    )
    words = ["--config=configs/compare.py", f"--workdir={runs}/out"]
    given = [f"--config.runs={runs}/one", f"--config.runs={runs}/two"]
    code, said, error = main(*words, *given, "--config.suites=language")
    assert code == 0, error
    assert "bits_per_byte" in said and f"comparison: {runs}/out/compare.html" in said
    found = json.loads((runs / "out" / "compare.json").read_text())
    (one,) = found["scores"]["language"]["bits_per_byte"]["against the first"]
    assert one["paired"] and one["difference"]["clusters"] > 2
    page = (runs / "out" / "compare.html").read_text()
    assert "bits_per_byte" in page and "one and two" in page
    # Their cards stay, and give the same.
    cards = [f"--config.runs={runs}/out/{name}" for name in ("one", "two")]
    code, _, error = main(*words[:1], f"--workdir={runs}/again", *cards)
    assert code == 0, error
    assert json.loads((runs / "again" / "compare.json").read_text()) == found


@pytest.mark.parametrize(
    "names, message",
    [
        (["one"], "must name two directories, or more"),
        (["one", "none"], "none' is not a directory"),
        (["one", "."], "is neither a run nor has it a card.json"),
        (["one", "broken"], "broken/card.json is no card: KeyError: 'sections'"),
    ],
)
def test_mistakes_are_told_in_a_line(runs, names, message):
    (runs / "broken").mkdir(exist_ok=True)
    (runs / "broken" / "card.json").write_text("{}")
    names = [name if name != "one" or "broken" not in names else "broken" for name in names]
    words = [f"--config.runs={runs / name}" for name in names]
    code, _, error = main("--config=configs/compare.py", f"--workdir={runs}/wrong", *words)
    assert code == 2 and message in error.splitlines()[-1]

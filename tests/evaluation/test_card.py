"""The card: what its page shows and its JSON says, and whether all can read it."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from lm.evaluation.card import Sample, Score, Section, Table, digest, picture, plain
from lm.evaluation.comparison import compare, read_card, write_comparison
from lm.evaluation.page import interval, line, metadata, shown, write_card
from lm.evaluation.statistics import Estimate, mean, share
from lm.training.plots import FAINT, INK, bare, figure_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FACTS = {
    "model": "quickstart",
    "directory": "runs/a_directory_with_a_long_name/that/never_ends_and_has_no_space/quickstart",
    "step": "1,000",
    "parameters": "1,049,088",
    "made of": "decoder of 6 layers, width 128, 4 heads, rotary positions",
}
COMMAND = "python main.py --config=configs/evaluate.py --config.init_from=runs/" + "long/" * 40


def curve(title):
    figure = figure_of(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    bare(axes)
    x = np.arange(1, 9)
    axes.fill_between(x, 2.2 / x + 0.9, 2.6 / x + 1.1, color=FAINT)
    axes.errorbar(x, 2.4 / x + 1, yerr=0.2, color="#4c78a8", marker="o", label="exact match")
    axes.plot(x, 2 / x + 1, "--", color=INK, label="per token")
    axes.set_xlabel("examples before the question", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.legend(frameon=False, labelcolor=INK)
    axes.set_title(title, color=INK, fontsize=11)
    return picture(title, figure)


def sections():
    """Two sections with all that there is, in the lengths that there are."""
    right = np.arange(200) % 3 == 0
    scores = [
        Score("perplexity", Estimate(3.412, 0.05, 3.31, 3.52, 200, 200), "lower", "exp of loss"),
        Score.share("exact_match", right, "higher", "share of answers", unparsed=7, truncated=3,
            chance=0.25, asked=digest(range(200))),
        Score("position_bias_of_the_answer", mean([0.2, -0.1, 0.4] * 9, [1, 2, 3] * 9), "none",
            "how much more often the first choice is taken than it is right, over templates"),
        Score("loss", mean([0.2, 0.4, 0.3] * 7), "lower", "nats per token"),
        Score("one story", mean([1.0]), "higher", "of a single cluster nothing is known"),
        Score("huge", Estimate(2.4e19, 1e18, 2e19, 3e19, 20, 20)),
    ]  # fmt: skip
    bare_table = Table("What was read", ("", ""), [("documents", "200, held out")])
    table = Table(
        "Loss by kind of document, nats a token",
        ("kind", "tokens", "loss"),
        [("dialogue", 12345, "1.204 ± 0.031"), ("A very long name of a kind", 77, "–")],
    )
    wide = Table("All of it", [f"column {i}" for i in range(12)], [[i / 7 for i in range(12)]] * 20)
    samples = [
        Sample({"asked": "Where is the cat?\nIn the\tpark?", "said": "<b>It's in the park.</b>",
            "right": "The park"}, True),
        Sample({"asked": "Who has the ball? " * 30, "said": "Nobody", "right": "Tom"}, False),
        Sample({"among the hardest": "Once upon a time", "bits per byte": "1.204"}),
    ]  # fmt: skip
    about = "How well it predicts the next token of text it has not seen. " * 3
    pictures = [curve("Loss by position"), curve("Loss by frequency")]
    return [
        Section(
            "language",
            "Language",
            about,
            scores,
            [bare_table, table, wide],
            pictures,
            samples * 2,
            12.3,
        ),
        Section("tasks", "Tasks & <puzzles>", about, scores[1:2], [], [curve("Tasks")], (), 8.0),
    ]


LEFT_OUT = {"truth": "it has no chat template", "harness": "config.harness.tasks names none"}


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return write_card(tmp_path_factory.mktemp("card"), FACTS, COMMAND, sections(), LEFT_OUT)


def test_the_page_says_all_that_there_is_and_needs_no_network(card):
    page = card.read_text(encoding="utf-8")
    assert "<b>It's" not in page and "&lt;b&gt;It&#x27;s in the park.&lt;/b&gt;" in page
    assert "[0.273, 0.403]" in page and "of 200, chance 0.250, 7 unparsed, 3 truncated" in page
    assert page.count('class="bar"') == 2  # exact_match's, and none of a loss between 0 and 1
    assert "of 27 in 3 clusters" in page and "Tasks &amp; &lt;puzzles&gt;: scores" in page
    assert "<summary>All of it</summary>" in page and "<summary>2 more</summary>" in page
    assert "it has no chat template" in page and "20 s" in page
    fetched = re.findall(r'(?:src|href)="[^"#][^"]*', page) + re.findall(r"url\((?!#)[^)]*", page)
    assert fetched == []
    ids = re.findall(r'\bid="([^"]*)"', page)
    used = re.findall(r'(?:href="|url\()#([^")]*)', page)
    assert len(ids) == len({*ids}) and {*used} <= {*ids}  # of three pictures by matplotlib, too
    assert INK not in page and FAINT not in page  # what is drawn has the page's colours


def test_the_json_has_every_item_and_no_number_that_json_lacks(card):
    def refuse(name):
        raise AssertionError(name)

    found = json.loads((card.parent / "card.json").read_text(), parse_constant=refuse)
    assert found["command"] == COMMAND and found["left_out"] == LEFT_OUT
    scores = {score["name"]: score for score in found["sections"]["language"]["scores"]}
    one, many = scores["one story"]["estimate"], scores["exact_match"]
    assert one["error"] is None and one["low"] is None and one["value"] == 1.0
    assert sum(many["items"]) / 200 == many["estimate"]["value"] == 0.335
    assert many["asked"] == digest(range(200)) != digest(range(1, 201))
    stories = Score("told", share([True] * 3, ["x", "y", "x"]), clusters=[("x", 1), "y", ("x", 1)])
    assert plain(stories)["clusters"] == [0, 1, 0]
    assert plain({"a": (np.float32(0.5), math.inf)}) == {"a": [0.5, None]}


def test_the_hub_reads_the_scores():
    hub = pytest.importorskip("huggingface_hub.repocard_data")
    found = metadata(FACTS, sections())
    results = hub.model_index_to_eval_results(found["model-index"])
    name, read = results
    assert name == "quickstart" and len(read) == 6 + 1
    assert all(one.task_type == "text-generation" and one.dataset_type for one in read)
    value = next(one for one in read if one.metric_type == "exact_match")
    assert value.metric_value == 0.335 and value.dataset_name
    card = hub.ModelCardData(model_name=name, eval_results=read)
    assert card.to_dict()["model-index"][0]["name"] == name


def test_numbers_and_lines_are_as_a_reader_wants_them():
    assert [shown(x) for x in (0.12345, 12.345, 123.4, 1234567, 2.4e19, 1e-5, -0.5, math.nan)] == [
        "0.123", "12.35", "123", "1,234,567", "2.40e+19", "1.00e-05", "−0.500", "–",
    ]  # fmt: skip
    section = sections()[0]
    assert interval(section.score("one story")) == "[–]"
    text = line(section)
    assert "exact_match                  0.335  [0.273, 0.403]  of 200, chance 0.250" in text


@pytest.mark.skipif(not CHROMIUM, reason="needs a chromium")
def test_the_pages_keep_nobody_out_and_fit_a_phone(card):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    from playwright.sync_api import sync_playwright

    cards = [read_card(card.parent)] * 2
    pages = card, write_comparison(card.parent, cards, compare(cards))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((390, "dark"), (1280, "light")):
            page = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
            )
            for path in pages:
                page.goto(path.as_uri())
                faults = axe.run(page).response["violations"]
                assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in faults]
                assert page.evaluate("document.documentElement.scrollWidth") == width
        browser.close()

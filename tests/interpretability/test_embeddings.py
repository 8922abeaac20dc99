"""The embedding space of tables that are known, and of a tiny run, by its page."""

import json

import numpy as np
import pytest
import tiny_jobs

import lm
from lm import __main__ as entry
from lm.config import ConfigError, defaults
from lm.evaluation import bias
from lm.evaluation.card import NotApplicable
from lm.evaluation.leaning import PAIRS, word_vectors
from lm.interpretability.embeddings import (
    align,
    analogy,
    cosines,
    effective_rank,
    first,
    maps,
    neighbourhood_map,
    parse_analogy,
    principal,
    shape,
)
from lm.jobs import embeddings

# Axes: royal, male, female, food.
WORDS = ("man", "woman", "king", "queen", "apple", "prince")
TABLE = np.array(
    [[0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0.8, 1, 0, 0.5]], float
)


def test_neighbours_are_by_cosine_whatever_the_lengths():
    scores = cosines(TABLE * np.arange(1, 7)[:, None], TABLE[2])
    assert scores == pytest.approx([0.5**0.5, 0, 1, 0.5, 0, 1.8 / (2 * 1.89) ** 0.5])
    assert [WORDS[i] for i in first(scores, 2, [2])] == ["prince", "man"]
    assert cosines(np.zeros((1, 4)), TABLE[0]) == 0


@pytest.mark.parametrize("method", ["add", "mul"])
def test_king_less_man_and_woman_is_queen(method):
    man, woman, king = TABLE[:3]
    scores = analogy(TABLE, man, king, woman, method)
    assert WORDS[first(scores, 1, [0, 1, 2])[0]] == "queen"
    b, a, to = 0.5, 0, 0.5**0.5  # cosines of queen with king, man and woman
    wanted = b - a + to if method == "add" else (1 + b) * (1 + to) / 4 / ((1 + a) / 2 + 1e-3)
    assert scores[3] == pytest.approx(wanted)


def test_isotropy_is_1_where_all_directions_are_alike_and_falls_with_a_common_one():
    even = np.concatenate([np.eye(5), -np.eye(5)]) * 3
    found = shape(even)
    assert found.isotropy == pytest.approx(1) and found.effective_rank == pytest.approx(5)
    assert found.mean_cosine == pytest.approx(-1 / 9)  # each has one opposite among nine others
    leaning = shape(even + 4 * np.eye(5)[0])
    assert leaning.isotropy < 0.1 and leaning.mean_cosine > 0.3 and leaning.effective_rank < 5
    # Along the axes of a diagonal WᵀW, Z is known.
    some = np.diag([1.0, 2.0, 3.0])
    z = [2 + np.exp(sign * x) for x in (1, 2, 3) for sign in (-1, 1)]
    assert shape(some).isotropy == pytest.approx(min(z) / max(z))


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    assert effective_rank(basis[:, :7]) == pytest.approx(7)
    assert effective_rank(np.outer(basis[0], basis[1])) == pytest.approx(1)
    assert 2 < effective_rank(basis[:, :3] * [1, 1, 0.5]) < 3


def test_maps_of_a_turned_space_lie_on_each_other():
    rng = np.random.default_rng(1)
    x_ND = rng.normal(size=(30, 6)) * [5, 3, 1, 1, 1, 1]
    turned = x_ND @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 7
    one, other = maps([turned, x_ND], lambda x: principal(x)[0])
    assert np.abs(one - other).max() < 1e-9
    variances = np.var(x_ND, 0)
    assert principal(x_ND, 6)[1].sum() == pytest.approx(1)
    assert principal(x_ND)[1][0] > 0.9 * variances[0] / variances.sum()
    # What lies nearest is at least as near as without.
    moved = x_ND + rng.normal(size=x_ND.shape)
    assert ((align(moved, x_ND) - x_ND) ** 2).sum() <= ((moved - x_ND) ** 2).sum()


def test_umap_says_what_it_needs_or_keeps_clusters_apart():
    rng = np.random.default_rng(2)
    x_ND = np.repeat(np.eye(2, 8) * 9, 12, 0) + rng.normal(size=(24, 8)) * 0.1
    try:
        found = neighbourhood_map(x_ND)
    except NotApplicable as why:
        assert "pip install" in str(why)
    else:
        gap = np.linalg.norm(found[:12].mean(0) - found[12:].mean(0))
        assert gap > 2 * found[:12].std()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with words for tokens, and three checkpoints."""
    fields = {"data__num_documents": 60, "checkpoint__keep": 9}
    tokenizer = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 500}
    return tiny_jobs.run(tmp_path_factory.mktemp("runs"), "words", **tokenizer, **fields)


@pytest.mark.slow
def test_a_page_follows_a_run(run, tmp_path):
    words = f"--config=configs/interpret/embeddings.py --config.init_from={run} --config.moments=2"
    words += f" --config.shuffles=99 --workdir={tmp_path}"
    assert entry.guarded(entry.run, words.split()) == 0
    page = json.loads((tmp_path / "embeddings.json").read_text(encoding="utf-8"))
    assert (page["facts"]["checkpoints"], page["command"].split()[2]) == (
        "8, 16, 24",
        "--config=configs/interpret/embeddings.py",
    )
    sections = page["sections"]
    assert [*sections, *page["left_out"]] == ["neighbours", "analogies", "shape", "map", "bias"]
    steps = {row[0]: row[1:] for row in sections["shape"]["tables"][0]["rows"]}
    loaded = lm.load(run, 16)
    table = np.asarray(loaded.params["embedding.tokens"])[: loaded.tokenizer.vocab_size]
    assert steps[16] == pytest.approx(shape(table))
    # The bias direction is the evaluation's own.
    pairs = [np.stack(word_vectors(table, loaded.tokenizer, pair)) for pair in PAIRS]
    rows = {row[0]: row for row in sections["bias"]["tables"][0]["rows"]}
    assert rows[16][1] == pytest.approx(bias.direction(pairs)[1])
    html = (tmp_path / "embeddings.html").read_text(encoding="utf-8")
    assert html.count('<svg role="img"') == sum(len(s["pictures"]) for s in sections.values()) >= 3
    assert "://" not in html.replace("http://www.w3.org", "")  # no network


def test_what_makes_no_sense_is_said_in_a_line(tmp_path):
    config = defaults(embeddings.EmbeddingsJob)
    with pytest.raises(ConfigError, match=r"config\.init_from='' must name"):
        embeddings.run(config, str(tmp_path))
    config.init_from, config.analogies = "somewhere", ("man:king",)
    with pytest.raises(ConfigError, match=r"config.analogies='man:king' must be four words"):
        embeddings.run(config, str(tmp_path))
    assert parse_analogy("man:king::woman:queen", "x") == ("man", "king", "woman", "queen")

"""Texts that an algorithm wrote are exactly that, and what is held out is never learnt."""

from collections import Counter

import numpy as np
import pytest

from lm.config import ConfigError
from lm.data import algorithmic, evaluation_batches, prepare, train_batches, training_texts
from lm.data.config import DataConfig
from lm.data.corpora import source
from lm.data.files import CorpusReport
from lm.tokenizers import TokenizerConfig, chat_template, train


@pytest.mark.parametrize("name, periods", [("repeats", {*range(8, 21)}), ("repeats_16", {16})])
def test_each_symbol_of_a_repeat_stood_a_period_before(name, periods):
    some = [algorithmic.repeat(name, 3, n) for n in range(400)]
    assert {one.period for one in some} == periods
    for text, period in some:
        assert len(text) == 48 and text[period:] == text[:-period]
    assert some[5] == algorithmic.repeat(name, 3, 5) != algorithmic.repeat(name, 4, 5)
    firsts = Counter(one.text[0] for one in some)
    assert {*firsts} == {*algorithmic.SYMBOLS} and len(algorithmic.SYMBOLS) == 64


@pytest.mark.parametrize("p", [7, 59])
def test_all_pairs_are_added_and_each_is_on_one_side_alone(p):
    name = f"modular_addition_{p}"
    sides = [[algorithmic.equation(name, 1, n, side) for n in range(p * p)] for side in (0, 1)]
    asked = [{one["prompt"] for one in side} for side in sides]
    assert not asked[0] & asked[1] and len(asked[0]) + len(asked[1]) == p * p
    assert len(asked[0]) - len(asked[1]) == 1
    for one in (*sides[0], *sides[1]):
        a, b, c = map(algorithmic.SYMBOLS.index, one["prompt"] + one["response"])
        assert (a + b) % p == c
    again = algorithmic.pairs(p, 1)
    np.testing.assert_array_equal(again, algorithmic.pairs(p, 1))
    assert {*map(tuple, again)} != {*map(tuple, algorithmic.pairs(p, 2))}


def prepared(config, objective, **tokenizer):
    """What reads batches, and the two splits."""
    made = train(TokenizerConfig(kind="char", **tokenizer), training_texts(config, 0, objective))
    template = chat_template(made, "plain", (made.bos_id,)) if objective == "sft" else None
    splits = prepare(config, made, 0, print, objective, template)
    return {"objective": objective, "tokenizer": made}, *splits


def rows(batches):
    """The targets of every row that is not padding."""
    return [row for one in batches for row in one["targets"][one["weights"].any(1)].tolist()]


def test_a_row_of_repeats_is_one_text_and_a_function_of_its_number(tmp_path):
    config = DataConfig(
        path="repeats", num_documents=60, packing="none", end_of_text=False, block_size=48,
        batch_size=4, cache_dir=str(tmp_path), validation_fraction=0.2,
    )  # fmt: skip
    reading, training, held_out = prepared(config, "causal")
    tokenizer = reading["tokenizer"]
    assert tokenizer.vocab_size == 66  # with end-of-text and unknown
    every = train_batches(config, training, seed=0, **reading)
    for host in ([0, 2], [1, 3]):
        part = train_batches(config, training, seed=0, rows=host, **reading)
        for n in (5, 40):
            batch = every.batch(n)
            np.testing.assert_array_equal(batch["inputs"][host], part.batch(n)["inputs"])
    assert (batch["weights"] == 1).all() and (batch["inputs"][:, 0] == tokenizer.bos_id).all()
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    learnt = {tokenizer.decode(row) for row in rows(map(every.batch, range(13)))}
    rest = rows(evaluation_batches(config, held_out, **reading))
    texts = {algorithmic.repeat("repeats", 0, n).text for n in range(60)}
    assert learnt | {*map(tokenizer.decode, rest)} == texts and len(learnt) + len(rest) == 60


def test_of_a_sum_the_answer_alone_is_learnt(tmp_path):
    config = DataConfig(
        path="modular_addition_7", num_documents=25, validation_fraction=24 / 25, packing="none",
        block_size=3, batch_size=25, cache_dir=str(tmp_path),
    )  # fmt: skip
    reading, training, held_out = prepared(config, "sft", chat_template="plain")
    batch = train_batches(config, training, seed=0, **reading).batch(0)
    (others,) = evaluation_batches(config, held_out, **reading)
    place = algorithmic.SYMBOLS.index
    for one, held in ((batch, False), (others, True)):
        asked = one["weights"].any(1)
        assert (one["weights"][asked] == [0, 0, 1]).all()
        read = [reading["tokenizer"].decode(row[1:]) for row in one["inputs"][asked].tolist()]
        assert {(place(a), place(b)) for a, b in read} == {
            *map(tuple, algorithmic.pairs(7, 0, held))
        }
        said = reading["tokenizer"].decode(one["targets"][asked, 2].tolist())
        assert all((place(a) + place(b)) % 7 == place(c) for (a, b), c in zip(read, said))


def test_what_is_of_another_kind_is_refused_in_a_line():
    config = DataConfig(num_documents=3)
    with pytest.raises(ConfigError, match="'repeats' holds texts, and conversations are needed"):
        list(source("repeats", config, 0).records(CorpusReport()))
    with pytest.raises(ConfigError, match="'modular_addition_7' holds conversations"):
        list(source("modular_addition_7", config, 0).items(CorpusReport()))
    with pytest.raises(ConfigError, match="did you mean 'modular_addition_59'"):
        source("modular_addition_58", config, 0)

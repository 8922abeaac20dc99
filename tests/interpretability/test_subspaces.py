"""Distributed alignment search and probes, on a program compiled into weights by hand."""

import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError
from lm.interpretability.subspaces import Pairs, align
from lm.models import bind, param_specs, skeleton
from lm.models.activations import trace

TOKENS, T = 8, 6  # tokens that are read; two more are answers
ANSWERS = 8, 9
# The residual stream's dimensions, as tracr (Lindner et al. 2023) lays them out: a token, one-hot;
# a place, one-hot; and the variable: the class of the token before.
TOKEN, PLACE, CLASS = range(TOKENS), range(TOKENS, TOKENS + T), TOKENS + T
WIDTH = 16
SITE = "blocks.0.residual_after"


@pytest.fixture(scope="module")
def program():
    """RASP: `aggregate(select(indices, indices - 1, ==), tokens % 2)`, then an answer."""
    config = tiny_models.config(
        num_layers=1,
        num_heads=1,
        width=WIDTH,
        head_dim=T,
        mlp_width=0,
        norm="none",
        positions="learned",
        vocab_size=TOKENS + 2,
        max_length=T,
        tie_embeddings=False,
    )
    values = {n: np.zeros(s.shape, np.float32) for n, s in param_specs(skeleton(config)).items()}
    values["embedding.tokens"][TOKEN, TOKEN] = 1
    values["embedding.positions"][range(T), PLACE] = 1
    attention = {part: values[f"blocks.attention.{part}"][0] for part in ("query", "key", "value")}
    for place in range(T):  # who stands at i asks for i - 1, and the first for itself
        attention["query"][PLACE[place], 0, max(place - 1, 0)] = 100 * T**0.5
        attention["key"][PLACE[place], 0, place] = 1
    attention["value"][TOKEN, 0, 0] = [1 - 2 * (token % 2) for token in TOKEN]
    values["blocks.attention.output"][0, 0, 0, CLASS] = 1
    values["head"][ANSWERS, CLASS] = [1, -1]
    return config, values


def pairs(number=160):
    rng = np.random.default_rng(0)
    base, source = rng.integers(0, TOKENS, (2, number, T), np.int32)
    return Pairs(base, source, np.array(ANSWERS)[source[:, -2] % 2])


def test_a_compiled_program_attends_where_it_says(program):
    config, values = program
    tokens = pairs(8).base_NT
    found = trace(
        bind(skeleton(config), values), tokens, names=("blocks.0.attention.pattern", "logits")
    )
    wanted = np.eye(T)[[0, *range(T - 1)]]
    assert np.allclose(found["blocks.0.attention.pattern"], wanted, atol=1e-6)
    answers = np.argmax(found["logits"][:, 1:], -1)
    assert np.array_equal(answers, np.array(ANSWERS)[tokens[:, :-1] % 2])


@pytest.mark.slow
def test_a_search_finds_the_variable_and_its_controls_do_not(program):
    config, values = program
    found = align(skeleton(config), values, pairs(), SITE, size=1, steps=120, learning_rate=0.05)
    assert np.abs(found.basis_DK[CLASS, 0]) > 0.99
    assert found.found.value == 1 and found.chance < 0.65
    for control in (found.random_parameters, found.arbitrary_labels):
        assert control.low < found.chance and control.value < 0.7


@pytest.mark.slow
def test_a_subspace_that_is_not_there_is_not_found(program):
    config, values = program
    found = align(skeleton(config), values, pairs(), "embedding", size=1, steps=40)
    assert found.found.value < 0.7  # the token before is not in this token's embedding


def test_what_cannot_be_searched_is_said_in_a_line(program):
    config, values = program
    model = skeleton(config)
    with pytest.raises(ConfigError, match="the axes BTHC: name a residual stream"):
        align(model, values, pairs(4), "blocks.0.attention.heads", size=1)
    with pytest.raises(ConfigError, match="size=17 is not in 1 … 16"):
        align(model, values, pairs(4), SITE, size=17)
    one = pairs(4)._replace(base_NT=np.zeros((4, T), np.int32))
    with pytest.raises(ConfigError, match="the same base text"):
        align(model, values, one, SITE, size=1)

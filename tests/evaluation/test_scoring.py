"""Log-probabilities of given tokens: those of the logits, packed or not, on any mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import general_params, tiny_model

from lm.config import ConfigError
from lm.evaluation.scoring import Scorer, pack, windows
from lm.models import bind, param_specs
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.parallel.sharding import parameter_shardings

KINDS = {
    "gpt": {"positions": "learned", "max_length": 64},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 1, "max_length": 64},
    "gemma": {
        "logits_softcap": 5.0,
        "window": 8,
        "attention_pattern": ("local", "global"),
        "max_length": 64,
    },
    "experts": {"num_experts": 4, "experts_per_token": 2, "activation": "swiglu", "max_length": 64},
    "lstm": {"cell": "lstm", "max_length": 64},
}


def texts(number, vocab, lengths=range(2, 60)):
    rng = np.random.default_rng(0)
    found = [rng.integers(0, vocab, rng.choice(lengths)).tolist() for _ in range(number)]
    return found, [int(rng.integers(1, len(ids))) for ids in found]


@functools.cache
def logits_of(model):
    return jax.jit(lambda params, tokens_BT: bind(model, params)(tokens_BT))


def expected(model, params, ids, start):
    logits = np.asarray(logits_of(model)(params, jnp.array([ids[:-1]])), np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(start - 1, len(ids) - 1)
    logprob = log_p[places, ids[start:]]
    over = logits[places] - logits[places, ids[start:]][:, None]
    rank = (over > 1e-4).sum(-1), (over > -1e-4).sum(-1)  # where nearly alike, either
    return logprob, rank, -(np.exp(log_p) * log_p).sum(-1)[places]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_logits(kind):
    model, _ = tiny_model(**KINDS[kind])
    params = general_params(model)
    lengths = (9, 33, 60)  # few, as the model compiles for each
    some, starts = texts(9, model.config.vocab_size, lengths)
    for scored, ids, start in zip(Scorer(model, params)(some, starts), some, starts):
        logprob, rank, entropy = expected(model, params, ids, start)
        np.testing.assert_allclose(scored.logprob, logprob, atol=2e-5)
        np.testing.assert_allclose(scored.entropy, entropy, atol=2e-5)
        assert (rank[0] <= scored.rank).all() and (scored.rank < rank[1]).all()
        assert scored.total == pytest.approx(logprob.sum(), abs=1e-4)
        assert scored.greedy == (not scored.rank.any())


def test_packed_texts_score_as_alone_in_any_batch():
    model, params = tiny_model(max_length=64)
    some, starts = texts(40, model.config.vocab_size)
    together = Scorer(model, params)(some, starts)
    for tokens in (64, 200, 10_000):
        for one, other in zip(Scorer(model, params, tokens=tokens)(some, starts), together):
            np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5)
    scorer = Scorer(model, params)
    alone = [scorer([ids], [start])[0] for ids, start in zip(some, starts)]
    for one, other in zip(alone, together):
        np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_scores_as_one_device(axes):
    model, params = tiny_model(max_length=64, vocab_size=256)
    some, starts = texts(20, 256)
    one = Scorer(model, params)(some, starts)
    layout = lay_out("", MeshConfig(**{"data": 1, **axes}), 3)
    placed = jax.device_put(params, parameter_shardings(param_specs(model), layout.mesh))
    with layout.active():
        many = Scorer(model, placed, ways=axes["data"] * axes.get("fsdp", 1), tokens=128)(
            some, starts
        )
    for a, b in zip(one, many):
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)
        np.testing.assert_array_equal(a.rank, b.rank)


def test_a_uniform_model_scores_the_log_of_its_vocabulary():
    model, params = tiny_model()
    params = {name: jnp.zeros_like(value) for name, value in params.items()}
    (scored,) = Scorer(model, params)([[1, 2, 3, 4]], [1])
    np.testing.assert_allclose(scored.logprob, -math.log(257), rtol=1e-6)
    np.testing.assert_allclose(scored.entropy, math.log(257), rtol=1e-6)
    assert scored.greedy  # nothing is likelier


def test_rows_hold_everything_once_and_little_else():
    sizes = np.random.default_rng(1).integers(1, 100, 500).tolist()
    rows = pack(sizes, 100)
    assert sorted(number for row in rows for number in row) == list(range(500))
    assert max(sum(sizes[n] for n in row) for row in rows) <= 100
    assert len(rows) <= 1.05 * sum(sizes) / 100 + 1


@pytest.mark.parametrize("stride", [0, 3, 8])
@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 30])
def test_windows_score_every_token_once_with_as_much_context_as_they_can(number, stride):
    whole, scored = [99, *range(number)], []
    for ids, start in windows(list(range(number)), 99, 8, stride):
        assert 1 <= start < len(ids) <= 9
        scored += ids[start:]
        end = whole.index(ids[-1]) + 1
        assert ids == whole[max(0, end - 9) : end] or len(scored) <= 8
        if stride and len(scored) > 8:
            assert start >= 9 - stride
    assert scored == list(range(number))


def test_what_cannot_be_scored_is_refused():
    model, params = tiny_model()
    scorer = Scorer(model, params)
    assert scorer([], []) == []
    for ids, start, message in (
        ([1], 1, "text 0 has 1 tokens, scored from token 1 on"),
        ([1, 2], 0, "scored from token 0 on"),
        ([1] * 34, 1, "at most model.max_length=32 before the last"),
        ([1, 257], 1, "ids outside 0 … 256"),
    ):
        with pytest.raises(ConfigError, match=message):
            scorer([ids], [start])
    with pytest.raises(ConfigError, match="only a decoder with an output head"):
        Scorer(*tiny_model(classifier="sequence", num_labels=1))

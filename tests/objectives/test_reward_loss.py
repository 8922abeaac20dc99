"""The reward model's loss is a sum over pairs: nothing but the pairs changes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import compiled

from lm.config import ConfigError
from lm.inference import score
from lm.models import bind, skeleton
from lm.objectives import ObjectiveConfig, check_objective, loss
from lm.objectives.reward import bradley_terry, pair_rewards

LENGTH = 12
OBJECTIVE = ObjectiveConfig(name="reward", centering=0.3)
CONFIG = tiny_models.config(classifier="sequence", num_labels=1, max_length=LENGTH)
PARAMS = tiny_models.params(CONFIG)
PROMPT = 3  # tokens of every prompt


def documents(pairs=4, longest=LENGTH, seed=0):
    """Pairs of whole texts that begin with the same prompt, [P][2] lists of ids."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(pairs):
        prompt = rng.integers(0, 40, PROMPT).tolist()
        lengths = rng.integers(2, longest - PROMPT + 1, 2)
        found.append([prompt + rng.integers(0, 40, n).tolist() for n in lengths])
    return found


def rows(documents, length=LENGTH, pad=0):
    """As the data has them: the last token of a text stands among the targets alone."""
    shape = (len(documents), 2, length)
    batch = {name: np.full(shape, pad, np.int32) for name in ("inputs", "targets")}
    batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
    batch["weights"] = np.zeros(shape, np.float32)
    for p, pair in enumerate(documents):
        for side, ids in enumerate(pair):
            at = (p, side, slice(len(ids) - 1))
            batch["inputs"][at], batch["targets"][at] = ids[:-1], ids[1:]
            batch["segment_ids"][at], batch["positions"][at] = 1, range(len(ids) - 1)
            batch["weights"][at][PROMPT - 1 :] = 1
    return batch


@functools.partial(compiled, static_argnums=(0,))
def computed(objective, params, batch):
    def summed(params):
        return loss(bind(skeleton(CONFIG), params), batch, objective)

    return jax.value_and_grad(summed, has_aux=True)(params)


@compiled
def judged(batch):
    return pair_rewards(bind(skeleton(CONFIG), PARAMS), batch)


def same(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), one, other)


def test_a_reward_is_that_of_the_whole_text_up_to_its_last_token():
    texts = documents()
    expected = score(CONFIG, PARAMS, [ids for pair in texts for ids in pair]).reshape(-1, 2)
    found = judged(rows(texts))
    np.testing.assert_allclose(found.reward_P2, expected, atol=1e-6)
    assert float(found.tokens) == sum(len(ids) for pair in texts for ids in pair)
    # What a template writes after the end of the turn is in the row, and is not read.
    longer = [[[*ids, 5, 6] for ids in pair] for pair in documents(longest=LENGTH - 2)]
    batch = rows(longer, LENGTH)
    for p, pair in enumerate(longer):
        for side, ids in enumerate(pair):
            batch["weights"][p, side, len(ids) - 3 :] = 0
    expected = score(CONFIG, PARAMS, [ids[:-2] for pair in longer for ids in pair])
    found = judged(batch)
    np.testing.assert_allclose(found.reward_P2.ravel(), expected[:, 0], atol=1e-6)


def test_a_full_row_loses_its_first_token_and_not_its_last():
    texts = [[ids[: PROMPT - 1] + list(range(LENGTH - 1)) for ids in p] for p in documents(2)]
    texts = [[ids[-LENGTH - 1 :] for ids in pair] for pair in texts]
    assert len(texts[0][0]) == LENGTH + 1
    found = judged(rows(texts))
    expected = score(CONFIG, PARAMS, [ids[1:] for pair in texts for ids in pair])
    np.testing.assert_allclose(found.reward_P2.ravel(), expected[:, 0], atol=1e-6)


def test_the_loss_is_bradley_terry_with_margin_and_centering():
    chosen, rejected = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    expected = np.log1p(np.exp([-0.5, 5.0]))
    np.testing.assert_allclose(bradley_terry(chosen, rejected), expected, rtol=1e-6)
    expected = np.log1p(np.exp([-0.5 + 2, 5.0 + 1]))
    margin = jnp.array([2.0, 1.0])
    np.testing.assert_allclose(bradley_terry(chosen, rejected, margin), expected, rtol=1e-6)

    batch = rows(documents())
    batch["margin"] = np.array([0.5, 0.0, 1.0, -0.5], np.float32)
    (total, metrics), _ = computed(OBJECTIVE, PARAMS, batch)
    r = np.asarray(judged(batch).reward_P2, np.float64)
    nats = np.log1p(np.exp(r[:, 1] - r[:, 0] + batch["margin"])).sum()
    np.testing.assert_allclose(metrics["nats"], nats, rtol=1e-5)
    np.testing.assert_allclose(total, nats + 0.3 * (r.sum(1) ** 2).sum(), rtol=1e-5)
    assert metrics["weight"] == 4 and metrics["accuracy"] == (r[:, 0] > r[:, 1]).sum()
    np.testing.assert_allclose(metrics["margin"], (r[:, 0] - r[:, 1]).sum(), atol=1e-5)
    np.testing.assert_allclose(metrics["reward"], r.mean(1).sum(), atol=1e-5)


def test_padding_companions_and_pairs_of_padding_change_nothing():
    texts = documents(longest=LENGTH - 2)
    whole = rows(texts) | {"margin": np.ones(4, np.float32)}
    expected = computed(OBJECTIVE, PARAMS, whole)
    # What stands in padding changes no bit, nor does the length of rows anything.
    other = computed(OBJECTIVE, PARAMS, rows(texts, pad=9) | {"margin": whole["margin"]})
    jax.tree.map(np.testing.assert_array_equal, other, expected)
    short = rows(texts, LENGTH - 2) | {"margin": whole["margin"]}
    same(computed(OBJECTIVE, PARAMS, short), expected)
    # The sum over parts of a batch is that of all.
    parts = [computed(OBJECTIVE, PARAMS, {n: x[at] for n, x in whole.items()})
             for at in (slice(1), slice(1, 4))]  # fmt: skip
    same(jax.tree.map(jnp.add, *parts), expected)
    # A pair of padding, or of one reply alone, weighs nothing, whatever its margin.
    padded = {n: np.concatenate([x, x[:2]]) for n, x in whole.items()}
    padded["margin"][4:] = np.nan
    padded["weights"][4], padded["segment_ids"][4] = 0, 0
    padded["weights"][5, 1], padded["segment_ids"][5, 1] = 0, 0
    found = computed(OBJECTIVE, PARAMS, padded)
    found[0][1]["tokens"] = expected[0][1]["tokens"]  # of the reply alone are read, too
    same(found, expected)
    # Where no row is packed the trainer says what is filled, and no more.
    bare = {n: x for n, x in whole.items() if n not in ("segment_ids", "positions")}
    same(computed(OBJECTIVE, PARAMS, bare | {"filled": whole["segment_ids"] > 0}), expected)


def test_a_batch_without_pairs_is_no_loss():
    empty = {name: np.zeros_like(x) for name, x in rows(documents()).items()}
    (total, metrics), gradient = computed(OBJECTIVE, PARAMS, empty)
    assert total == 0 and metrics["weight"] == 0 and metrics["accuracy"] == 0
    assert not any(np.asarray(g).any() for g in gradient.values())


def test_only_a_reward_model_has_this_objective_and_it_has_no_other():
    with pytest.raises(ConfigError, match="num_labels=1"):
        check_objective(OBJECTIVE, tiny_models.config(), "config")
    with pytest.raises(ConfigError, match="output head"):
        check_objective(ObjectiveConfig(), CONFIG, "config")
    check_objective(OBJECTIVE, CONFIG, "config")

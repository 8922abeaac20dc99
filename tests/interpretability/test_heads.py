"""Scores of heads, on heads whose work is known because they were made by hand."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models

from lm.interpretability import heads
from lm.models import bind, skeleton

V, T = 9, 24  # token 0 begins every text and nothing else
BUILT = {
    "num_heads": 1,
    "width": 3 * V + T,
    "head_dim": T,
    "vocab_size": V,
    "max_length": T,
    "mlp_width": 4,
    "positions": "learned",
    "tie_embeddings": False,
    "attention_scale": 1e3,
    "activation": "relu",
}


def induction_head():
    """A head that copies the token before, and one that looks for it: config and parameters.

    Of the residual stream V numbers are the token, V the one before, V the guess, T the place.
    """
    config = tiny_models.config(**BUILT)
    params = {name: np.zeros_like(value) for name, value in tiny_models.params(config).items()}
    for name in params:
        if name.endswith("scale"):
            params[name] += 1
    token, before, guess, place = np.split(np.eye(3 * V + T, dtype=np.float32), [V, 2 * V, 3 * V])
    pad = np.zeros((3 * V + T, T - V), np.float32)
    params["embedding.tokens"], params["embedding.positions"] = token, place
    params["head"] = guess
    attention = {n: params[f"blocks.attention.{n}"] for n in ("query", "key", "value", "output")}
    attention["query"][0, :, 0] = np.roll(place, -1, 0).T  # place i asks for i - 1
    attention["key"][0, :, 0] = place.T
    attention["query"][1, :, 0] = np.hstack([token.T, pad])
    attention["key"][1, :, 0] = np.hstack([before.T, pad])
    for layer, written in enumerate((before, guess)):
        attention["value"][layer, :, 0] = np.hstack([token.T, pad])
        attention["output"][layer, 0, :V] = written
    return config, params


def repeats(rows=3):
    tokens, periods = heads.repeated_tokens(0, rows, T - 1, range(1, V), (4, 8))
    return np.pad(tokens, ((0, 0), (1, 0))), periods


def test_a_hand_built_induction_head_scores_one_and_predicts_the_repeat():
    config, params = induction_head()
    tokens, periods = repeats()

    @jax.jit
    def patterns_and_logits(params):
        model = bind(skeleton(config), params)
        return heads.attention_patterns(model, tokens), model(tokens)

    pattern, logits_BTV = map(np.asarray, patterns_and_logits(params))
    assert np.allclose(heads.previous_token_scores(pattern[0]), 1)
    assert np.allclose(heads.induction_scores(pattern[1], tokens), 1)
    assert (heads.induction_scores(pattern[0], tokens) < 0.5).all()
    assert (heads.previous_token_scores(pattern[1]) < 0.5).all()
    said = logits_BTV.argmax(-1)
    for row, period in enumerate(periods):
        seen = [len(set(tokens[row, max(0, t - period + 1) : t + 1])) for t in range(T)]
        sure = [t for t in range(period + 1, T - 1) if seen[t] == period]  # no token twice in it
        assert (said[row, sure] == tokens[row, 1:][sure]).all()


def test_composition_and_copying_of_a_hand_built_induction_head():
    config, params = induction_head()
    found = heads.composition_scores(config, params)
    assert found.key_LHLH[0, 0, 1, 0] == pytest.approx(1 / np.sqrt(V))
    assert found.query_LHLH[0, 0, 1, 0] == found.value_LHLH[0, 0, 1, 0] == 0
    assert found.key_LHLH[1].max() == 0  # nothing is later
    assert heads.copying_scores(config, params)[:, 0] == pytest.approx([0, 1])
    params["head"] = -params["head"]
    assert heads.copying_scores(config, params)[1, 0] == pytest.approx(-1)


def test_norms_of_all_heads_and_layers_that_are_not_rotated_are_read_as_they_are():
    fields = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "max_length": 8}
    config = tiny_models.config(**fields, qk_norm_joint=True, rotary_pattern=(True, False))
    params = tiny_models.params(config)
    ours = heads.head_weights(config, params)
    ones = {n: np.ones_like(x) if "key_norm" in n else x for n, x in params.items()}
    scale_KC = params["blocks.attention.key_norm.scale"][1]
    plain_LHDC = heads.head_weights(config, ones).key_LHDC
    assert np.allclose(ours.key_LHDC[1, 3], plain_LHDC[1, 3] * scale_KC[1])
    turned, found = (heads.composition_scores(config, params, n).key_LHLH for n in (3, 0))
    assert np.allclose(turned, found)  # what the second layer composes with
    rotated = dataclasses.replace(config, rotary_pattern=(True,))
    assert not np.allclose(heads.composition_scores(rotated, params, 3).key_LHLH, found)


def test_small_matrices_give_what_large_ones_would():
    # Grouped queries, LayerNorm with biases, a norm of queries and keys, and rotation.
    config = tiny_models.config(
        num_heads=4, num_kv_heads=2, norm="layernorm", bias=True, qk_norm=True, max_length=8
    )
    params = tiny_models.params(config)
    w = heads.head_weights(config, params)
    assert (w.key_LHDC[:, 0] == w.key_LHDC[:, 1]).all() and (w.value_bias_LHC != 0).all()
    x = np.random.default_rng(0).normal(size=32)
    normed = (x - x.mean()) * params["blocks.attention_norm.scale"][1]
    normed += params["blocks.attention_norm.bias"][1]
    value = normed @ params["blocks.attention.value"][1, :, 1]
    value += params["blocks.attention.value_bias"][1, 1]
    assert np.allclose(x @ w.value_LHDC[1, 3] + w.value_bias_LHC[1, 3], value)
    ov, qk = w.value_LHDC @ w.output_LHCD, w.query_LHDC @ np.swapaxes(w.key_LHDC, -1, -2)
    found = heads.composition_scores(config, params)
    for scores, b in (
        (found.query_LHLH, qk[1, 2]),
        (found.key_LHLH, qk[1, 2].T),
        (found.value_LHLH, ov[1, 2]),
    ):
        a = ov[0, 1]
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        assert scores[0, 1, 1, 2] == pytest.approx(np.linalg.norm(a @ b) / norms)
    turned = heads.composition_scores(config, params, offset=3)
    assert np.allclose(turned.value_LHLH, found.value_LHLH)
    assert not np.allclose(turned.key_LHLH, found.key_LHLH)
    embedding = params["embedding.tokens"].astype(np.float64)
    head = embedding * params["final_norm.scale"]
    values = np.linalg.eigvals(embedding @ ov[1, 2] @ (head - head.mean(1, keepdims=True)).T)
    copying = values.real.sum() / np.abs(values).sum()
    assert heads.copying_scores(config, params)[1, 2] == pytest.approx(copying, abs=1e-6)


def test_what_noise_composes_is_one_over_the_root_of_the_width():
    mean, deviation = heads.random_composition(256, 16)
    assert mean == pytest.approx(1 / 16, rel=0.1) and deviation < 0.1 * mean


def test_a_uniform_head_scores_what_counting_says():
    tokens = np.array([[5, 6, 5, 7, 5, 6]])
    segments = np.ones_like(tokens)
    even = np.asarray(heads.uniform_pattern(segments))
    assert np.allclose(heads.previous_token_scores(even), np.mean([1 / n for n in range(2, 7)]))
    assert np.allclose(heads.first_token_scores(even), np.mean([1 / n for n in range(2, 7)]))
    copies = [1 / 3, 2 / 5, 1 / 6]
    assert np.allclose(heads.duplicate_token_scores(even, tokens), np.mean(copies))
    assert np.allclose(heads.induction_scores(even, tokens), np.mean(copies))
    classes = heads.class_targets(np.array([[1, 0, 1, 2, 0, 1]]), segments)
    assert np.allclose(heads.attention_to(even, classes), np.mean([1 / 3, 2 / 6]))


def test_scores_depend_neither_on_padding_nor_on_companions():
    config = tiny_models.config(max_length=30)
    model = bind(skeleton(config), tiny_models.params(config))
    tokens, _ = heads.repeated_tokens(1, 2, 16, range(40), (3, 5))

    @jax.jit
    def scored(padded, fields):
        pattern = heads.attention_patterns(model, padded, **fields)[1]
        given = fields["segments_BT"]
        return [
            heads.induction_scores(pattern, padded, given)[0],
            heads.duplicate_token_scores(pattern, padded, given)[0],
            heads.previous_token_scores(pattern, given)[0],
            heads.first_token_scores(pattern, given)[0],
        ]

    def scores(rows, left, right):
        around = ((0, 0), (left, right))
        padded, segments = np.pad(tokens[rows], around), np.pad(np.ones((len(rows), 16)), around)
        places = np.maximum(np.arange(16 + left + right) - left, 0)
        fields = {
            "segments_BT": segments.astype(np.int32),
            "positions_BT": np.broadcast_to(places, padded.shape),
        }
        return np.array(scored(padded, fields))

    plain = scores([0], 0, 0)
    assert np.isfinite(plain).all()
    for left, right in ((3, 0), (0, 3)):
        assert np.allclose(scores([0, 1], left, right), plain, atol=1e-6)


def test_random_periods_tell_a_head_that_matches_from_one_that_counts():
    ids = range(1, 64)
    mixed, _ = heads.repeated_tokens(0, 32, 48, ids)
    fixed, periods = heads.repeated_tokens(0, 32, 48, ids, (16, 16))
    assert set(periods) == {16}
    counting = np.broadcast_to(
        np.eye(48, k=-15, dtype=np.float32), (32, 1, 48, 48)
    )  # always 15 back
    assert np.nanmean(heads.induction_scores(counting, fixed)) > 0.9
    assert np.nanmean(heads.induction_scores(counting, mixed)) < 0.3


def test_in_context_learning_is_a_difference_of_losses():
    loss = np.broadcast_to(np.log(np.arange(1.0, 513)), (2, 512))[:, ::-1]
    assert heads.in_context_learning_score(loss) == pytest.approx(np.log(13 / 463))
    assert heads.in_context_learning_score(loss[:, :100]) == pytest.approx(np.log(413 / 503))

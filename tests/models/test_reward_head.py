"""A decoder that judges a text reads its last token, whatever stands around the text."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import compiled

from lm.config import ConfigError, view
from lm.inference import Framing, Generator, score
from lm.models import ModelConfig, bind, costs, init, param_specs, skeleton
from lm.models.huggingface.families import family_for
from lm.models.huggingface.read import open_checkpoint
from lm.models.huggingface.write import save_pretrained
from lm.models.text import last_places

REWARD = {"classifier": "sequence", "num_labels": 1}
PAD = 7  # also the last token of every text here, as where padding is end-of-text


def reward(**fields):
    config = tiny_models.config(**REWARD, **fields)
    return config, tiny_models.params(config)


def texts():
    rng = np.random.default_rng(0)
    return [[*rng.integers(8, 40, n).tolist(), PAD] for n in (3, 9, 1, 14, 6)]


def rewards(config, params, rows, length, left):
    """Rewards of rows padded with PAD to `length`, before or after each text."""
    tokens_BT = np.full((len(rows), length), PAD, np.int32)
    filled_BT = np.zeros((len(rows), length), np.int32)
    positions_BT = np.zeros((len(rows), length), np.int32)
    for row, ids in enumerate(rows):
        at = slice(length - len(ids), length) if left else slice(len(ids))
        tokens_BT[row, at], filled_BT[row, at], positions_BT[row, at] = ids, 1, range(len(ids))

    @compiled
    def computed(params):
        model = bind(skeleton(config), params)
        x_BTD = model.hidden(tokens_BT, segments_BT=filled_BT, positions_BT=positions_BT)
        return model.classify(x_BTD, last_places(filled_BT))[:, 0], model.values(x_BTD)

    reward_B, value_BT = map(np.asarray, computed(params))
    last_B = [length - 1 if left else len(ids) - 1 for ids in rows]
    np.testing.assert_array_equal(reward_B, value_BT[np.arange(len(rows)), last_B])
    return reward_B


@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi"])
def test_rewards_do_not_depend_on_padding_side_or_companions_though_padding_is_end_of_text(
    positions,
):
    config, params = reward(positions=positions)
    rows = texts()
    alone = np.concatenate([rewards(config, params, [ids], len(ids), False) for ids in rows])
    assert np.ptp(alone) > 0.01
    for length, left in ((15, False), (15, True), (16, True)):
        together = rewards(config, params, rows, length, left)
        np.testing.assert_allclose(together, alone, rtol=0, atol=2e-6)
    found = score(config, params, rows)
    assert found.shape == (len(rows), 1) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], alone, rtol=0, atol=2e-6)
    # End-of-text itself is judged: without it a text is worth something else.
    without = score(config, params, [ids[:-1] or [9] for ids in rows])[:, 0]
    assert np.abs(without - alone).min() > 1e-4


def test_texts_of_many_lengths_are_scored_by_few_programs():
    config, params = reward(max_length=1024)
    scores = importlib.import_module("lm.inference.fill").scores_of_texts
    before = scores._cache_size()
    for length in range(65, 129, 7):
        score(config, params, [[9] * length] * 2)
    assert scores._cache_size() == before + 1
    for length in (1, 10, 100, 200):
        score(config, params, [[9] * length] * 2, length=200)
    assert scores._cache_size() == before + 2


def test_a_head_in_place_of_the_output_head_has_no_bias_and_starts_as_published():
    config = tiny_models.config(**REWARD, tie_embeddings=False, width=256)
    specs = param_specs(skeleton(config))
    new = {name for name in specs if name.startswith(("head", "classifier"))}
    assert new == {"classifier.projection"}
    drawn = [init({name: specs[name] for name in new}, jax.random.key(seed)) for seed in range(40)]
    std = np.std([x["classifier.projection"] for x in drawn])
    assert std == pytest.approx(257**-0.5, rel=0.03)
    with pytest.raises(ConfigError, match="cannot generate"):
        Generator(skeleton(config), {}, Framing())


def test_a_value_head_stands_beside_the_output_head_and_is_read_in_float32():
    config = tiny_models.config(
        classifier="token", num_labels=1, tie_embeddings=False, compute_dtype="bfloat16"
    )
    params = tiny_models.params(config)
    assert {"head", "classifier.projection"} <= set(params)
    model = bind(skeleton(config), params)
    x_BTD = model.hidden(tiny_models.tokens())
    value_BT = model.values(x_BTD)
    assert value_BT.shape == (2, 12) and value_BT.dtype == jnp.float32
    expected = np.asarray(x_BTD, np.float32) @ params["classifier.projection"]
    np.testing.assert_allclose(value_BT, expected[..., 0], atol=1e-6)
    assert model(tiny_models.tokens()).shape == (2, 12, 40)


def test_costs_know_that_a_reward_model_makes_no_logits():
    language, (config, _) = tiny_models.config(tie_embeddings=False), reward(tie_embeddings=False)
    logits = 2 * language.vocab_size * language.width
    both = (costs.forward_flops_per_token(each, 8) for each in (language, config))
    assert next(both) - next(both) == pytest.approx(logits - 2 * config.width / 8)
    head = language.vocab_size * language.width
    total = costs.parameters(language).total - costs.parameters(config).total
    assert total == head - config.width


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_goes_to_hugging_face_and_back(kind, tmp_path):
    fields = {"initializer": "normal", "activation": "swiglu", "tie_embeddings": False}
    if kind == "gpt2":
        fields = {"positions": "learned", "norm": "layernorm", "bias": True}
    config, params = reward(**fields)
    family = family_for(config)
    assert family.model_type == kind
    save_pretrained(tmp_path, family, config, params)
    said = json.loads((tmp_path / "config.json").read_text())
    name = {"llama": "Llama", "gpt2": "GPT2"}[kind]
    assert said["architectures"] == [f"{name}ForSequenceClassification"]
    assert said["id2label"] == {"0": "LABEL_0"}
    back = open_checkpoint(tmp_path)
    assert "score.weight" in back.stored
    assert (back.config.classifier, back.config.num_labels) == ("sequence", 1)
    for parameter, array in back.parameters().items():
        np.testing.assert_array_equal(array, params[parameter])


def test_what_cannot_judge_is_refused():
    for fields in ({"architecture": "encoder_decoder"}, {"cell": "gru"}):
        with pytest.raises(ConfigError, match="classifier"):
            view(ModelConfig, ModelConfig(**REWARD, **fields))
    language = tiny_models.config()
    with pytest.raises(ConfigError, match="classifier='none' has no score"):
        score(language, {}, [[1]])

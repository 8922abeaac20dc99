"""Rotary angles that depend on how long a text is: `dynamic` and `longrope`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import compiled

from lm.config import ConfigError
from lm.inference import Framing, Generator, SamplingConfig, SearchConfig
from lm.inference.engine import Engine, EngineConfig, Request
from lm.inference.search import search
from lm.interpretability.heads import composition_scores
from lm.models import ModelConfig, bind, skeleton
from lm.parallel.mesh import MeshConfig, make_mesh

ORIGINAL = 6
KINDS = {
    "longrope": {
        "rotary_scaling": "longrope",
        "rotary_short": (1.0, 1.2, 1.5, 2.0),
        "rotary_long": (1.0, 2.0, 4.0, 8.0),
    },
    "dynamic": {"rotary_scaling": "dynamic"},
    "local": {
        "rotary_local_base": 50.0,
        "rotary_local_scaling": "dynamic",
        "rotary_local_factor": 3.0,
        "attention_pattern": ("local", "global"),
        "window": 4,
    },
}
FURTHER = {"rotary_base": 100.0, "rotary_factor": 4.0, "rotary_original_length": ORIGINAL}


def tiny(kind: str, **fields) -> tuple[ModelConfig, dict]:
    config = tiny_models.config(**{**FURTHER, **KINDS[kind], **fields})
    return config, tiny_models.params(config)


def slow_but(fast: str, *kinds: str) -> list:
    """Every kind, of which one is in the quick suite."""
    return [pytest.param(k, marks=() if k == fast else pytest.mark.slow) for k in kinds]


def last_logits(config, params, texts):
    """What full forward passes say after each of the texts."""
    padded = np.array([[*text, *[0] * (16 - len(text))] for text in texts])
    segments_BT = np.array([[1] * len(text) + [0] * (16 - len(text)) for text in texts])
    logits_BTV = tiny_models.logits(config, params, padded, segments_BT=segments_BT)
    return np.array(logits_BTV)[np.arange(len(texts)), [len(text) - 1 for text in texts]]


@pytest.mark.parametrize("kind", slow_but("longrope", *KINDS))
def test_cached_decoding_equals_a_forward_pass_of_the_text_so_far(kind):
    config, params = tiny(kind, scan_layers=kind != "local")
    texts = tiny_models.tokens(3, 10)
    lengths = np.array([2, 5, 7])  # before, at and beyond the original length
    cache = jax.jit(lambda: skeleton(config).new_cache(3, 12))()

    @compiled
    def extend(params, tokens_BT, positions_BT, cache):
        model = bind(skeleton(config), params)
        x_BTD, cache = model.extend(tokens_BT, positions_BT, cache)
        return model.unembed(x_BTD), cache

    tokens_BT, positions_BT = np.zeros((3, 7), np.int32), np.full((3, 7), -1)
    for row, n in enumerate(lengths):
        tokens_BT[row, 7 - n :], positions_BT[row, 7 - n :] = texts[row, :n], np.arange(n)
    logits_BTV, cache = extend(params, tokens_BT, positions_BT, cache)
    for further in range(3):
        read = [text[: n + further] for text, n in zip(texts, lengths)]
        expected = last_logits(config, params, read)
        np.testing.assert_allclose(logits_BTV[:, -1], expected, atol=1e-5)
        new_B1 = np.array([[text[n + further]] for text, n in zip(texts, lengths)])
        logits_BTV, cache = extend(params, new_B1, (lengths + further)[:, None], cache)
    # What is taken back may take a row back over the original length.
    cache = jax.jit(lambda cache: cache.rewind(jnp.array([0, 3, 0])))(cache)
    new_B1 = np.array([[texts[0, 5]], [9], [texts[2, 9]]])
    logits_BTV, _ = extend(params, new_B1, np.array([[5], [5], [10]]), cache)
    read = [texts[0, :6], [*texts[1, :5], 9], [*texts[2], texts[2, 9]]]
    expected = last_logits(config, params, read)
    np.testing.assert_allclose(logits_BTV[:, -1], expected, atol=1e-5)


@pytest.mark.parametrize("kind", slow_but("longrope", "longrope", "dynamic"))
def test_the_engine_draws_what_forward_passes_of_the_text_so_far_say(kind):
    config, params = tiny(kind)
    sizes = EngineConfig(max_slots=3, page_size=4, prefill_chunk=8, decode_chunk=4)
    engine = Engine(skeleton(config), params, Framing(), config=sizes)
    sampling = SamplingConfig(temperature=0, max_new_tokens=5)
    prompts = [[5, 6, 7], [9] * 6, list(range(3, 13)), [5, 6, 7, 8]]
    texts = {engine.submit(Request(tuple(ids), sampling)): list(ids) for ids in prompts}
    logprobs = {number: [] for number in texts}
    while not engine.idle:
        for event in engine.step():
            texts[event.number] += [step.id for step in event.steps]
            logprobs[event.number] += [step.logprob for step in event.steps]
    for ids, text, found in zip(prompts, texts.values(), logprobs.values()):
        read = [text[: len(ids) + step] for step in range(5)]
        each = np.array(jax.nn.log_softmax(last_logits(config, params, read)))
        assert text[len(ids) :] == each.argmax(-1).tolist()
        np.testing.assert_allclose(found, each.max(-1), atol=2e-5)


@pytest.mark.parametrize("kind", slow_but("dynamic", "longrope", "dynamic"))
def test_a_document_has_the_angles_of_its_own_length_wherever_it_stands(kind):
    config, params = tiny(kind)
    text = tiny_models.tokens(1, 12)[0]
    packed = {
        "segments_BT": np.array([[1] * 4 + [2] * 8]),
        "positions_BT": np.array([[*range(4), *range(8)]]),
    }
    found = tiny_models.logits(config, params, text[None], **packed)[0]
    filled = {"filled_BT": np.arange(12)[None] < 4}
    padded = tiny_models.logits(config, params, text[None], **filled)[0]
    alone = tiny_models.logits(config, params, text[None, :4])[0]
    np.testing.assert_allclose(found[:4], alone, atol=1e-5)
    np.testing.assert_allclose(padded[:4], alone, atol=1e-5)
    alone = tiny_models.logits(config, params, text[None, 4:])[0]
    np.testing.assert_allclose(found[4:], alone, atol=1e-5)
    as_if_short = dataclasses.replace(config, rotary_original_length=100)
    shorter = tiny_models.logits(as_if_short, params, text[None, 4:])[0]
    assert np.abs(shorter - alone).max() > 1e-3


@pytest.mark.parametrize("kind", slow_but("longrope", "longrope", "dynamic"))
def test_devices_that_share_a_sequence_know_how_long_all_of_it_is(kind):
    config, params = tiny(kind, num_layers=1)
    tokens_BT = tiny_models.tokens(2, 16)
    segments_BT = np.array([[1] * 16, [1] * 4 + [2] * 12])
    positions_BT = np.array([[*range(16)], [*range(4), *range(12)]])
    fields = {"segments_BT": segments_BT, "positions_BT": positions_BT}
    expected = tiny_models.logits(config, params, tokens_BT, **fields)
    with jax.set_mesh(make_mesh(MeshConfig(context=4), jax.devices()[:4])):
        found = compiled(
            lambda params, tokens_BT, **fields: bind(skeleton(config), params)(tokens_BT, **fields)
        )(params, tokens_BT, **fields)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_beams_may_grow_over_the_original_length_and_guesses_may_not():
    config, params = tiny("longrope", num_layers=1)
    generator = Generator(skeleton(config), params, Framing(end_of_text=(-2,)))
    beams = SearchConfig(num_beams=2, max_new_tokens=4, temperature=0, length_penalty=0.0)
    found = search(generator, [[5, 6, 7, 8]], beams)
    (text,) = np.concatenate(list(found), 1)[:, :4].tolist()
    read = [[5, 6, 7, 8, *text[:n]] for n in range(4)]
    each = jax.nn.log_softmax(last_logits(config, params, read))
    np.testing.assert_allclose(found.scores[0], each[np.arange(4), text].sum(), atol=1e-5)
    for refused in ({"prompt_lookup": 2}, {"penalty_alpha": 0.5, "top_k": 2}):
        asked = SearchConfig(max_new_tokens=4, temperature=0, **refused)
        with pytest.raises(ConfigError, match=r"longrope.* from 4 tokens to 8, beyond 6"):
            search(generator, [[5, 6, 7, 8]], asked)


def test_one_offset_is_no_one_angle():
    config, params = tiny("longrope")
    with pytest.raises(ConfigError, match="rotary_scaling='longrope'"):
        composition_scores(config, params, offset=1)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({**KINDS["longrope"], "rotary_short": (1.0,)}, "rotary_short=.* 4 positive numbers"),
        ({"rotary_scaling": "dynamic", "rotary_fraction": 0.25}, "more than 2 rotated"),
        ({"rotary_local_scaling": "linear"}, "rotary_local_base"),
    ],
)
def test_impossible_angles_are_refused(fields, named):
    with pytest.raises(ConfigError, match=named):
        tiny_models.config(**fields)


def test_a_cache_without_such_angles_keeps_no_tokens():
    cache = skeleton(tiny_models.config()).new_cache(1, 4)
    assert cache.tokens_BS is None and len(jax.tree.leaves(cache)) == 4
    assert jnp.shape(cache.positions_BS) == (1, 4)

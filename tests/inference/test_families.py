"""Every kind of model decodes from its cache what full forward passes would."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from families import ENCODER_DECODERS, FAMILIES
from tiny_models import compiled
from tiny_run import general_params, tiny_model

from lm.inference import Framing, Generator, SamplingConfig
from lm.inference.prepare import in_compute_dtype
from lm.inference.prompts import NOTHING, padded, padded_after
from lm.models import bind, skeleton
from lm.models.config import POSITIONS

VOCABULARY, START, NEW = 61, (7,), 9
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5]]
QUICK = ("neox", "gemma", "smollm", "experts", "t5", "bart", "lstm", "bahdanau")
GREEDY = SamplingConfig(temperature=0, max_new_tokens=NEW)


def model_of(family, **fields):
    """The skeleton of a family, by its name or fields, and parameters in general position."""
    family = FAMILIES[family] if isinstance(family, str) else family
    model, _ = tiny_model(**{"vocab_size": VOCABULARY, **family, **fields})
    return model, general_params(model)


def full_forward(model, params, prompts, texts):
    """Logits of whole texts at once, without a cache; what is read for `prompts` goes before."""
    config = dataclasses.replace(model.config, capacity_factor=0.0)
    forward = compiled(lambda params, *tokens, **a: bind(skeleton(config), params)(*tokens, **a))
    length = max(map(len, texts))
    tokens_BT = np.array([[*ids, *[0] * (length - len(ids))] for ids in texts], np.int32)
    if config.architecture == "decoder":
        return np.asarray(forward(params, tokens_BT))
    source_BS, segments_BS = padded_after(prompts, config.max_length)
    return np.asarray(forward(params, source_BS, tokens_BT, source_segments_BS=segments_BS))


def cases():
    """Every family, its layers unrolled and scanned; in the quick suite, some in one way.

    And combinations of positions, shared heads, norms and scanning, so few that each pair is met.
    """
    for index, (name, fields) in enumerate(FAMILIES.items()):
        for scan in (False, True):
            if not (scan and "cell" in fields):  # recurrent layers are never scanned
                quick = name in QUICK and (scan == (index % 2 > 0) or "cell" in fields)
                marks = () if quick else pytest.mark.slow
                case = f"{name}-{'scanned' if scan else 'unrolled'}"
                yield pytest.param(fields, scan, id=case, marks=marks)
    kinds = itertools.product(enumerate(POSITIONS), enumerate((None, 2, 1)))
    for (p, positions), (h, heads) in kinds:
        norm, scan = ("pre", "post")[(p + h) % 2], (p // 2 + h) % 2 > 0
        fields = {"num_heads": 4, "num_kv_heads": heads, "norm_position": norm}
        fields |= {"positions": positions, "norm": "layernorm", "bias": True}
        marks = () if (p + h) % 3 else pytest.mark.slow
        name = f"{positions}-{heads}-{norm}-{'scanned' if scan else 'unrolled'}"
        yield pytest.param(fields, scan, id=name, marks=marks)


@pytest.mark.parametrize("family, scan", list(cases()))
def test_cached_decoding_equals_the_full_forward_pass(family, scan):
    model, params = model_of(family, scan_layers=scan, capacity_factor=0.0)
    texts = np.random.default_rng(0).integers(0, VOCABULARY, (3, 13)).tolist()
    expected_BTV = full_forward(model, params, PROMPTS, texts)

    def extend(params, tokens_BT, positions_BT, cache):
        x_BTD, cache = bind(model, params).extend(tokens_BT, positions_BT, cache)
        return bind(model, params).unembed(x_BTD), cache

    def start(params, *new, source):
        return extend(params, *new, bind(model, params).new_cache(3, 16, *source))

    step = compiled(extend)

    lengths = (3, 7, 1)  # of what is read at first, behind padding
    tokens_BT, positions_BT = padded([row[:n] for row, n in zip(texts, lengths)], 32)
    source = padded_after(PROMPTS, 32) if "architecture" in family else ()
    logits_BTV, cache = compiled(start)(params, tokens_BT, positions_BT, source=source)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits_BTV[row, -n:], expected_BTV[row, :n], atol=1e-5)
    for further in range(6):
        at = [n + further for n in lengths]
        next_B1 = np.array([[row[t]] for row, t in zip(texts, at)])
        logits_B1V, cache = step(params, next_B1, np.array(at)[:, None], cache)
        for row, t in enumerate(at):
            np.testing.assert_allclose(logits_B1V[row, 0], expected_BTV[row, t], atol=1e-5)


def test_a_row_that_has_ended_leaves_no_trace():
    # A token at position -1, as generation feeds for rows that have ended, changes no later logits.
    model, params = tiny_model(positions="learned")
    extend = compiled(lambda params, *new: bind(model, params).extend(*new))
    cache = model.new_cache(1, 4)
    for token, position in [(5, 0), (9, -1), (6, 1)]:
        x_BTD, cache = extend(params, jnp.array([[token]]), jnp.array([[position]]), cache)
    expected_BTV = compiled(lambda params: bind(model, params)(jnp.array([[5, 6]])))(params)
    found_BTV = bind(model, params).unembed(x_BTD)
    np.testing.assert_allclose(found_BTV[:, 0], expected_BTV[:, -1], atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("experts", "t5") else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_greedy_generation_takes_the_likeliest_token_of_full_forward_passes(name):
    model, params = model_of(name)
    drawn = rows(generator(model, params).generate(PROMPTS, GREEDY))
    heads = [START if name in ENCODER_DECODERS else prompt for prompt in PROMPTS]
    texts = [[*head, *ids] for head, ids in zip(heads, drawn)]
    logits_BTV = full_forward(model, params, PROMPTS, texts)
    for head, ids, logits_TV in zip(heads, drawn, logits_BTV):
        read_NV = logits_TV[len(head) - 1 : len(head) - 1 + NEW]
        assert ids == read_NV.argmax(-1).tolist()
    assert len({id for ids in drawn for id in ids}) > 1  # not one token over and over


@pytest.mark.parametrize(
    "name",
    ["gemma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("experts", "bart", "lstm"))],
)
def test_a_prompt_alone_and_scanned_layers_give_the_same_tokens(name, monkeypatch):
    model, params = model_of(name)
    together = rows(generator(model, params).generate(PROMPTS, GREEDY))
    monkeypatch.setattr("lm.inference.prepare.UNROLLED_LAYERS", 1)
    scanned = generator(model, params)
    assert scanned.model.config.scan_layers
    assert rows(scanned.generate(PROMPTS[:1], GREEDY)) == together[:1]


def generator(model, params):
    return Generator(model, params, Framing(end_of_text=(-2,), decoder_start=START))


def rows(generation):
    drawn_BN = np.concatenate(list(generation), 1)
    return [[t for t in row if t != NOTHING] for row in drawn_BN.tolist()]


@pytest.mark.parametrize("name", [n for n, fields in FAMILIES.items() if "cell" not in fields])
def test_only_matrices_are_rounded_to_the_compute_dtype(name):
    model, params = model_of(name, compute_dtype="bfloat16")
    kept = {
        name.rpartition(".")[2]
        for name, value in in_compute_dtype(model, params).items()
        if value.dtype == np.float32
    }
    biases = {name for name in kept if name.endswith("bias")}
    untied = set() if model.config.tie_embeddings else {"tokens"}  # looked up, never multiplied
    assert kept - biases - untied <= {"scale", "positions", "router", "sinks"}
    assert "relative_bias" in kept or model.config.positions != "relative"
    assert "router" in kept or not model.config.num_experts
    rounded = {name for name in params if name.rpartition(".")[2] not in kept}
    assert all(len(params[name].shape) >= 2 for name in rounded)

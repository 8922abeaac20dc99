"""Warpers, one by one and together, leave what those of transformers leave; so does greedy text."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from lm.inference import Framing, Generator, SamplingConfig  # noqa: E402
from lm.inference.sampling import log_distribution, warping  # noqa: E402
from lm.inference.warpers import History  # noqa: E402
from lm.models import skeleton  # noqa: E402

transformers.logging.set_verbosity_error()

V, B, LENGTH, PROMPT = 613, 5, 14, 4
END = 7
SETTINGS = [
    {"temperature": 0.6}, {"temperature": 3.0}, {"top_k": 5}, {"top_k": 300}, {"top_p": 0.3},
    {"top_p": 0.95}, {"min_p": 0.02}, {"min_p": 0.4}, {"typical_p": 0.2}, {"typical_p": 0.9},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 40},
    {"min_new_tokens": LENGTH - PROMPT}, {"min_new_tokens": LENGTH - PROMPT + 1},
    {"logit_bias": {3: 4.0, 600: -5.5}},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.7},
    {
        "temperature": 1.4, "top_k": 90, "top_p": 0.9, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2, "logit_bias": {9: 3.0}, "min_new_tokens": 30,
    },
]  # fmt: skip

distribution = jax.jit(log_distribution, static_argnames="kind")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings):
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(0, 3, (B, V)).astype(np.float32)
    tokens_BL = rng.integers(1, 5, (B, LENGTH)).astype(np.int32)
    history = History(tokens_BL, np.full(B, PROMPT), np.full(B, LENGTH))
    values, kind = warping([SamplingConfig(**settings)] * B, V, [END])
    count_B = np.full(B, LENGTH - PROMPT)
    logs_BV = distribution(logits_BV, values, kind=kind, history=history, count_B=count_B)
    theirs = torch.softmax(processed(settings, tokens_BL, logits_BV), -1).numpy()
    np.testing.assert_array_equal(np.isfinite(logs_BV), theirs > 0)
    np.testing.assert_allclose(np.exp(logs_BV), theirs, atol=1e-6)


def processed(settings, tokens_BL, logits_BV):
    """What transformers' own list of processors, in its own order, makes of the logits."""
    fields = {k: v for k, v in settings.items() if k != "logit_bias"}
    config = GenerationConfig(do_sample=True, eos_token_id=END, **{"top_k": 0, **fields})
    config._eos_token_tensor = torch.tensor([END])
    if "logit_bias" in settings:
        config.sequence_bias = {(id,): bias for id, bias in settings["logit_bias"].items()}
    model = decoder_oracles.build("gpt2")
    steps = model._get_logits_processor(config, input_ids_seq_length=PROMPT, device="cpu")
    return steps(torch.tensor(tokens_BL).long(), torch.tensor(logits_BV))


def test_ngrams_and_penalties_do_not_see_padding():
    logits_BV = np.random.default_rng(1).normal(0, 3, (1, V)).astype(np.float32)
    tokens = np.array([[5, 0, 6, 5, 0]], np.int32)
    padded = np.concatenate(
        [np.full((1, 3), -1, np.int32), tokens, np.full((1, 2), 9, np.int32)], 1
    )
    for settings in (
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"frequency_penalty": 1.5},
    ):
        values, kind = warping([SamplingConfig(**settings)], V)
        plain = History(tokens, np.array([1]), np.array([5]))
        shifted = History(padded, np.array([4]), np.array([8]))
        same = [distribution(logits_BV, values, kind=kind, history=h) for h in (plain, shifted)]
        np.testing.assert_array_equal(*same)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 10},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_text_with_penalties_and_bans_is_the_same(name, settings, tmp_path):
    model = decoder_oracles.build(name)
    model.save_pretrained(tmp_path)
    _, config, params = family_checks.load(tmp_path)
    prompts = [row[:n].tolist() for row, n in zip(family_checks.text_batch()["inputs"], (3, 8, 5))]
    plain = decoder_oracles.greedy(model, prompts, 16)
    end = plain[0][6]
    generator = Generator(skeleton(config), params, Framing(end_of_text=(end,)))
    greedy = SamplingConfig(temperature=0, max_new_tokens=16, **settings)
    ours = np.concatenate(list(generator.generate(prompts, greedy)), 1)[:, :16].tolist()
    for prompt, row in zip(prompts, ours):
        # One by one: transformers counts the padding of a batch among the tokens of a row.
        theirs = GenerationConfig(
            max_new_tokens=16, do_sample=False, eos_token_id=end, pad_token_id=0, **settings
        )
        ids = torch.tensor([prompt])
        tokens = model.generate(ids, generation_config=theirs, attention_mask=torch.ones_like(ids))
        expected = tokens[0, len(prompt) :].tolist()
        assert [t for t in row if t >= 0] == expected
    assert ours[0] != plain[0]

"""Every decoder family, imported, is the same model: values, gradients, text; and so exported.

Each is made small, odd and random by transformers, saved, imported here, compared, and exported.
"""

import json
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import decoder_checks  # noqa: E402
import decoder_oracles  # noqa: E402
import encoder_checks  # noqa: E402
import encoder_oracles  # noqa: E402

from lm.inference import Framing, Generator, SamplingConfig  # noqa: E402
from lm.models import bind, skeleton  # noqa: E402
from lm.models.huggingface.write import save_pretrained  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BATCH = decoder_checks.random_batch()
NO_END = -2  # no token has this id
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=decoder_oracles.CASES)
def case(request, tmp_path_factory):
    """A model there, the family, config and parameters here, and what the model computes."""
    model = decoder_oracles.build(request.param)
    directory = tmp_path_factory.mktemp("original")
    model.save_pretrained(directory)
    imported = encoder_checks.load(directory, scan_layers=True)
    theirs = decoder_oracles.computed(model, BATCH, tmp_path_factory.mktemp("gradient"))
    return types.SimpleNamespace(name=request.param, model=model, ours=imported, theirs=theirs)


@pytest.mark.parametrize("taps", [True, False], ids=["unrolled", "scanned"])
def test_outputs_and_gradients_are_the_same(case, taps):
    outputs, gradient = decoder_checks.computed(*case.ours, BATCH, taps)
    expected, expected_gradient = case.theirs
    errors = {n: decoder_checks.worst(outputs[n], expected[n], BATCH.mask) for n in outputs}
    relative, tensor = decoder_checks.worst_gradient(gradient, expected_gradient)
    size = np.abs(expected["logits"]).max()
    measured = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{case.name}: {measured} of {size:.1f}, gradient {relative:.1e} ({tensor})")
    assert max(errors.values()) < decoder_checks.OUTPUTS, errors
    assert relative < decoder_checks.GRADIENTS, tensor


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
# config.json as others write it: the model → the fields.
ODD = {
    "yarn of a low base": ("llama", {"rope_scaling": _YARN, "rope_theta": 2.0}),
    "yarn of an outer length": (
        "llama",
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": None},
            "original_max_position_embeddings": 16,
            "rope_parameters": None,
        },
    ),
    "linear with a length": (
        "mistral",
        {"rope_scaling": {**_YARN, "rope_type": "linear"}, "rope_theta": 50.0},
    ),
    "neox theta": ("gpt_neox", {"rope_parameters": None, "rope_theta": 50.0, "rotary_pct": 0.5}),
    "neox both": ("gpt_neox", {"rope_theta": 50.0, "rotary_emb_base": 300}),
    "inert": ("llama", {"is_llama_config": True, "unsloth_fixed": True, "rope_interleaved": False}),
    "roberta pad 0": ("roberta", {"pad_token_id": 0}),
    "roberta pad 2": ("roberta_masked", {"pad_token_id": 2}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_configs_are_read_as_transformers_reads_them(name, tmp_path):
    case, fields = ODD[name]
    decoder = case in decoder_oracles.CASES
    oracles = decoder_oracles if decoder else encoder_oracles
    model = oracles.build(case if decoder else encoder_oracles.CASES[case])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    model = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = torch.tensor(BATCH.tokens).long()
    with torch.no_grad():
        theirs = model(tokens, attention_mask=torch.ones_like(tokens))[0].numpy()
    _, config, params = encoder_checks.load(tmp_path)
    ours = bind(skeleton(config), params)
    ours = ours(BATCH.tokens) if config.head_transform or decoder else ours.hidden(BATCH.tokens)
    assert np.abs(ours - theirs).max() < decoder_checks.OUTPUTS


def test_exported_it_is_bit_for_bit_what_was_imported(case, tmp_path):
    save_pretrained(tmp_path / "out", *case.ours)
    back, report = type(case.model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    expected, found = case.model.state_dict(), back.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        logits = decoder_oracles.run(back.eval(), BATCH).logits
    np.testing.assert_array_equal(logits.numpy(), case.theirs[0]["logits"])


def test_greedy_text_is_the_same(case):
    _, config, params = case.ours
    prompts = [row[:length].tolist() for row, length in zip(BATCH.tokens, (3, 8, 5))]
    generator = Generator(skeleton(config), params, Framing(end_of_text=(NO_END,)))
    drawn = generator.generate(prompts, SamplingConfig(temperature=0, max_new_tokens=12))
    ours = np.concatenate(list(drawn), 1)[:, :12].tolist()
    assert ours == decoder_oracles.greedy(case.model, prompts, 12)

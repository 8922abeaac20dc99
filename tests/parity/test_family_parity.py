"""Every family, imported, is the same model: values, gradients, text; and so exported.

Each class of transformers is made small, odd and random, saved, imported here, compared, exported.
"""

import json
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import encoder_oracles  # noqa: E402
import family_checks  # noqa: E402

from lm.inference import Framing, Generator, SamplingConfig  # noqa: E402
from lm.models import ModelConfig, bind, skeleton  # noqa: E402
from lm.models.huggingface.write import save_pretrained  # noqa: E402
from lm.models.positions import relative_buckets  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NO_END = -2  # no token has this id
ORACLES = {
    **dict.fromkeys(decoder_oracles.CASES, decoder_oracles),
    **dict.fromkeys(encoder_oracles.CASES, encoder_oracles),
}
GENERATING = [n for n, c in encoder_oracles.CASES.items() if "Generation" in c.model]


@pytest.fixture(scope="module", params=ORACLES)
def case(request, tmp_path_factory):
    """A model there, the family, config and parameters here, and what the model computes."""
    oracle = ORACLES[request.param]
    model, batch = oracle.build(request.param), oracle.random_batch(request.param)
    directory = tmp_path_factory.mktemp("original")
    model.save_pretrained(directory)
    ours = family_checks.load(directory, scan_layers=True)
    theirs = oracle.computed(model, batch, tmp_path_factory.mktemp("gradient"))
    return types.SimpleNamespace(
        name=request.param, oracle=oracle, model=model, batch=batch, ours=ours, theirs=theirs
    )


@pytest.mark.slow
def test_layers_one_by_one_have_the_same_outputs(case):
    _, config, params = case.ours
    outputs, (expected, _) = family_checks.looked_at(config, params, case.batch), case.theirs
    assert set(outputs) == set(expected)
    errors = family_checks.worst(outputs, expected, case.batch)
    print(case.name, *(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < family_checks.OUTPUTS, errors


@pytest.mark.slow
def test_scanned_layers_have_the_same_outputs_and_gradients(case):
    outputs, gradient = family_checks.computed(*case.ours, case.batch, taps=False)
    expected, expected_gradient = case.theirs
    errors = family_checks.worst(outputs, expected, case.batch)
    relative = family_checks.worst_gradients(gradient, expected_gradient)
    tensor = max(relative, key=relative.get)
    print(f"{case.name}: {errors}, gradient {relative[tensor]:.1e} ({tensor})")
    assert max(errors.values()) < family_checks.OUTPUTS, errors
    assert relative[tensor] < family_checks.GRADIENTS, tensor


@pytest.mark.slow
def test_exported_it_is_bit_for_bit_what_was_imported(case, tmp_path):
    save_pretrained(tmp_path / "out", *case.ours)
    back, report = type(case.model).from_pretrained(
        tmp_path / "out",
        attn_implementation=case.model.config._attn_implementation,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    expected, found = case.model.state_dict(), back.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    outputs = case.oracle.outputs(back.eval(), case.batch)  # by its config.json, too
    for name, output in case.theirs[0].items():
        np.testing.assert_array_equal(outputs[name].detach(), output, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gptj", "falcon_11b", "gpt_neox"])
def test_a_body_without_a_head_is_the_same_body_and_goes_back(name, tmp_path):
    model, batch = decoder_oracles.build(name, head="Model"), family_checks.text_batch()
    model.save_pretrained(tmp_path / "body")
    family, config, params = family_checks.load(tmp_path / "body")
    (tokens,), named = family_checks.arguments(batch)
    hidden = bind(skeleton(config), params).hidden(tokens, **named)
    with torch.no_grad():
        expected = decoder_oracles.run(model, batch).last_hidden_state.numpy()
    errors = family_checks.worst({"hidden": hidden}, {"hidden": expected}, batch)
    assert errors["hidden"] < family_checks.OUTPUTS
    save_pretrained(tmp_path / "back", family, config, params)
    back, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    found = back.state_dict()
    assert all(torch.equal(found[n], tensor) for n, tensor in model.state_dict().items())


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_configs_are_read_as_transformers_reads_them(name, tmp_path):
    case, fields = ODD[name]
    model = ORACLES[case].build(case)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    model = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = family_checks.text_batch()["inputs"]
    with torch.no_grad():
        ids = torch.tensor(tokens).long()
        theirs = model(ids, attention_mask=torch.ones_like(ids))[0].numpy()
    _, config, params = family_checks.load(tmp_path)
    ours = bind(skeleton(config), params)
    headless = config.architecture == "encoder" and not config.head_transform
    ours = ours.hidden(tokens) if headless else ours(tokens)
    assert np.abs(ours - theirs).max() < family_checks.OUTPUTS


@pytest.mark.slow
@pytest.mark.parametrize("case", decoder_oracles.CASES, indirect=True)
def test_greedy_text_is_the_same(case):
    _, config, params = case.ours
    alike = case.name in decoder_oracles.BY_LENGTH
    lengths = (4, 4, 4) if alike else (3, 8, 5)
    prompts = [row[:n].tolist() for row, n in zip(case.batch["inputs"], lengths)]
    generator = Generator(skeleton(config), params, Framing(end_of_text=(NO_END,)))
    drawn = generator.generate(prompts, SamplingConfig(temperature=0, max_new_tokens=12))
    ours = np.concatenate(list(drawn), 1)[:, :12].tolist()
    assert ours == decoder_oracles.greedy(case.model, prompts, 12, not alike or case.name == "phi3")


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_search_gives_the_tokens_of_transformers(name, tmp_path):
    case = encoder_oracles.CASES[name]
    model = encoder_oracles.build(case, seed=17)  # of many, one that says different things
    with torch.no_grad():
        encoder_oracles.restless(model)
    model.save_pretrained(tmp_path)
    _, config, params = family_checks.load(tmp_path)
    batch, ends = encoder_oracles.random_batch(case), encoder_oracles.ENDS[case.kind]
    theirs, stop = encoder_oracles.greedy(model, batch, **ends, steps=14)
    source = (batch["source"], batch["source_mask"])
    ours = family_checks.greedy(config, params, *source, **ends, stop=stop, steps=14)
    assert len(set(theirs.flat)) > 6
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 9), (16, 20), (32, 64), (4, 128)])
def test_distances_fall_into_the_buckets_of_transformers(buckets, distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    config = ModelConfig(relative_buckets=buckets, relative_distance=distance)
    apart = np.arange(-2 * distance, 2 * distance + 1)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(apart), bidirectional, buckets, distance
    )
    ours = relative_buckets(config, bidirectional)[np.clip(apart, -distance, distance) + distance]
    np.testing.assert_array_equal(ours, theirs.numpy())

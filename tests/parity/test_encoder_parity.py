"""BERT, RoBERTa, T5, T5 v1.1, mT5 and BART compute what transformers computes, and go back to it.

Every class is made small, odd and random there, saved, imported here, compared, and exported.
"""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import encoder_checks  # noqa: E402
import encoder_oracles  # noqa: E402
from encoder_oracles import CASES  # noqa: E402

from lm.models import ModelConfig  # noqa: E402
from lm.models.huggingface.write import save_pretrained  # noqa: E402
from lm.models.positions import relative_buckets  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OUTPUTS, GRADIENTS = 2e-5, 1e-4
GENERATING = [n for n, c in CASES.items() if c.model.endswith("ConditionalGeneration")]
# What an exported config.json must say besides sizes: wrong, it would load all the same.
MEANT = {
    "bert_gelu_new": {"hidden_act": "gelu_new"},
    "roberta": {"pad_token_id": 1, "hidden_act": "gelu"},
    "t5": {"scale_decoder_outputs": True, "feed_forward_proj": "relu"},
    "t5_v1_1": {"scale_decoder_outputs": False, "feed_forward_proj": "gated-gelu"},
    "bart": {"scale_embedding": False},
    "bart_scaled": {"scale_embedding": True, "activation_function": "relu"},
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Case name → the model there, a batch, and the family, config and parameters here."""

    @functools.cache
    def load(name):
        case = CASES[name]
        model = encoder_oracles.build(case)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        return model, encoder_oracles.random_batch(case), *encoder_checks.load(directory)

    return load


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_transformers(imported, name):
    model, batch, family, config, params = imported(name)
    theirs, their_gradients = encoder_oracles.computed(model, batch)
    ours = encoder_checks.computed(config, params, batch)
    our_gradients = encoder_checks.gradients(family, config, params, batch)
    errors = encoder_checks.worst(ours, theirs, batch)
    relative = encoder_checks.worst_gradients(our_gradients, their_gradients)
    print(name, max(errors.values()), max(relative.values()))
    assert max(errors.values()) < OUTPUTS, errors
    assert max(relative.values()) < GRADIENTS, relative


@pytest.mark.parametrize("name", CASES)
def test_an_exported_model_loads_in_transformers_bit_for_bit(imported, name, tmp_path):
    model, _, family, config, params = imported(name)
    save_pretrained(tmp_path / "out", family, config, params)
    back, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = model.state_dict(), back.state_dict()
    assert set(found) == set(expected)
    for tensor, value in expected.items():
        assert torch.equal(found[tensor], value), tensor
    assert back.config.to_dict().items() >= MEANT.get(name, {}).items()


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_search_gives_the_tokens_of_transformers(name, tmp_path):
    case = CASES[name]
    model = encoder_oracles.build(case, seed=17)  # of many, one that says different things
    with torch.no_grad():
        encoder_oracles.restless(model)
    model.save_pretrained(tmp_path)
    _, config, params = encoder_checks.load(tmp_path)
    batch, ends = encoder_oracles.random_batch(case), encoder_oracles.ENDS[case.kind]
    theirs, stop = encoder_oracles.greedy(model, batch, **ends, steps=14)
    source = (batch["source"], batch["source_mask"])
    ours = encoder_checks.greedy(config, params, *source, **ends, stop=stop, steps=14)
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


def test_a_body_without_a_pooler_is_imported_without_one(tmp_path):
    case = CASES["bert"]
    config = transformers.BertConfig(**case.config)
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    _, ours, params = encoder_checks.load(tmp_path)
    assert not ours.pooler
    assert not any(name.startswith("pooler") for name in params)

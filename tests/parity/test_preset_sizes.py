"""The presets have as many parameters as transformers makes of the config.json we write for them.

Models are built on torch's `meta` device: shapes alone, whatever the size.
"""

import pytest

from lm.config import ConfigError
from lm.models import count, param_specs, skeleton
from lm.models.huggingface.families import family_for
from lm.models.presets import PRESETS, preset

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow


def written():
    """The presets that have a family, and the config.json of each."""
    for name in PRESETS:
        try:
            family = family_for(preset(name))
            hf = family.write_config(preset(name))
        except ConfigError:
            continue
        yield name, {"model_type": family.model_type, "architectures": family.architectures, **hf}


WRITTEN = dict(written())
# Not in transformers, or in another form.
ELSEWHERE = ("palm_", "deepseek_moe_", "gpt1")


def parameters_of(model_class, config):
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    model.tie_weights()
    # Copies of `shared`, which an untied T5 makes three parameters of until weights are loaded.
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    own = {name: p for name, p in model.named_parameters() if name not in copies}
    if config.model_type == "marian":  # tables of sinusoids, which are not learned
        own = {name: p for name, p in own.items() if "embed_positions" not in name}
    own |= {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    return sum(p.numel() for p in own.values())


def test_every_preset_that_transformers_has_is_written():
    assert [name for name in PRESETS if name not in WRITTEN] == [
        name for name in PRESETS if name.startswith(ELSEWHERE)
    ]


def test_gpt1_is_as_large_as_the_default_of_transformers():
    expected = parameters_of("OpenAIGPTLMHeadModel", transformers.OpenAIGPTConfig())
    assert count(param_specs(skeleton(preset("gpt1")))) == expected


@pytest.mark.parametrize("name", WRITTEN)
def test_a_preset_is_as_large_as_the_same_model_in_transformers(name):
    hf = dict(WRITTEN[name])
    model_class, tied = hf.pop("architectures")[0], hf["tie_word_embeddings"]
    model_type = hf.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **hf)
    config.tie_word_embeddings = tied  # T5Config does not take it as an argument
    found = param_specs(skeleton(preset(name)))
    found.pop("head_bias" if model_type == "marian" else "", None)  # a buffer there
    assert count(found) == parameters_of(model_class, config)

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
ELSEWHERE = ("transformer_", "palm_", "deepseek_", "gpt1")


def parameters_of(model_class, config):
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    model.tie_weights()
    # Copies of `shared`, which an untied T5 makes three parameters of until weights are loaded.
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return sum(p.numel() for name, p in model.named_parameters() if name not in copies)


def test_every_preset_that_transformers_has_is_written():
    assert [name for name in PRESETS if name not in WRITTEN] == [
        name for name in PRESETS if name.startswith(ELSEWHERE)
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_preset_is_as_large_as_the_same_model_in_transformers(name):
    hf = dict(WRITTEN[name])
    model_class, tied = hf.pop("architectures")[0], hf["tie_word_embeddings"]
    config = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf)
    config.tie_word_embeddings = tied  # T5Config does not take it as an argument
    assert count(param_specs(skeleton(preset(name)))) == parameters_of(model_class, config)


# What a config of transformers is by default, and the preset that it is.
DEFAULTS = {
    "gpt1": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig"),
    "gpt2_small": ("GPT2LMHeadModel", "GPT2Config"),
    "opt_125m": ("OPTForCausalLM", "OPTConfig"),
    "bert_base": ("BertModel", "BertConfig"),
    "t5_small": ("T5ForConditionalGeneration", "T5Config"),
    "bart_large": ("BartForConditionalGeneration", "BartConfig"),
    "llama_7b": ("LlamaForCausalLM", "LlamaConfig"),
    "mistral_7b": ("MistralForCausalLM", "MistralConfig"),
    "mixtral_8x7b": ("MixtralForCausalLM", "MixtralConfig"),
    "gpt_neox_20b": ("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "gemma2_2b": ("Gemma2ForCausalLM", "Gemma2Config"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_presets_are_the_defaults_of_transformers(name):
    model_class, config_class = DEFAULTS[name]
    config = getattr(transformers, config_class)()
    assert count(param_specs(skeleton(preset(name)))) == parameters_of(model_class, config)

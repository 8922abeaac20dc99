"""The presets have as many parameters as the same architecture in transformers.

Models are built on torch's `meta` device: shapes alone, whatever the size.
"""

import pytest

from lm.models import count, param_specs, skeleton
from lm.models.presets import PRESETS, preset

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

ELSEWHERE = ("transformer_", "palm_", "deepseek_")  # not in transformers, or in another form


def modern(c, **more):
    """Fields that Llama and its heirs share."""
    return dict(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.feed_forward,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_width,
        tie_word_embeddings=c.tie_embeddings,
        **more,
    )


def bert(c, **more):
    return dict(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        intermediate_size=c.feed_forward,
        max_position_embeddings=c.max_length + c.position_offset,
        type_vocab_size=c.token_types,
        **more,
    )


def gpt2(c):
    return dict(
        vocab_size=c.vocab_size,
        n_positions=c.max_length,
        n_embd=c.width,
        n_layer=c.num_layers,
        n_head=c.num_heads,
    )


def opt(c):
    return dict(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        word_embed_proj_dim=c.width,
        ffn_dim=c.feed_forward,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        max_position_embeddings=c.max_length,
    )


def bloom(c):
    return dict(
        vocab_size=c.vocab_size, hidden_size=c.width, n_layer=c.num_layers, n_head=c.num_heads
    )


def neox(c):
    return dict(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.feed_forward,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        tie_word_embeddings=False,
    )


def t5(c):
    return dict(
        vocab_size=c.vocab_size,
        d_model=c.width,
        d_kv=c.head_width,
        d_ff=c.feed_forward,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        feed_forward_proj="gated-gelu" if c.gated else "relu",
        tie_word_embeddings=c.tie_embeddings,
    )


def bart(c):
    return dict(
        vocab_size=c.vocab_size,
        d_model=c.width,
        max_position_embeddings=c.max_length,
        encoder_layers=c.encoder_layers,
        decoder_layers=c.num_layers,
        encoder_attention_heads=c.num_heads,
        decoder_attention_heads=c.num_heads,
        encoder_ffn_dim=c.feed_forward,
        decoder_ffn_dim=c.feed_forward,
    )


# Start of a preset's name → class of the model, class of its config, its fields. The longest wins.
KINDS = {
    "gpt1": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", gpt2),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt2),
    "gpt3": ("GPT2LMHeadModel", "GPT2Config", gpt2),
    "opt": ("OPTForCausalLM", "OPTConfig", opt),
    "bloom": ("BloomForCausalLM", "BloomConfig", bloom),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", neox),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", neox),
    "bert": ("BertModel", "BertConfig", bert),
    "bert_base_mlm": ("BertForMaskedLM", "BertConfig", bert),
    "bert_large_mlm": ("BertForMaskedLM", "BertConfig", bert),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", bert),
    "t5": ("T5ForConditionalGeneration", "T5Config", t5),
    "bart": ("BartForConditionalGeneration", "BartConfig", bart),
    "llama": ("LlamaForCausalLM", "LlamaConfig", modern),
    "mistral": ("MistralForCausalLM", "MistralConfig", modern),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        lambda c: modern(c, num_local_experts=c.num_experts),
    ),
    "qwen2_5": ("Qwen2ForCausalLM", "Qwen2Config", modern),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", modern),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", modern),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", modern),
}


def parameters_of(model_class, config):
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    model.tie_weights()
    # Copies of `shared`, which an untied T5 makes three parameters of until weights are loaded.
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return sum(p.numel() for name, p in model.named_parameters() if name not in copies)


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith(ELSEWHERE)])
def test_a_preset_is_as_large_as_the_same_model_in_transformers(name):
    model = preset(name)
    start = max((k for k in KINDS if name.startswith(k)), key=len)
    model_class, config_class, fields = KINDS[start]
    config = getattr(transformers, config_class)(**fields(model))
    config.tie_word_embeddings = model.tie_embeddings  # T5Config does not take it as an argument
    assert count(param_specs(skeleton(model))) == parameters_of(model_class, config)


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

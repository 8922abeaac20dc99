"""Decoders from Hugging Face: what they compute (golden files), and what their configs mean."""

import pathlib

import family_checks
import numpy as np
import pytest
import safetensors.numpy

from lm.config import ConfigError
from lm.inference.prompts import Framing, check_writes
from lm.models import param_specs, skeleton
from lm.models.config import ModelConfig
from lm.models.huggingface import to_tensors
from lm.models.huggingface.config_fields import essence
from lm.models.huggingface.families import FAMILIES, family_for, family_of
from lm.models.positions import rotary_frequencies
from lm.models.presets import PRESETS, preset
from lm.training.report import model_line

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DECODERS = (
    "gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox", "opt",
    "bloom", "gptj", "deepseek_v3", "qwen3_moe", "smollm3", "olmo2", "gpt_oss",
    "falcon", "starcoder2", "phi3",
)  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_a_family_computes_what_transformers_does(name):
    batch = family_checks.text_batch(rows=2, length=10)
    outputs, gradient = family_checks.computed(*family_checks.load(GOLDEN / name), batch)
    with np.load(GOLDEN / name / "computed.npz") as expected:
        streams = {f"hidden.{i}": stream for i, stream in enumerate(expected["hidden"])}
        expected_norms, logits = expected["gradient_norms"], expected["logits"]
    del outputs["loss"]
    errors = family_checks.worst(outputs, {**streams, "logits": logits}, batch)
    assert max(errors.values()) < family_checks.OUTPUTS, errors
    tensors = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")
    norms = [np.linalg.norm(gradient[tensor]) for tensor in sorted(tensors)]
    # Of some biases the gradient is zero but for rounding.
    tolerance = family_checks.GRADIENTS * expected_norms + 1e-6 * expected_norms.max()
    assert (np.abs(norms - expected_norms) < tolerance).all()


@pytest.mark.parametrize("name", DECODERS)
def test_tensors_come_back_bit_for_bit(name):
    family, config, params = family_checks.load(GOLDEN / name)
    tensors = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")
    back = to_tensors(family, config, params)
    assert family.write_config(config)  # raises if anything would be lost
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[n], tensors[n].astype(np.float32)) for n in tensors)


# config.json as it stands beside the published weights, most of it older than version 5.
_LLAMA = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-5}
_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "ep_size": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
_FALCON = {
    "alibi": False, "attention_dropout": 0.0, "bias": False, "bos_token_id": 11, "eos_token_id": 11,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
    "vocab_size": 65_024,
}  # fmt: skip
_PHI = {
    "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "silu",
    "initializer_range": 0.02, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
PUBLISHED = {
    "llama3_2_1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **_LLAMA,
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128_000,
        "eos_token_id": 128_001, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131_072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500_000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128_256,
    },
    "mistral_7b": {
        "model_type": "mistral", **_LLAMA, "hidden_size": 4096, "intermediate_size": 14_336,
        "max_position_embeddings": 32_768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rope_theta": 10_000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32_000,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral", **_LLAMA, "attention_dropout": 0.0, "hidden_size": 4096,
        "intermediate_size": 14_336, "max_position_embeddings": 32_768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 32_000,
    },
    "qwen2_5_0_5b": {
        "model_type": "qwen2", **_LLAMA, "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32_768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "sliding_window": 32_768, "tie_word_embeddings": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151_936,
    },
    "qwen3_0_6b": {
        "model_type": "qwen3", **_LLAMA, "attention_bias": False, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40_960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1_000_000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151_936,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **_LLAMA,
        "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40_960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1_000_000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151_936,
    },
    "smollm3_3b": {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], **_LLAMA,
        "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 2048,
        "intermediate_size": 11_008, "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65_536, "max_window_layers": 28, "mlp_bias": False,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 5_000_000.0, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 128_256,
    },
    "olmo2_7b": {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **_LLAMA,
        "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 4096,
        "intermediate_size": 11_008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 500_000, "tie_word_embeddings": False,
        "vocab_size": 100_352,
    },
    "olmo3_7b": {
        "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], **_LLAMA,
        "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 4096,
        "intermediate_size": 11_008,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65_536, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
            "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
        "rope_theta": 500_000, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 100_278,
    },
    "gemma2_2b": {
        "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192,
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
        "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256_000,
    },
    "gemma3_1b": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32_768, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000, "rope_scaling": None, "rope_theta": 1_000_000,
        "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262_144,
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True,
        "attention_dropout": 0.0, "eos_token_id": 200_002, "experts_per_token": 4, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131_072, "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "output_router_logits": False, "pad_token_id": 199_999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150_000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201_088,
    },
    "pythia_160m": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12,
        "rotary_emb_base": 10_000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50_304,
    },
    "gpt_j_6b": {
        "model_type": "gptj", "activation_function": "gelu_new",
        "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "gradient_checkpointing": False, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
        "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048,
        "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64, "scale_attn_weights": True,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index",
        "tie_word_embeddings": False, "vocab_size": 50_400,
    },
    "falcon_7b": {
        "model_type": "falcon", **_FALCON, "apply_residual_connection_post_layernorm": False,
        "architectures": ["FalconForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"}, "hidden_size": 4544,
        "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
        "num_hidden_layers": 32, "parallel_attn": True,
    },
    "falcon_40b": {  # as it was before transformers had the family
        "model_type": "RefinedWeb", **_FALCON, "apply_residual_connection_post_layernorm": False,
        "architectures": ["RWForCausalLM"], "hidden_size": 8192, "n_head": 128, "n_head_kv": 8,
        "n_layer": 60, "parallel_attn": True,
    },
    "falcon_180b": {
        "model_type": "falcon", **_FALCON, "architectures": ["FalconForCausalLM"],
        "hidden_size": 14_848, "multi_query": True, "new_decoder_architecture": True,
        "num_attention_heads": 232, "num_hidden_layers": 80, "num_kv_heads": 8,
        "parallel_attn": True,
    },
    "falcon2_11b": {
        "model_type": "falcon", **_FALCON, "activation": "gelu", "ff_factor": 4,
        "ffn_hidden_size": 16_384, "hidden_size": 4096, "max_position_embeddings": 8192,
        "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 32,
        "num_hidden_layers": 60, "num_kv_heads": 8, "num_ln_in_parallel_attn": 1,
        "parallel_attn": True, "rope_scaling": None, "rope_theta": 500_042.0,
        "tie_word_embeddings": False,
    },
    "starcoder2_3b": {
        "model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"],
        "attention_dropout": 0.1, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042,
        "intermediate_size": 12_288, "max_position_embeddings": 16_384, "mlp_type": "default",
        "norm_epsilon": 1e-5, "num_attention_heads": 24, "num_hidden_layers": 30,
        "num_key_value_heads": 2, "residual_dropout": 0.1, "rope_theta": 999999.4420358813,
        "sliding_window": 4096, "use_bias": True, "vocab_size": 49_152,
    },
    "phi3_mini_4k": {
        "model_type": "phi3", **_PHI, "bos_token_id": 1, "eos_token_id": 32_000,
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32_000, "rope_scaling": None,
        "rope_theta": 10_000.0, "sliding_window": 2047, "tie_word_embeddings": False,
        "vocab_size": 32_064,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
    },
    "phi4": {
        "model_type": "phi3", **_PHI, "bos_token_id": 100_257, "eos_token_id": 100_265,
        "hidden_size": 5120, "intermediate_size": 17_920, "max_position_embeddings": 16_384,
        "num_attention_heads": 40, "num_key_value_heads": 10, "num_hidden_layers": 40,
        "original_max_position_embeddings": 16_384, "pad_token_id": 100_349, "rope_scaling": None,
        "rope_theta": 250_000, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 100_352,
    },
    "phi4_mini": {
        "model_type": "phi3", **_PHI, "full_attn_mod": 1, "hidden_size": 3072,
        "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131_072, "mlp_bias": False, "num_attention_heads": 24,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "pad_token_id": 199_999,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": list(preset("phi4_mini").rotary_long),
            "short_factor": [1.0] * 48,
        },
        "rope_theta": 10_000.0, "sliding_window": 262_144, "tie_word_embeddings": True,
        "vocab_size": 200_064,
    },
    "opt_125m": {
        "model_type": "opt", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
        "activation_function": "relu", "attention_dropout": 0.0, "do_layer_norm_before": True,
        "dropout": 0.1, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0,
        "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12,
        "pad_token_id": 1, "prefix": "</s>", "vocab_size": 50_272, "word_embed_proj_dim": 768,
    },
    "opt_350m": {
        "model_type": "opt", "activation_dropout": 0.0, "activation_function": "relu",
        "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
        "do_layer_norm_before": False, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096,
        "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
        "num_attention_heads": 16, "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>",
        "vocab_size": 50_272, "word_embed_proj_dim": 512,
    },
    "bloom_560m": {
        "model_type": "bloom", "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
        "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
        "masked_softmax_fusion": True, "n_embed": 1024, "n_inner": None, "n_layer": 24,
        "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1, "seq_length": 2048,
        "skip_bias_add": True, "skip_bias_add_qkv": False, "unk_token_id": 0,
        "vocab_size": 250_880,
    },
    "deepseek_v3": {
        **_DEEPSEEK, "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3,
        "hidden_size": 7168, "intermediate_size": 18_432, "max_position_embeddings": 163_840,
        "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "rms_norm_eps": 1e-6, "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10_000, "routed_scaling_factor": 2.5, "topk_group": 4, "vocab_size": 129_280,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    "deepseek_v2_lite": {
        **_DEEPSEEK, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
        "bos_token_id": 100_000, "eos_token_id": 100_001, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10_944, "max_position_embeddings": 163_840,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "rms_norm_eps": 1e-6, "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10_000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "topk_group": 1, "topk_method": "greedy", "vocab_size": 102_400,
    },
    "moonlight_16b_a3b": {
        **_DEEPSEEK, "bos_token_id": 163_584, "eos_token_id": 163_585, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 11_264, "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50_000.0,
        "routed_scaling_factor": 2.446, "topk_group": 1, "vocab_size": 163_840,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name):
    hf = PUBLISHED[name]
    assert essence(family_of(hf).read_config(hf)) == essence(preset(name))


def test_a_body_without_a_head_is_read_and_written_as_one():
    family, hf = FAMILIES["mistral"], PUBLISHED["mistral_7b"]
    body = family.read_config({**hf, "architectures": ["MistralModel"]})
    assert not body.has_output_head and "head" not in param_specs(skeleton(body))
    assert family.write_config(body)["architectures"] == ["MistralModel"]
    tied = {"architectures": ["MistralModel"], "tie_word_embeddings": True}
    assert family.read_config({**hf, **tied}).has_output_head  # as it has there
    with pytest.raises(ConfigError, match=r"output_head=False.*Run.embed"):
        check_writes(body, Framing())
    line = model_line(body)
    assert "no output head" in line and "untied" not in line


HOMES = {
    "gpt2": "gpt2", "gpt3": "gpt2", "llama": "llama", "llama2": "llama", "llama3": "llama",
    "mistral": "mistral", "mixtral": "mixtral", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3": "gemma3_text", "pythia": "gpt_neox", "gpt": "gpt_neox",
    "opt": "opt", "bloom": "bloom", "gpt_j_6b": "gptj", "smollm3": "smollm3", "olmo2": "olmo2",
    "olmo3": "olmo3",
    "qwen3_30b_a3b": "qwen3_moe", "qwen3_235b_a22b": "qwen3_moe", "gpt_oss_20b": "gpt_oss",
    "gpt_oss_120b": "gpt_oss",
    "moonlight": "deepseek_v3", "deepseek_v3": "deepseek_v3", "deepseek_v2": "deepseek_v2",
    "deepseek_v2_lite": "deepseek_v2",
    "falcon": "falcon", "falcon2": "falcon", "starcoder2": "starcoder2", "phi3": "phi3",
    "phi4": "phi3",
}  # fmt: skip


def test_every_preset_of_a_family_can_be_written_as_that_family():
    written = []
    for name in PRESETS:
        family = FAMILIES.get(HOMES.get(name) or HOMES.get(name.split("_")[0]))
        if family:
            family.write_config(preset(name))  # raises if anything would be lost
            written.append(family.model_type)
    assert set(written) == set(HOMES.values())
    for name in ("olmo3_7b", "llama3_1_8b"):  # though some cannot say their rotations
        assert family_for(preset(name)).model_type == HOMES[name.split("_")[0]]


def yarn(**fields):
    return {"rope_scaling": {"type": "yarn", "factor": 4.0, **fields}}


_ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    "name, changes, named",
    [
        ("llama3_2_1b", {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type"),
        ("llama3_2_1b", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "short_factor"),
        ("llama3_2_1b", {"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor='2'"),
        ("llama3_2_1b", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ("llama3_2_1b", yarn(mrope=1), "mrope"),
        (
            "llama3_2_1b",
            {**yarn(**{_ORIGINAL: 8}), _ORIGINAL: 16},
            f"{_ORIGINAL}=16, and 8 .* config.ignore={_ORIGINAL}",
        ),
        ("llama3_2_1b", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama3_2_1b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama3_2_1b", {"hidden_act": "mish"}, "hidden_act"),
        ("llama3_2_1b", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama3_2_1b", {"hidden_size": "2048"}, "hidden_size"),
        ("llama3_2_1b", {"attention_sinks": 4}, "attention_sinks"),
        ("mistral_7b", {"layer_types": ["full_attention"] * 32}, "layer_types"),
        ("qwen2_5_0_5b", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen2_5_0_5b", {"layer_types": ["chunked_attention"] * 24}, "layer_types"),
        ("qwen2_5_0_5b", {"layer_types": ["sliding_attention"] * 24}, "sliding_window"),
        ("qwen2_5_0_5b", {"use_mrope": True}, "use_mrope"),
        ("qwen3_30b_a3b", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_30b_a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_30b_a3b", {"num_experts_per_tok": 129}, "experts_per_token=129"),
        ("qwen3_30b_a3b", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate"),
        ("smollm3_3b", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3_3b", {"layer_types": ["sliding_attention"] * 36}, "sliding_window"),
        ("olmo2_7b", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmo3_7b", {"rope_theta": 10_000.0}, "rope_theta"),
        ("gemma2_2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2_2b", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0"),
        ("gemma2_2b", {"sliding_window_size": 8}, "sliding_window_size=8 .* only None or 4096"),
        ("gemma3_1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_1b", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
        ("gpt_oss_20b", {"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ("gpt_oss_20b", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0"),
        ("gpt_oss_20b", {"swiglu_limit": 0.0}, "activation_limit=0.0"),
        ("pythia_160m", {"rotary_pct": 0.02}, "rotary_fraction"),
        ("pythia_160m", {"hidden_act": "laplace"}, "hidden_act"),
        ("gpt_j_6b", {"rotary_dim": 300}, "rotary_dim=300"),
        ("falcon_7b", {"alibi": True}, "alibi"),
        ("falcon_7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("falcon_7b", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads"),
        ("falcon_180b", {"parallel_attn": False}, "parallel_attn"),
        ("starcoder2_3b", {"norm_type": "rms_norm"}, "norm_type"),
        ("opt_125m", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("opt_125m", {"num_attention_heads": 5}, "num_attention_heads"),
        ("bloom_560m", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("bloom_560m", {"n_inner": 1024}, "n_inner"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ("deepseek_v2_lite", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v2_lite", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("moonlight_16b_a3b", {"topk_method": "greedy"}, "topk_method"),
        ("moonlight_16b_a3b", {"scoring_func": "softmax"}, "scoring_func"),
        ("moonlight_16b_a3b", {"rope_interleave": False}, "rope_interleave"),
        ("moonlight_16b_a3b", {"attention_bias": True}, "attention_bias"),
        ("moonlight_16b_a3b", {"num_key_value_heads": 4}, "num_kv_heads=4"),
        ("moonlight_16b_a3b", {"n_group": 7}, "router_groups=7"),
    ],
)
def test_what_cannot_be_honoured_is_named(name, changes, named):
    hf = {**PUBLISHED[name], **changes}
    with pytest.raises(ConfigError, match=named):
        family_of(hf).read_config(hf)


@pytest.mark.parametrize(
    "model_type, name, fields, named",
    [
        ("llama", "llama_7b", {"attention_pattern": ("local",), "window": 8}, "attention_pattern"),
        ("llama", "llama_7b", {"qk_norm": True}, "qk_norm"),
        ("llama", "llama_7b", {"attention_softcap": 5.0}, "attention_softcap"),
        ("llama", "llama_7b", {"activation": "relu"}, "activation"),
        ("mistral", "llama_7b", {"num_experts": 4}, "num_experts"),
        ("gemma2", "gemma2_2b", {"attention_scale": 0.1234}, "attention_scale"),
        ("qwen3_moe", "qwen3_30b_a3b", {"shared_experts": 1}, "shared_experts"),
        ("llama", "smollm3_3b", {}, "rotary_pattern"),
        ("qwen3", "qwen3_0_6b", {"qk_norm_joint": True}, "qk_norm_joint"),
        ("olmo2", "olmo2_1b", {"norm_position": "pre"}, "norm_position"),
        ("mixtral", "mixtral_8x7b", {"attention_sinks": True}, "attention_sinks"),
        ("mixtral", "mixtral_8x7b", {"activation": "swiglu_clipped"}, "activation"),
        ("gpt_oss", "gpt_oss_20b", {"expert_bias": False}, "expert_bias"),
        ("gpt_neox", "pythia_160m", {"shared_norm": True}, "shared_norm"),
        ("opt", "opt_125m", {"norm_epsilon": 1e-6}, "norm_epsilon"),
        ("bloom", "bloom_560m", {"mlp_width": 100}, "mlp_width"),
        ("deepseek_v3", "moonlight_16b_a3b", {"attention_scale": 0.5}, "attention_scale"),
        ("deepseek_v3", "moonlight_16b_a3b", {"router_bias": False}, "router_bias"),
        ("falcon", "falcon_40b", {"parallel": False}, "num_kv_heads"),
        ("starcoder2", "starcoder2_3b", {"head_dim": 64}, "head_dim"),
    ],
)
def test_what_a_family_cannot_say_is_named_and_not_dropped(model_type, name, fields, named):
    with pytest.raises(ConfigError, match=named):
        FAMILIES[model_type].write_config(preset(name, **fields))


def test_versions_4_and_5_say_the_same_rotations():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    hf = PUBLISHED["qwen3_0_6b"]
    old = {**hf, "rope_scaling": scaling}
    new = {**hf, "rope_theta": None, "rope_parameters": {**scaling, "rope_theta": 1_000_000}}
    family = FAMILIES["qwen3"]
    config = family.read_config(old)
    assert config == family.read_config(new)
    written = family.write_config(config)
    for keys in (("rope_scaling", "rope_theta"), ("rope_parameters",)):
        said = {**hf, "rope_theta": None, **{key: written[key] for key in keys}}
        assert family.read_config(said) == config


def test_layers_that_are_not_rotated_are_every_fourth_or_those_that_a_file_names():
    def rotated(**fields):
        hf = {**PUBLISHED["smollm3_3b"], "num_hidden_layers": 4, "layer_types": None, **fields}
        config = FAMILIES["smollm3"].read_config(hf)
        return [config.layer_kind(layer)[:2] for layer in range(4)]

    whole, unrotated = (False, True), (False, False)
    assert rotated(no_rope_layers=None) == [whole, whole, whole, unrotated]
    assert rotated(no_rope_layers=None, no_rope_layer_interval=2) == [whole, unrotated] * 2
    windowed = {"use_sliding_window": True, "sliding_window": 8}  # of those that are not rotated
    assert rotated(no_rope_layers=[0, 1, 1, 1, 0], **windowed) == [(True, False), *[whole] * 3]
    assert "rotary positions in 27 layers" in model_line(preset("smollm3_3b"))


# Of the uploads of SmolLM2, unsloth, Vicuna, DialoGPT, BART and others.
INERT = {
    "is_llama_config": True, "unsloth_fixed": True, "unsloth_version": "2024.9", "save_step": 9,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "max_sequence_length": 2048,
    "rope_interleaved": False, "_flash_attn_2_enabled": True, "unheard_of": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama3_2_1b", "qwen2_5_0_5b", "gemma2_2b", "opt_125m"])
def test_fields_that_change_nothing_are_known(name):
    hf = PUBLISHED[name]
    assert family_of(hf).read_config({**hf, **INERT}) == family_of(hf).read_config(hf)


def test_neox_has_its_own_names_of_rotations():
    def read(**fields):
        config = FAMILIES["gpt_neox"].read_config({**PUBLISHED["pythia_160m"], **fields})
        return config.rotary_base, config.rotary_fraction

    assert read() == read(rope_theta=50.0, partial_rotary_factor=1.0) == (10_000.0, 0.25)
    assert read(rotary_emb_base=300, rope_theta=50.0) == (300.0, 0.25)
    new = {"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 1.0}
    assert read(rope_parameters=new, rope_theta=50.0, rotary_emb_base=300) == (70.0, 1.0)
    assert read(rope_parameters={"rope_type": "default"}, rope_theta=50.0) == (10_000.0, 0.25)


def test_yarn_of_a_low_base_is_what_transformers_has():
    config = ModelConfig(
        width=16, num_heads=1, rotary_base=2.0, rotary_scaling="yarn", rotary_factor=4.0,
        rotary_original_length=4096, rotary_high=32.0,
    )  # fmt: skip
    expected = [0.25, 0.229251, 0.210224, 0.192776, 0.176777, 0.162105, 0.148651, 0.136313]
    np.testing.assert_allclose(rotary_frequencies(config)[0], expected, rtol=1e-5)


def test_local_layers_are_slowed_unless_they_have_a_base_of_their_own():
    fields = {"rotary_scaling": "linear", "rotary_factor": 4.0, "rotary_base": 100.0}
    shared = ModelConfig(**fields)
    np.testing.assert_array_equal(
        rotary_frequencies(shared, local=True)[0], rotary_frequencies(shared)[0]
    )
    own = ModelConfig(**fields, rotary_local_base=100.0)
    np.testing.assert_allclose(
        rotary_frequencies(own, local=True)[0], 4 * rotary_frequencies(own)[0]
    )

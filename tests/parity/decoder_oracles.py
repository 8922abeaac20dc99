"""Decoders of transformers, small, odd and random, and what they compute."""

import zlib

import family_checks
import safetensors.numpy
import torch
import transformers

# Heads are grouped and wider than width / heads where the family has that; patterns of layers show;
# windows are shorter than texts.
_LLAMA = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 97, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 32, "n_inner": 20
}  # fmt: skip
_NEOX = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 3, "max_position_embeddings": 32,
}  # fmt: skip
_OPT = {
    "vocab_size": 97, "hidden_size": 24, "ffn_dim": 20, "num_hidden_layers": 3,
    "num_attention_heads": 3, "max_position_embeddings": 32,
}  # fmt: skip
_PHI3 = {**_LLAMA, "hidden_size": 32}


_DEEPSEEK = {
    **_LLAMA, "num_key_value_heads": 4, "hidden_size": 12, "intermediate_size": 14,
    "moe_intermediate_size": 8, "q_lora_rank": 9, "kv_lora_rank": 11, "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4, "v_head_dim": 7, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5, "num_mtp_layers": 0,
}  # fmt: skip
_FALCON = {
    "vocab_size": 97, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 3,
    "ffn_hidden_size": 20,
}  # fmt: skip
_FALCON_40B = {
    **_FALCON, "hidden_size": 24, "num_attention_heads": 4, "num_kv_heads": 2,
    "new_decoder_architecture": True,
}  # fmt: skip
_STARCODER = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def _rope(kind: str, theta: float = 10_000.0, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


# Name → (class, fields).
FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", _GPT2),
    "gptj": (
        "GPTJ",
        {
            "vocab_size": 97, "n_embd": 30, "n_layer": 3, "n_head": 3, "n_positions": 32,
            "n_inner": 20, "rotary_dim": 6,
        },
    ),
    "falcon": ("Falcon", _FALCON),
    "starcoder2": (
        "Starcoder2",
        {**_STARCODER, "sliding_window": 5, **_rope("default", 500.0)},
    ),
    "llama": (
        "Llama",
        {**_LLAMA, **_rope(
            "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )},
    ),
    "mistral": ("Mistral", {**_LLAMA, "head_dim": 10, "sliding_window": 5}),
    "mixtral": (
        "Mixtral",
        {
            **_LLAMA, "hidden_size": 12, "intermediate_size": 12, "head_dim": 6,
            "num_local_experts": 5, "num_experts_per_tok": 2,
        },
    ),
    "qwen2": (
        "Qwen2",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_LLAMA, "hidden_size": 12, "head_dim": 6, "num_experts": 5, "num_experts_per_tok": 2,
            "moe_intermediate_size": 8, "norm_topk_prob": True, "mlp_only_layers": [0],
        },
    ),
    "smollm3": ("SmolLM3", {**_LLAMA, "no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", _LLAMA),
    "olmo3": (
        "Olmo3",
        {
            **_LLAMA, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0,
                    "original_max_position_embeddings": 8,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            **_LLAMA, "head_dim": 10, "tie_word_embeddings": True, "sliding_window": 5,
            "query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **_LLAMA, "num_hidden_layers": 8, "hidden_size": 16, "head_dim": 6,
            "tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_LLAMA, "hidden_size": 12, "intermediate_size": 12, "head_dim": 6,
            "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 4,
            "swiglu_limit": 0.6, **_rope(
                "yarn", 50.0, factor=4.0, original_max_position_embeddings=8, truncate=False,
            ),
        },
    ),
    "gpt_neox": ("GPTNeoX", {**_NEOX, "rotary_pct": 0.5}),
    "phi3": (
        "Phi3",
        {**_PHI3, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 5, **_rope(
            "longrope", 50.0, short_factor=[1.0, 1.1, 1.3], long_factor=[1.0, 2.0, 5.0],
        )},
    ),
    "opt": ("OPT", _OPT),
    "bloom": ("Bloom", {"vocab_size": 97, "hidden_size": 18, "n_layer": 3, "n_head": 6}),
    "deepseek_v3": (
        "DeepseekV3",
        _DEEPSEEK,
    ),
}  # fmt: skip

# What else a family may say; the same tensors or fewer, and so not kept as golden files.
VARIANTS: dict[str, tuple[str, dict]] = {
    "gpt2_scaled": (
        "GPT2",
        {
            **_GPT2, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False,
            "activation_function": "relu2",
        },
    ),
    "llama_biased": (
        "Llama",
        {
            **_LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
            "tie_word_embeddings": True, **_rope("linear", factor=3.0),
        },
    ),
    "llama_yarn": (
        "Llama",
        {**_LLAMA, "head_dim": 16, **_rope(
            "yarn", 50.0, factor=4.0, original_max_position_embeddings=8, beta_fast=3.0,
            beta_slow=0.5, mscale=0.7, mscale_all_dim=1.2, truncate=False, finetuned=True,
        )},
    ),
    "mistral_yarn": (
        "Mistral",
        {**_LLAMA, "sliding_window": 5, **_rope(
            "yarn", 50.0, factor=None, original_max_position_embeddings=8, attention_factor=1.3,
        )},
    ),
    "llama_dynamic": (
        "Llama", {**_LLAMA, "max_position_embeddings": 8, **_rope("dynamic", 50.0, factor=3.0)}
    ),
    "qwen3_longrope": (
        "Qwen3",
        {**_LLAMA, "head_dim": 10, **_rope(
            "longrope", 50.0, original_max_position_embeddings=8,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.5], long_factor=[1.0, 1.5, 2.0, 3.0, 5.0],
        )},
    ),
    "gemma3_scaled": (
        "Gemma3",
        {
            **_LLAMA, "hidden_size": 16, "head_dim": 6, "sliding_window": 5,
            "query_pre_attn_scalar": 7, "max_position_embeddings": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 4.0},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
            },
        },
    ),
    "gemma3_slowed": (
        "Gemma3",
        {
            **_LLAMA, "hidden_size": 16, "head_dim": 6, "sliding_window": 5,
            "query_pre_attn_scalar": 7, "max_position_embeddings": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0,
                    "original_max_position_embeddings": 8,
                },
                "sliding_attention": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0},
            },
        },
    ),
    "phi3_short": (
        "Phi3",
        {
            **_PHI3, "sliding_window": 5, "tie_word_embeddings": True,
            "original_max_position_embeddings": 24, "rope_scaling": {
                "type": "su", "original_max_position_embeddings": 24,
                "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [3.0] * 4,
            },
        },
    ),
    "mixtral_windowed": ("Mixtral", {**_LLAMA, "sliding_window": 5, "num_local_experts": 3}),
    "qwen3_biased": (
        "Qwen3",
        {
            **_LLAMA, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "gpt_oss_without_biases": (
        "GptOss",
        {
            **_LLAMA, "intermediate_size": 12, "head_dim": 6, "num_local_experts": 3,
            "num_experts_per_tok": 1, "attention_bias": False, "tie_word_embeddings": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 3, **_rope("default", 300.0),
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **_DEEPSEEK, "topk_method": "group_limited_greedy", "norm_topk_prob": False,
            "qk_nope_head_dim": 6, "kv_lora_rank": 10, **_rope(
                "yarn", 50.0, factor=4.0, original_max_position_embeddings=8, beta_fast=3.0,
                mscale=0.7, mscale_all_dim=0.7,
            ),
        },
    ),
    "deepseek_v3_plain": (
        "DeepseekV3",
        {
            **_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "v_head_dim": 12,
            "norm_topk_prob": False, "first_k_dense_replace": 0, "rms_norm_eps": 1e-4, **_rope(
                "yarn", 50.0, factor=4.0, original_max_position_embeddings=8, beta_fast=3.0,
                mscale=0.7, mscale_all_dim=0.9,
            ),
        },
    ),
    "qwen3_moe_biased": (
        "Qwen3Moe",
        {
            **_LLAMA, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
            "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
        },
    ),
    "smollm3_windowed": (
        "SmolLM3",
        {
            **_LLAMA, "attention_bias": True, "mlp_bias": True, "use_sliding_window": True,
            "sliding_window": 4, "no_rope_layers": [0, 1, 1, 0],
        },
    ),
    "olmo2_biased": (
        "Olmo2", {**_LLAMA, "attention_bias": True, "tie_word_embeddings": True}
    ),
    "gpt_neox_sequential": (
        "GPTNeoX",
        {
            **_NEOX, "use_parallel_residual": False, "attention_bias": False,
            "hidden_act": "quick_gelu", "tie_word_embeddings": True, "hidden_size": 32,
            "num_attention_heads": 2, "rotary_emb_base": 300.0,
        },
    ),
    "opt_350m": (
        "OPT",
        {
            **_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 18,
            "activation_function": "gelu",
        },
    ),
    "opt_without_biases": (
        "OPT",
        {
            **_OPT, "enable_bias": False, "_remove_final_layer_norm": True,
            "word_embed_proj_dim": 30, "tie_word_embeddings": False,
        },
    ),
    "falcon_40b": ("Falcon", {**_FALCON_40B, "bias": True}),
    "falcon_11b": (
        "Falcon",
        {
            **_FALCON_40B, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False,
            "activation": "relu2", **_rope("linear", 500.0, factor=2.0),
        },
    ),
    "falcon_sequential": (
        "Falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "starcoder2_plain": (
        "Starcoder2",
        {**_STARCODER, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "quick_gelu"},
    ),
    "bloom_untied": (
        "Bloom",
        {
            "vocab_size": 97, "hidden_size": 40, "n_layer": 3, "n_head": 5,
            "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip

CASES = {**FAMILIES, **VARIANTS}
# Their angles depend on how long a text is. transformers takes the longest of a batch, so all must
# be alike; and it keeps keys that have become stale, but of Phi-3's.
BY_LENGTH = ("phi3", "llama_dynamic", "qwen3_longrope", "gemma3_scaled", "gemma3_slowed")
_CLASSES = {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}


def build(name: str, head: str = "", **changes):
    """The random model: no gain is one, no bias zero, and every number is a float16.

    Args:
      name: a case.
      head: what its class ends in, such as "ForSequenceClassification"; "": of a language model.
      **changes: fields of its config that have other values.
    """
    kind, fields = CASES[name]
    config_class, model_class = _CLASSES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    model_class = f"{config_class.removesuffix('Config')}{head}" if head else model_class
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, config_class)(**{**fields, **ids, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).float().eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # Gemma writes what it has normalised: at full size its stream would outgrow the
                # precision that is asked for.
                center = -0.5 if kind.startswith("Gemma") else parameter
                noise = center + 0.2 * noise
            else:
                spread = 0.5 if parameter.shape[0] == config.vocab_size else 1.1
                noise *= spread * parameter.shape[-1] ** -0.5
            parameter.copy_(noise.half())
        for layer, buffer in model.named_buffers():
            if layer.endswith("e_score_correction_bias"):
                buffer.copy_((0.1 * torch.randn(buffer.shape, generator=generator)).half())
    return model


def run(model, batch, **arguments):
    """What the model gives for a batch."""
    if model.config.model_type != "bloom":  # which takes positions from the mask alone
        arguments["position_ids"] = torch.tensor(batch["positions"]).long()
    tokens, mask = torch.tensor(batch["inputs"]).long(), torch.tensor(batch["mask"])
    return model(tokens, attention_mask=mask, use_cache=False, **arguments)


def random_batch(name: str) -> dict:
    """Tokens, the rows padded in different ways."""
    return family_checks.text_batch(alike=name in BY_LENGTH)


def outputs(model, batch) -> dict[str, torch.Tensor]:
    """What is compared but gradients, and the loss that has them."""
    out = run(model, batch, output_hidden_states=True)
    found = {f"hidden.{i}": hidden for i, hidden in enumerate(out.hidden_states)}
    name = "classes" if "classes" in batch else "labels"
    scores = out.logits if name == "classes" else out.logits.transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor(batch[name]).long())
    return found | {"scores" if name == "classes" else "logits": out.logits, "loss": loss}


def computed(model, batch, scratch) -> tuple[dict, dict]:
    """As `family_checks.computed`.

    A gradient has the name of its tensor in a file, which is another than the model's own where
    transformers fuses tensors as it reads them; so it is written to the directory `scratch`.
    """
    model.zero_grad()
    found = outputs(model, batch)
    found["loss"].backward()
    parameters = list(model.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.grad)
        model.save_pretrained(scratch)
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)
    gradient = safetensors.numpy.load_file(scratch / "model.safetensors")
    gradient |= {n: 0 * gradient[n] for n, _ in model.named_buffers() if n in gradient}
    return {name: array.detach().numpy() for name, array in found.items()}, gradient


def greedy(model, prompts: list[list[int]], new: int, cached: bool = True) -> list[list[int]]:
    """The `new` tokens that greedy search adds to each prompt."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    settings = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    tokens = model.generate(ids, attention_mask=mask, generation_config=settings, use_cache=cached)
    return tokens[:, length:].tolist()

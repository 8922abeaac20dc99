"""Llama, Mistral, Mixtral and SmolLM 3, and what all families of Llama's make share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lm.config import check, check_choice
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    OrNull,
    Together,
    activation,
    classifier,
    demand,
    with_defaults,
)
from lm.models.huggingface.family import Family
from lm.models.huggingface.name_map import Linear, Table
from lm.models.huggingface.rope import ROPE_FIELDS, read_rotary, write_rotary

# ---- What they share -------------------------------------------------------------------------

FIELDS = {
    "vocab_size": Field("vocab_size", 32_000),
    "hidden_size": Field("width", 4096),
    "intermediate_size": Field("mlp_width", 11_008),
    "num_hidden_layers": Field("num_layers", 32),
    "num_attention_heads": Field("num_heads", 32),
    "num_key_value_heads": Field("num_kv_heads"),
    "head_dim": Field("head_dim"),
    "hidden_act": activation("silu", gated=True),
    "max_position_embeddings": Field("max_length", 2048),
    "rms_norm_eps": Field("norm_epsilon", 1e-6),
    "initializer_range": Field("initializer_std", 0.02),
    "tie_word_embeddings": Field("tie_embeddings", False),
}
# Biases in all four projections of attention, or in none.
BIASES = {"attention_bias": Field("qkv_bias attention_bias", False)}

LAYER = "model.layers.{layer}"
BODY = {
    "embedding.tokens": "model.embed_tokens.weight",
    "final_norm": "model.norm",
    "head": "lm_head.weight",
    "classifier": "score",
    "blocks.attention.query": f"{LAYER}.self_attn.q_proj",
    "blocks.attention.key": f"{LAYER}.self_attn.k_proj",
    "blocks.attention.value": f"{LAYER}.self_attn.v_proj",
    "blocks.attention.output": f"{LAYER}.self_attn.o_proj",
    "blocks.attention.query_norm": f"{LAYER}.self_attn.q_norm",
    "blocks.attention.key_norm": f"{LAYER}.self_attn.k_norm",
    "blocks.attention_norm": f"{LAYER}.input_layernorm",
    "blocks.mlp_norm": f"{LAYER}.post_attention_layernorm",
}
MLP = {
    "blocks.mlp.gate": f"{LAYER}.mlp.gate_proj",
    "blocks.mlp.up": f"{LAYER}.mlp.up_proj",
    "blocks.mlp.down": f"{LAYER}.mlp.down_proj",
}
_EXPERTS = {
    "blocks.mlp.router": f"{LAYER}.block_sparse_moe.gate",
    "blocks.mlp.gate": f"{LAYER}.block_sparse_moe.experts.{{expert}}.w1",
    "blocks.mlp.down": f"{LAYER}.block_sparse_moe.experts.{{expert}}.w2",
    "blocks.mlp.up": f"{LAYER}.block_sparse_moe.experts.{{expert}}.w3",
}


def begun(table: Table, blocks: str, first: int) -> Table:
    """The table of layers that are `blocks` here, and whose first is their layer `first`."""
    layer = LAYER.replace("layer}", f"layer+{first}}}")

    def theirs(name: str | Linear) -> str | Linear:
        if isinstance(name, Linear):
            return dataclasses.replace(name, name=name.name.replace(LAYER, layer))
        return name.replace(LAYER, layer)

    def ours(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(name, tuple):
            return tuple(map(ours, name))
        return name.replace("blocks.", f"{blocks}.")

    return {ours(key): theirs(name) for key, name in table.items()}


def family(
    model_type: str, architectures: str, constants: Json | None = None, **attributes
) -> Family:
    """A family whose tensors are named as Llama's."""
    *_, body = architectures.split()
    scores = f"{body.removesuffix('Model')}ForSequenceClassification"
    attributes["together"] = (*attributes["together"], classifier(scores))
    attributes["inert"] = (
        # Dropout of attention alone, which ours is not, and how to compute.
        "attention_dropout", "pretraining_tp", "cache_implementation",
        *attributes.get("inert", ()),
    )  # fmt: skip
    return Family(
        model_type,
        (*architectures.split(), scores),
        constants={"norm": "rmsnorm", "initializer": "normal", **(constants or {})},
        base_prefix="model.",
        ignored=(r"rotary_emb\.inv_freq$", *attributes.pop("ignored", ())),
        **{"tensors": BODY | MLP, **attributes},
    )


def rotary(base: float = 10_000.0) -> Together:
    """Rotations of whole heads; `base` where the file does not say."""
    return Together(ROPE_FIELDS, lambda values: whole(read_rotary(values, base)), write_rotary)


def whole(fields: dict[str, Any]) -> dict[str, Any]:
    """Of a family whose classes turn whole heads, whatever the file says of a part of them.

    They do not look at it, unless angles are slowed: then they cannot compute.
    """
    if fields["rotary_scaling"] != "none":
        demand("partial_rotary_factor", fields["rotary_fraction"], 1)
    return {**fields, "rotary_fraction": 1.0}


def check_divided(config: ModelConfig) -> dict[str, Any]:
    """Refuses what transformers does, though nothing depends on it where there is a head_dim."""
    check(
        config.width % config.num_heads == 0,
        f"config.model.width={config.width} must be a multiple of num_heads={config.num_heads} to "
        "be written for this Hugging Face family",
    )
    return {}


def shortest(kinds: Sequence[Any]) -> tuple:
    """The shortest pattern that, repeated, gives every layer its kind."""
    period = next(
        period
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds))
    )
    return tuple(kinds[:period])


# ---- Windows ---------------------------------------------------------------------------------

_TYPES = ("full_attention", "sliding_attention")


def _layer_types(num_layers: int, is_local: Callable[[int], bool]) -> list[str]:
    """What layers 0, 1, … are called."""
    return [_TYPES[bool(is_local(layer))] for layer in range(num_layers)]


def windows(
    is_local: Callable[[Json, int], bool], default: int | None = 4096, **others: Any
) -> Together:
    """Which layers see only a window: `layer_types`, or in older files what `is_local` says.

    Args:
      is_local: (the fields, a layer) → whether it is one of them.
      default: the window of files that lack it.
      **others: fields that `is_local` looks at, and what files mean that lack them.
    """

    def read(values: Json) -> dict[str, Any]:
        layers, types = values["num_hidden_layers"], values["layer_types"]
        if types is None:
            types = _layer_types(layers, lambda layer: is_local(values, layer))
        check(
            len(types) == layers,
            f"config.json: layer_types has {len(types)} entries, not num_hidden_layers={layers}",
        )
        for index, kind in enumerate(types):
            check_choice(f"config.json: layer_types[{index}]", kind, _TYPES)
        if "sliding_attention" not in types:
            return {}
        window = values["sliding_window"] if values.get("use_sliding_window", True) else None
        check(window, "config.json: sliding_attention layers need a sliding_window")
        ranges = ["local" if kind == "sliding_attention" else "global" for kind in types]
        return {"attention_pattern": shortest(ranges), "window": window}

    def write(config: ModelConfig) -> dict[str, Any]:
        types = _layer_types(config.num_layers, config.is_local)
        return {"sliding_window": config.window or None, "layer_types": types}

    return Together({"sliding_window": OrNull(default), "layer_types": None, **others}, read, write)


def one_window(default: int | None, **others: Any) -> Together:
    """Mistral's, which all layers have or none; `others` as of `windows`."""

    def is_local(values: Json, layer: int) -> bool:
        return values["sliding_window"] is not None and values.get("use_sliding_window", True)

    layered = windows(is_local, default, **others)

    def read(values: Json) -> dict[str, Any]:
        layers = values["num_hidden_layers"]
        types = _layer_types(layers, lambda layer: is_local(values, layer))
        demand("layer_types", values["layer_types"], None, types)
        return layered.read(values)

    write = lambda config: {"sliding_window": config.window or None}  # noqa: E731
    return Together(layered.defaults, read, write)


# ---- Llama, Mistral, Mixtral -----------------------------------------------------------------

_LLAMA = family(
    "llama",
    "LlamaForCausalLM LlamaModel",
    fields={**FIELDS, **BIASES, "mlp_bias": Field("bias", False)},
    together=(rotary(),),
    written=check_divided,
)
_MISTRAL_FIELDS = with_defaults(
    FIELDS,
    intermediate_size=14_336,
    num_key_value_heads=OrNull(8),
    max_position_embeddings=131_072,
)
_MISTRAL = family(
    "mistral",
    "MistralForCausalLM MistralModel",
    fields=_MISTRAL_FIELDS,
    together=(rotary(), one_window(4096)),
)
_MIXTRAL = family(
    "mixtral",
    "MixtralForCausalLM MixtralModel",
    fields={
        **with_defaults(_MISTRAL_FIELDS, rms_norm_eps=1e-5),
        "num_local_experts": Field("num_experts", 8),
        "num_experts_per_tok": Field("experts_per_token", 2),
    },
    together=(rotary(base=1e6), one_window(None)),
    inert=("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"),
    written=lambda config: {"intermediate_size": config.expert_feed_forward},
    tensors=BODY | _EXPERTS,
)


# ---- SmolLM 3: Llama, but for layers that are not rotated (Yang et al. 2025b) ----------------


def _rotated(values: Json) -> list[bool]:
    """Whether layers 0, 1, … are: `no_rope_layers` has a 0 for each that is not."""
    layers, rotated = values["num_hidden_layers"], values["no_rope_layers"]
    if rotated is None:
        every = values["no_rope_layer_interval"]
        rotated = [(layer + 1) % every != 0 for layer in range(layers)]
    check(
        isinstance(rotated, list) and len(rotated) >= layers,
        f"config.json: no_rope_layers={rotated!r} must have num_hidden_layers={layers} entries",
    )
    return [bool(flag) for flag in rotated[:layers]]


_SMOLLM3 = family(
    "smollm3",
    "SmolLM3ForCausalLM SmolLM3Model",
    fields={
        **with_defaults(
            FIELDS,
            vocab_size=128_256,
            hidden_size=2048,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=OrNull(4),
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
        ),
        **BIASES,
        "mlp_bias": Field("bias", False),
    },
    together=(
        rotary(base=2e6),
        Together(
            {"no_rope_layers": None, "no_rope_layer_interval": 4},
            lambda values: {"rotary_pattern": shortest(_rotated(values))},
            lambda config: {
                "no_rope_layers": [
                    int(config.layer_kind(layer).rotated) for layer in range(config.num_layers)
                ]
            },
        ),
        windows(
            lambda values, layer: (
                values["use_sliding_window"]
                and values["sliding_window"] is not None
                and not _rotated(values)[layer]
            ),
            None,
            use_sliding_window=False,
        ),
    ),
    inert=("max_window_layers",),
    # The padding that transformers has where the file has none is beyond a small vocabulary.
    written=lambda config: {"use_sliding_window": config.window > 0, "pad_token_id": None},
)

FAMILIES = (_LLAMA, _MISTRAL, _MIXTRAL, _SMOLLM3)

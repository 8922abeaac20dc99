"""The fields of a config.json, each with what it says of a model: read and written from one table.

Most are a `Field`: the same value as a field of `ModelConfig`, or one that follows from it. Some
mean something only together (`Together`); `only` is for those with one value that we can honour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lm.config import ConfigError, check, check_choice, nearest
from lm.models.config import GATED, ModelConfig

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class OrNull:
    """A default beside which null has a meaning of its own."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of config.json.

    Attributes:
      ours: the fields of ModelConfig that it gives, separated by spaces; "": none.
      default: what a file means that lacks it. Values have its type, unless it is None.
      read: (its name, its value) → ours; None: nothing is said of ours.
      write: ours → its value. Where a config leaves ours to others it is what that comes to.
    """

    ours: str
    default: Any = None
    read: Callable[[str, Any], Any] = lambda name, value: value
    write: Callable[[Any], Any] = lambda value: value


@dataclasses.dataclass(frozen=True)
class Together:
    """Fields of config.json that mean something only together.

    Attributes:
      defaults: as of `Field`, by name.
      read: the values of all fields of the family → fields of ModelConfig.
      write: ModelConfig → fields of config.json.
    """

    defaults: Json
    read: Callable[[Json], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


def only(*allowed: Any) -> Field:
    """A field with these values alone, of which a file means the first that lacks it."""
    return Field("", allowed[0], lambda name, value: demand(name, value, *allowed))


def demand(name: str, value: Any, *allowed: Any) -> None:
    """Raises ConfigError unless the field `name` has one of the values that can be honoured."""
    if value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ConfigError(f"config.json: {name}={value!r} is not supported, only {choices}")


# ---- Classifiers -----------------------------------------------------------------------------

_TIED = "tie_word_embeddings"
# What a file may say of labels; `read_labels` and `classified` use them.
LABELS: Json = dict.fromkeys(("architectures", "id2label", "num_labels", "_num_labels"))


def read_labels(values: Json) -> int:
    """How many labels a classifier has."""
    counts = len(values["id2label"] or ()), values["num_labels"], values["_num_labels"], 2
    return next(filter(None, counts))


def write_labels(config: ModelConfig) -> dict[str, Any]:
    """The labels' names, of which there must be some."""
    names = {index: f"LABEL_{index}" for index in range(config.num_labels)}
    return {
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }


def classifier(architecture: str) -> Together:
    """What is in place of a decoder's output head: a classifier of texts, or nothing.

    The class says so, of which `architecture` is the classifier's. A body that is tied could write,
    and so it does, as it does there.
    """
    body = f"{architecture.removesuffix('ForSequenceClassification')}Model"

    def read(values: Json) -> dict[str, Any]:
        names = values["architectures"] or ()
        if architecture in names:
            return {"classifier": "sequence", "num_labels": read_labels(values)}
        return {"output_head": False} if body in names and not values[_TIED] else {}

    def write(config: ModelConfig) -> dict[str, Any]:
        if config.classifier == "sequence":
            return {"architectures": [architecture], **write_labels(config)}
        return {} if config.output_head else {"architectures": [body], _TIED: False}

    return Together(LABELS, read, write)


# ACT2FN's names of our nonlinearities; the first of several is written.
_NONLINEARITIES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
# Which of gelu_tanh's names a gate has.
_WRITTEN_OF_GATES = {"gelu_tanh": "gelu_pytorch_tanh"}


def activation_name(ours: str) -> str:
    """The name of our nonlinearity; of the one in the gate where there is a gate."""
    plain = GATED.get(ours, ours)
    if ours in GATED and plain in _WRITTEN_OF_GATES:
        return _WRITTEN_OF_GATES[plain]
    return next(theirs for theirs, known in _NONLINEARITIES.items() if known == plain)


def activation(default: str, gated: bool = False) -> Field:
    """The nonlinearity of the MLP."""
    gates = {plain: ours for ours, plain in reversed(GATED.items())}  # the first of a plain one

    def read(name: str, value: str) -> str:
        check_choice(f"config.json: {name}", value, _NONLINEARITIES)
        plain = _NONLINEARITIES[value]
        return gates[plain] if gated else plain

    def write(ours: str) -> str:  # of several names the one that the family's own files have
        return default if read("", default) == ours else activation_name(ours)

    return Field("activation", default, read, write)


def with_defaults(fields: Mapping[str, Field], **defaults: Any) -> dict[str, Field]:
    """`fields`, of which some mean another thing when they are left out."""
    changed = {n: dataclasses.replace(fields[n], default=value) for n, value in defaults.items()}
    return {**fields, **changed}


# Fields of any config.json that change nothing of what a forward pass computes: where the model
# came from, how to train it, how to sample from it, what to return.
_INERT = (
    "_name_or_path name_or_path architectures model_type dtype torch_dtype transformers_version "
    "_commit_hash tokenizer_class language license finetuning_task task_specific_params "
    "id2label label2id num_labels _num_labels problem_type output_hidden_states output_attentions "
    "output_past return_dict return_dict_in_generate output_scores use_cache torchscript "
    "use_bfloat16 chunk_size_feed_forward gradient_checkpointing attn_implementation "
    "_attn_implementation _attn_implementation_autoset is_encoder_decoder prefix bos_token_id "
    "eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens "
    "begin_suppress_tokens bad_words_ids max_length min_length max_new_tokens do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "num_return_sequences exponential_decay_length_penalty remove_invalid_values "
    "classifier_dropout classifier_bias tf_legacy_loss transformers.js_config transformers_weights "
    "unsloth_fixed unsloth_version is_llama_config max_sequence_length model_max_length save_step "
    "custom_pipelines predict_special_tokens neftune_noise_alpha tokenizer_max_length "
    "_flash_attn_2_enabled _attn_implementation_internal _experts_implementation use_flash_attn "
    "use_flash_attention use_flash_attention_2 attention_implementation base_model_name "
    "base_model_name_or_path bos_token eos_token pad_token unk_token"
)
# And those that are honoured at one value alone, in every family.
_FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "quantization": (None,),
    "pruned_heads": (None, {}),
    "auto_map": (None,),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (None, False),
    "rope_interleaved": (None, False),
}


def settings(hf: Json, defaults: Json, inert: Iterable[str]) -> dict[str, Any]:
    """The fields of a config.json that decide what is computed, defaults where it is silent.

    Args:
      hf: config.json.
      defaults: as of `Field`, of all the fields that the family looks at.
      inert: its fields, beside those of all families, that change nothing.

    Raises:
      ConfigError: a field that is none of these, or of another type than its default.
    """
    known = {*defaults, *inert, *_INERT.split(), *_FIXED}
    for name, value in hf.items():
        if name not in known and value is not None:
            raise ConfigError(
                f"config.json has {name}={value!r}, a field that is not known of this family"
                f"{nearest(name, defaults)}: it may change what is computed; config.ignore={name} "
                "says that it does not"
            )
    for name, allowed in _FIXED.items():
        if name not in inert and name not in defaults:
            demand(name, hf.get(name), *allowed)
    values = {}
    for name, default in defaults.items():
        null = default is None or isinstance(default, OrNull)
        default = default.value if isinstance(default, OrNull) else default
        value = values[name] = hf.get(name, default)
        kind = (int, float) if isinstance(default, float) else type(default)
        fits = isinstance(value, kind) and (isinstance(value, bool) == isinstance(default, bool))
        wanted = "a number" if isinstance(default, float) else type(default).__name__
        check(
            default is None or fits or (null and value is None),
            f"config.json: {name}={value!r} must be {wanted}",
        )
    return values


# ---- Whether a config.json says everything that a model is -----------------------------------

# Choices of training and of how to compute, not of the function computed.
_FREE = (
    "dropout capacity_factor initializer initializer_std compute_dtype attention remat scan_layers"
)
# Fields that mean nothing unless another has the value.
_ONLY_IF: dict[str, Callable[[ModelConfig], bool]] = {
    "position_offset": lambda c: c.positions == "learned",
    "rotary_base rotary_fraction rotary_scaling rotary_pattern": lambda c: c.positions == "rotary",
    "rotary_factor": lambda c: c.positions == "rotary" and c.rotary_scaling != "none",
    "rotary_original_length": lambda c: (
        c.positions == "rotary"
        and not {c.rotary_scaling, c.scaling_of(c.window > 0)} <= {"none", "linear"}
    ),
    "rotary_low rotary_high": lambda c: (
        c.positions == "rotary" and c.rotary_scaling in ("llama3", "yarn")
    ),
    "rotary_gain": lambda c: c.positions == "rotary" and c.rotary_scaling in ("yarn", "longrope"),
    "rotary_truncate": lambda c: c.positions == "rotary" and c.rotary_scaling == "yarn",
    "rotary_short rotary_long": lambda c: (
        c.positions == "rotary" and c.rotary_scaling == "longrope"
    ),
    "rotary_local_base": lambda c: c.positions == "rotary" and c.window > 0,
    "rotary_local_scaling": lambda c: (
        c.positions == "rotary" and c.window > 0 and c.rotary_local_base is not None
    ),
    "rotary_local_factor": lambda c: (
        c.positions == "rotary" and c.window > 0 and c.rotary_local_scaling != "none"
    ),
    # A text may be of any length, and theirs is that of the original context.
    "max_length": lambda c: (
        c.positions != "rotary" or "dynamic" not in (c.rotary_scaling, c.scaling_of(c.window > 0))
    ),
    "relative_buckets relative_distance": lambda c: c.positions == "relative",
    "experts_per_token expert_width shared_experts dense_layers router_score router_normalize "
    "router_scale router_bias router_groups expert_bias": lambda c: c.num_experts > 0,
    "activation_limit": lambda c: c.activation == "swiglu_clipped",
    "router_group_limit router_group_best": lambda c: c.router_groups > 1,
    "query_rank shared_key_dim value_dim": lambda c: c.kv_rank > 0,
    "bias mlp_width": lambda c: c.num_experts == 0 or c.dense_layers > 0,
    "norm_bias": lambda c: c.norm == "layernorm",
    "pooler_activation": lambda c: c.pooler,
    "transform_bias": lambda c: c.head_transform,
    "classifier_transform": lambda c: c.classifier != "none",
    "classifier_pooling": lambda c: c.classifier == "sequence",
    "qk_norm_joint": lambda c: c.qk_norm,
    "num_labels": lambda c: c.classifier != "none",
    "output_head": lambda c: c.classifier != "sequence",
    "tie_embeddings head_bias output_scale logits_softcap": lambda c: c.has_output_head,
    "cross_attention": lambda c: c.cell != "attention",
}


def resolved(config: ModelConfig) -> dict[str, Any]:
    """Every field; where it is left to others, what that comes to."""
    return {
        **dataclasses.asdict(config),
        "num_encoder_layers": config.encoder_layers,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_width,
        "value_dim": config.value_width,
        "mlp_width": config.feed_forward,
        "expert_width": config.expert_feed_forward,
        "embedding_width": config.table_width,
        "embedding_scale": config.embedding_scale or math.sqrt(config.width),
        "output_scale": config.output_scale or config.width**-0.5,
        "attention_scale": config.attention_scale or config.head_width**-0.5,
        "attention_pattern": tuple(config.is_local(layer) for layer in range(config.num_layers)),
        "rotary_pattern": tuple(
            config.layer_kind(layer).rotated for layer in range(config.num_layers)
        ),
        "rotary_gain": config.rotary_amplitude,
        "qkv_bias": config.has_bias("qkv"),
        "attention_bias": config.has_bias("attention"),
        "norm_bias": config.has_bias("norm"),
        "final_norm": config.has_final_norm,
    }


def essence(config: ModelConfig) -> dict[str, Any]:
    """The fields, resolved, that the computed function depends on."""
    meaningless = _FREE.split()
    for names, means in _ONLY_IF.items():
        meaningless += [] if means(config) else names.split()
    return {name: value for name, value in resolved(config).items() if name not in meaningless}


class NotExact(ConfigError):
    """A model that a family cannot say.

    Attributes:
      lost: fields of ModelConfig → (the model's value, what the family would make of it).
    """

    def __init__(self, lost: Mapping[str, tuple[Any, Any]]):
        self.lost = lost
        field, (value, other) = next(iter(lost.items()))
        super().__init__(
            f"config.model.{field}={value!r} cannot be written for this Hugging Face family, which "
            f"would have {other!r}"
        )


def check_same(config: ModelConfig, other: ModelConfig) -> None:
    """Raises NotExact unless `other` computes what `config` does."""
    lost, theirs = {}, essence(other)
    for field, value in essence(config).items():
        found = theirs.get(field)
        close = isinstance(value, float) and isinstance(found, float)
        if not (math.isclose(value, found, rel_tol=1e-6) if close else value == found):
            lost[field] = (value, found)
    if lost:
        raise NotExact(lost)

"""What it takes to know a Hugging Face family: how its config reads, and how its tensors are named.

A `Family` turns a config.json into a `ModelConfig` and back, and lists `Rule`s: which of our
parameters are made of which of its tensors, and how the numbers are rearranged. Everything else
(reading, writing, sharding, errors) is the same for all families. `gpt2` is a whole one to read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.config import ConfigError, check, nearest
from lm.models.config import ModelConfig

Arrays = list[np.ndarray]
Shapes = Sequence[tuple[int, ...]]

_STRIP = 64  # numbers side by side in memory that are copied together


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some of our parameters, and the tensors that hold the same numbers.

    With `{layer}` in the tensors' names the rule is applied once a layer, and `load` and `save` see
    one layer's arrays.

    Attributes:
      ours: parameter names.
      theirs: tensor names, or templates of them.
      load: (tensors, shapes of ours) → ours.
      save: ours → tensors.
      first_layer: the number that `{layer}` has for index 0 of our `layers` axis.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable[[Arrays, Shapes], Arrays]
    save: Callable[[Arrays], Arrays]
    first_layer: int = 0

    @property
    def layered(self) -> bool:
        """Whether it is applied once a layer."""
        return "{layer}" in self.theirs[0]


def same(ours: str, theirs: str) -> Rule:
    """The same numbers in the same order: vectors, embeddings, biases of several heads."""
    return Rule(
        (ours,),
        (theirs,),
        lambda tensors, shapes: [tensors[0].reshape(shapes[0])],
        lambda arrays: [arrays[0].reshape(-1) if _is_bias(ours) else arrays[0]],
    )


def _is_bias(name: str) -> bool:
    return name.endswith("_bias")


def linear(ours: str, theirs: str, inputs: int = 1) -> Rule:
    """torch.nn.Linear: [outputs, inputs] there, [inputs…, outputs…] here.

    Args:
      ours, theirs: names.
      inputs: how many of our leading dimensions are inputs (2 for attention's output: H, C).
    """

    def save(arrays: Arrays) -> Arrays:
        rows = math.prod(arrays[0].shape[:inputs])
        turned = arrays[0].reshape(rows, -1).T
        tensor = np.empty(turned.shape, turned.dtype)
        copy_into(tensor, turned)
        return [tensor]

    return Rule((ours,), (theirs,), lambda t, shapes: [t[0].T.reshape(shapes[0])], save)


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`; by strips where `source` lies in memory the other way around.

    Read number by number in the order of `target`, each number of a transposed matrix would be
    alone on its line of cache.
    """
    steps = [abs(step) for step in source.strides]
    axis = steps.index(min(steps)) if steps else 0
    if axis >= source.ndim - 1:
        target[...] = source
    elif axis > 0:
        for part, origin in zip(target, source, strict=True):
            copy_into(part, origin)
    else:
        for start in range(0, len(source), _STRIP):
            target[start : start + _STRIP] = source[start : start + _STRIP].copy(order="K")


# ACT2FN's names of the nonlinearities we have; gated ones are named by their nonlinearity.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

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


def settings(
    hf: Mapping[str, Any], defaults: Mapping[str, Any], inert: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields of a config.json that decide what is computed, defaults where it is silent.

    Args:
      hf: config.json.
      defaults: the fields that the family's `read_config` looks at → what the file leaves out.
      inert: its fields, beside those of all families, that change nothing.

    Raises:
      ConfigError: a field that is none of these, or of another type than its default.
    """
    known = {*defaults, *inert, *_INERT.split(), *_FIXED}
    for name, value in hf.items():
        check(
            name in known or value is None,
            f"config.json has {name}={value!r}, a field that is not known of this family"
            f"{nearest(name, defaults)}: it may change what is computed; config.ignore={name} says "
            "that it does not",
        )
    for name, allowed in _FIXED.items():
        if name not in defaults:
            demand(hf, name, *allowed)
    values = {name: hf.get(name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        kind = (int, float) if isinstance(default, float) else type(default)
        value = values[name]
        fits = isinstance(value, kind) and (isinstance(value, bool) == isinstance(default, bool))
        wanted = "a number" if isinstance(default, float) else type(default).__name__
        check(default is None or fits, f"config.json: {name}={value!r} must be {wanted}")
    return values


def demand(values: Mapping[str, Any], name: str, *allowed: Any) -> None:
    """Raises ConfigError unless the field `name` has one of the values that can be honoured."""
    value = values.get(name)
    if value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ConfigError(f"config.json: {name}={value!r} is not supported, only {choices}")


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture as Hugging Face writes it.

    Attributes:
      model_type: of config.json.
      architectures: classes whose tensors these are, the one that is written first.
      read_config: config.json → ModelConfig. It must look at every field that changes what is
        computed, and raise ConfigError naming the first it cannot honour.
      write_config: ModelConfig → config.json, without `model_type` and `dtype`, and without
        `architectures` unless that depends on the model.
      rules: ModelConfig → rules that cover every parameter of the model exactly once.
      base_prefix: may be missing from, or stand before, names in a file (`transformer.`).
      aliases: tensors that are copies of others by design (tied heads): theirs → what of. They may
        be in a file or not, or stand in for the other, and are compared when both are there; they
        are not written.
      ignored: regular expressions (`re.search`) of tensors that hold no parameters: masks,
        frequencies. Only tensors that no rule names are asked about.
      settle: (config, tensors) → config, where config.json does not say what the tensors do, such
        as whether there is a pooler. The names may be asked with or without `base_prefix`; the
        numbers are read when they are asked for.
      renamed: (regular expression, replacement) of parts of names that other files have.
    """

    model_type: str
    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], list[Rule]]
    base_prefix: str = ""
    aliases: Callable[[ModelConfig], dict[str, str]] = lambda config: {}
    ignored: tuple[str, ...] = ()
    settle: Callable[[ModelConfig, Mapping[str, np.ndarray]], ModelConfig] = (
        lambda config, tensors: config
    )
    renamed: tuple[tuple[str, str], ...] = ()

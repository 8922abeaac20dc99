"""BERT, RoBERTa, T5, BART, mBART and Marian from Hugging Face: golden files, names, refusals.

The golden files are what transformers saved and computed: `tests/golden/make.py`.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import family_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lm.config import ConfigError
from lm.models import bind, skeleton
from lm.models.huggingface.config_fields import essence
from lm.models.huggingface.families import FAMILIES, family_for, family_of
from lm.models.huggingface.read import open_checkpoint
from lm.models.huggingface.write import save_pretrained
from lm.models.positions import sinusoids
from lm.models.presets import preset

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = (
    "bert", "roberta", "distilbert", "modernbert", "embedding_gemma", "t5", "t5_v1_1", "bart",
    "mbart", "marian",
)  # fmt: skip


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Encoder-decoders, and whether their layers are scanned: half of it with the quick tests.
BOTH = [("t5", True), ("bart", False), slow("t5", False), slow("bart", True)]
BOTH += [slow("mbart", True), slow("marian", True)]


@functools.cache
def golden(name):
    """(family, config, params) of a golden model, and what is expected: batch, output, gradient."""
    with np.load(GOLDEN / name / "expected.npz") as file:
        found = {key: file[key] for key in file.files}
    parts = {name: found.pop(name, None) for name in ("greedy", "stop")}
    parts |= {"batch": {}, "output": {}, "gradient": {}}
    for key, value in found.items():
        part, tensor = key.split("/")
        parts[part][tensor] = value
    return family_checks.load(GOLDEN / name), parts


def model_of(name, **changes):
    (_, config, params), expected = golden(name)
    config = dataclasses.replace(config, **changes)
    return bind(skeleton(config), params), expected["batch"]


def copied(name, directory, **fields):
    """A copy of a golden model's directory with these fields in its config.json."""
    shutil.copytree(GOLDEN / name, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def retensored(directory, change):
    """`directory`, its tensors passed through `change`: dict → dict."""
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)
    return directory


# ---- What transformers computes --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_family_computes_what_transformers_does(name):
    model, expected = golden(name)
    outputs, gradient = family_checks.computed(*model, expected["batch"])
    assert set(outputs) == set(expected["output"])
    errors = family_checks.worst(outputs, expected["output"], expected["batch"])
    assert max(errors.values()) < family_checks.OUTPUTS, errors
    relative = family_checks.worst_gradients(gradient, expected["gradient"])
    assert max(relative.values()) < family_checks.GRADIENTS, relative


@pytest.mark.parametrize("name", ["t5_v1_1", "bart", slow("t5")])
def test_greedy_search_gives_the_golden_tokens(name):
    (_, config, params), expected = golden(name)
    batch, tokens = expected["batch"], expected["greedy"]
    start, pad = (2, 1) if name == "bart" else (0, 0)
    ends = {"start": start, "stop": int(expected["stop"]), "pad": pad}
    source = (batch["source"], batch["source_mask"])
    found = family_checks.greedy(config, params, *source, **ends, steps=tokens.shape[1] - 1)
    np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_goes_back_to_the_tensors_it_came_from(name, tmp_path):
    (family, config, params), _ = golden(name)
    save_pretrained(tmp_path / "out", family, config, params)
    ours = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    theirs = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")
    if not config.head_bias:  # zeros, which transformers makes itself
        theirs.pop("final_logits_bias", None)
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[tensor], theirs[tensor]) for tensor in theirs)
    again = open_checkpoint(tmp_path / "out")
    assert essence(again.config) == essence(config)


# ---- Packing and the cache -------------------------------------------------------------------


@pytest.mark.parametrize("name, scan_layers", BOTH)
def test_packed_pairs_are_computed_as_if_alone(name, scan_layers):
    model, batch = model_of(name, scan_layers=scan_layers)
    call = jax.jit(lambda *texts, **named: model(*texts, **named))
    apart = call(
        batch["source"],
        batch["inputs"],
        segments_BT=batch["mask"],
        source_segments_BS=batch["source_mask"],
    )

    def packed(tokens, mask):
        lengths = mask.sum(-1)
        texts = [row[:length] for row, length in zip(tokens, lengths)]
        ids = np.repeat(np.arange(len(texts)) + 1, lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        # Padding between and after, so that slots are not positions.
        return (np.pad(x, (0, 3))[None] for x in (np.concatenate(texts), ids, positions))

    source, source_ids, source_positions = packed(batch["source"], batch["source_mask"])
    inputs, ids, positions = packed(batch["inputs"], batch["mask"])
    together = call(
        source,
        inputs,
        positions_BT=positions,
        segments_BT=ids,
        source_positions_BS=source_positions,
        source_segments_BS=source_ids,
    )
    alone = np.asarray(apart)[batch["mask"] > 0]
    np.testing.assert_allclose(np.asarray(together)[ids > 0], alone, atol=1e-5)


@pytest.mark.parametrize("name, scan_layers", BOTH)
def test_cached_decoding_is_the_full_forward_pass(name, scan_layers):
    model, batch = model_of(name, scan_layers=scan_layers)
    full = jax.jit(lambda *texts, **named: model.hidden(*texts, **named))(
        batch["source"],
        batch["inputs"],
        segments_BT=batch["mask"],
        source_segments_BS=batch["source_mask"],
    )
    B, T = batch["inputs"].shape
    new_cache = jax.jit(lambda *source: model.new_cache(B, T, *source))
    cache = new_cache(batch["source"], batch["source_mask"])
    positions = jnp.where(batch["mask"] > 0, jnp.arange(T), -1)
    extend = jax.jit(lambda *arguments: model.extend(*arguments))
    first, cache = extend(batch["inputs"][:, :3], positions[:, :3], cache)
    steps = [first]
    for step in range(3, T):
        here = slice(step, step + 1)
        x_B1D, cache = extend(batch["inputs"][:, here], positions[:, here], cache)
        steps.append(x_B1D)
    mask = batch["mask"] > 0
    cached = np.concatenate(steps, 1)
    np.testing.assert_allclose(cached[mask], np.asarray(full)[mask], atol=1e-5)


# ---- config.json -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, model_type",
    [
        ("bert_base", "bert"),
        ("bert_large_mlm", "bert"),
        ("roberta_base", "roberta"),
        ("distilbert_base", "distilbert"),
        ("modernbert_large", "modernbert"),
        ("embeddinggemma_300m", "gemma3_text"),
        ("t5_small", "t5"),
        ("t5_v1_1_xl", "t5"),
        ("bart_large", "bart"),
        ("mbart_large_50", "mbart"),
        ("opus_mt", "marian"),
    ],
)
def test_a_preset_is_what_its_config_json_says(name, model_type):
    config = preset(name)
    family = family_for(config)
    assert family.model_type == model_type
    hf = {"model_type": model_type, **family.write_config(config)}
    tensors = {"pooler": config.pooler, "head_bias": config.head_bias}  # which those say
    again = dataclasses.replace(family.read_config(hf), **tensors)
    assert essence(again) == essence(config)
    assert (again.dropout, again.initializer) == (config.dropout, config.initializer)


# config.json as it stands beside the published weights.
_OLD = {
    "activation_dropout": 0.0, "add_bias_logits": False, "attention_dropout": 0.0,
    "classif_dropout": 0.0, "classifier_dropout": 0.0, "decoder_layerdrop": 0.0, "dropout": 0.1,
    "encoder_layerdrop": 0.0, "init_std": 0.02, "is_encoder_decoder": True,
    "scale_embedding": True, "use_cache": True,
}  # fmt: skip
_LARGE = {
    **_OLD, "model_type": "mbart", "activation_function": "gelu", "add_final_layer_norm": True,
    "architectures": ["MBartForConditionalGeneration"], "bos_token_id": 0, "d_model": 1024,
    "decoder_attention_heads": 16, "decoder_ffn_dim": 4096, "decoder_layers": 12,
    "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "encoder_layers": 12,
    "eos_token_id": 2, "forced_eos_token_id": 2, "gradient_checkpointing": False,
    "max_length": 200, "max_position_embeddings": 1024, "normalize_before": True,
    "normalize_embedding": True, "num_beams": 5, "num_hidden_layers": 12, "output_past": True,
    "pad_token_id": 1, "static_position_embeddings": False,
}  # fmt: skip
_TRANSLATORS = {
    "mbart_large_cc25": {
        **_LARGE, "_num_labels": 3, "extra_pos_embeddings": 2, "prefix": " ", "vocab_size": 250_027,
        "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": 250_020}},
    },
    "mbart_large_50": {
        **_LARGE, "decoder_start_token_id": 2, "tokenizer_class": "MBart50Tokenizer",
        "vocab_size": 250_054,
    },
    "opus_mt": {
        **_OLD, "model_type": "marian", "activation_function": "swish",
        "add_final_layer_norm": False, "architectures": ["MarianMTModel"],
        "bad_words_ids": [[58_100]], "bos_token_id": 0, "d_model": 512,
        "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layers": 6,
        "decoder_start_token_id": 58_100, "decoder_vocab_size": 58_101,
        "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "encoder_layers": 6,
        "eos_token_id": 0, "extra_pos_embeddings": 58_101, "forced_eos_token_id": 0,
        "max_length": 512, "max_position_embeddings": 512, "normalize_before": False,
        "normalize_embedding": False, "num_beams": 6, "num_hidden_layers": 6,
        "pad_token_id": 58_100, "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True, "vocab_size": 58_101,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name, fields, word",
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"hidden_act": "mish"}, "hidden_act"),
        ("bert", {"tie_word_embeddings": False}, "cls.predictions.decoder.weight"),
        ("bert", {"num_attention_heads": 2}, "num_attention_heads"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
        ("bert", {"embedding_size": 128}, "embedding_size"),
        ("bert", {"layer_norm_eps": "tiny"}, "layer_norm_eps"),
        ("modernbert", {"classifier_activation": "relu"}, "classifier_activation"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
        ("embedding_gemma", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("roberta", {"pad_token_id": -1}, "pad_token_id"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings"),
        ("roberta", {"id2label": {"0": "only"}}, "classifier.out_proj.weight"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj"),
        ("t5", {"dense_act_fn": "gelu_new"}, "dense_act_fn"),
        ("t5", {"is_decoder": True}, "is_decoder"),
        ("bart", {"decoder_ffn_dim": 14}, "decoder_ffn_dim"),
        ("bart", {"decoder_attention_heads": 1}, "decoder_attention_heads"),
        ("bart", {"normalize_before": True}, "normalize_before"),
        ("bart", {"encoder_layerdrop": 0.1}, "encoder_layerdrop"),
        ("bart", {"static_position_embeddings": True}, "static_position_embeddings"),
        ("bart", {"vocab_size": 32}, "model.shared.weight"),
        ("mbart", {"add_final_layer_norm": False}, "add_final_layer_norm"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        ("marian", {"decoder_vocab_size": 29}, "decoder_vocab_size"),
        ("marian", {"d_model": 9}, "d_model"),
    ],
)
def test_what_cannot_be_honoured_is_named_in_one_line(name, fields, word, tmp_path):
    with pytest.raises(ConfigError, match=word) as error:
        open_checkpoint(copied(name, tmp_path / "in", **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("bert_base", {"norm_position": "pre"}),
        ("roberta_base", {"norm": "rmsnorm"}),
        ("t5_small", {"norm": "layernorm"}),
        ("t5_v1_1_small", {"output_scale": 2.0}),
        ("bart_base", {"norm_epsilon": 1e-6}),
    ],
)
def test_a_model_that_its_family_has_not_is_not_written(name, changes):
    family = FAMILIES[name.split("_")[0]]
    config = dataclasses.replace(preset(name), **changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        family.write_config(config)


# config.json as it stands beside the published weights.
PUBLISHED = {
    **_TRANSLATORS,
    "distilbert_base": {
        "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1,
        "dim": 768, "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02,
        "max_position_embeddings": 512, "model_type": "distilbert", "n_heads": 12, "n_layers": 6,
        "pad_token_id": 0, "qa_dropout": 0.1, "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False, "tie_weights_": True, "transformers_version": "4.10.0.dev0",
        "vocab_size": 30_522,
    },
    "modernbert_base": {
        "architectures": ["ModernBertForMaskedLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 50_281, "classifier_activation": "gelu",
        "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean",
        "cls_token_id": 50_281, "decoder_bias": True, "deterministic_flash_attn": False,
        "embedding_dropout": 0.0, "eos_token_id": 50_282, "global_attn_every_n_layers": 3,
        "global_rope_theta": 160_000.0, "gradient_checkpointing": False,
        "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0,
        "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-5,
        "local_attention": 128, "local_rope_theta": 10_000.0, "max_position_embeddings": 8192,
        "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False,
        "norm_eps": 1e-5, "num_attention_heads": 12, "num_hidden_layers": 22,
        "pad_token_id": 50_283, "position_embedding_type": "absolute",
        "repad_logits_with_grad": False, "sep_token_id": 50_282, "sparse_pred_ignore_index": -100,
        "sparse_prediction": False, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0",
        "vocab_size": 50_368,
    },
    "embeddinggemma_300m": {
        "_sliding_window_pattern": 6, "architectures": ["Gemma3TextModel"], "attention_bias": False,
        "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
        "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 1152,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
        "max_position_embeddings": 2048, "model_type": "gemma3_text", "num_attention_heads": 3,
        "num_hidden_layers": 24, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10_000.0,
        "rope_scaling": None, "rope_theta": 1_000_000.0, "sliding_window": 512,
        "torch_dtype": "float32", "use_bidirectional_attention": True, "use_cache": True,
        "vocab_size": 262_144,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(name):
    hf, config = PUBLISHED[name], preset(name)
    found = dataclasses.replace(family_of(hf).read_config(hf), head_bias=config.head_bias)
    assert essence(found) == essence(config)


# ---- What only the tensors say ---------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_robertas_positions_begin_after_its_padding(pad, tmp_path):
    hf = json.loads((GOLDEN / "roberta" / "config.json").read_text())
    config = open_checkpoint(copied("roberta", tmp_path / "in", pad_token_id=pad)).config
    assert config.position_offset == pad + 1
    assert config.max_length == hf["max_position_embeddings"] - pad - 1
    written = FAMILIES["roberta"].write_config(config)
    assert (written["pad_token_id"], written["max_position_embeddings"]) == (
        pad,
        hf["max_position_embeddings"],
    )


def test_old_names_of_norms_are_understood(tmp_path):
    def old(tensors):
        names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma") for name in tensors}
        return {
            new.replace("LayerNorm.bias", "LayerNorm.beta"): tensors[name]
            for name, new in names.items()
        }

    directory = retensored(copied("bert", tmp_path / "in"), old)
    (_, _, expected), _ = golden("bert")
    _, _, params = family_checks.load(directory)
    assert all(np.array_equal(params[name], expected[name]) for name in expected)


def test_the_body_of_bert_has_a_pooler_where_there_is_one(tmp_path):
    def body(tensors, *dropped):
        kept = {n: t for n, t in tensors.items() if n.startswith("bert.")}
        return {n: t for n, t in kept.items() if not any(part in n for part in dropped)}

    fields = {"architectures": ["BertModel"]}
    with_pooler = retensored(copied("bert", tmp_path / "with", **fields), body)
    assert open_checkpoint(with_pooler).config.pooler
    without = copied("bert", tmp_path / "without", **fields)
    retensored(without, lambda tensors: body(tensors, "pooler"))
    checkpoint = open_checkpoint(without)
    assert not checkpoint.config.pooler
    assert not any(name.startswith("pooler") for name in checkpoint.parameters())


def test_the_next_sentence_head_is_read_with_the_masked_language_model(tmp_path):
    """Published files of BertForMaskedLM hold the other half of the pre-training heads too."""
    directory = copied("bert", tmp_path / "in", architectures=["BertForMaskedLM"])
    config = open_checkpoint(directory).config
    assert (config.pooler, config.classifier, config.num_labels) == (True, "sequence", 2)
    retensored(directory, lambda tensors: {n: t for n, t in tensors.items() if "seq_rel" not in n})
    config = open_checkpoint(directory).config
    assert (config.pooler, config.classifier) == (True, "none")


@pytest.mark.parametrize(
    "fields, scale",
    [
        ({"tie_word_embeddings": True}, 0.0),  # T5
        ({}, 0.0),  # T5's published files
        ({"tie_word_embeddings": False}, 1.0),  # T5 v1.1's
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, 1.0),  # as now saved
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, 0.0),
    ],
)
def test_t5_scales_its_output_as_the_file_says(fields, scale):
    hf = {"model_type": "t5", **FAMILIES["t5"].write_config(preset("t5_small"))}
    for name in ("tie_word_embeddings", "scale_decoder_outputs"):
        hf.pop(name)
    assert FAMILIES["t5"].read_config(hf | fields).output_scale == scale


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("relu", "relu"),
        ("gated-gelu", "geglu"),
        ("gated-gelu_python", "geglu_exact"),
        ("gated-silu", "swiglu"),
        ("gated-relu2", "relu2glu"),
        ("quick_gelu", "gelu_quick"),
    ],
)
def test_t5_has_every_nonlinearity_and_gate(written, ours):
    family, base = FAMILIES["t5"], {"model_type": "t5", "feed_forward_proj": written}
    config = family.read_config(base)
    assert config.activation == ours
    assert family.write_config(config)["feed_forward_proj"] == written


def test_the_head_of_t5_is_its_embedding_where_the_tensors_are_the_same(tmp_path):
    assert golden("t5")[0][1].tie_embeddings
    assert not golden("t5_v1_1")[0][1].tie_embeddings  # though config.json says that it is tied
    directory = copied("t5_v1_1", tmp_path / "in")
    retensored(directory, lambda t: t | {"lm_head.weight": t["shared.weight"].copy()})
    assert open_checkpoint(directory).config.tie_embeddings


def test_the_bias_of_bart_logits_is_a_parameter_unless_it_is_zero(tmp_path):
    (family, config, _), _ = golden("bart")
    assert not config.head_bias
    bias = np.random.default_rng(0).normal(size=(1, config.vocab_size)).astype(np.float32)
    directory = copied("bart", tmp_path / "in")
    retensored(directory, lambda tensors: tensors | {"final_logits_bias": bias})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.head_bias
    params = checkpoint.parameters()
    np.testing.assert_array_equal(params["head_bias"], bias[0])
    save_pretrained(tmp_path / "out", family, checkpoint.config, params)
    back = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(back["final_logits_bias"], bias)


def test_sinusoids_are_exact_far_from_the_start():
    positions = np.arange(0, 16_384, 37)
    angles = positions[:, None] / 10_000 ** (np.arange(8) / 8)
    exact = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    np.testing.assert_allclose(
        jax.jit(sinusoids, static_argnums=1)(positions, 16), exact, atol=1e-6
    )


def test_tables_of_sinusoids_are_read_where_they_are_those_of_marian(tmp_path):
    (_, config, expected), _ = golden("marian")
    positions = np.arange(config.max_length)
    table = np.array(sinusoids(positions, config.width))
    names = [f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")]

    def with_tables(where, table):
        directory = copied("marian", tmp_path / where)
        return retensored(directory, lambda tensors: tensors | dict.fromkeys(names, table))

    _, _, params = family_checks.load(with_tables("same", table))
    assert params.keys() == expected.keys()
    with pytest.raises(ConfigError, match="embed_positions"):
        open_checkpoint(with_tables("other", table[::-1].copy()))
    old = {"static_position_embeddings": True, "normalize_embedding": False}
    old |= {"extra_pos_embeddings": 31, "normalize_before": False, "add_bias_logits": False}
    again = open_checkpoint(copied("marian", tmp_path / "old", **old))
    assert essence(again.config) == essence(config)

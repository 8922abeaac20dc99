"""Texts of foreign directories have the ids of transformers, framing included.

Where our reading is another than that of version 5, `lm.tokenizers.vocabularies` says why.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "tokenizers"))

from test_foreign_tokenizers import byte_level, sentence_piece, with_bytes, word_piece  # noqa: E402
from tokenizers import normalizers, processors  # noqa: E402

import lm  # noqa: E402
from lm.models.huggingface.families import FAMILIES  # noqa: E402
from lm.models.huggingface.family import NameMap  # noqa: E402

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.slow

TEXTS = (
    "The Cat sat.", "the  cat  ", "", "\n the", "Café É 漢字 don't", "e\u0301 a", "12 345",
    "\tx\n\n y",
)  # fmt: skip
SPACED = (" the cat", "  the cat", " ")
BRACKETS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
END = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "vocab_size": 700, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 4, "num_key_value_heads": 2, "head_dim": 2,
    "n_embd": 4, "n_layer": 1, "n_head": 2, "word_embed_proj_dim": 4, "ffn_dim": 4,
    "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4,
}  # fmt: skip


def pairs(names):
    model = json.loads(byte_level(names).to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": merges}


def words():
    vocabulary = word_piece().get_vocab()
    return {"vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))}


def bert_json(lowercase, accents):
    rust = word_piece()
    rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents)
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return {"tokenizer.json": rust.to_str()}


def llama_json():
    rust = with_bytes(["<unk>", "<s>", "</s>"], prefix=True)
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return {"tokenizer.json": rust.to_str()}


def llama_pieces():
    data = sentence_piece(
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return {"tokenizer.model": data}


def t5_pieces():
    return {"spiece.model": sentence_piece(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)}


def of(kind, **fields):
    return {"tokenizer_class": kind, **fields}


OPT = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
# model_type, files, tokenizer_config.json (None: there is none)
CASES = {
    **{
        f"{model} {kind}": (model, pairs, BRACKETS, config)
        for model in ("roberta", "bart", "opt", "gpt2", "t5")
        for kind, config in {
            "alone": None,
            "Roberta": of("RobertaTokenizer"),
            "Bart": of("BartTokenizerFast"),
            "prefix": of("RobertaTokenizer", add_prefix_space=True),
            "named": of("RobertaTokenizer", cls_token="<mask>", sep_token="<pad>"),
            "GPT2": of("GPT2Tokenizer", **OPT),
            "begun": of("GPT2Tokenizer", **OPT, add_bos_token=True),
        }.items()
        if (model, kind) != ("t5", "alone")  # which is no T5
    },
    **{
        f"{model} {kind}": (model, pairs, END, config)
        for model in ("gpt2", "qwen2", "qwen3", "gpt_neox")
        for kind, config in {
            "with words": None,
            "begun": {"add_bos_token": True},
            "Qwen": of("Qwen2Tokenizer", eos_token="<|im_end|>", bos_token=None),
        }.items()
    },
    **{
        f"bert {name}": ("bert", words, None, config)
        for name, config in {
            "alone": None,
            "cased": of("BertTokenizer", do_lower_case=False),
            "named": of("DistilBertTokenizer", cls_token="[MASK]", sep_token="[PAD]"),
        }.items()
    },
    **{
        f"bert {lowercase} {accents} {kind} {settings}": (
            "bert", bert_json, (lowercase, accents), of(kind, **settings)
        )
        for lowercase in (True, False)
        for accents in (None, False)
        for kind in (None, "BertTokenizerFast", "PreTrainedTokenizerFast")
        for settings in ({}, {"do_lower_case": False}, {"strip_accents": False})
    },
    "gpt2 json with a space": (
        "gpt2", lambda: {"tokenizer.json": byte_level(END).to_str()}, None,
        of("GPT2Tokenizer", add_prefix_space=True),
    ),
    "llama json": ("llama", llama_json, None, of("LlamaTokenizerFast")),
    "llama pieces": ("llama", llama_pieces, None, of("LlamaTokenizer", add_bos_token=True)),
    "llama pieces bare": ("llama", llama_pieces, None, of("LlamaTokenizer", add_bos_token=False)),
    "llama pieces ended": (
        "llama", llama_pieces, None,
        of("LlamaTokenizer", add_bos_token=True, add_eos_token=True),
    ),
    "t5": ("t5", t5_pieces, None, None),
    "mt5": ("mt5", t5_pieces, None, of("T5TokenizerFast")),
}  # fmt: skip


def opened(path, case):
    model_type, files, argument, config = CASES[case]
    family = FAMILIES[model_type]
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    hf = {name: value for name, value in SIZES.items() if name in known}
    hf |= {"model_type": model_type, "architectures": list(family.architectures[:1])}
    shapes = NameMap(family, family.read_config(hf)).shapes
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(zeros, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = () if argument is None else argument if files is bert_json else (argument,)
    for name, data in files(*arguments).items():
        (path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return lm.load(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("case", CASES)
def test_a_text_has_the_ids_of_transformers(case, tmp_path):
    ours, theirs = opened(tmp_path, case)
    for text in TEXTS if "llama" in case else (*TEXTS, *SPACED):
        if text or theirs(text).input_ids:  # an empty prompt starts somewhere
            assert ours.encode(text) == theirs(text).input_ids, text


@pytest.mark.parametrize("case", ["llama json", "llama pieces"])
def test_of_llama_the_first_space_counts(case, tmp_path):
    ours, theirs = opened(tmp_path, case)
    for text in SPACED:
        assert ours.tokenizer.decode(ours.encode(text)) == text
        if text.strip() and transformers.__version__ >= "5":
            assert ours.encode(text.removeprefix(" ")) == theirs(text).input_ids

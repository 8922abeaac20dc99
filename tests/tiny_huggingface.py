"""A tiny GPT-2 as Hugging Face would write it, made by hand: neither torch nor transformers."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from lm.tokenizers import TokenizerConfig, train
from lm.tokenizers.export import huggingface_files

LAYERS, HEADS, WIDTH, VOCABULARY, CONTEXT = 3, 4, 32, 261, 24

CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": VOCABULARY,
    "n_positions": CONTEXT,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": None,
    "n_ctx": CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "task_specific_params": {"text-generation": {"do_sample": True}},
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random numbers under GPT-2's names, float32."""
    shapes = {
        "transformer.wte.weight": (VOCABULARY, WIDTH),
        "transformer.wpe.weight": (CONTEXT, WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
        "transformer.ln_f.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
        for name, ins, outs in (
            ("attn.c_attn", WIDTH, 3 * WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, 4 * WIDTH),
            ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ):
            shapes |= {f"{block}.{name}.weight": (ins, outs), f"{block}.{name}.bias": (outs,)}
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.2, s).astype(np.float32) for n, s in shapes.items()}


def write_directory(
    path: pathlib.Path,
    weights: dict[str, np.ndarray] | None = None,
    tokenizer: bool = True,
    **fields,
) -> pathlib.Path:
    """A Hugging Face directory: config.json, model.safetensors and a byte tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    save_file(tensors() if weights is None else weights, path / "model.safetensors")
    if tokenizer:
        files = huggingface_files(train(TokenizerConfig(kind="byte"), []))
        for name, data in files.items():
            (path / name).write_bytes(data)
    return path

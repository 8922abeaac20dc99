"""Makes the golden files of every family: python tests/golden/make.py (needs torch, transformers).

Each folder holds a small random model as transformers saves it and what transformers computes of
it: of decoders (saved in float16) `computed.npz`; of families with an encoder `expected.npz`, with
a batch, the gradient of its loss and, where the model generates, its greedy search. They change
only with a case or with transformers: what a model computes must not.
"""

import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "parity")]

import decoder_oracles  # noqa: E402
import encoder_oracles as oracles  # noqa: E402
import family_checks  # noqa: E402

# Two layers are enough for a pattern; compiling them is most of what a test does.
_RANGES = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_LAYERS = {
    "gpt2": {"n_layer": 2},
    "gptj": {"n_layer": 2},
    "bloom": {"n_layer": 2},
    "gemma3": _RANGES,
    "olmo3": _RANGES,
}
_ENCODER = {
    "vocab_size": 31, "hidden_size": 9, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 13, "max_position_embeddings": 11, "num_labels": 4,
}  # fmt: skip
_DISTIL = {
    "vocab_size": 31, "dim": 9, "n_layers": 2, "n_heads": 3, "hidden_dim": 13,
    "max_position_embeddings": 11, "num_labels": 4,
}  # fmt: skip
_MODERN = {
    **oracles.MODERN, "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2,
    "intermediate_size": 9, "local_attention": 4, "max_position_embeddings": 11,
}  # fmt: skip
_GEMMA = {
    **oracles.GEMMA, "vocab_size": 31, "hidden_size": 10, "num_hidden_layers": 2,
    "head_dim": 6, "intermediate_size": 13, "sliding_window": 5, "max_position_embeddings": 11,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
# transformers cannot generate with a decoder deeper than the encoder.
_T5 = {
    "vocab_size": 31, "d_model": 9, "d_kv": 5, "num_heads": 2, "d_ff": 13, "num_layers": 3,
    "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}  # fmt: skip
_BART = {
    "vocab_size": 31, "d_model": 9, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 13,
    "decoder_ffn_dim": 13, "max_position_embeddings": 14, "scale_embedding": True,
}  # fmt: skip
_MBART = {**_BART, "d_model": 6, "activation_function": "relu"}
_MARIAN = {
    **_BART, "d_model": 6, "pad_token_id": 1, "decoder_start_token_id": 1,
    "activation_function": "swish",
}  # fmt: skip
_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "bert": oracles.Case("BertForPreTraining", _ENCODER),
    "roberta": oracles.Case("RobertaForSequenceClassification", _ENCODER),
    "distilbert": oracles.Case("DistilBertForSequenceClassification", _DISTIL),
    "modernbert": oracles.Case("ModernBertForMaskedLM", _MODERN, 0.2),
    "embedding_gemma": oracles.Case("Gemma3TextModel", _GEMMA, 0.2),
    "t5": oracles.Case("T5ForConditionalGeneration", _T5, change=oracles.restless),
    "t5_v1_1": oracles.Case("T5ForConditionalGeneration", _T5 | _V1_1, change=oracles.untie),
    "bart": oracles.Case("BartForConditionalGeneration", _BART, change=oracles.restless),
    "mbart": oracles.Case("MBartForConditionalGeneration", _MBART, change=oracles.restless),
    "marian": oracles.Case("MarianMTModel", _MARIAN, change=oracles.biased),
}


def decoder(name: str) -> None:
    """Writes a folder of `decoder_oracles`."""
    batch = family_checks.text_batch(rows=2, length=10)
    model = decoder_oracles.build(name, **_LAYERS.get(name, {"num_hidden_layers": 2}))
    with tempfile.TemporaryDirectory() as scratch:
        outputs, gradient = decoder_oracles.computed(model, batch, pathlib.Path(scratch))
    model.half().save_pretrained(HERE / name)
    computed = {
        "logits": outputs["logits"],
        "hidden": np.stack([outputs[n] for n in outputs if n.startswith("hidden.")]),
        "gradient_norms": [np.linalg.norm(gradient[tensor]) for tensor in sorted(gradient)],
    }
    np.savez_compressed(HERE / name / "computed.npz", **computed)


def encoder(name: str) -> None:
    """Writes a folder of `CASES`."""
    case = CASES[name]
    # Of many, a seed with which BART does not say the same over and over.
    model = oracles.build(case, seed=23 if name == "bart" else 0)
    batch = oracles.random_batch(case, length=7)
    outputs, gradients = oracles.computed(model, batch)
    expected = {f"batch/{n}": value for n, value in batch.items()}
    expected |= {f"output/{n}": value for n, value in outputs.items()}
    expected |= {f"gradient/{n}": value for n, value in gradients.items()}
    model.save_pretrained(HERE / name)
    if "source" in batch and case.kind in ("T5", "Bart"):
        ends = oracles.ENDS[case.kind]
        expected["greedy"], expected["stop"] = oracles.greedy(model, batch, **ends, steps=8)
    np.savez_compressed(HERE / name / "expected.npz", **expected)


def main() -> None:
    """Writes every folder anew."""
    for make, names in ((decoder, decoder_oracles.FAMILIES), (encoder, CASES)):
        for name in names:
            make(name)
            (HERE / name / "model.safetensors").chmod(0o644)
            (HERE / name / "generation_config.json").unlink(missing_ok=True)
            size = sum(file.stat().st_size for file in (HERE / name).iterdir())
            print(f"{name}: {size / 1000:.1f} kB")


if __name__ == "__main__":
    main()

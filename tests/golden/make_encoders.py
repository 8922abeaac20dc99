"""Makes the golden files of the families with an encoder; needs torch and transformers.

    python tests/golden/make_encoders.py

Each folder is a model as transformers saved it, and `expected.npz`: a batch, what transformers
computes of it, the gradient of its loss, and, where the model generates, its greedy search. Make
them anew only when a case changes: what a model computes must not.
"""

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "parity")]

import encoder_oracles as oracles  # noqa: E402

_ENCODER = {
    "vocab_size": 31,
    "hidden_size": 9,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 13,
    "max_position_embeddings": 11,
    "num_labels": 4,
}
# transformers cannot generate with a decoder deeper than the encoder.
_T5 = {
    "vocab_size": 31,
    "d_model": 9,
    "d_kv": 5,
    "num_heads": 2,
    "d_ff": 13,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}
_BART = {
    "vocab_size": 31,
    "d_model": 9,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 13,
    "decoder_ffn_dim": 13,
    "max_position_embeddings": 14,
    "scale_embedding": True,
}
_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "bert": oracles.Case("BertForPreTraining", _ENCODER),
    "roberta": oracles.Case("RobertaForSequenceClassification", _ENCODER),
    "t5": oracles.Case("T5ForConditionalGeneration", _T5, change=oracles.restless),
    "t5_v1_1": oracles.Case("T5ForConditionalGeneration", _T5 | _V1_1, change=oracles.untie),
    "bart": oracles.Case("BartForConditionalGeneration", _BART, change=oracles.restless),
}


def main() -> None:
    for name, case in CASES.items():
        # Of many, a seed with which BART does not say the same over and over.
        model = oracles.build(case, seed=23 if name == "bart" else 0)
        batch = oracles.random_batch(case, length=7)
        outputs, gradients = oracles.computed(model, batch)
        expected = {f"batch/{n}": value for n, value in batch.items()}
        expected |= {f"output/{n}": value for n, value in outputs.items()}
        expected |= {f"gradient/{n}": value for n, value in gradients.items()}
        model.save_pretrained(HERE / name)
        (HERE / name / "model.safetensors").chmod(0o644)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        if "source" in batch:
            ends = oracles.ENDS[case.kind]
            expected["greedy"], expected["stop"] = oracles.greedy(model, batch, **ends, steps=8)
        np.savez_compressed(HERE / name / "expected.npz", **expected)


if __name__ == "__main__":
    main()

"""Makes the golden files of every decoder family: python tests/golden/make.py (needs torch).

Each folder holds a small random model as transformers saves it, in float16, and what transformers
computes of it in float32: the default test suite compares ours with that. They change only with
`tests/parity/decoder_oracles.py` and with transformers.
"""

import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent / "parity")]

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402

# Two layers are enough for a pattern; compiling them is most of what a test does.
_LAYERS = {
    "gpt2": {"n_layer": 2},
    "bloom": {"n_layer": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


def main() -> None:
    """Writes every folder anew."""
    for name in decoder_oracles.FAMILIES:
        batch = family_checks.text_batch(rows=2, length=10)
        model = decoder_oracles.build(name, **_LAYERS.get(name, {"num_hidden_layers": 2}))
        with tempfile.TemporaryDirectory() as scratch:
            outputs, gradient = decoder_oracles.computed(model, batch, pathlib.Path(scratch))
        directory = HERE / name
        model.half().save_pretrained(directory)
        (directory / "generation_config.json").unlink()
        norms = [np.linalg.norm(gradient[tensor]) for tensor in sorted(gradient)]
        count = len(outputs) - 2
        computed = {
            "logits": outputs["logits"],
            "hidden": np.stack([outputs[f"hidden.{i}"] for i in range(count)]),
            "gradient_norms": norms,
        }
        np.savez_compressed(directory / "computed.npz", **computed)
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"{name}: {size / 1000:.1f} kB")


if __name__ == "__main__":
    main()

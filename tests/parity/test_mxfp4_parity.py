"""Four-bit tensors of gpt-oss are read as transformers dequantizes them, bit for bit."""

import json

import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

from lm.config import ConfigError  # noqa: E402
from lm.models.huggingface.read import open_checkpoint  # noqa: E402

QUANTIZED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
}


@pytest.fixture
def packed(tmp_path):
    """A directory as gpt-oss was published, and what its expert tensors should be."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    decoder_oracles.build("gpt_oss", **sizes).bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = QUANTIZED
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    rng, expected = np.random.default_rng(0), {}
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(0, 255, blocks.shape[:-1], np.uint8)  # 255 is no number
        # Every number at every scale.
        blocks.flat[: 255 * 16] = np.tile(np.arange(16) * 17, 255)
        scales.flat[:255] = np.arange(255)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pair = (torch.tensor(blocks), torch.tensor(scales))
        expected[name] = convert_moe_packed_tensors(*pair).view(torch.int16).numpy()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, expected


def test_four_bits_become_the_bfloat16_of_transformers(packed):
    directory, expected = packed
    checkpoint = open_checkpoint(directory)
    assert len(expected) == 2 and set(checkpoint.dtypes) == {"bfloat16"}
    for name, bits in expected.items():
        stored = checkpoint.stored[name]
        assert stored.shape == bits.shape and stored.size == 2 * bits.size
        np.testing.assert_array_equal(stored.read().view(np.int16), bits)
    _, _, params = family_checks.load(directory)
    gate_up = torch.tensor(expected["model.layers.0.mlp.experts.gate_up_proj"])
    gate_up = gate_up.view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(params["blocks.mlp.gate"][0], gate_up[..., 0::2])
    np.testing.assert_array_equal(params["blocks.mlp.up"][0], gate_up[..., 1::2])


@pytest.mark.parametrize(
    "field, value",
    [("quantization_config", {**QUANTIZED, "quant_method": "awq"}), ("swiglu_alpha", 1)],
)
def test_other_quantization_is_refused(packed, field, value):
    config = json.loads((packed[0] / "config.json").read_text(encoding="utf-8"))
    config[field] = value
    (packed[0] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=field):
        open_checkpoint(packed[0])

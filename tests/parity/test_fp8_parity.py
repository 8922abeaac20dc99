"""Eight-bit matrices of DeepSeek-V3 are read as transformers dequantizes them."""

import json

import numpy as np
import pytest
import safetensors.torch

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402
from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # noqa: E402

from lm.models.huggingface.read import open_checkpoint  # noqa: E402

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def test_blocks_of_eight_bits_become_the_float32_of_transformers(tmp_path):
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "q_lora_rank": None, "kv_lora_rank": 200}
    sizes["first_k_dense_replace"] = 0
    decoder_oracles.build("deepseek_v3", **sizes).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = FP8
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    expected, generator = {}, torch.Generator().manual_seed(0)
    for name in [name for name in tensors if "self_attn" in name and tensors[name].ndim == 2]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        grid = -(-rows // 128), -(-columns // 128)
        scales = tensors[f"{name}_scale_inv"] = torch.rand(grid, generator=generator)
        # transformers takes whole blocks alone.
        whole = torch.zeros(128 * grid[0], 128 * grid[1]).to(torch.float8_e4m3fn)
        whole[:rows, :columns] = tensors[name]
        found = Fp8Dequantize(None)._dequantize_one(whole, scales)
        expected[name] = found[:rows, :columns].numpy()
    # What predicts further tokens is left out.
    tensors["model.layers.61.eh_proj.weight"] = torch.zeros(2, 2)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert len(expected) == 4 and checkpoint.ignored == ("model.layers.61.eh_proj.weight",)
    for name, array in expected.items():
        stored = checkpoint.stored[name]
        assert stored.shape == array.shape and stored.size == array.nbytes
        np.testing.assert_array_equal(stored.read(), array)
    _, _, params = family_checks.load(tmp_path)
    output = expected["model.layers.0.self_attn.o_proj.weight"].T.reshape(4, 7, 256)
    np.testing.assert_array_equal(params["blocks.attention.output"][0], output)

"""Vectors of texts are what sentence-transformers makes of the same directory."""

import json

import numpy as np
import pytest
import tiny_huggingface
from safetensors.numpy import save_file
from test_main import main

import lm
from lm.config import ConfigError

TEXTS = ["a cat", "the cat sat"]
DENSE = np.random.default_rng(0).normal(size=(2, 48, 32)).astype(np.float32)


def write(path, file, **fields):
    (path / file).parent.mkdir(exist_ok=True)
    (path / file).write_text(json.dumps(fields), encoding="utf-8")


def directory(path, pooling: dict, **dense):
    """A tiny GPT-2 with the modules that e5-mistral has, and EmbeddingGemma's dense layers."""
    tiny_huggingface.write_directory(path)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    kinds += [("3_Dense", "Dense"), ("4_Normalize", "Normalize")]
    modules = [{"path": p, "type": f"sentence_transformers.models.{kind}"} for p, kind in kinds]
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    write(path, "1_Pooling/config.json", word_embedding_dimension=32, **pooling)
    activation = "torch.nn.modules.activation.Tanh"
    write(path, "2_Dense/config.json", activation_function=activation, **dense)
    save_file(
        {"linear.weight": DENSE[0], "linear.bias": DENSE[1, :, 0].copy()},
        path / "2_Dense/model.safetensors",
    )
    write(path, "3_Dense/config.json", activation_function="torch.nn.modules.linear.Identity")
    save_file({"linear.weight": DENSE[1].T.copy()}, path / "3_Dense/model.safetensors")
    return path


def by_hand(run, text: str, last: bool) -> np.ndarray:
    x_TD = np.asarray(run.transformer.hidden(np.array([run.encode(text)])))[0]
    hidden = np.tanh(DENSE[0] @ (x_TD[-1] if last else x_TD.mean(0)) + DENSE[1, :, 0])
    vector = DENSE[1].T @ hidden
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    "pooling, last",
    [
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, True),
        ({"pooling_mode": "mean"}, False),
    ],
)
def test_pooling_and_what_follows_it_are_as_the_directory_says(tmp_path, pooling, last):
    run = lm.load(directory(tmp_path / "hf", pooling))
    expected = [by_hand(run, text, last) for text in TEXTS]
    # The model may compute in bfloat16.
    np.testing.assert_allclose(run.embed(TEXTS), expected, atol=5e-3)
    assert run.embed("a cat", pooling="mean").shape == (32,)  # by itself, whatever follows
    assert run.vectors.width == 32


def test_a_converted_model_keeps_its_vectors(tmp_path):
    source = directory(tmp_path / "hf", {"pooling_mode": "lasttoken"})
    fields = ["--config=configs/convert.py", "--config.init_from="]
    assert main(fields[0], fields[1] + str(source), f"--workdir={tmp_path / 'run'}")[0] == 0
    out = tmp_path / "out"
    back = (fields[1] + str(tmp_path / "run"), "--config.to=hf", f"--workdir={out}")
    assert main(fields[0], *back)[0] == 0
    expected = lm.load(source).embed(TEXTS)
    for place in (tmp_path / "run", out):
        np.testing.assert_allclose(lm.load(place).embed(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize(
    "file, fields, named",
    [
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling_mode='weightedmean'"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "several modes"),
        ("2_Dense/config.json", {"activation_function": "a.Mish"}, "activation_function='Mish'"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default_prompt_name"),
    ],
)
def test_what_would_make_other_vectors_is_named(tmp_path, file, fields, named):
    path = directory(tmp_path / "hf", {"pooling_mode": "mean"})
    write(path, file, **fields)
    with pytest.raises(ConfigError, match=named):
        lm.load(path).embed("a")

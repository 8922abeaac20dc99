"""Adapters from a config file: trained, taken up again, gone on with, opened."""

import dataclasses
import json
import shutil
from unittest import mock

import numpy as np
import pytest
import tiny_huggingface
import tiny_jobs
from test_main import main
from tiny_jobs import get_config

import lm
from lm import command
from lm.__main__ import JOBS
from lm.config import ConfigError, defaults
from lm.jobs import convert as convert_job
from lm.jobs.convert import ConvertJob
from lm.models import ModelConfig, bind, skeleton
from lm.runs.sources import open_source
from lm.tokenizers import TokenizerConfig
from lm.training.checkpoint_files import fingerprint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run to adapt."""
    place = tmp_path_factory.mktemp("base")
    fields = dict(train__steps=8, checkpoint__every=8, model__tie_embeddings=False)
    return tiny_jobs.run(place, "base", **fields)


def adapt(place, base, name="adapted", devices=1, **fields):
    """A run of eight steps that starts from `base` with adapters."""
    steps = dict(train__steps=8, checkpoint__every=4, optimizer__learning_rate=1e-2)
    fields = {
        "init_from": str(base),
        "adapter__kind": "lora",
        "adapter__rank": 4,
        "adapter__alpha": 8.0,
        **fields,
    }
    return tiny_jobs.run(place, name, devices, **{**steps, **fields})


def saved(directory):
    """The adapters of the latest checkpoint."""
    return open_source(directory).adapters()[1]


def test_it_trains_and_its_base_stays_as_it_is(tmp_path, base):
    before = tiny_jobs.parameters(base)
    adapted = adapt(tmp_path, base, train__steps=24, adapter__targets=("mlp", "head"))
    losses = [loss for _, loss in tiny_jobs.losses(adapted)]
    assert losses[-1] < losses[0] - 0.1
    for name, value in tiny_jobs.parameters(base).items():
        assert value.tobytes() == before[name].tobytes()
    # Its checkpoints are the adapters' alone, and with them the model is another.
    held = saved(adapted)
    assert all(".lora_" in name for name in held)
    assert np.abs(tiny_jobs.parameters(adapted)["blocks.mlp.up"] - before["blocks.mlp.up"]).max()
    config = json.loads((adapted / "config.json").read_text())
    assert config["base"]["fingerprint"] == fingerprint(before)
    assert config["base"]["step"] == 8
    alone = command.read([f"--workdir={adapted}"], JOBS).config  # goes on
    assert (alone.job, list(alone.adapter.targets)) == ("train", ["mlp", "head"])
    assert lm.load(adapted).generate("The cat", max_new_tokens=3).startswith("The cat")


@pytest.mark.parametrize("fields", [{}, {"adapter__kind": "dora", "adapter__base": "int8"}])
def test_interrupted_and_resumed_it_is_the_same_run_to_the_bit(tmp_path, base, fields):
    part = adapt(tmp_path, base, "part", train__steps=4, optimizer__decay_steps=8, **fields)
    whole = adapt(tmp_path, base, "whole", optimizer__decay_steps=8, **fields)
    adapt(tmp_path, base, "part", optimizer__decay_steps=8, **fields)
    one, other = saved(whole), saved(part)
    for name in one:
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


def test_a_mesh_is_one_device(tmp_path, base):
    one = adapt(tmp_path, base, "one", adapter__kind="dora")
    mesh = dict(mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
    many = adapt(tmp_path, base, "many", 8, adapter__kind="dora", **mesh)
    np.testing.assert_allclose(
        [loss for _, loss in tiny_jobs.losses(one)],
        [loss for _, loss in tiny_jobs.losses(many)],
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind, near", [("int8", 0.01), ("nf4", 0.1)])
def test_a_rounded_base_learns_nearly_the_same(tmp_path, base, kind, near):
    full, rounded = (
        tiny_jobs.losses(adapt(tmp_path, base, name, adapter__base=name))
        for name in ("compute", kind)
    )
    assert abs(full[-1][1] - rounded[-1][1]) < near


def test_the_next_run_goes_on_with_the_same_adapters(tmp_path, base):
    first = adapt(tmp_path, base)
    second = tiny_jobs.run(
        tmp_path, "second", init_from=str(first), train__steps=2, optimizer__learning_rate=0.0
    )
    one, other = saved(first), saved(second)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    configs = [json.loads((d / "config.json").read_text()) for d in (first, second)]
    assert configs[0]["adapter"] == configs[1]["adapter"]
    assert configs[0]["base"]["fingerprint"] == configs[1]["base"]["fingerprint"]
    with pytest.raises(ConfigError, match=r"adapter\.rank=4, and this config says 8"):
        tiny_jobs.run(tmp_path, "third", init_from=str(first), adapter__rank=8)


def test_another_base_is_refused(tmp_path, base):
    place = tmp_path / "here"
    shutil.copytree(base, place / "base")
    adapted = adapt(place, place / "base")
    moved = tmp_path / "there"
    place.rename(moved)
    whole = tiny_jobs.parameters(moved / "adapted")  # they moved together
    shutil.rmtree(moved / "base")
    with pytest.raises(ConfigError, match="which is not there"):
        lm.load(moved / adapted.name)
    found = lm.load(moved / adapted.name, base=base).params
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value)
    fields = dict(train__steps=8, checkpoint__every=8, model__tie_embeddings=False)
    tiny_jobs.run(moved, "base", seed=5, **fields)
    with pytest.raises(ConfigError, match="not the base that these adapters were trained beside"):
        lm.load(moved / adapted.name)


def convert(to, source, target):
    config = defaults(ConvertJob)
    config.update(init_from=str(source), to=to)
    convert_job.run(config, str(target))
    return target


def tuned():
    """The tiny job without a model or a tokenizer of its own."""
    config = get_config()
    config.model, config.tokenizer = defaults(ModelConfig), defaults(TokenizerConfig)
    config.model.compute_dtype = "float32"
    config.data.block_size = 16
    return config


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_out_to_peft_and_back_it_is_the_same_model(tmp_path, kind):
    base = tiny_huggingface.write_directory(tmp_path / "gpt2")
    with mock.patch.object(tiny_jobs, "get_config", tuned):
        adapted = adapt(tmp_path, base, train__steps=4, adapter__kind=kind)
        out = convert("peft", adapted, tmp_path / "peft")
        more = tiny_jobs.run(tmp_path, "more", init_from=str(out), train__steps=2)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["fan_in_fan_out"] and config["use_dora"] == (kind == "dora")
    whole = convert("hf", adapted, tmp_path / "whole")
    run = convert("run", out, tmp_path / "run")
    expected = saved_logits(adapted)
    for place in (out, whole, run):
        np.testing.assert_allclose(saved_logits(place), expected, atol=2e-5, err_msg=str(place))
    assert lm.load(out).generate("a", max_new_tokens=2).startswith("a")
    # Training went on from there; the rank is that of all that a layer there holds.
    assert json.loads((more / "config.json").read_text())["adapter"]["rank"] == 12


def saved_logits(place):
    loaded = lm.load(place)
    config = dataclasses.replace(loaded.skeleton.config, compute_dtype="float32")
    return bind(skeleton(config), loaded.params)(np.array([[1, 2, 3]]))


@pytest.mark.slow
def test_as_a_user_asks_for_them_of_sft_and_of_finetune(tmp_path, base):
    lines = [{"prompt": "Who sat?", "response": "The cat."}, {"prompt": "Why?", "response": "So."}]
    chat, text = tmp_path / "chat.jsonl", tmp_path / "text.txt"
    chat.write_text("".join(json.dumps(line) + "\n" for line in lines * 8))
    text.write_text("the cat sat on the mat\n\n" * 40)
    small = [
        f"--config.data.cache_dir={tmp_path / 'tokens'}",
        f"--config.train.compilation_cache={tmp_path / 'xla'}",
        "--config.data.block_size=96",
        "--config.model.max_length=96",
        "--config.data.batch_size=8",
        "--config.data.validation_fraction=0.25",
        "--config.train.steps=20",
        "--config.train.log_every=10",
        "--config.train.eval_every=0",
        "--config.checkpoint.every=0",
        "--config.optimizer.learning_rate=1e-2",
        "--config.adapter.kind=lora",
        "--config.prompt=",
    ]
    for name, path, more in (
        ("align/sft", chat, ["--config.chat_template=chatml", "--config.adapter.base=nf4"]),
        ("finetune", text, ["--config.adapter.targets=mlp", "--config.adapter.targets=head"]),
    ):
        place = tmp_path / path.stem
        code, out, errors = main(
            f"--config=configs/{name}.py",
            f"--workdir={place}",
            f"--config.init_from={base}",
            f"--config.data.path={path}",
            *small,
            *more,
        )
        assert code == 0, errors
        assert "lora of rank 16" in out and "frozen" in out
        losses = [loss for _, loss in tiny_jobs.losses(place)]
        assert losses[-1] < losses[0]


def test_adapters_need_a_model(tmp_path):
    with pytest.raises(ConfigError, match="a model to adapt"):
        tiny_jobs.run(tmp_path, "none", adapter__kind="lora")

"""Every config that trains, and every strategy: four steps through main.py, as on one device."""

import functools

import numpy as np
import pytest
import tiny_jobs
from test_main import main

from lm.parallel.layout import STRATEGIES

SLOW = pytest.mark.slow

SMALL = {
    "data.num_documents": 60,
    "data.validation_fraction": 0.3,
    "data.block_size": 64,
    "data.batch_size": 16,
    "data.even_batch": False,
    "model.num_layers": 2,
    "model.width": 32,
    "model.num_heads": 4,
    "model.compute_dtype": "float32",
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 1,
    "train.steps": 4,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.eval_batch_size": 16,
    "train.steps_per_dispatch": 1,
    "checkpoint.every": 0,
    "exact_match": 0,
    "prompt": "",
}
BPE = {"tokenizer.vocab_size": 300}
STORIES = {"data.num_documents": 16, "data.packing": "best_fit"}
PAIRS = {"data.num_documents": 400, "data.source_length": 64}
# name → the config's file, and what makes it small, or a model of another kind.
CONFIGS = {
    "story": ("story", STORIES),
    "mixture": ("story", STORIES | {"model.num_experts": 8, "model.activation": "swiglu"}),
    "lstm": ("story", STORIES | {"model.cell": "lstm"}),
    "quickstart": ("quickstart", BPE),
    "shakespeare_char": ("shakespeare_char", {"data.path": "storyworld"}),
    "bert_tiny": ("bert_tiny", BPE),
    "t5_tiny": ("t5_tiny", {"tokenizer.vocab_size": 400, "tokenizer.num_sentinels": 20}),
    "finetune": ("finetune", {"init_from": "quickstart"}),
    "sft": ("align/sft", BPE | {"init_from": "", "chat_template": "plain", "data.block_size": 256}),
    "translate": ("translate", BPE | PAIRS | {"data.long_pairs": "drop"}),
}
PRODUCTS = {
    "context=4": {"mesh.context": 4},
    "context=2,tensor=2": {"mesh.context": 2, "mesh.tensor": 2},
    "zero3,tensor=2": {"strategy": "zero3", "mesh.tensor": 2},
    "zero2,stage=2": {"strategy": "zero2", "mesh.stage": 2},
}
WAYS = {name: {"strategy": name} for name in STRATEGIES} | PRODUCTS
# The story is tried with every strategy. What splits a model may depend on its kind (decoder,
# encoder, encoder-decoder, mixture, cells), what splits rows on their objective: each kind meets
# every axis that can split it, and products of axes, divided among the configs that train it.
KINDS = {
    "story": tuple(STRATEGIES),
    "mixture": ("zero3", "expert", "context=4", "zero2,stage=2"),
    "lstm": ("zero3", "megatron_3d", "context", "expert", "zero2,stage=2"),
    "quickstart": ("zero3,tensor=2", "megatron_3d"),
    "shakespeare_char": ("zero2,stage=2", "context=2,tensor=2"),
    "bert_tiny": ("context", "megatron_3d", "context=2,tensor=2", "expert"),
    "t5_tiny": ("tensor", "context", "zero3,tensor=2", "zero2,stage=2", "expert"),
    "translate": ("megatron_3d", "context=4", "context=2,tensor=2"),
    "finetune": ("megatron_3d", "context"),
    "sft": ("context=4", "zero2,stage=2"),
}
FAST = [("story", way) for way in STRATEGIES]
FAST += [("mixture", "expert"), ("bert_tiny", "context"), ("translate", "context=4")]


def refusal(name, way):
    """The words of the line in which a combination that cannot be must end; None: it trains."""
    if name == "lstm" and ("context" in way or "stage" in way or way == "megatron_3d"):
        return "needs config.model.cell='attention', not 'lstm'"
    if way == "expert" and name != "mixture":
        return "config.mesh.expert=8 must divide config.model.num_experts=0"
    return None


CASES = [
    pytest.param(name, way, marks=() if (name, way) in FAST or refusal(name, way) else SLOW)
    for name in CONFIGS
    for way in KINDS[name]
]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


def train(place, name, way, devices):
    """The run directory, and what `main` returns."""
    file, fields = CONFIGS[name]
    caches = {"data.cache_dir": place / "tokens", "train.compilation_cache": ""}
    fields = SMALL | fields | way | caches
    if fields.get("init_from"):
        on_one_device(place, fields["init_from"])
        fields["init_from"] = place / f"{fields['init_from']}-1"
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    workdir = place / "-".join(map(str, [name, *way.values(), devices]))
    command = [f"--config=configs/{file}.py", f"--workdir={workdir}", *flags]
    return workdir, main(*command, devices=devices)


def losses(workdir):
    """(step, loss) of training and of evaluation."""
    return tiny_jobs.losses(workdir) + tiny_jobs.losses(workdir, "eval_loss")


@functools.cache
def on_one_device(place, name):
    workdir, (code, _, errors) = train(place, name, {}, 1)
    assert code == 0, errors
    return losses(workdir)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_config_trains_with_a_strategy_as_on_one_device(place, name, way):
    workdir, (code, _, errors) = train(place, name, WAYS[way], 8)
    if refused := refusal(name, way):
        assert code == 2 and refused in errors and errors.count("\n") == 1
        return
    assert code == 0, errors
    expected = on_one_device(place, name)
    assert [step for step, _ in expected] == [1, 2, 3, 4, 4]
    assert expected[3][1] < expected[0][1] - 0.01  # they would differ if steps did nothing
    np.testing.assert_allclose(losses(workdir), expected, atol=1e-4, rtol=0)

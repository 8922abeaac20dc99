"""An iteration of PPO planned without its hardware: what lies there, when, and for how long."""

import dataclasses
import json

import pytest
from tpu_compiler import needs_libtpu

from lm.__main__ import run
from lm.config import ConfigError
from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.planning import topology

MODEL = dict(num_layers=2, num_heads=4, width=32, mlp_width=64, vocab_size=64, max_length=64)
SIZES = {
    **{"preset": "", "topology": "cpu:8", "mesh.fsdp": 8, "mesh.tensor": 1},
    **{"data.block_size": 32, "data.batch_size": 16, "learning.epochs": 3},
    **{"rollout.prompts": 32, "rollout.max_new_tokens": 12, "rollout.slots": 8},
    **{f"model.{name}": size for name, size in MODEL.items()},
    **{"model.compute_dtype": "float32", "model.scan_layers": True},
}


def planned(folder, **fields):
    fields = SIZES | {name.replace("__", "."): value for name, value in fields.items()}
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    run(["--config=configs/align/plan_ppo.py", f"--workdir={folder}", *words])
    return json.loads((folder / "plan.json").read_text())["iteration"]


def test_memory_is_what_shapes_say_and_a_phase_takes_its_largest_program(
    tmp_path, capsys, monkeypatch
):
    small = dataclasses.replace(topology._CPU, memory=400_000.0)
    monkeypatch.setattr(topology, "_CPU", small)
    found = planned(tmp_path)
    model = ModelConfig(**MODEL)
    split = sum(4 * spec.size for spec in param_specs(skeleton(model)).values()) / 8
    held, programs = found["held"], found["programs"]
    assert held["policy"] == held["reference"] == held["engine: weights"] == split
    assert held["its optimizer"] == pytest.approx(2 * split, abs=16)  # two moments, a counter
    for name, size in (("critic and its optimizer", 3 * split), ("reward model", split)):
        assert size < held[name] < 1.05 * size  # a head more
    pages = 8 * 4 + 1  # of 16 tokens: 33, and one that others share; nobody's
    assert held["engine: keys and values"] == costs.cache_bytes(model, 16 * pages, "float32")

    times = {name: program["times"] for name, program in programs.items()}
    assert times == {
        **{"prefill": 32 * 1, "decode": 4 * 12},
        **{"log-probabilities": 2, "the reference's": 2, "values": 2, "rewards": 1},
        **{"epoch of the policy": 3, "epoch of the critic": 3},
    }
    each = [program["times"] * program["seconds"] for program in programs.values()]
    assert found["seconds"] == pytest.approx(sum(each))
    update = [programs[f"epoch of the {name}"]["memory"]["total"] for name in ("policy", "critic")]
    others = sum(held.values()) - 3 * split  # of either, its parameters and optimizer are in both
    assert found["phases"]["update"]["memory"] == pytest.approx(max(update) + others, rel=0.02)

    said = capsys.readouterr().out
    phases = found["phases"].values()
    assert [phase["fits"] for phase in phases] == [phase["memory"] <= 4e5 for phase in phases]
    assert not found["fits"] and "does not fit" in said
    for change in ("config.learning.critic=shared", "config.rollout.slots=4", "train.accumulation"):
        assert change in said


def test_an_iteration_is_planned_on_one_mesh(tmp_path):
    with pytest.raises(ConfigError, match=r"leave config.search and config.decode"):
        planned(tmp_path, search__meshes=2)
    with pytest.raises(ConfigError, match=r"config.reward_model='gpt5' is not one of"):
        planned(tmp_path, reward_model="gpt5")
    with pytest.raises(ConfigError, match="batch_size=24 must divide the 32 responses"):
        planned(tmp_path, data__batch_size=24)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_tpu_compiles_every_program_of_an_iteration(critic, tmp_path):
    sizes = {"num_heads": 16, "num_kv_heads": 8, "width": 2048, "mlp_width": 4096}
    found = planned(
        tmp_path,
        **{f"model__{name}": size for name, size in sizes.items()},
        **{"topology": "v5e:2x4", "model__compute_dtype": "bfloat16", "mesh__fsdp": 2},
        **{"mesh__tensor": 4, "learning__critic": critic, "rollout__top_k": 8},
    )
    assert found["fits"] and "support" in found["programs"]
    assert ("values" in found["programs"]) == (critic == "separate")
    assert all(0 < program["mfu"] < 1 for program in found["programs"].values())
    # The engine's weights are in two bytes each, and a table that is looked up in four, or two.
    assert 0.5 <= found["held"]["engine: weights"] / found["held"]["reference"] < 0.6

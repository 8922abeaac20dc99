"""A run planned without its hardware: what is said is right, and mistakes take one line."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tpu_compiler import needs_libtpu

from lm.config import ConfigError
from lm.jobs import plan
from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.objectives import ObjectiveConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import BATCH_AXES, MeshConfig, mesh_sizes
from lm.planning import topology
from lm.planning.decoding import decode_mesh
from lm.planning.programs import _refused, train_program
from lm.planning.search import advice, candidates, meshes, over
from lm.planning.sketch import sketch
from lm.planning.topology import open_topology
from lm.training.workload import Workload

ROOT = Path(__file__).parents[2]
TINY = dict(
    num_layers=2, num_heads=4, width=32, vocab_size=64, max_length=16, compute_dtype="float32",
    scan_layers=True, mlp_width=64,
)  # fmt: skip
MODEL = ModelConfig(**TINY)


def config(**fields):
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.get_config()
    result.topology, result.preset, result.model.remat = "cpu:8", "", "none"
    result.data.block_size, result.data.rows_per_device = 16, 1
    result.model.update(TINY)
    result.update_from_flattened_dict(fields)
    return result


def workload(model=MODEL, rows=16):
    return Workload(model, model.max_length, rows)


def placed(workload, mesh, zero, topology):
    layout = lay_out("", mesh, zero, topology.devices)
    return dataclasses.replace(workload, layout=layout)


def compiled(workload, mesh, zero, topology):
    return train_program(placed(workload, mesh, zero, topology), topology)


# ---- Topologies ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, said",
    [
        ("v9:4x4", "'v9' is not one of v4, v5e, v5p, v6e, tpu7x, cpu"),
        ("v5p", "must give 3 size"),
        ("v5p:4x4", "must give 3 size.* like v5p:4x4x4"),
        ("v5e:4x4x4", "must give 2 size"),
        ("v5p:0x4x4", "must give 3 size"),
        ("v5p:3x4x4", "must be even, or 1.*v5p:4x4x4"),
        ("v5e:32x32", "1,024 chips, more than the 256"),
        ("cpu:100000", "needs 100000 CPU devices and this process has"),
    ],
)
def test_a_topology_that_cannot_be_is_refused_in_one_line(name, said):
    with pytest.raises(ConfigError, match=said) as error:
        open_topology(name)
    assert "\n" not in str(error.value) and f"config.topology='{name}'" in str(error.value)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[tpu\]'"):
        open_topology("v5p:4x4x4")


# ---- Programs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned():
    """The training step of the tiny model over eight devices, as zero3."""
    topology = open_topology("cpu:8")
    mesh = MeshConfig(data=1, fsdp=8)
    return compiled(workload(), mesh, 3, topology), topology, mesh


def test_memory_is_exactly_what_the_shardings_say(planned):
    program, *_ = planned
    shape = {n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in
             param_specs(skeleton(MODEL)).items()}  # fmt: skip
    split = sum(4 * leaf.size for leaf in shape.values()) / 8
    assert program.memory.parameters == split
    assert program.memory.optimizer == pytest.approx(2 * split, abs=16)  # two moments, a counter
    assert program.fits and program.memory.total > 3 * split


@pytest.mark.slow
def test_a_scanned_model_costs_what_it_costs_unrolled(planned):
    program, topology, mesh = planned
    model = ModelConfig(**{**TINY, "scan_layers": False})
    unrolled = compiled(workload(model), mesh, 3, topology)
    # On the same mesh the partitioner may split a product otherwise; FLOPs stay.
    assert program.estimate.flops == pytest.approx(unrolled.estimate.flops, rel=0.02)
    assert program.compiler_flops < 0.8 * unrolled.compiler_flops


def test_flops_are_the_analytic_ones():
    """Of one device; attention on the CPU multiplies all pairs, those that are masked too."""
    program = compiled(workload(), MeshConfig(data=1), 0, open_topology("cpu:1"))
    length = MODEL.max_length
    masked = 12 * MODEL.num_heads * MODEL.head_width * (length - (length + 1) / 2)
    each = costs.training_flops_per_token(MODEL, length) + MODEL.num_layers * masked
    assert program.estimate.flops == pytest.approx(each * 16 * length, rel=0.05)


def test_a_reward_models_step_counts_both_replies_of_a_pair():
    model = dataclasses.replace(MODEL, classifier="sequence", num_labels=1)
    pairs = dataclasses.replace(workload(model), objective=ObjectiveConfig(name="reward"))
    program = compiled(pairs, MeshConfig(data=1), 0, open_topology("cpu:1"))
    assert program.tokens == 2 * 16 * MODEL.max_length
    one = costs.training_flops_per_token(model, MODEL.max_length)
    assert program.model_flops == pytest.approx(program.tokens * one)
    assert program.estimate.flops == pytest.approx(program.model_flops, rel=0.1)


def test_what_preferences_are_compared_with_takes_room():
    kto = dataclasses.replace(workload(), objective=ObjectiveConfig(name="kto"))
    program = compiled(kto, MeshConfig(data=1, fsdp=8), 3, open_topology("cpu:8"))
    split = sum(4 * spec.size for spec in param_specs(skeleton(MODEL)).values()) / 8
    assert program.memory.parameters == split
    batch = 3 * 4 * 2 * 16 * MODEL.max_length / 8  # inputs, targets and weights of two replies
    assert program.memory.arguments - batch == pytest.approx(split, rel=0.01)


def test_the_plan_is_printed_and_written(tmp_path, capsys):
    result = plan.run(config(), str(tmp_path))
    said = capsys.readouterr().out
    for part in ("optimizer state", "fits in", "all-gather", "fsdp", "not measured", "MFU"):
        assert part in said
    assert json.loads((tmp_path / "plan.json").read_text())["training"]["mesh"] == "fsdp=8"
    assert result["training"]["fits"]


@pytest.mark.parametrize("weights", ["compute", "int8"])
def test_decoding_is_planned_by_itself_beside_what_memory_allows(weights, tmp_path, capsys):
    fields = {
        **{"decode.only": True, "decode.batch_sizes": (2, 4), "decode.prompt_length": 8},
        **{"decode.weights": weights, "decode.mesh.tensor": 2, "topology": "cpu:2"},
        **{"data.block_size": 128, "model.max_length": 128},
    }
    result = plan.run(config(**fields), str(tmp_path))
    said = capsys.readouterr().out
    assert "training" not in result and "HBM limit" in said and "optimizer" not in said
    found = result["decoding"]
    assert found["mesh"] == "tensor=2" and [step["rows"] for step in found["steps"]] == [2, 4]
    numbers = costs.parameters(MODEL).total / 2  # nearly all are of matrices that two devices share
    size = numbers * (1.3 if weights == "int8" else 4)  # with a scale for 32 numbers or 64
    for step in found["steps"]:
        page = costs.cache_bytes(MODEL, 64, "float32")
        cache = (1 + 2 * step["rows"]) * page / 2  # two pages a row, and nobody's
        assert step["memory"]["arguments"] == pytest.approx(cache, rel=0.1)
        assert step["memory"]["parameters"] == pytest.approx(size, rel=0.1)
        read = step["memory"]["parameters"] + step["rows"] * page  # half of two pages
        limit = step["rows"] / (read / topology._CPU.bandwidth)
        assert step["tokens_per_second_limit"] == pytest.approx(limit)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("weights", ["compute", "int8"])
def test_a_tpu_reads_weights_and_pages_once(weights, tmp_path):
    """No copies of either: not of layers out of their stack, nor of pages beside the kernel."""
    heads = {"num_heads": 16, "num_kv_heads": 8, "width": 2048, "mlp_width": 8192}
    fields = {
        **{f"model.{name}": size for name, size in heads.items()},
        **{"model.num_layers": 25, "model.vocab_size": 1024, "model.max_length": 2048},
        **{"model.compute_dtype": "bfloat16", "data.block_size": 2048, "topology": "v5e:2x4"},
        **{"decode.only": True, "decode.batch_sizes": (1, 8), "decode.mesh.tensor": 8},
        **{"decode.weights": weights},
    }
    for step in plan.run(config(**fields), str(tmp_path))["decoding"]["steps"]:
        least = step["rows"] / step["tokens_per_second_limit"] * 819e9
        assert least * 0.95 < step["bytes"] < least * 1.1
        assert step["tokens_per_second_estimate"] < step["tokens_per_second_limit"]


def test_key_value_heads_are_repeated_where_devices_are_more():
    topology, model = open_topology("cpu:4"), ModelConfig(**{**TINY, "num_kv_heads": 2})
    assert decode_mesh(model, topology, 4) == MeshConfig(data=2, tensor=2)
    small = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=5e4))
    assert decode_mesh(model, small, 4) == MeshConfig(data=1, tensor=4)


def test_what_does_not_fit_is_reported_with_what_to_change(tmp_path, capsys, monkeypatch):
    small = dataclasses.replace(topology._CPU, memory=400_000.0)
    monkeypatch.setattr(topology, "_CPU", small)
    fields = {"strategy": "data_parallel", "data.rows_per_device": 8}
    result = plan.run(config(**fields), str(tmp_path))
    said = capsys.readouterr().out
    assert not result["training"]["fits"] and "does not fit in 390.6 KiB" in said
    for change in ("config.mesh.fsdp=", "config.zero=3", "config.model.remat=offload"):
        assert change in said


def test_a_program_that_the_compiler_refuses_is_understood():
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (107.71G) exceeds available HBM (95.73G). HLO module: step."
    )
    assert _refused(said) == pytest.approx(107.71 * 2**30)
    assert _refused("INTERNAL: something else") is None


# ---- Meshes ----------------------------------------------------------------------------------


def test_every_mesh_that_is_tried_divides_model_and_batch():
    tried = list(meshes(workload(), 8))
    assert len(tried) == len(set(tried)) > 10
    for mesh in tried:
        sizes = mesh_sizes(mesh, 8)
        assert MODEL.num_heads % sizes["tensor"] == 0 and MODEL.num_layers % sizes["stage"] == 0
        assert 16 % np.prod([sizes[axis] for axis in BATCH_AXES]) == 0


def test_candidates_that_fit_come_first_and_are_of_different_kinds():
    topology = open_topology("cpu:8")
    found = candidates(workload(), topology, 3, 6)
    kinds = [tuple(n > 1 for n in mesh_sizes(c.mesh, 8).values()) for c in found]
    assert len(found) == 6 and len(set(kinds)) >= 4
    seconds = [c.sketch.estimate.seconds for c in found]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_meshes_are_ranked_beside_a_naive_one(tmp_path, capsys):
    result = plan.run(config(**{"search.meshes": 2}), str(tmp_path))
    rows = result["ranking"]
    assert sorted(r["note"] for r in rows) == ["", "", "as configured", "naive"]
    assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    assert "tokens/s/device" in capsys.readouterr().out


def test_zero_moves_more_and_holds_less():
    topology, mesh = open_topology("cpu:8"), MeshConfig(data=1, fsdp=8)
    stages = [sketch(over(workload(), mesh, zero, 8), topology) for zero in range(4)]
    memory = [stage.memory for stage in stages]
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[3]
    assert stages[3].received["zero"] > stages[0].received["zero"]


def test_where_devices_lie_changes_nothing_of_what_is_held_and_moved():
    topology, mesh = open_topology("cpu:8"), MeshConfig(data=2, fsdp=2, tensor=2)
    anywhere = sketch(over(workload(), mesh, 3, 8), topology)
    here = sketch(placed(workload(), mesh, 3, topology), topology)
    assert here.memory == anywhere.memory and here.received == anywhere.received
    assert here.estimate.bytes == anywhere.estimate.bytes


def test_advice_is_ordered_by_what_fits_and_how_fast(planned):
    program, topology, mesh = planned
    found = advice(placed(workload(), MeshConfig(data=8), 0, topology), topology, program)
    assert "config.zero=3" not in {a.change for a in found}  # nothing to split over data
    found = advice(placed(workload(rows=64), mesh, 0, topology), topology, program)
    changes = {a.change for a in found}
    assert {"config.zero=3", "config.model.remat=full", "config.train.accumulation=2"} <= changes
    fitting = [a.seconds for a in found if a.fits]
    assert fitting == sorted(fitting)


# ---- Mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"preset": "llama4_8b"}, "config.preset='llama4_8b' is not a known model"),
        ({"model.vocab_size": 0}, "config.model.vocab_size=0 must be positive"),
        ({"data.batch_size": 12}, "config.data.batch_size=12 must be a multiple of 8"),
        ({"mesh.fsdp": 3}, "needs 3 devices, and there are 8"),
        ({"strategy": "zero4"}, "config.strategy='zero4' is not one of"),
        ({"search.meshes": 2, "data.batch_size": 7}, "no mesh of 8 devices divides a batch of 7"),
        ({"decode.enabled": True, "decode.prompt_length": 99}, "longer than the cache's 16"),
        ({"decode.only": True, "decode.batch_sizes": ()}, "batch_sizes=.* at least one size"),
        ({"decode.only": True, "decode.batch_sizes": (0,)}, r"batch_sizes\[0\]=0 must be"),
        ({"scaling.presets": ("llama9",)}, r"config.scaling.presets\[0\]='llama9' is not one of"),
    ],
)
def test_mistakes_take_one_line(fields, said, tmp_path, monkeypatch):
    program = "lm.jobs.plan.train_program"
    if "decode.enabled" in fields:  # its check comes after the training step
        monkeypatch.setattr("lm.planning.report.show_training", lambda *a: {})
        monkeypatch.setattr(program, lambda *a: None)
    with pytest.raises(ConfigError, match=said) as error:
        plan.run(config(**fields), str(tmp_path))
    assert "\n" not in str(error.value)

"""What a run is said to need is what XLA allocates, and what the report prints."""

import dataclasses
import io

import jax
import pytest
from rich.console import Console

from lm.config import view
from lm.models import ModelConfig, count, param_specs, skeleton
from lm.models.presets import preset
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.parallel.platform import compiling_for
from lm.planning.programs import train_program
from lm.planning.topology import open_topology
from lm.training.memory import expected_memory, kept
from lm.training.report import binary, describe_run
from lm.training.setup import set_up
from lm.training.workload import Workload

DEEP = {"num_layers": 8, "num_heads": 4, "width": 64, "vocab_size": 64, "max_length": 128}


def workload(mesh=None, **fields):
    """Eight rows of a model, on one device or over a mesh of all."""
    config = ModelConfig(**{**DEEP, "compute_dtype": "float32", "scan_layers": True, **fields})
    view(type(config), config)
    layout = lay_out("", mesh or MeshConfig(), -1, None if mesh else jax.devices()[:1])
    return Workload(config, config.max_length, 8, layout=layout)


FAMILIES = {
    "decoder": {},
    "recomputing products": {"remat": "dots"},
    "recomputing all": {"remat": "full"},
    "encoder_decoder": {"architecture": "encoder_decoder", "num_layers": 3},
    "experts": {"num_experts": 4, "activation": "swiglu", "num_layers": 4, "dense_layers": 1},
    "ring": {"num_layers": 4},
    "ring with a bias": {"num_layers": 4, "positions": "relative"},
    "gru": {"cell": "gru", "architecture": "encoder_decoder", "num_layers": 2},
}
LONG_TO_COMPILE = ("experts", "gru")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG_TO_COMPILE)) for n in FAMILIES],
)
def test_expected_memory_is_what_the_compiled_step_takes(name):
    topology = open_topology("cpu:4" if "ring" in name else "cpu:1")
    mesh = MeshConfig(data=1, context=len(topology.devices))
    planned = workload(**FAMILIES[name])
    layout = lay_out("", mesh, -1, topology.devices)
    planned = dataclasses.replace(planned, layout=layout)
    if planned.model.architecture == "encoder_decoder":
        planned = dataclasses.replace(planned, source_length=planned.block_size)
    taken = train_program(planned, topology).memory.total
    assert 0.7 < sum(expected_memory(planned).values()) / taken < 1.5


def test_layer_inputs_that_wait_in_the_hosts_memory_take_none_of_the_devices():
    taken = {remat: kept(workload(remat=remat)) for remat in ("none", "full", "offload")}
    device = {remat: size for remat, (size, _) in taken.items()}
    assert device["none"] > device["full"] > 5 * device["offload"]
    inputs = 4 * 8 * 8 * 128 * 64  # of eight layers, for as many rows
    assert taken["offload"][1] == inputs and taken["full"][1] == 0


def test_where_a_kernel_computes_attention_no_scores_are_kept():
    with compiling_for("tpu"):
        short, long = (
            kept(workload(max_length=length, compute_dtype="bfloat16"))[0] for length in (256, 1024)
        )
    assert long == pytest.approx(4 * short, rel=1e-3)  # as many bytes a token


def test_memory_is_divided_by_the_mesh():
    alone = expected_memory(workload())
    parameters = 4 * count(param_specs(skeleton(workload().model)))
    assert alone["parameters"] == alone["gradients"] == parameters
    counters = alone["optimizer"] - 2 * parameters  # beside two moments
    assert 0 < counters <= 8
    data = expected_memory(workload(MeshConfig(data=8)))
    assert data["parameters"] == alone["parameters"] and data["optimizer"] == alone["optimizer"]
    assert data["activations"] * 8 == pytest.approx(alone["activations"], rel=0.1)
    fsdp = expected_memory(workload(MeshConfig(data=1, fsdp=8)))
    assert fsdp["parameters"] * 8 == alone["parameters"]
    assert (fsdp["optimizer"] - counters) * 8 == 2 * parameters
    tensor = expected_memory(workload(MeshConfig(data=4, tensor=2)))
    assert alone["activations"] / 8 < 1.1 * tensor["activations"] < alone["activations"] / 4
    planned = workload(MeshConfig(data=8))
    away = dataclasses.replace(planned.train, offload_optimizer=True)
    assert expected_memory(dataclasses.replace(planned, train=away))["optimizer"] == counters


# ---- Report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits_its_width_and_cuts_nothing(width):
    config = preset("gpt2_small")
    specs = param_specs(skeleton(config))
    layout = lay_out("", MeshConfig(data=2, fsdp=2, tensor=2), -1)
    text = io.StringIO()
    training = set_up(Workload(config, 1024, 8, layout=layout))
    with layout.active():
        describe_run(Console(file=text, width=width), training)
    printed = text.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    for fact in ("data=2 × fsdp=2 × tensor=2", "124,439,808", "474.7 MiB", "FLOPs a token", *specs):
        assert fact in printed
    row = next(line for line in printed.splitlines() if "attention.query " in line)
    assert "12×768/fsdp×12/tensor×64" in row.replace(" ", "")
    assert ("head_dim" in row) == (width == 120)


def test_bytes_are_written_with_binary_prefixes():
    sizes = (0, 512, 1023, 1024, 1536, 1024**2 - 1, 3 * 1024**3, 2**45)
    written = ["0 B", "512 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "3.0 GiB", "32.0 TiB"]
    assert [binary(size) for size in sizes] == written

"""What a run is said to need is what XLA allocates, and what the report prints."""

import io

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_models
from rich.console import Console

from lm.config import view
from lm.models import ModelConfig, bind, count, param_specs, skeleton
from lm.models.presets import preset
from lm.objectives.cross_entropy import linear_cross_entropy
from lm.parallel.chips import chip_of, peak_flops, published_peak, total_peak_flops
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from lm.parallel.platform import compiling_for
from lm.training.memory import expected_memory, kept_by_row
from lm.training.report import binary, describe_run
from lm.training.setup import set_up
from lm.training.workload import Workload


def abstract_parameters(model):
    specs = param_specs(model)
    return {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "float32", 918),
        ("TPU7x", "bfloat16", 1153.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 156),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GB200", "float8_e4m3fn", 5000),
        ("NVIDIA H200", "float8_e4m3fn", 1978.9),
        ("NVIDIA L4", "float8_e5m2", 242.5),
    ],
)
def test_published_peaks_are_found_by_device_kind(kind, dtype, teraflops):
    assert published_peak(kind, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA A1000", "Tesla T40", ""])
def test_a_chip_that_is_not_listed_has_no_published_peak(kind):
    assert published_peak(kind, "bfloat16") is None


def test_bandwidth_is_that_of_the_chip_and_its_memory():
    kinds = ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA H200", "NVIDIA GH200 480GB")
    assert [chip_of(kind).bandwidth / 1e9 for kind in kinds] == [2039, 1555, 4800, 4000]
    assert published_peak("NVIDIA A100-SXM4-80GB", "float8_e4m3fn") is None  # has no fp8


def test_the_peak_of_a_cpu_is_measured_and_shared_by_its_devices():
    with jax.set_mesh(make_mesh(MeshConfig())):  # as in training
        peak = peak_flops(jax.devices()[0], "float32")
        total = total_peak_flops("float32")
    assert peak.source == "measured"
    assert 1e9 < peak.flops * 8 == total < 1e15


# ---- Memory ----------------------------------------------------------------------------------

DEEP = {"num_layers": 8, "num_heads": 4, "width": 64, "vocab_size": 64, "max_length": 128}


def expected(config, mesh=None, **arguments):
    layout = lay_out("", mesh or MeshConfig(), -1, None if mesh else jax.devices()[:1])
    sizes = {"block_size": config.max_length, "batch_size": 8} | arguments
    return expected_memory(config, param_specs(skeleton(config)), layout, **sizes)


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
    "fields, context",
    [
        pytest.param(
            f,
            4 if "ring" in n else 1,
            id=n,
            marks=[pytest.mark.slow] if n in LONG_TO_COMPILE else [],
        )
        for n, f in FAMILIES.items()
    ],
)
def test_expected_activations_are_what_xla_allocates(fields, context):
    config = ModelConfig(**{**DEEP, **fields}, compute_dtype="float32", scan_layers=True)
    view(type(config), config)
    model = skeleton(config)
    layout = lay_out("", MeshConfig(data=1, context=context), -1, jax.devices()[:context])
    sharding = batch_sharding(layout.mesh)
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=sharding)

    def loss(params, ids):
        bound = bind(model, params)
        texts = (ids, ids) if config.architecture == "encoder_decoder" else (ids,)
        weights = jnp.ones(ids.shape)
        return linear_cross_entropy(bound.hidden(*texts), bound.output_weights(), ids, weights)[0]

    with layout.active():
        lowered = tiny_models.compiled(jax.grad(loss)).lower(abstract_parameters(model), ids)
    allocated = lowered.compile().memory_analysis().temp_size_in_bytes
    memory = expected_memory(config, param_specs(model), layout, block_size=128, batch_size=8)
    assert 0.7 < (memory.activations + memory.logits) / allocated < 1.5


def test_layer_inputs_that_wait_in_the_hosts_memory_take_none_of_the_devices():
    kept = {
        remat: kept_by_row(ModelConfig(**DEEP, remat=remat), 128, 0)
        for remat in ("none", "full", "offload")
    }
    assert kept["none"] > kept["full"] > kept["offload"] == 0


def test_where_a_kernel_computes_attention_no_scores_are_kept():
    config = ModelConfig(**DEEP, compute_dtype="bfloat16")
    with compiling_for("tpu"):
        short, long = (kept_by_row(config, length, 0) for length in (256, 1024))
    assert long == pytest.approx(4 * short, rel=1e-3)  # as many bytes a token


def test_memory_is_divided_by_the_mesh():
    config = ModelConfig(**{**DEEP, "compute_dtype": "float32"})
    specs = param_specs(skeleton(config))
    abstract = abstract_parameters(skeleton(config))
    state = jax.eval_shape(optax.adam(1e-3).init, abstract)
    alone = expected(config, optimizer_state=state)
    assert alone.parameters == alone.gradients == 4 * count(specs)
    assert alone.optimizer == 2 * alone.parameters + 4  # two moments and a step count
    data = expected(config, MeshConfig(data=8), optimizer_state=state)
    assert (data.parameters, data.optimizer) == (alone.parameters, alone.optimizer)
    assert data.activations * 8 == alone.activations
    fsdp = expected(config, MeshConfig(data=1, fsdp=8), optimizer_state=state)
    assert fsdp.parameters * 8 == alone.parameters
    assert (fsdp.optimizer - 4) * 8 == alone.optimizer - 4
    tensor = expected(config, MeshConfig(data=4, tensor=2), optimizer_state=state)
    assert alone.activations / 8 < tensor.activations < alone.activations / 4


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

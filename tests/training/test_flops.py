"""What a run is said to cost is what XLA counts and allocates."""

import io

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_models
from rich.console import Console

from lm.models import ModelConfig, Transformer, bind, count, param_specs
from lm.objectives import ObjectiveConfig, causal
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.training import flops
from lm.training.report import binary, describe_run

WIDE = {"num_layers": 2, "num_heads": 4, "width": 256, "vocab_size": 512, "max_length": 64}
LONG = {
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "width": 128,
    "vocab_size": 64,
    "max_length": 512,
}


def abstract_parameters(model):
    specs = param_specs(model)
    return {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}


@pytest.mark.parametrize("fields", [WIDE, {**LONG, "activation": "swiglu", "positions": "learned"}])
def test_forward_flops_are_those_xla_counts(fields):
    config = ModelConfig(**fields, compute_dtype="float32", scan_layers=False)
    model, T = Transformer(config), config.max_length
    abstract = {
        n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in param_specs(model).items()
    }
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    forward = tiny_models.compiled(lambda p, t: bind(model, p)(t))
    counted = forward.lower(abstract, tokens).compile().cost_analysis()["flops"] / (2 * T)
    # XLA multiplies with all T keys and masks afterwards.
    unseen = config.num_layers * 4 * config.num_heads * config.head_width * (T - (T + 1) / 2)
    expected = flops.forward_flops_per_token(config, T) + unseen
    assert expected == pytest.approx(counted, rel=0.05)
    assert expected < counted  # the rest is norms, softmax and activations


def test_training_flops_of_gpt2_small_by_hand():
    config = ModelConfig(num_layers=12, num_heads=12, width=768, vocab_size=50_257)
    matrices = 12 * 12 * 768**2 + 50_257 * 768
    attention = 12 * 4 * 768 * 1025 / 2
    assert flops.training_flops_per_token(config, 1024) == 3 * (2 * matrices + attention)


def test_tying_the_head_saves_parameters_and_no_flops():
    tied, untied = (ModelConfig(vocab_size=99, tie_embeddings=tie) for tie in (True, False))
    assert flops.forward_flops_per_token(tied, 8) == flops.forward_flops_per_token(untied, 8)


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
    ],
)
def test_published_peaks_are_found_by_device_kind(kind, dtype, teraflops):
    assert flops.published_peak(kind, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA A1000", "Tesla T40", ""])
def test_a_chip_that_is_not_listed_has_no_published_peak(kind):
    assert flops.published_peak(kind, "bfloat16") is None


def test_the_peak_of_a_cpu_is_measured_and_shared_by_its_devices():
    with jax.set_mesh(make_mesh(MeshConfig())):  # as in training
        peak = flops.peak_flops(jax.devices()[0], "float32")
        total = flops.total_peak_flops("float32")
    assert peak.source == "measured"
    assert 1e9 < peak.flops * 8 == total < 1e15


# ---- Memory ----------------------------------------------------------------------------------

DEEP = {"num_layers": 8, "num_heads": 4, "width": 64, "vocab_size": 64, "max_length": 128}


def expected(config, mesh=None, **arguments):
    specs = param_specs(Transformer(config))
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    sizes = {"block_size": config.max_length, "batch_size": 8} | arguments
    return flops.expected_memory(config, specs, mesh, **sizes)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_expected_activations_are_what_xla_allocates(remat):
    config = ModelConfig(**DEEP, compute_dtype="float32", remat=remat, scan_layers=True)
    model = Transformer(config)
    abstract = {
        n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in param_specs(model).items()
    }
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    batch = {"inputs": ids, "targets": ids, "weights": jax.ShapeDtypeStruct((8, 128), jnp.float32)}

    def loss(params, batch):
        return causal(bind(model, params), batch, ObjectiveConfig())[0]

    compiled = tiny_models.compiled(jax.grad(loss)).lower(abstract, batch).compile()
    allocated = compiled.memory_analysis().temp_size_in_bytes
    memory = expected(config)
    assert 0.7 < (memory.activations + memory.logits) / allocated < 1.5


def test_memory_is_divided_by_the_mesh():
    config = ModelConfig(**{**DEEP, "compute_dtype": "float32"})
    specs = param_specs(Transformer(config))
    abstract = abstract_parameters(Transformer(config))
    state = jax.eval_shape(optax.adam(1e-3).init, abstract)
    alone = expected(config, optimizer_state=state)
    assert alone.parameters == alone.gradients == 4 * count(specs)
    assert alone.optimizer == 2 * alone.parameters + 4  # two moments and a step count
    data = expected(config, make_mesh(MeshConfig(data=8)), optimizer_state=state)
    assert (data.parameters, data.optimizer) == (alone.parameters, alone.optimizer)
    assert data.activations * 8 == alone.activations
    fsdp = expected(config, make_mesh(MeshConfig(data=1, fsdp=8)), optimizer_state=state)
    assert fsdp.parameters * 8 == alone.parameters
    assert (fsdp.optimizer - 4) * 8 == alone.optimizer - 4
    tensor = expected(config, make_mesh(MeshConfig(data=4, tensor=2)), optimizer_state=state)
    assert alone.activations / 8 < tensor.activations < alone.activations / 4


# ---- Report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits_its_width_and_cuts_nothing(width):
    config = ModelConfig(
        num_layers=12, num_heads=12, width=768, vocab_size=50_257, max_length=1024,
        positions="learned", norm="layernorm", bias=True,
    )  # fmt: skip
    specs = param_specs(Transformer(config))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    text = io.StringIO()
    with jax.set_mesh(mesh):
        describe_run(
            Console(file=text, width=width),
            model_config=config,
            specs=specs,
            mesh=mesh,
            block_size=1024,
            batch_size=8,
        )
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

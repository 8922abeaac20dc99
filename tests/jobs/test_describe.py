"""A model described: every printed number is right, at any size, for nothing."""

import importlib.util
import re
from pathlib import Path

import jax
import pytest
from test_main import main

from lm.config import ConfigError
from lm.jobs.describe import run
from lm.models import param_specs, skeleton
from lm.models.presets import PRESETS, preset

ROOT = Path(__file__).parents[2]
# One of each kind, small where there is a choice.
KINDS = [
    "transformer_base", "gpt1", "gpt2_small", "bert_base_mlm", "roberta_base", "t5_v1_1_small",
    "bart_base", "palm_540b", "llama3_2_1b", "mistral_7b", "qwen3_0_6b", "gemma2_2b",
    "gemma3_270m", "opt_125m", "pythia_70m", "bloom_560m", "mixtral_8x7b", "deepseek_moe_16b",
]  # fmt: skip


def config(**fields):
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / "describe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.get_config().lock()
    result.update(fields)
    return result


@pytest.fixture
def described(capsys, monkeypatch):
    """Prints on a page of `width`, and returns the lines."""

    def lines(width=None, **fields):
        if width is not None:
            monkeypatch.setattr("lm.jobs.describe.PIPED_WIDTH", width)
        run(config(**fields))
        return capsys.readouterr().out.splitlines()

    return lines


def fact(lines, name):
    """What is said of `name`, in one line."""
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{name} "))
    said = [lines[start][len(name) :]]
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        said.append(line)
    return " ".join(" ".join(said).split())


def test_gpt2_small_is_described_exactly(described):
    lines = described()
    assert lines[0] == "parameters: 124,439,808"
    assert fact(lines, "total").startswith("124,439,808")
    assert fact(lines, "embedding").startswith(f"{(50_257 + 1024) * 768:,} ")
    assert fact(lines, "non-embedding") == f"{12 * 7_087_872 + 1536:,}"
    assert fact(lines, "checkpoint") == (
        "474.7 MiB in float32, 237.4 MiB in bfloat16, 118.7 MiB in int8"
    )
    # By hand in test_costs: 3·(2·123,532,032 + 12·4·768·1025/2), and so on.
    assert fact(lines, "training").startswith("798 MFLOPs a token at 1,024 tokens")
    assert fact(lines, "prefill").startswith("189 MFLOPs a token of 1,024")
    assert fact(lines, "decode").startswith("285 MFLOPs a token, which sees 1,024 tokens")
    assert fact(lines, "KV cache") == (
        "a token: 72.0 KiB in float32, 36.0 KiB in bfloat16 "
        "1,024 tokens: 72.0 MiB in float32, 36.0 MiB in bfloat16"
    )
    assert "adamw 949.4 MiB" in fact(lines, "optimizer")  # two float32 moments
    assert "lion 474.7 MiB" in fact(lines, "optimizer")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_listed_and_nothing_cut(described, name, width):
    specs = param_specs(skeleton(preset(name)))
    lines = described(width, preset=name)
    total = sum(spec.size for spec in specs.values())
    assert lines[0] == f"parameters: {total:,}"
    assert not any("…" in line or len(line) > width for line in lines)
    for parameter, spec in specs.items():
        row = next(line for line in lines if line.startswith(f"{parameter} "))
        assert f" {spec.size:,} " in row
        if width == 120:
            assert " × ".join(map(str, spec.shape)) in row
            assert " ".join(axis or "–" for axis in spec.axes) in row


def test_a_model_of_any_depth_is_described_without_an_array(described):
    arrays = len(jax.live_arrays())
    lines = described(preset="palm_540b", model={"num_layers": 10_000})
    layer = 535_637_864_448 // 118
    assert lines[0] == f"parameters: {10_000 * layer + 256_000 * 18_432 + 18_432:,}"
    assert len(jax.live_arrays()) == arrays


def test_what_differs_from_the_preset_is_said(described):
    changes = {"num_layers": 2, "tie_embeddings": False, "attention_pattern": ("global", "global")}
    lines = described(model=changes)
    said = fact(lines, "changed")
    assert all(f"{name}={value!r}" in said for name, value in changes.items())
    specs = param_specs(skeleton(preset("gpt2_small", **changes)))
    assert lines[0] == f"parameters: {sum(spec.size for spec in specs.values()):,}"
    assert "untied head" in fact(lines, "embedding")


def test_a_mixture_has_active_parameters_and_an_encoder_no_cache(described):
    assert fact(described(preset="mixtral_8x7b"), "active").startswith("12,879,9")
    lines = described(preset="bert_base")
    assert not any(line.startswith(("KV cache", "decode", "prefill", "active")) for line in lines)


def test_local_layers_stop_growing_at_their_window(described):
    lines = described(preset="gemma3_1b", context=2048)
    assert "a token after 512: 8.0 KiB in float32" in fact(lines, "KV cache")  # 4 of 26 layers
    slots = 22 * 512 + 4 * 2048
    assert f"{slots * 2 * 256 * 4 / 2**20:.1f} MiB in float32" in fact(lines, "KV cache")


def test_a_source_has_a_length_of_its_own(described):
    lines = described(preset="t5_small", source_length=256)
    assert "a token of 256 in the source" in fact(lines, "encode")
    assert "512 tokens and 256 of the source: 18.0 MiB in float32" in fact(lines, "KV cache")


@pytest.mark.parametrize("fields", [{"list": True}, {"preset": ""}])
def test_the_presets_are_listed_with_their_sizes(described, fields):
    lines = described(**fields)
    for name, known in PRESETS.items():
        row = next(line for line in lines if line.startswith(f"{name} "))
        assert re.search(r" \d[\d,]+ ", row)
        assert known.source.split(",")[0][:20] in row
    assert re.search(r"^gpt2_small +124,439,808 ", "\n".join(lines), re.MULTILINE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": "gpt2_smal"}, ["config.preset='gpt2_smal'", "did you mean 'gpt2_small'"]),
        ({"model": {"width": 770}}, ["config.model.width=770", "config.model.num_heads=12"]),
        ({"model": {"norm": "layer"}}, ["config.model.norm='layer'", "layernorm"]),
        ({"model": {"attention_pattern": "locl"}}, ["config.model.attention_pattern[0]='locl'"]),
        ({"model": {"vocab_size": 0}}, ["config.model.vocab_size=0", "positive"]),
        ({"context": 2000}, ["config.context=2000", "config.model.max_length=1024"]),
        ({"context": -1}, ["config.context=-1"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_field(fields, words):
    with pytest.raises(ConfigError) as refused:
        run(config(**fields))
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.slow
def test_the_command_prints_the_parameters_first():
    arguments = ["--config=configs/describe.py", "--config.preset=gpt2_medium"]
    arguments += ["--config.model.num_layers=1", "--config.model.attention_pattern=('global',)"]
    code, output, errors = main(*arguments)
    layer = 12 * 1024**2 + 13 * 1024
    parameters = layer + (50_257 + 1024 + 2) * 1024
    assert output.splitlines()[0] == f"parameters: {parameters:,}"
    assert (code, errors) == (0, "")

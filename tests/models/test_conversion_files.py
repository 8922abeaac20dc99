"""Hugging Face directories on disk: read onto any mesh, written back, and every way to be wrong."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_huggingface as tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lm.config import ConfigError
from lm.models import ModelConfig
from lm.models.huggingface import from_tensors, to_tensors
from lm.models.huggingface.families import FAMILIES, family_for
from lm.models.huggingface.family import NameMap
from lm.models.huggingface.read import download, is_checkpoint, is_hub_name, open_checkpoint
from lm.models.huggingface.write import save_pretrained
from lm.models.presets import PRESETS, preset
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import parameter_shardings

BLOCK = "transformer.h.1."


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_directory(tmp_path_factory.mktemp("hf") / "gpt2")


def written(path):
    """All tensors below a directory, as the safetensors library reads them."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        assert one[name].tobytes() == other[name].tobytes(), name


def save(path, params, **options):
    family, config = FAMILIES["gpt2"], FAMILIES["gpt2"].read_config(tiny.CONFIG)
    return save_pretrained(path, family, config, params, **options)


# ---- Reading


def test_a_directory_says_what_its_model_is(directory):
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    assert is_checkpoint(directory) and checkpoint.family.model_type == "gpt2"
    assert (config.num_layers, config.width, config.vocab_size) == (3, 32, 261)
    assert checkpoint.dtypes == {"float32": sum(t.size for t in tiny.tensors().values())}


def test_parameters_are_the_tensors_rearranged(directory):
    params = open_checkpoint(directory).parameters()
    their = tiny.tensors()
    np.testing.assert_array_equal(params["embedding.tokens"], their["transformer.wte.weight"])
    fused = their[BLOCK + "attn.c_attn.weight"]
    key = np.asarray(params["blocks.attention.key"])[1]
    np.testing.assert_array_equal(key.reshape(32, 32), fused[:, 32:64])


def test_reading_a_file_is_rearranging_it_in_memory(directory):
    checkpoint = open_checkpoint(directory)
    assert_same(
        {n: np.asarray(p) for n, p in checkpoint.parameters().items()},
        from_tensors(checkpoint.family, checkpoint.config, tiny.tensors()),
    )


@pytest.mark.parametrize(
    "mesh, part",
    [({"fsdp": 4, "tensor": 2}, (3, 8, 64)), ({"stage": 3}, (1, 32, 128))],
)
def test_several_devices_hold_the_parameters_of_one(directory, mesh, part):
    devices = jax.devices()[: math.prod(mesh.values())]
    mesh = make_mesh(MeshConfig(data=1, **mesh), devices)
    checkpoint = open_checkpoint(directory)
    shardings = parameter_shardings(checkpoint.names.specs, mesh)
    spread, whole = checkpoint.parameters(shardings), checkpoint.parameters()
    for name, array in spread.items():
        assert array.sharding == shardings[name]
        np.testing.assert_array_equal(array, whole[name], name)
    assert {s.data.shape for s in spread["blocks.mlp.up"].addressable_shards} == {part}


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_dtype_is_read_as_every_other(tmp_path, stored, wanted):
    weights = {n: t.astype(stored) for n, t in tiny.tensors().items()}
    path = tiny.write_directory(tmp_path / "hf", weights, tokenizer=False)
    found = open_checkpoint(path).parameters(dtype=wanted)["embedding.tokens"]
    expected = weights["transformer.wte.weight"].astype(wanted)
    assert found.dtype == wanted and np.asarray(found).tobytes() == expected.tobytes()


def test_the_prefix_of_the_base_model_may_be_missing(tmp_path, directory):
    bare = {n.removeprefix("transformer."): t for n, t in tiny.tensors().items()}
    path = tiny.write_directory(tmp_path / "hf", bare, architectures=["GPT2Model"])
    found, expected = (open_checkpoint(p).parameters() for p in (path, directory))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_masks_are_left_out_and_copies_compared(tmp_path):
    weights = tiny.tensors()
    weights["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.uint8)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    path = tiny.write_directory(tmp_path / "hf", weights)
    checkpoint = open_checkpoint(path)
    assert checkpoint.ignored == ("h.0.attn.bias",) and len(checkpoint.parameters()) == 20
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight should be a copy"):
        open_checkpoint(path).parameters()


def test_a_copy_stands_in_for_the_tensor_it_is_tied_to(tmp_path):
    weights = tiny.tensors()
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    path = tiny.write_directory(tmp_path / "hf", weights)
    found = open_checkpoint(path).parameters()["embedding.tokens"]
    np.testing.assert_array_equal(found, weights["lm_head.weight"])


def test_what_the_reader_names_is_left_out_and_listed(tmp_path):
    weights = {**tiny.tensors(), "cls.extra.weight": np.ones(3, np.float32)}
    path = tiny.write_directory(tmp_path / "hf", weights, my_field=1)
    with pytest.raises(ConfigError, match="my_field=1"):
        open_checkpoint(path)
    with pytest.raises(ConfigError, match=r"cls\.extra\.weight is unknown"):
        open_checkpoint(path, ["^my_field$"])
    assert open_checkpoint(path, ["^my_field$", "cls"]).ignored == ("cls.extra.weight",)
    with pytest.raises(ConfigError, match="not a regular expression"):
        open_checkpoint(path, ["("])


# ---- Bad input


def tensor(name, value):
    """A directory with another tensor of this name; with None, without it."""

    def write(path):
        weights = {**tiny.tensors(), name: value}
        return tiny.write_directory(path, {n: t for n, t in weights.items() if t is not None})

    return write


def fields(**changed):
    return lambda path: tiny.write_directory(path, **changed)


def damaged(change, name="model.safetensors"):
    """A directory of which a file's bytes went through `change`; None takes it away."""

    def write(path):
        file = tiny.write_directory(path) / name
        data = change(file.read_bytes())
        file.unlink() if data is None else file.write_bytes(data)
        return path

    return write


def header(change):
    def edit(data):
        length = int.from_bytes(data[:8], "little")
        described = json.loads(data[8 : 8 + length])
        change(described["transformer.wte.weight"])
        text = json.dumps(described).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return damaged(edit)


def without_a_shard(path):
    tiny.write_directory(path)
    files = save(path / "new", open_checkpoint(path).parameters(), shard_bytes=100_000)
    assert len(files) > 1
    files[1].unlink()
    return path / "new"


def pickled(path):
    (tiny.write_directory(path) / "model.safetensors").rename(path / "pytorch_model.bin")
    return path


def of_dtype(dtype):
    return tensor(BLOCK + "ln_1.bias", np.zeros(32, dtype))


WRONG = {
    "missing": (tensor(BLOCK + "ln_1.bias", None), "transformer.h.1.ln_1.bias is missing"),
    "unknown": (tensor("h.7.ln_1.bias", np.ones(32)), "h.7.ln_1.bias is unknown"),
    "shape": (
        tensor(BLOCK + "ln_1.bias", np.ones(31, np.float32)),
        "transformer.h.1.ln_1.bias is [31], and the config says [32]",
    ),
    "another size": (fields(n_embd=64), "is [261, 32], and the config says [261, 64]"),
    "fewer layers": (fields(n_layer=2), "transformer.h.2.attn.c_attn.bias"),
    "more layers": (
        fields(n_layer=4),
        "ln_1.weight, transformer.h.3.ln_1.bias, transformer.h.3.attn.c_attn.weight (and 9 more) "
        "are missing",
    ),
    "int8": (of_dtype(np.int8), "transformer.h.1.ln_1.bias has dtype I8"),
    "fp8": (of_dtype(ml_dtypes.float8_e4m3fn), "has dtype F8_E4M3"),
    "double": (of_dtype(np.float64), "has dtype F64"),
    "cut off": (damaged(lambda data: data[:-100]), "is truncated"),
    "cut in the header": (damaged(lambda data: data[:100]), "is truncated"),
    "cut to nothing": (damaged(lambda data: b""), "is truncated"),
    "too long": (damaged(lambda data: data + b"12"), "has 2 bytes at its end"),
    "not json": (damaged(lambda data: data[:8] + b"!" + data[9:]), "its header is damaged"),
    "no offsets": (header(lambda entry: entry.pop("data_offsets")), "has a damaged header"),
    "wrong offsets": (
        header(lambda entry: entry["shape"].append(2)),
        "has a damaged header: transformer.wte.weight",
    ),
    "a pointer": (
        damaged(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "no shard": (without_a_shard, "names model-00002-of-00003.safetensors, which is not there"),
    "pickled": (pickled, "has its weights in pytorch_model.bin"),
    "no weights": (damaged(lambda data: None), "has no weights"),
    "bad config": (damaged(lambda data: b"{", "config.json"), "config.json is damaged"),
    "unknown type": (fields(model_type="gpt22"), "did you mean 'gpt2'"),
    "unknown class": (
        fields(architectures=["GPT2DoubleHeadsModel"]),
        "architectures=['GPT2DoubleHeadsModel'] is not one of",
    ),
    "field": (fields(n_layers=3), "n_layers=3, a field that is not known"),
    "value": (fields(is_decoder=True), "is_decoder=True is not supported"),
    "type": (fields(n_layer="3"), "n_layer='3' must be int"),
    "activation": (fields(activation_function="mish"), "activation_function='mish'"),
    "impossible": (fields(n_head=5), "n_embd=32 is not divisible by n_head=5"),
    "quantized": (fields(quantization_config={"bits": 4}), "quantization_config"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_that_names_it(tmp_path, case):
    write, words = WRONG[case]
    path = write(tmp_path / "hf")
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


def test_numbers_beyond_float16_are_not_made_infinite(tmp_path):
    weights = tiny.tensors()
    weights["transformer.wte.weight"][3, 4] = 1e6
    checkpoint = open_checkpoint(tiny.write_directory(tmp_path / "hf", weights))
    with pytest.raises(ConfigError, match=r"1e\+06, beyond float16"):
        checkpoint.parameters(dtype="float16")
    params = checkpoint.parameters(dtype="bfloat16")
    with pytest.raises(ConfigError, match="beyond float16"):
        save(tmp_path / "out", params, dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


# ---- Writing


def test_written_tensors_are_those_that_were_read(tmp_path, directory):
    params = open_checkpoint(directory).parameters()
    files = save(tmp_path / "out", params, fields={"eos_token_id": 7}, files={"a.txt": b"a"})
    assert files == [tmp_path / "out" / "model.safetensors"]
    assert_same(written(tmp_path / "out"), tiny.tensors())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert config["eos_token_id"] == 7 and config["dtype"] == config["torch_dtype"] == "float32"
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"a"
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(directory).config
    with safe_open(files[0], "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_with_their_index_hold_the_same(tmp_path, directory):
    params = open_checkpoint(directory).parameters()
    files = save(tmp_path / "out", params, shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tiny.tensors().values())
    assert all(file.stat().st_size < 70_000 for file in files)
    assert_same(written(tmp_path / "out"), tiny.tensors())
    again = open_checkpoint(tmp_path / "out").parameters()
    assert all(np.array_equal(again[name], params[name]) for name in params)


def test_what_chooses_experts_is_not_rounded(tmp_path):
    golden = pathlib.Path(__file__).parents[1] / "golden" / "deepseek_v3"
    checkpoint = open_checkpoint(golden)
    params = {n: p * 1.001 for n, p in checkpoint.parameters().items()}  # beyond bfloat16's digits
    model = checkpoint.family, checkpoint.config, params
    tensors = load_file(*save_pretrained(tmp_path / "out", *model, dtype="bfloat16"))
    exact = {n: t for n, t in to_tensors(*model).items() if ".mlp.gate." in n}
    assert any(n.endswith(".e_score_correction_bias") for n in exact)
    assert_same({n: tensors.pop(n) for n in exact}, exact)
    assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    router = open_checkpoint(tmp_path / "out").parameters()["blocks.mlp.router"]
    np.testing.assert_array_equal(router, params["blocks.mlp.router"])


def test_bfloat16_goes_through_float32_unchanged(tmp_path):
    weights = {n: t.astype(ml_dtypes.bfloat16) for n, t in tiny.tensors().items()}
    path = tiny.write_directory(tmp_path / "hf", weights)
    save(tmp_path / "out", open_checkpoint(path).parameters(), dtype="bfloat16")
    assert_same(written(tmp_path / "out"), weights)


def test_parameters_spread_over_devices_are_written_whole(tmp_path, directory):
    checkpoint = open_checkpoint(directory)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    save(
        tmp_path / "out",
        checkpoint.parameters(parameter_shardings(checkpoint.names.specs, mesh)),
    )
    assert_same(written(tmp_path / "out"), tiny.tensors())


def test_what_is_there_is_not_overwritten(tmp_path, directory):
    with pytest.raises(ConfigError, match="is not empty"):
        save(directory, open_checkpoint(directory).parameters())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a directory"):
        save(tmp_path / "file" / "out", {})


# ---- Families


def small(config):
    """A tiny model of the same kind, with unequal sizes."""
    grouped = config.kv_heads < config.num_heads
    narrow = {
        "num_heads": 6,
        "num_kv_heads": (2 if grouped else None),
        "width": 48 if config.head_dim is None else 18,
        "head_dim": None if config.head_dim is None else 4,
        "num_layers": 2 * len(config.attention_pattern),
        "mlp_width": 28 if config.mlp_width else None,
        "num_experts": 3 if config.num_experts else 0,
        "experts_per_token": min(config.experts_per_token, 2),
        "dense_layers": min(config.dense_layers, 1),
        "router_groups": 1,
        "router_group_limit": 1,
        "kv_rank": 5 if config.kv_rank else 0,
        "query_rank": 7 if config.query_rank else 0,
        "shared_key_dim": 2 if config.kv_rank else 0,
        "value_dim": 3 if config.kv_rank else config.value_dim,
        "vocab_size": 37,
        "max_length": 16,
        "window": 4 if config.window else 0,
    }
    return dataclasses.replace(config, **narrow)


def says(family, config):
    try:
        return bool(family.write_config(config))
    except ConfigError:
        return False


BIASED = {"qkv_bias": True, "attention_bias": True}
VARIANTS = [
    ("llama", "llama2_70b", {"bias": True, **BIASED}),
    ("qwen2", "qwen2_5_0_5b", {"attention_pattern": ("global", "local"), "window": 3}),
    ("qwen3", "qwen3_0_6b", BIASED),
    ("mixtral", "mixtral_8x7b", {"expert_width": 5, "mlp_width": 7}),
]


@pytest.mark.parametrize(
    "model_type, name, fields",
    [
        *(
            (kind, next(n for n in PRESETS if says(family, preset(n))), {})
            for kind, family in FAMILIES.items()
        ),
        *VARIANTS,
    ],
)
def test_rules_are_inverse_and_make_every_parameter_once(model_type, name, fields):
    family = FAMILIES[model_type]
    config = dataclasses.replace(small(preset(name)), **fields)
    assert family.write_config(config)  # raises if anything would be lost
    names = NameMap(family, config)
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in names.specs.items()}
    tensors = to_tensors(family, config, params)
    assert {n: t.shape for n, t in tensors.items()} == names.shapes
    assert_same(from_tensors(family, config, tensors), params)


def test_a_model_of_no_family_is_told_what_would_have_to_differ():
    config = ModelConfig(vocab_size=64, max_length=16, activation="gelu_tanh")
    with pytest.raises(ConfigError, match=r"nearest, 'falcon', has model\.norm='layernorm', not"):
        family_for(config)
    with pytest.raises(ConfigError, match="no Hugging Face family"):
        family_for(ModelConfig(cell="lstm", vocab_size=64, max_length=16))


# ---- The hub


def test_names_of_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_name("gpt2") and is_hub_name("meta-llama/Llama-3.2-1B")
    assert not is_hub_name("runs/gtp2") and not is_hub_name("./gpt2") and not is_hub_name("/a")
    assert not is_hub_name("a/b/c") and not is_hub_name("../gpt2")


def test_only_what_is_needed_is_downloaded(monkeypatch, directory):
    import huggingface_hub

    def snapshot(name, allow_patterns):
        assert name == "organisation/model" and "*.bin" not in allow_patterns
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download("organisation/model") == pathlib.Path(directory)

    def fail(name, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match="no model of that name came from the Hugging Face hub"):
        download("gpt2")

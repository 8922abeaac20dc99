"""The convert job: there and back, and other jobs on what it makes or on the source itself."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_huggingface as tiny
import tiny_jobs
from safetensors.numpy import load_file
from test_main import main
from tiny_run import write_tiny_run

import lm
from lm.command import load_config
from lm.config import ConfigError, defaults
from lm.jobs import convert, generate
from lm.jobs.convert import ConvertJob
from lm.jobs.generate import GenerateJob
from lm.models import bind, skeleton
from lm.models.huggingface.read import open_checkpoint
from lm.tokenizers.huggingface import byte_values


def run(source, target, **fields):
    config = defaults(ConvertJob)
    config.init_from = str(source)
    config.update_from_flattened_dict({n.replace("__", "."): v for n, v in fields.items()})
    return convert.run(config, str(target))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_directory(tmp_path_factory.mktemp("hf") / "gpt2")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("runs") / "gpt2"
    run(source, target)
    return target


def tensors(path):
    return load_file(path / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(one[n].dtype == other[n].dtype for n in one)
    assert all(one[n].tobytes() == other[n].tobytes() for n in one)


def greedy(opened):
    return opened.generate("The cat", max_new_tokens=6, temperature=0)


def test_there_and_back_is_the_same_to_the_last_bit(converted, source, tmp_path, capsys):
    summary = run(converted, tmp_path / "hf", to="hf")
    assert summary["family"] == "gpt2" and summary["parameters"] == 47_296
    assert "47,296" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "hf"), tiny.tensors())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    kept = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "eos_token_id")
    assert {name: config[name] for name in kept} == {name: tiny.CONFIG[name] for name in kept}


def test_a_run_and_its_source_write_alike(converted, source):
    from_run, from_source = lm.load(converted), lm.load(source)
    assert from_run.step == from_source.step == 0
    tokens = [from_run.encode("A cat.")]
    np.testing.assert_array_equal(from_run.model(tokens), from_source.model(tokens))
    assert greedy(from_run) == greedy(from_source)
    with pytest.raises(ConfigError, match="single step 0"):
        lm.load(source, step=3)


def test_bfloat16_is_kept_in_half_the_space_and_a_mesh_changes_nothing(tmp_path):
    weights = {n: t.astype("bfloat16") for n, t in tiny.tensors().items()}
    tiny.write_directory(tmp_path / "a", weights)
    half = {"dtype": "bfloat16", "mesh__data": 1}
    done = run(tmp_path / "a", tmp_path / "run", **half, mesh__fsdp=4, mesh__tensor=2)
    assert done["bytes"] == 2 * 47_296
    run(tmp_path / "run", tmp_path / "b", to="hf", **half, mesh__fsdp=2, mesh__tensor=4)
    assert_same(tensors(tmp_path / "b"), weights)


def test_roles_of_ids_and_settings_of_generation_survive(tmp_path):
    path = tiny.write_directory(tmp_path / "a", bos_token_id=3)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 256]}))
    assert lm.load(path).framing.end_of_text == (5, 256)
    run(path, tmp_path / "run")
    assert lm.load(tmp_path / "run").framing.end_of_text == (5, 256)
    run(tmp_path / "run", tmp_path / "b", to="hf")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["bos_token_id"] == 3
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [5, 256]}


def test_texts_are_framed_as_the_tokenizer_frames_them(tmp_path):
    path = tiny.write_directory(tmp_path / "hf")
    described = json.loads((path / "tokenizer.json").read_text())
    end = "<|endoftext|>"
    text, special = {"Sequence": {"id": "A", "type_id": 0}}, {"id": end, "type_id": 0}
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, text],
        "pair": [text, text],
        "special_tokens": {end: {"id": end, "ids": [256], "tokens": [end]}},
    }
    assert lm.load(path).encode("a") == [97]
    (path / "tokenizer.json").write_text(json.dumps(described))
    assert lm.load(path).encode("a") == [256, 97]


NAMES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 256, 257, … after the bytes
ENDS = {"bos_token": "</s>", "eos_token": "</s>"}
# tokenizer_config.json, special_tokens_map.json → what stands before and after the bytes of a text.
FRAMED = {
    "roberta": ({"tokenizer_class": "RobertaTokenizer"}, {}, [256], [258]),
    "bart": ({"tokenizer_class": "BartTokenizerFast"}, {}, [256], [258]),
    "own names": (
        {"tokenizer_class": "RobertaTokenizer", "cls_token": "<unk>"},
        {"cls_token": {"content": "<mask>"}, "sep_token": "<pad>"},
        [260],
        [257],
    ),
    "opt": ({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, ENDS, [258], []),
    "both": ({"add_bos_token": True, "add_eos_token": True, **ENDS}, {}, [258], [258]),
    "gpt2": ({}, {}, [], []),
    "a space": ({"add_prefix_space": True}, {}, [32], []),
}


@pytest.mark.parametrize("case", FRAMED)
def test_a_vocabulary_alone_is_framed_as_its_class_does(case, tmp_path):
    config, mapped, before, after = FRAMED[case]
    path = tiny.write_directory(tmp_path / "hf", tokenizer=False)
    vocabulary = byte_values() | {name: 256 + i for i, name in enumerate(NAMES)}
    files = {"vocab": vocabulary, "tokenizer_config": config, "special_tokens_map": mapped}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    (path / "merges.txt").write_text("#version: 0.2\n")
    assert lm.load(path).encode("Aé") == [*before, *"Aé".encode(), *after]


def test_a_model_trained_here_goes_out_as_the_family_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    gated = {"num_kv_heads": 1, "mlp_width": 24, "activation": "swiglu"}
    tokenizer = write_tiny_run(tmp_path / "run", num_layers=2, **gated)
    assert run(tmp_path / "run", tmp_path / "hf", to="hf")["family"] == "llama"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == 256 and config["tie_word_embeddings"] is True
    back = open_checkpoint(tmp_path / "hf").parameters()
    for name, array in lm.load(tmp_path / "run").params.items():
        np.testing.assert_array_equal(array, back[name], name)
    assert lm.load(tmp_path / "hf").tokenizer.encode("é") == tokenizer.encode("é")
    # Read as it was in training: after begin-of-text.
    assert lm.load(tmp_path / "hf").encode("é") == lm.load(tmp_path / "run").encode("é")
    assert lm.load(tmp_path / "hf").encode("é")[0] == tokenizer.bos_id


def test_without_a_tokenizer_there_are_ids_only(tmp_path):
    path = tiny.write_directory(tmp_path / "hf", tokenizer=False)
    run(path, tmp_path / "run")
    for opened in (lm.load(path), lm.load(tmp_path / "run")):
        assert opened.tokenizer is None and opened.model([[1, 2]]).shape == (1, 2, 261)
        with pytest.raises(ConfigError, match="has no tokenizer"):
            opened.encode("a")
    assert run(tmp_path / "run", tmp_path / "back", to="hf")["parameters"] == 47_296
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        lm.load(tmp_path / "run")


def test_what_was_ignored_is_said(tmp_path, capsys):
    odd = "cls.\x1b[2J[red]x"
    weights = {**tiny.tensors(), "cls.extra": np.ones(2, np.float32), odd: np.ones(2, np.float32)}
    path = tiny.write_directory(tmp_path / "hf", weights)
    assert set(run(path, tmp_path / "run", ignore="cls")["ignored"]) == {"cls.extra", odd}
    printed = capsys.readouterr().out
    assert "cls.extra" in printed and r"cls.\x1b[2J[red]x" in printed and "\x1b" not in printed
    (path / "config.json").write_text(json.dumps({**tiny.CONFIG, "attn_factor": 2}))
    with pytest.raises(ConfigError, match=r"attn_factor=2, .* config.ignore=attn_factor says"):
        lm.load(path, ignore="cls")
    fields = {"init_from": str(path), "ignore": ("cls", "attn_factor"), "max_new_tokens": 1}
    config = defaults(GenerateJob)
    config.update_from_flattened_dict(fields)
    assert len(generate.run(config, "")) == 1
    steps = {"train__steps": 2, "checkpoint__every": 0, **GPT2}
    ignore = ("cls", "attn_factor")
    trained = tiny_jobs.run(tmp_path, "t", init_from=str(path), ignore=ignore, **steps)
    assert lm.load(trained).step == 2


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"init_from": ""}, "config.init_from='' must name"),
        ({"init_from": "./nowhere"}, "does not exist"),
        ({"to": "huggingface"}, "config.to='huggingface' is not one of 'run', 'hf'"),
        ({"to": "hf"}, "is a Hugging Face directory already"),
        ({"dtype": "int8"}, "config.dtype='int8'"),
        ({"shard_gigabytes": 0.0}, "config.shard_gigabytes=0.0 must be above 0"),
        ({"mesh__fsdp": 3}, "config.mesh"),
    ],
)
def test_mistakes_are_named(source, tmp_path, fields, words):
    with pytest.raises(ConfigError, match=words):
        run(source, tmp_path / "out", **fields)
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_converted_to_a_run_and_nothing_is_overwritten(source, converted, tmp_path):
    for origin, target, words in (
        (converted, tmp_path / "out", "is a run directory already"),
        (source, converted, "is not empty"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(origin, target)


def test_a_failed_conversion_leaves_nothing(tmp_path):
    weights = tiny.tensors()
    weights["transformer.ln_f.bias"][0] = 1e9
    path = tiny.write_directory(tmp_path / "hf", weights)
    with pytest.raises(ConfigError, match="beyond float16"):
        run(path, tmp_path / "run", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_may_not_have_more_ids_than_the_embedding(tmp_path):
    weights = tiny.tensors()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:200]
    path = tiny.write_directory(tmp_path / "hf", weights, vocab_size=200)
    for open_it in (lm.load, lambda p: run(p, tmp_path / "run")):
        with pytest.raises(ConfigError, match="257 ids and its embedding 200 rows"):
            open_it(path)


@pytest.mark.parametrize(
    "rows, added, end, fields",
    [
        (256, {}, 256, {}),  # neither has an end of text
        (256, {"[PAD]": 256}, 257, {}),
        (257, {"<|end|>": 256, "[PAD]": 257}, 256, {"eos_token_id": 256}),
        (257, {"</s>": 256, "[PAD]": 257}, 256, {"eos_token_id": [7, 256]}),
    ],
)
def test_special_tokens_may_lie_beyond_the_embedding(rows, added, end, fields, tmp_path):
    weights = tiny.tensors()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:rows]
    path = tiny.write_directory(tmp_path / "hf", weights, False, vocab_size=rows, **fields)
    hf = {**tiny.CONFIG, "vocab_size": rows, "bos_token_id": None, "eos_token_id": None, **fields}
    (path / "config.json").write_text(json.dumps(hf))
    (path / "vocab.json").write_text(json.dumps(byte_values()))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "added_tokens.json").write_text(json.dumps(added))
    opened = lm.load(path)
    assert opened.tokenizer.eos_id == end
    assert opened.encode("é") == [0xC3, 0xA9]
    assert greedy(opened).startswith("The cat")
    run(path, tmp_path / "run")
    assert greedy(lm.load(tmp_path / "run")) == greedy(opened)


GPT2 = {
    "tokenizer__kind": "bpe",  # not set: the one of the source is kept
    "model__num_layers": 3,
    "model__num_heads": 4,
    "model__width": 32,
    "model__mlp_width": 128,
    "model__vocab_size": 261,
    "model__max_length": 24,
    "model__positions": "learned",
    "model__norm": "layernorm",
    "model__bias": True,
    "data__block_size": 24,
}


def test_fine_tuning_starts_from_either(converted, source, tmp_path):
    steps = {"train__steps": 2, "train__log_every": 2, "train__steps_per_dispatch": 1, **GPT2}
    trained = [
        tiny_jobs.run(tmp_path, name, init_from=str(origin), **steps)
        for name, origin in (("a", converted), ("b", source))
    ]
    tiny_jobs.assert_same_run(*trained)
    moved = tiny_jobs.parameters(trained[0])["final_norm.scale"]
    start = tiny.tensors()["transformer.ln_f.weight"]
    assert 0 < np.abs(moved - start).max() < 0.05
    assert run(trained[0], tmp_path / "hf", to="hf")["family"] == "gpt2"


def test_the_command_line(source, tmp_path):
    def convert(place, *arguments):
        return main("--config=convert", f"--workdir={tmp_path / place}", *arguments)

    here = f"--config.init_from={source}"
    code, output, errors = convert("run", here, "--config.dtype=bfloat16")
    assert code == 0 and "GPT2LMHeadModel" in output, errors
    code, _, errors = convert("run", here)
    assert code == 2 and errors.count("\n") == 1
    code, _, errors = convert("x", here, "--config.ignore=(")
    assert code == 2 and "not a regular expression" in errors


def trained_configs():
    for path in sorted((tiny_jobs.REPOSITORY / "configs").glob("*.py")):
        config = load_config(path)
        if config.get("job") == "train" and not config.init_from:
            # One that converts, and one that says why not, are enough for every day.
            slow = path.stem not in ("story", "bert_tiny")
            yield pytest.param(path.stem, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("name", [*trained_configs()])
def test_a_shipped_config_converts_or_says_at_its_start_that_it_will_not(name, tmp_path):
    fields = {
        "data.num_documents": 1 if name == "story" else 400,
        "data.cache_dir": tmp_path / "tokens",
        "train.steps": 2,
        "train.eval_every": 0,
        "train.compilation_cache": "",
        "optimizer.warmup_steps": 1,
        "exact_match": 0,
        "prompt": "",
    }
    if name == "shakespeare_char":
        (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 400)
        fields["data.path"] = tmp_path / "text.txt"
    words = [f"--config.{field}={value}" for field, value in fields.items()]
    code, output, errors = main(f"--config={name}", f"--workdir={tmp_path / 'run'}", *words)
    assert code == 0, errors
    said = "will not convert to Hugging Face: " in output.partition("parameter ")[0]
    assert said == (name in ("bert_tiny", "translate"))
    out = f"--workdir={tmp_path / 'hf'}"
    code, _, errors = main(
        "--config=convert", f"--config.init_from={tmp_path / 'run'}", "--config.to=hf", out
    )
    assert (code == 0) == (not said), errors
    if not said:
        ours, theirs = (logits(lm.load(tmp_path / name)) for name in ("run", "hf"))
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def logits(run):
    """In float32, of a text or of a pair of them."""
    exact = skeleton(dataclasses.replace(run.skeleton.config, compute_dtype="float32"))
    texts = 2 if exact.config.architecture == "encoder_decoder" else 1
    return bind(exact, run.params)(*[np.arange(5, 25).reshape(2, 10)] * texts)

"""Training that starts from a model starts from that model, whatever it is."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_jobs
from test_main import main

import lm
from lm.config import view
from lm.data import prepare, train_batches
from lm.jobs.train import TrainJob
from lm.models import bind, skeleton
from lm.tokenizers import TokenizerConfig, train
from lm.tokenizers.export import framed, huggingface_files

GOLDEN = tiny_jobs.REPOSITORY / "tests" / "golden"
LETTERS = "a cat sat on the mat; he ran."
# Fields of config.json that change no shape, at values that no config of ours has by default.
ODD = {
    "gpt2": {"layer_norm_epsilon": 1e-2},
    "bloom": {"layer_norm_epsilon": 1e-2},
    "opt": {},
    "gptj": {"layer_norm_epsilon": 1e-2},
    "falcon": {"rope_parameters": {"rope_theta": 300.0}, "layer_norm_epsilon": 1e-2},
    "starcoder2": {"sliding_window": 3, "norm_epsilon": 1e-2},
    "gpt_neox": {
        "layer_norm_eps": 1e-2,
        "rope_parameters": {
            "partial_rotary_factor": 0.5, "rope_theta": 500.0, "rope_type": "default"
        },
    },
    "phi3": {"rms_norm_eps": 1e-2},  # beyond its original length
    "llama": {"rms_norm_eps": 1e-2},  # llama3 scaling and a base of 500
    "mistral": {"rms_norm_eps": 1e-2, "sliding_window": 3},
    "mixtral": {"rms_norm_eps": 1e-2, "sliding_window": 3},
    "qwen2": {"sliding_window": 2, "rope_parameters": {"rope_theta": 300.0}},
    "qwen3": {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 300.0}},
    "qwen3_moe": {"rms_norm_eps": 1e-2, "use_sliding_window": True, "sliding_window": 3},
    "smollm3": {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 300.0}},
    "olmo2": {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 300.0}},
    "olmo3": {"rms_norm_eps": 1e-2, "sliding_window": 3},
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5, "sliding_window": 3},
    "gpt_oss": {"rms_norm_eps": 1e-2, "sliding_window": 3, "swiglu_limit": 0.3},
    "gemma3": {"sliding_window": 3, "query_pre_attn_scalar": 50},
    "deepseek_v3": {
        "rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 300.0}, "topk_group": 3,
        "routed_scaling_factor": 3.0, "norm_topk_prob": False,
    },
    "bert": {"layer_norm_eps": 1e-2},
    "roberta": {"layer_norm_eps": 1e-2},
    "distilbert": {"activation": "relu"},
    "modernbert": {"norm_eps": 1e-2, "local_attention": 2},
    "embedding_gemma": {"sliding_window": 3, "query_pre_attn_scalar": 50},
    "t5": {"relative_attention_max_distance": 5, "layer_norm_epsilon": 1e-2},
    "t5_v1_1": {"relative_attention_max_distance": 5, "layer_norm_epsilon": 1e-2},
    "bart": {"scale_embedding": False},
    "mbart": {"scale_embedding": False, "activation_function": "gelu"},
    "marian": {"scale_embedding": False},
}  # fmt: skip
FAST = ("llama", "gemma2", "t5")
PAIRS = [
    "--config.objective.name=seq2seq",
    "--config.data.text_field=source",
    "--config.data.text_field=target",
]


def source(place: pathlib.Path, family: str, **fields) -> pathlib.Path:
    """A tiny Hugging Face directory of a family, its texts in letters, and odd in all it can."""
    directory = place / family
    shutil.copytree(GOLDEN / family, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **ODD[family], **fields}))
    kinds = TokenizerConfig(kind="char", mask_token=True, bos_token="<s>")
    for name, data in huggingface_files(train(kinds, [LETTERS])).items():
        (directory / name).write_bytes(data)
    return directory


def tune(place: pathlib.Path, init_from: pathlib.Path, name: str, *fields: str):
    """Exit code, output and errors of one step from `init_from` into `place / name`."""
    (place / "text.txt").write_text(LETTERS * 20)
    (place / "pairs.tsv").write_text("a cat\tsat on\nhe ran\tthe mat\nthe mat\ta\n")
    return main(
        "--config=configs/finetune.py",
        f"--workdir={place / name}",
        f"--config.init_from={init_from}",
        f"--config.data.path={place / ('pairs.tsv' if PAIRS[0] in fields else 'text.txt')}",
        f"--config.data.cache_dir={place / 'tokens'}",
        "--config.data.validation_fraction=0.0",
        "--config.data.block_size=8",
        "--config.data.batch_size=2",
        "--config.model.compute_dtype=float32",
        "--config.model.dropout=0.0",
        "--config.optimizer.warmup_steps=1",
        "--config.train.steps=1",
        "--config.train.log_every=1",
        *fields,
    )


def batch_of(run) -> dict[str, np.ndarray]:
    """The first batch of a run."""
    fields = {name: run.config[name] for name in ("data", "seed", "objective")}
    job = view(TrainJob, {**fields, "model": run.config["model"]})
    corpora, _ = prepare(job.data, run.tokenizer, job.seed)
    reading = {"objective": job.objective.name, "tokenizer": run.tokenizer}
    return train_batches(job.data, corpora, seed=job.seed, **reading).batch(0)


def loss(source: pathlib.Path, batch: dict[str, np.ndarray]) -> float:
    """Mean nats of a batch's targets, by the logits of the model in the directory `source`."""
    run = lm.load(source)
    exact = dataclasses.replace(run.skeleton.config, compute_dtype="float32")
    model = bind(skeleton(exact), run.params)
    arguments = {"segments_BT": batch["segment_ids"], "positions_BT": batch["positions"]}
    tokens = [batch["inputs"]]
    if "source" in batch:
        tokens.insert(0, batch["source"])
        arguments["source_segments_BS"] = batch["source_segment_ids"]
        arguments["source_positions_BS"] = batch["source_positions"]
    logp_BTV = jax.nn.log_softmax(model(*tokens, **arguments))
    nats_BT = -np.take_along_axis(np.asarray(logp_BTV), batch["targets"][..., None], -1)[..., 0]
    return float((nats_BT * batch["weights"]).sum() / batch["weights"].sum())


def objective(family: str) -> list[str]:
    if family in ("bert", "roberta", "distilbert", "modernbert", "embedding_gemma"):
        return ["--config.objective.name=masked"]
    return PAIRS if family in ("t5", "t5_v1_1", "bart", "mbart", "marian") else []


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in ODD]
)
def test_the_first_loss_is_the_loss_of_the_source(tmp_path, family):
    directory = source(tmp_path, family)
    code, _, errors = tune(tmp_path, directory, "tuned", *objective(family))
    assert code == 0, errors
    ((_, first),) = tiny_jobs.losses(tmp_path / "tuned")
    run = lm.load(tmp_path / "tuned")
    assert first == pytest.approx(loss(directory, batch_of(run)), abs=1e-5)
    own = lm.load(directory).skeleton.config
    assert run.skeleton.config == dataclasses.replace(own, compute_dtype="float32", dropout=0.0)


def test_a_tuned_run_stops_and_frames_texts_as_its_source_and_goes_back_as_it_came(tmp_path):
    directory = source(tmp_path, "llama")
    ends = {"eos_token_id": [5, 7], "temperature": 0.6}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    file = directory / "tokenizer.json"
    file.write_bytes(framed(file.read_bytes(), before=[6], after=[]))  # a letter will do
    code, _, errors = tune(tmp_path, directory, "tuned", "--config.data.end_of_text=False")
    assert code == 0, errors
    original = lm.load(directory).framing
    assert original.before == (6,) and original.end_of_text == (5, 7)
    stream = dataclasses.replace(original, empty=())  # documents had no separators
    assert lm.load(tmp_path / "tuned").framing == stream
    # A document's end is learnt as an end, too; and a run of that run has it all again.
    assert tune(tmp_path, tmp_path / "tuned", "again")[0] == 0
    again = lm.load(tmp_path / "again")
    assert again.framing == dataclasses.replace(
        original, end_of_text=(5, 7, again.tokenizer.eos_id)
    )
    for run in ("tuned", "again"):
        out = tmp_path / f"{run}.hf"
        arguments = ["--config.to=hf", f"--config.init_from={tmp_path / run}", f"--workdir={out}"]
        code, _, errors = main("--config=configs/convert.py", *arguments)
        assert code == 0, errors
        assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
        back, own = lm.load(out).framing, lm.load(tmp_path / run).framing
        assert (back.before, back.end_of_text) == (own.before, own.end_of_text)


def test_what_may_not_change_is_named_at_once_and_what_may_is_taken(tmp_path):
    directory = source(tmp_path, "llama")
    wrong = ["model.rotary_base=10000.0", "model.num_heads=2", "tokenizer.kind=bpe"]
    fine = ["model.width=24", "model.remat=full", "model.max_length=64", "data.block_size=40"]
    fields = [f"--config.{field}" for field in (*wrong, *fine)]
    code, _, errors = tune(tmp_path, directory, "tuned", *fields)
    assert code == 2 and errors.count("\n") == 1
    assert (
        "model.num_heads=4, model.rotary_base=500.0, tokenizer.kind='huggingface', and this config "
        "says 2, 10000.0, 'bpe'"
    ) in errors
    assert not (tmp_path / "tuned").exists()
    assert tune(tmp_path, directory, "tuned", *fields[3:])[0] == 0
    model = lm.load(tmp_path / "tuned").skeleton.config
    assert (model.max_length, model.remat, model.rotary_base) == (64, "full", 500.0)


def test_learned_positions_may_be_fewer_but_not_more_and_the_run_outlives_its_source(tmp_path):
    directory = source(tmp_path, "gpt2")
    code, _, errors = tune(tmp_path, directory, "tuned", "--config.model.max_length=33")
    assert code == 2 and "model.max_length=32, and this config says 33" in errors
    assert tune(tmp_path, directory, "tuned", "--config.model.max_length=9")[0] == 0
    shutil.rmtree(directory)
    code, output, errors = main(f"--workdir={tmp_path / 'tuned'}", "--config.train.steps=2")
    assert code == 0, errors
    assert "resuming at step 1 of 2" in output
    assert lm.load(tmp_path / "tuned").params["embedding.positions"].shape[0] == 9

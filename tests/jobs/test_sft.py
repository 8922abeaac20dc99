"""Supervised fine-tuning as users run it: a file of conversations, then a model that replies."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import tiny_jobs
from test_main import main

import lm
from lm.alignment.replies import replies
from lm.data import Example
from lm.inference import SamplingConfig
from lm.tokenizers import TokenizerConfig, train
from lm.tokenizers.export import huggingface_files

FACTS = {"Who sat?": "The cat.", "Where?": "On the mat.", "When?": "Now.", "Why?": "It slept."}
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=30)
SMALL = [
    "--config.init_from=",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.width=64",
    "--config.model.compute_dtype=float32",
    "--config.data.validation_fraction=0.25",
    "--config.data.block_size=96",
    "--config.data.batch_size=8",
    "--config.optimizer.name=muon",
    "--config.optimizer.learning_rate=1e-2",
    "--config.train.steps_per_dispatch=10",
    "--config.train.log_every=10",
    "--config.train.eval_every=0",
    "--config.checkpoint.every=0",
]


def tune(place, name, lines, *fields):
    """Exit code, output and errors of SFT on `lines` into `place / name`."""
    path = place / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return main(
        "--config=configs/align/sft.py",
        f"--workdir={place / name}",
        f"--config.data.path={path}",
        f"--config.data.cache_dir={place / 'tokens'}",
        f"--config.train.compilation_cache={place / 'xla'}",
        *SMALL,
        *fields,
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run that has learnt `FACTS`, in conversations of one turn and of two, and its output."""
    place = tmp_path_factory.mktemp("sft")
    ask, say = "user", "assistant"
    lines = []
    for (question, answer), (other, reply) in zip(FACTS.items(), reversed(FACTS.items())):
        turns = [(ask, question), (say, answer), (ask, other), (say, reply)]
        lines += [{"messages": [{"role": r, "content": c} for r, c in turns[:n]]} for n in (2, 4)]
    fields = ["--config.tokenizer.kind=byte", "--config.tokenizer.chat_template=chatml"]
    code, out, errors = tune(
        place, "taught", lines * 2, *fields, "--config.train.steps=80", "--config.exact_match=4"
    )
    assert code == 0, errors
    return place / "taught", out


def test_a_tuned_model_answers_right_and_stops_by_itself(taught):
    directory, out = taught
    run = lm.load(directory)
    asked = [Example(({"role": "user", "content": question},)) for question in FACTS]
    assert replies(run, asked, GREEDY) == list(FACTS.values())
    assert "exact match: 4 of 4 validation conversations, 100.0%" in out
    # The end of a turn is an end of text for whatever continues ids.
    end = run.tokenizer.special_ids["<|im_end|>"]
    assert run.framing.end_of_text == (run.tokenizer.eos_id, end)
    asked = [{"role": "user", "content": "Where?"}]
    settings = {"temperature": 0, "max_new_tokens": 30}
    assert run.reply("Where?", **settings) == run.reply(asked, **settings) == "On the mat."
    assert run.reply(["Why?", asked], **settings) == ["It slept.", "On the mat."]
    ids = run.chat_template().encode(asked)
    texts = run.generator.generate([ids], GREEDY).texts()
    assert "".join(text for _, text in texts) == "On the mat."


def test_chatting_with_it_needs_nothing_but_its_directory(taught, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who sat?\nWhy?\n"))
    from lm.__main__ import guarded, run

    words = [f"--config.init_from={taught[0]}", "--config.temperature=0"]
    assert guarded(run, ["--config=configs/chat.py", *words]) in (0, None)
    assert capsys.readouterr().out.splitlines() == ["The cat.", "It slept."]


def test_samples_are_replies_to_conversations_that_were_held_out(taught):
    text = (taught[0] / "samples.txt").read_text()
    first = text.split("\n\n")[0].splitlines()
    assert first[0].removeprefix("user: ") in FACTS
    assert first[-1].removeprefix("→ ") in FACTS.values()
    losses = tiny_jobs.losses(taught[0], "eval_loss")
    assert losses[-1][1] < 0.2


@pytest.mark.slow
def test_a_base_model_is_given_a_template_that_stays_with_the_run(tmp_path):
    lines = [{"prompt": question, "response": answer} for question, answer in FACTS.items()]
    steps = ["--config.train.steps=10", "--config.train.log_every=10"]
    base = tmp_path / "base"
    code, _, errors = tune(tmp_path, "base", lines, *steps, "--config.tokenizer.kind=byte")
    assert code == 2 and "config.chat_template='' must name a chat template" in errors
    steps += ["--config.data.block_size=128"]
    plain = ["--config.tokenizer.kind=byte", "--config.chat_template=plain"]
    plain += ["--config.prompt=Who sat?"]
    code, _, errors = tune(tmp_path, "base", lines, *steps, *plain)
    assert code == 0, errors
    assert (base / "samples.txt").read_text().startswith("user: Who sat?\n→ ")
    fields = [f"--config.init_from={base}", "--config.chat_template=chatml", "--config.prompt="]
    code, out, errors = tune(tmp_path, "tuned", lines, *steps, *fields)
    assert code == 0, errors
    assert "note: the tokenizer has no token <|im_start|> or <|im_end|>" in " ".join(out.split())
    template = lm.load(tmp_path / "tuned").chat_template()
    assert template.render([{"role": "user", "content": "a"}]).endswith("<|im_start|>assistant\n")
    # It goes on, whether or not the command says again how.
    code, _, errors = tune(tmp_path, "tuned", lines, *steps, *fields, "--config.train.steps=20")
    assert code == 0, errors


@pytest.mark.slow
def test_a_model_of_hugging_face_goes_back_and_ends_its_turns_there(tmp_path):
    source = tmp_path / "llama"
    shutil.copytree(tiny_jobs.REPOSITORY / "tests" / "golden" / "llama", source)
    config = TokenizerConfig(kind="char", chat_template="chatml", bos_token="<s>")
    tokenizer = train(config, ["".join(FACTS) + "".join(FACTS.values()) + "user assistant\n"])
    for name, data in huggingface_files(tokenizer).items():
        (source / name).write_bytes(data)
    lines = [{"prompt": question, "response": answer} for question, answer in FACTS.items()]
    fields = [f for f in SMALL if "model" not in f and "init_from" not in f]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, errors = main(
        "--config=configs/align/sft.py",
        f"--workdir={tmp_path / 'tuned'}",
        f"--config.init_from={source}",
        f"--config.data.path={path}",
        f"--config.data.cache_dir={tmp_path / 'tokens'}",
        *fields,
        "--config.data.block_size=32",
        "--config.train.steps=10",
        "--config.prompt=",
    )
    assert code == 0, errors
    out = tmp_path / "out"
    words = [f"--config.init_from={tmp_path / 'tuned'}", "--config.to=hf", f"--workdir={out}"]
    code, _, errors = main("--config=configs/convert.py", *words)
    assert code == 0, errors
    ends = [tokenizer.eos_id, tokenizer.special_ids["<|im_end|>"]]
    written = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) <= set(written)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert set(ends) <= set(model.generation_config.eos_token_id)
    asked = [{"role": "user", "content": "Where?"}]
    ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert list(ids) == lm.load(tmp_path / "tuned").chat_template().encode(asked)


@pytest.mark.slow
def test_neither_accumulation_nor_packing_nor_the_mesh_changes_what_is_learnt(tmp_path):
    lines = [{"prompt": q * n, "response": a * (n % 3 + 1)} for n in (1, 2, 3, 4, 5, 6)
             for q, a in FACTS.items()]  # fmt: skip
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {
        "objective__name": "sft",
        "chat_template": "plain",
        "data__path": str(path),
        "data__packing": "none",
        "data__block_size": 96,
        "data__batch_size": 24,  # all of them
        "train__steps": 3,
        "train__log_every": 1,
        "train__steps_per_dispatch": 1,
        "checkpoint__every": 0,
        "prompt": "",
    }
    one = tiny_jobs.run(tmp_path, "one", **fields)
    ways = {
        "accumulated": {"train__accumulation": 4},
        "packed": {"data__packing": "best_fit", "data__batch_size": 10},  # all of them, too
        "mesh": {"num_devices": 8, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__data": 2},
    }
    for name, way in ways.items():
        other = tiny_jobs.run(tmp_path, name, **fields | way)
        if name == "packed":
            rows = tiny_jobs.losses(other, "tokens")[0][1]
            assert rows == tiny_jobs.losses(one, "tokens")[0][1]
        expected = np.array(tiny_jobs.losses(one))
        np.testing.assert_allclose(tiny_jobs.losses(other), expected, atol=2e-5, err_msg=name)


def test_what_cannot_be_learnt_from_is_one_line(tmp_path):
    lines = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": 3}]
    fields = ["--config.tokenizer.kind=byte", "--config.chat_template=chatml"]
    refuse = "--config.data.on_bad_file=refuse"
    code, _, errors = tune(tmp_path, "bad", lines, *fields, refuse)
    assert code == 2 and "bad.jsonl line 2: response must be text, not int" in errors
    code, _, errors = tune(tmp_path, "bad", lines, *fields, "--config.model.architecture=encoder")
    assert code == 2 and "objective.name='sft', which needs decoder" in errors
    assert len(errors.splitlines()) == 1

"""The worked example of alignment, as its benchmark runs it; the README's test runs the stories."""

import importlib.util
import json
import sys
import types

import pytest
import tiny_jobs
from test_main import main
from tiny_run import write_tiny_run

from lm.tokenizers import TokenizerConfig, train

LITTLE = ("train.steps=2", "checkpoint.every=2", "train.log_every=1", "train.eval_every=2")

PATH = tiny_jobs.REPOSITORY / "benchmarks" / "align_example.py"


@pytest.fixture
def align_example():
    spec = importlib.util.spec_from_file_location("align_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_walks_are_learnt_from_examples_and_rewards(tmp_path, align_example, monkeypatch, capsys):
    """The commands that the benchmark gives run in this process."""

    def command(words, **_):
        assert words[:2] == [sys.executable, "main.py"]
        code, output, errors = main(*words[2:])
        assert code == 0, output + errors

    monkeypatch.setattr(align_example, "subprocess", types.SimpleNamespace(run=command))
    words = ["align_example.py", "--task=walks", "--seeds=1", f"--workdir={tmp_path}"]
    words += [f"--pictures={tmp_path}", "--set", *LITTLE]
    words += [f"train.compilation_cache={tmp_path / 'xla'}"]
    monkeypatch.setattr(sys, "argv", words)
    align_example.main()
    output = capsys.readouterr().out
    assert "| PPO |" in output and "| GRPO |" in output
    assert (tmp_path / "align_walks.png").read_bytes().startswith(b"\x89PNG")


def test_the_figures_that_are_shown_are_of_the_configs_and_the_data_that_are_there(align_example):
    shown = json.loads((tiny_jobs.REPOSITORY / "docs" / "align.json").read_text())
    assert shown.pop("made_with") == align_example.made_with("stories") and len(shown) == 5
    readme = (tiny_jobs.REPOSITORY / "README.md").read_text(encoding="utf-8")
    for policy in ("sft", "ppo", "ppo_free", "dpo", "grpo"):
        gold = [seed["policies"][policy]["gold"] for seed in shown.values()]
        assert "| {:.2f} ± {:.2f} |".format(*align_example.interval(gold)) in readme


def test_policies_are_judged_by_held_out_questions(tmp_path, align_example):
    talks = train(TokenizerConfig(kind="byte", chat_template="chatml"), [])
    fields = {"tokenizer": talks, "max_length": 768}
    for name, step, head in (("sft", 1, {}), ("ppo", 2, {}), ("reward", 1, {"num_labels": 1})):
        head |= {"classifier": "sequence"} if head else {}
        write_tiny_run(tmp_path / name, steps=(step,), **fields, **head)
    sft, other = (align_example.judged(name, tmp_path, 4) for name in ("sft", "ppo"))
    assert sft["kl"] == 0 and other["kl"] > 1  # nats of a reply, to the SFT model
    for found in (sft, other):
        assert found["exact"] == 0 and -2 <= found["gold"] <= -0.5  # of models that know nothing
    assert (tmp_path / "ppo" / "judged.json").exists()
    right = align_example.ranked_right(tmp_path, 40)
    assert all(0 < share < 1 for share in right.values()) and len(right) == 3

"""launch/align.sh: which commands it runs, and what it refuses."""

import shlex
import sys

import pytest
from scripts import script

FILES = ("llama", "chats.jsonl", "pairs.jsonl", "prompts.jsonl", "out")


def commands(*flags):
    """The flags of main.py of every step, in a dry run."""
    lines = script("align.sh", "--dry-run", *FILES, *flags).splitlines()
    assert all(line.startswith("python main.py --config=configs/") for line in lines)
    return [shlex.split(line)[2:] for line in lines]


def test_every_step_starts_from_what_those_before_it_made():
    sft, reward, ppo, hf, adapter = commands()
    assert {"--config.init_from=llama", "--config.data.path=chats.jsonl"} <= {*sft}
    assert {"--config.adapter.kind=lora", "--workdir=out/sft"} <= {*sft}
    assert {"--config.init_from=out/sft", "--config.data.path=pairs.jsonl"} <= {*reward}
    assert {"--config.init_from=out/sft", "--config.data.path=prompts.jsonl"} <= {*ppo}
    assert "--config.rewards.functions=out/reward" in ppo
    assert {"--config.init_from=out/ppo", "--config.to=hf", "--workdir=out/hf"} <= {*hf}
    assert {"--config.init_from=out/sft", "--config.to=peft"} <= {*adapter}


def test_flags_reach_the_steps_that_they_are_for():
    steps = commands("--config.mesh.fsdp=-1", "--ppo.train.steps=3", "--sft.adapter.kind=none")
    assert [step[-1] for step in steps[:3]] == [
        "--config.adapter.kind=none", "--config.mesh.fsdp=-1", "--config.train.steps=3",
    ]  # fmt: skip
    assert ["--config.mesh.fsdp=-1" in step for step in steps] == [True, True, True, False]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (FILES[:4], "needs HF_DIR"),
        ((*FILES, "--sft.x"), "'--sft.x' must be --config.FIELD=VALUE"),
        ((*FILES, "more"), "'more' must be"),
        (("--sft.x=1", *FILES), "must come after OUT"),
        ((*FILES[:3], "--dry-run", "out"), "'--dry-run' is a flag"),
        (FILES, "HF_DIR='llama' must be a Hugging Face directory"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(arguments, says):
    said = script("align.sh", *arguments, code=2)
    assert says in said and said.count("\n") == 1


def test_what_later_steps_would_refuse_is_said_before_the_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    line = tmp_path / "line.jsonl"
    line.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    files = (str(tmp_path), *[str(line)] * 3, str(tmp_path / "out"))
    said = script("align.sh", *files, "--ppo.rollout.max_token=3", code=2, PYTHON=sys.executable)
    assert said.startswith("error: config.rollout.max_token is not a known field")
    line.write_text('{"prompt": "a"}\n')
    assert "must hold pairs" in script("align.sh", *files, code=2)
    assert not (tmp_path / "out").exists()


def test_every_file_must_be_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = script("align.sh", str(tmp_path), str(tmp_path / "config.json"), *FILES[2:], code=2)
    assert said == "launch/align.sh: 'pairs.jsonl' must be a file of JSON lines: there is none\n"

"""The best of several replies are kept, in lines that training reads."""

import json
import math

import numpy as np
import pytest
from tiny_run import write_talker

from lm.__main__ import run
from lm.alignment.best_of_n import best, best_and_worst, kl_bound
from lm.config import ConfigError
from lm.data import DataConfig
from lm.data.conversations import examples

REWARD = """
def early(prompts, responses, answer, finished, **fields):
    assert all(type(reply) is str for reply in responses) and len(finished) == len(answer)
    return [sum(ord(c) for c in reply) % 97 / 10 for reply in responses]
"""


def test_the_best_that_ended_are_kept_each_text_once():
    replies, worth = ["a", "b", "a", "c", "d"], np.array([1.0, 3.0, 2.0, 0.5, 9.0])
    ended = [True] * 4 + [False]
    assert best(replies, worth, ended) == [1]
    assert best(replies, worth, ended, keep=9) == [1, 2, 3]
    assert best(replies, worth, ended, keep=9, at_least=1.5) == [1, 2]
    assert best(replies, worth, [False] * 5, keep=9) == []
    assert best_and_worst(worth, ended) == (1, 3)
    assert best_and_worst(worth, ended, at_least=4.0) is None
    assert best_and_worst(np.ones(5), ended) is None
    assert best_and_worst(worth, [False] * 5) is None
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    (folder / "talker").mkdir()
    write_talker(folder / "talker", 64)
    (folder / "mine.py").write_text(REWARD)
    lines = [json.dumps({"prompt": str(n), "answer": n}) for n in range(5)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(folder, name, **fields):
    fields = {
        "init_from": folder / "talker",
        "data.path": folder / "prompts.jsonl",
        "data.block_size": 60,
        "rewards.functions": f"{folder / 'mine.py'}:early",
        "rollout.samples": 4,
        "rollout.prompts": 2,
        "rollout.max_new_tokens": 32,
        "compilation_cache": "",
        "output_file": folder / name,
        **fields,
    }
    words = [f"--config.{field}={value}" for field, value in fields.items()]
    run(["--config=configs/align/best_of_n.py", *words])
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_lines_are_replies_to_learn_and_a_file_that_was_left_is_made_whole(folder, capsys):
    lines = command(folder, "best.jsonl", keep=2)
    assert lines and len({(x["prompt"], x["response"]) for x in lines}) == len(lines)
    assert all(sum(map(ord, x["response"])) % 97 / 10 == pytest.approx(x["reward"]) for x in lines)
    assert "nats from the model" in capsys.readouterr().out
    data = DataConfig(path=str(folder / "best.jsonl"), validation_fraction=0.0)
    found = examples(data, 0, "sft")[0][0]
    assert [one.answer for one in found] == [line["response"] for line in lines]

    whole = (folder / "best.jsonl").read_bytes()
    (folder / "left.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    command(folder, "left.jsonl", keep=2)
    assert (folder / "left.jsonl").read_bytes() == whole


def test_pairs_of_the_best_and_the_worst_are_preferences(folder):
    lines = command(folder, "pairs.jsonl", form="pairs")
    assert lines and all(line["chosen_reward"] > line["rejected_reward"] for line in lines)
    data = DataConfig(path=str(folder / "pairs.jsonl"), validation_fraction=0.0)
    found = examples(data, 0, "reward")[0][0]
    assert [one.answer for one in found] == [line["chosen"] for line in lines]


def test_mistakes_are_said_before_anything_is_drawn(folder):
    with pytest.raises(ConfigError, match=r"keep=9 is more than .*samples=4"):
        command(folder, "no.jsonl", keep=9)
    with pytest.raises(ConfigError, match=r"block_size=65 is longer than the context .* to 64"):
        command(folder, "no.jsonl", **{"data.block_size": 65})
    with pytest.raises(ConfigError, match="lines of another origin"):
        command(folder, "prompts.jsonl")
    assert not (folder / "no.jsonl").exists()

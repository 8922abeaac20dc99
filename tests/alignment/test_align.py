"""Learning from rewards, from the command to the run directory that it leaves."""

import signal

import numpy as np
import pytest
import tiny_align
import tiny_jobs
from test_main import main
from tiny_align import COMPILED, PPO, measured
from tiny_run import write_tiny_run

import lm
from lm import command
from lm.__main__ import JOBS
from lm.config import ConfigError, view
from lm.tokenizers import TokenizerConfig, train


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_align.write_source(tmp_path_factory.mktemp("align") / "source")


@pytest.fixture(scope="module")
def learned(source):
    """GRPO for 8 iterations."""
    return tiny_align.run(source, "grpo", train__steps=8)


def assert_compiled_at_once(directory):
    """All in the first iteration, but for the checksums of the first checkpoint, of the second."""
    assert {0} <= COMPILED[directory] <= {0, 2}


def test_grpo_raises_the_reward(learned):
    rewards = measured(learned, "reward")
    assert len(rewards) == 8
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert_compiled_at_once(learned)


def test_ppo_with_a_critic_raises_the_reward(source):
    directory = tiny_align.run(source, "ppo", train__steps=8, **PPO)
    rewards = measured(directory, "reward")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert measured(directory, "kl")[0] == 0
    losses = measured(directory, "value_loss")
    assert losses[-1] < losses[0]
    assert all(value <= 1 for value in measured(directory, "explained_variance"))
    assert_compiled_at_once(directory)


@pytest.mark.slow
def test_a_critic_may_be_a_head_of_the_policy(source):
    fields = {**PPO, "learning__critic": "shared", "learning__kl_stop": 1e-9, "train__steps": 4}
    directory = tiny_align.run(source, "shared", **fields)
    assert len(measured(directory, "value_loss")) == 4
    assert measured(directory, "epochs") == [1] * 4  # of two: each was far enough
    assert isinstance(lm.load(directory).generate("a", max_new_tokens=3), str)


def test_the_first_update_meets_the_policy_that_wrote(learned, source):
    held_out = {"data__validation_path": str(source / "prompts.jsonl")}
    directory = tiny_align.run(source, "one", train__steps=1, data__batch_size=32, **held_out)
    for name, value in {"ratio": 1, "approx_kl": 0, "clip_fraction": 0, "kl": 0}.items():
        assert measured(directory, name) == [value]
    assert len(measured(directory, "eval_reward")) == 1


def test_the_run_directory_explains_itself(learned):
    run = lm.load(learned)
    assert run.step == 8 and run.config["job"] == "align"
    assert run.generate("Say a: ", max_new_tokens=4).startswith("Say a: ")
    names = {"reward", "entropy", "clip_fraction", "response_length", "end_rate", "kl"}
    names |= {"rollout_seconds", "scoring_seconds", "update_seconds", "loss", "learning_rate"}
    assert names <= run.metrics[0].keys()
    asked = command.read([f"--workdir={learned}"], JOBS)  # goes on by its directory alone
    assert view(asked.section, asked.config).rollout.samples == 8
    page = (learned / "samples.html").read_text()
    assert "before" in page and "http" not in page and "Say a: " in page
    assert (learned / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((learned / "tensorboard").iterdir())


ADAPTED = {**PPO, "advantage__kl_target": 1.0}


@pytest.mark.parametrize(
    "name, fields", [("grpo", {}), pytest.param("ppo", ADAPTED, marks=pytest.mark.slow)]
)
def test_a_run_that_goes_on_is_one_without_a_break_bit_for_bit(source, name, fields):
    whole = tiny_align.run(source, f"whole_{name}", train__steps=4, **fields)
    broken = tiny_align.run(source, f"broken_{name}", train__steps=4, **fields)
    for step in tiny_jobs.checkpoint_steps(broken)[1:]:
        path = broken / "checkpoints" / f"{step:08d}"
        path.rename(path.with_suffix(".deleting"))
    tiny_align.run(source, f"broken_{name}", train__steps=4, **fields)
    tiny_jobs.assert_same_run(whole, broken)
    for field in ("reward", "kl", "kl_coefficient", "response_length"):
        assert measured(whole, field) == measured(broken, field)


def test_a_prompt_that_is_none_is_named_by_file_line_and_field(source, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(ConfigError, match=r"bad.jsonl line 1: prompt must be text"):
        tiny_align.run(source, "bad", data__path=str(tmp_path / "bad.jsonl"))


def test_with_adapters_the_first_ratio_is_one_and_the_kl_zero(source):
    fields = {"adapter__kind": "lora", "adapter__rank": 4, "train__steps": 3}
    first = tiny_align.run(source, "adapted", data__batch_size=32, **fields)
    assert_compiled_at_once(first)
    for name, value in {"ratio": 1, "approx_kl": 0, "clip_fraction": 0, "kl": 0}.items():
        assert measured(first, name)[0] == value
    # And where the reference has adapters itself, which go on.
    fields = {"init_from": str(first), "train__steps": 1}
    second = tiny_align.run(source, "adapted_again", data__batch_size=32, **fields)
    for name, value in {"ratio": 1, "approx_kl": 0, "clip_fraction": 0, "kl": 0}.items():
        assert measured(second, name)[0] == value
    assert isinstance(lm.load(second).generate("a", max_new_tokens=3), str)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(source):
    fields = {"train__steps": 40, "checkpoint__every": 0}
    words = tiny_align.command(source, "left", **fields)
    process = tiny_jobs.start(words)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=600)
    assert process.returncode == 75, err
    assert "SIGTERM: saved step" in out
    assert len(tiny_jobs.checkpoint_steps(source.parent / "left")) == 1
    code, _, err = main(*words[2:])
    assert code == 0, err
    whole = tiny_align.run(source, "unbroken", **fields)
    tiny_jobs.assert_same_run(source.parent / "left", whole)


@pytest.mark.slow
def test_a_mesh_learns_as_one_device_does_to_rounding(source):
    fields = {"train__steps": 3, "rollout__temperature": 1.0, **PPO}
    alone = tiny_align.run(source, "alone", **fields)
    split = tiny_align.run(
        source, "split", num_devices=8, mesh__data=1, mesh__fsdp=4, mesh__tensor=2, **fields
    )
    assert_compiled_at_once(split)
    for field in ("loss", "reward", "entropy", "value_loss"):
        np.testing.assert_allclose(
            measured(alone, field)[:1], measured(split, field)[:1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_a_mesh_shares_a_learned_reward(source):
    judge = source.parent / "judge"
    write_tiny_run(judge, max_length=128, classifier="sequence", num_labels=1)
    fields = {"rewards__functions": str(judge), "rewards__chat_template": "chatml"}
    fields["train__steps"] = 2
    one = tiny_align.run(source, "judged", **fields)
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
    four = tiny_align.run(source, "judged_by_four", 4, **mesh, **fields)
    assert measured(four, "reward") == pytest.approx(measured(one, "reward"), abs=1e-4)


def test_configs_are_checked_before_any_work(source):
    for fields, message in (
        ({"rollout__prompts": 3}, "data.batch_size=16 must divide the 24 responses"),
        ({"rollout__samples": 1, "rollout__prompts": 16}, "needs 2 at least"),
        ({"rollout__max_new_tokens": 99}, "leaves no room for a prompt"),
        ({"data__block_size": 64}, "data.block_size=64 is longer than config.model.max_length=48"),
        ({"rollout__max_new_tokens": 32}, "no prompt of at most 1 tokens.* the shortest has"),
        ({"objective__policy__temperature": 0.5}, "is not that of the sampler"),
        ({"rewards__functions": "nothing"}, "rewards.functions='nothing'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_align.run(source, "refused", **fields)
    assert not (source.parent / "refused" / "config.json").exists()


def test_a_critic_is_a_reward_model_that_reads_the_policys_tokens(source):
    short = {"max_length": 24, "classifier": "sequence", "num_labels": 1}
    words = {"max_length": 48, "tokenizer": train(TokenizerConfig(kind="char"), ["ab"]), **short}
    for fields, message in (
        ({"max_length": 48}, "critic_from=.* is no reward model: it has model.classifier='none'"),
        (short, "block_size=32 is longer than the critic's max_length=24"),
        (words, "critic_from=.* has another tokenizer than the policy"),
    ):
        critic = source.parent / f"critic{len(fields)}"
        write_tiny_run(critic, **fields)
        with pytest.raises(ConfigError, match=message):
            tiny_align.run(source, "refused", learning__critic_from=str(critic), **PPO)

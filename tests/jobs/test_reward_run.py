"""A reward model from a run and a file of pairs, by the command a user gives; then what it says."""

import json

import numpy as np
import pytest
import tiny_jobs
from tiny_run import write_tiny_run

import lm
from lm.__main__ import run
from lm.alignment.rewards import Rewards, RewardsConfig
from lm.config import ConfigError, view
from lm.data.conversations import held_out
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.runs.config import TrainJob
from lm.runs.reward import Scale
from lm.tokenizers import TokenizerConfig, train

KIND, RUDE = "please", "never"


def reply(rng, kind):
    noise = "".join(rng.choice(list("abcdef"), rng.integers(1, 4)))
    return f"{noise} {KIND if kind else RUDE}"


def write_pairs(path, count=200, seed=0):
    rng = np.random.default_rng(seed)
    lines = [
        {"prompt": str(rng.integers(1000)), "chosen": reply(rng, True), "rejected": reply(rng, 0)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(tmp_path, name, *more, steps=40):
    fields = {
        "init_from": tmp_path / "talker",
        "data.path": tmp_path / "pairs.jsonl",
        "data.cache_dir": tmp_path / "tokens",
        "data.validation_fraction": 0.1,
        "data.block_size": 48,
        "data.batch_size": 16,
        "train.compilation_cache": "",
        "train.steps": steps,
        "train.eval_every": 20,
        "optimizer.learning_rate": 1e-2,
    }
    run([
        "--config=configs/align/reward.py",
        f"--workdir={tmp_path / name}",
        *(f"--config.{field}={value}" for field, value in fields.items()),
        *more,
    ])  # fmt: skip
    return tmp_path / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a random model that can chat, the pairs, and the reward model learned from both."""
    tmp_path = tmp_path_factory.mktemp("reward")
    (tmp_path / "talker").mkdir()
    tokenizer = train(TokenizerConfig(kind="byte", chat_template="chatml"), [])
    llama = {"activation": "swiglu", "tie_embeddings": False, "max_length": 64}
    write_tiny_run(tmp_path / "talker", tokenizer=tokenizer, **llama)
    write_pairs(tmp_path / "pairs.jsonl")
    return command(tmp_path, "reward")


def test_it_ranks_held_out_pairs_and_says_how_well(trained):
    [(step, accuracy), *_] = tiny_jobs.losses(trained, "eval_accuracy")[::-1]
    assert step == 40 and accuracy > 0.9
    [(step, error)] = tiny_jobs.losses(trained, "eval_calibration_error")
    assert step == 40 and 0 <= error < 0.3
    names = {"accuracy", "margin", "reward", "eval_margin"}
    records = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
    assert names <= set().union(*records)


def test_the_run_scores_replies_on_the_scale_of_held_out_ones(trained):
    reward, rng = lm.load(trained), np.random.default_rng(9)
    replies = [reply(rng, kind) for kind in [True] * 20 + [False] * 20]
    scores = reward.score("12", replies)
    assert scores.dtype == np.float32 and scores.shape == (40,)
    assert scores[:20].min() > scores[20:].max()
    assert abs(scores.mean()) < 0.3 and 0.7 < scores.std() < 1.3
    scale = Scale.read(trained)
    raw = reward.score("12", replies, normalized=False)
    np.testing.assert_allclose(raw, scores * scale.std + scale.mean, atol=1e-5)
    # Messages and companions change nothing, and a reply without an end is another.
    prompt = [{"role": "user", "content": "12"}]
    alone = [reward.score(prompt, text)[0] for text in replies[:3]]
    np.testing.assert_allclose(alone, scores[:3], atol=1e-5)
    several = reward.score([prompt, "12"], replies[:2], [True, False])
    assert several[0] == pytest.approx(scores[0], abs=1e-5) and several[1] != scores[1]
    with pytest.raises(ConfigError, match="3 prompts and 2 responses"):
        reward.score(["a", "b", "c"], ["d", "e"])
    with pytest.raises(ConfigError, match="no logits"):
        reward.model([[1, 2]])


def test_rows_are_judged_as_the_same_replies_are_as_text(trained):
    reward, saved = lm.load(trained), Scale.read(trained)
    job = view(TrainJob, {n: reward.config[n] for n in ("data", "objective", "model", "seed")})
    pairs = held_out(job.data, job.seed, "reward")
    assert saved.replies == 2 * len(pairs) >= 20
    texts = [(list(p.prompt), r[0]["content"]) for p in pairs for r in p.replies]
    found = reward.score(*map(list, zip(*texts)), normalized=False)
    np.testing.assert_allclose(Scale.of(found)[:2], saved[:2], rtol=1e-4, atol=1e-5)


def test_its_directory_is_a_reward(trained):
    rewards = Rewards(RewardsConfig(functions=(str(trained), "length"), max_length=4))
    replies = [f"abc {KIND}", f"abc {RUDE}"]
    worth = rewards(["1", "2"], replies, response_ids=[[1], [1] * 9], finished=[True, True])
    assert set(worth.parts) == {"reward", "length"}
    assert worth.parts["reward"][0] > 0 > worth.parts["reward"][1]
    np.testing.assert_allclose(worth.total_N, worth.parts["reward"] + [0, -1], rtol=1e-6)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shared = Rewards(RewardsConfig(functions=str(trained)), mesh=mesh)(["1", "2"], replies)
    np.testing.assert_allclose(shared.total_N, worth.parts["reward"], atol=1e-4)
    with pytest.raises(ConfigError, match="classifier='none'"):
        Rewards(RewardsConfig(functions=str(trained.parent / "talker")))


def test_it_goes_to_hugging_face_and_judges_there_as_here(trained, tmp_path):
    convert = ["--config=configs/convert.py", "--config.to=hf"]
    run([*convert, f"--config.init_from={trained}", f"--workdir={tmp_path / 'out'}"])
    replies = [f"abc {KIND}", f"abc {RUDE}", "ab"]
    expected = lm.load(trained).score("12", replies, normalized=False)
    back = lm.load(tmp_path / "out")  # which may compute in bfloat16
    np.testing.assert_allclose(back.score("12", replies), expected, rtol=0.02)
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for reply, reward in zip(replies, expected):
        messages = [{"role": "user", "content": "12"}, {"role": "assistant", "content": reply}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        end = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        with torch.no_grad():
            found = model(torch.tensor([ids[:end]])).logits
        assert found.item() == pytest.approx(reward, abs=1e-4)


def test_it_goes_on_where_it_was_left_and_begins_as_the_source_with_a_new_head(trained, tmp_path):
    for name in ("talker", "pairs.jsonl"):
        (tmp_path / name).symlink_to(trained.parent / name)
    command(tmp_path, "parts", steps=4)
    gone_on = command(tmp_path, "parts", steps=8)
    source, new = (tiny_jobs.parameters(x) for x in (trained.parent / "talker", gone_on))
    assert set(new) - set(source) == {"classifier.projection"}
    assert tiny_jobs.checkpoint_steps(gone_on) == [4, 8]


def test_what_it_cannot_do_is_said_before_any_work(trained, tmp_path):
    for name in ("talker", "pairs.jsonl"):
        (tmp_path / name).symlink_to(trained.parent / name)
    with pytest.raises(ConfigError, match="num_labels=1"):
        command(tmp_path, "two", "--config.model.num_labels=2")
    with pytest.raises(ConfigError, match="writes nothing"):
        command(tmp_path, "prompted", "--config.prompt=Once")
    with pytest.raises(ConfigError, match="output head"):
        command(tmp_path, "sft", "--config.objective.name=causal")
    assert not any((tmp_path / name).exists() for name in ("two", "prompted", "sft"))


def test_it_learns_with_adapters_and_a_whole_head(trained, tmp_path):
    for name in ("talker", "pairs.jsonl"):
        (tmp_path / name).symlink_to(trained.parent / name)
    lora = command(tmp_path, "lora", "--config.adapter.kind=lora", "--config.adapter.rank=4")
    assert tiny_jobs.losses(lora, "eval_accuracy")[-1][1] > 0.9
    reward = lm.load(lora)
    good, bad = reward.score("12", [f"abc {KIND}", f"abc {RUDE}"])
    assert good > 0 > bad

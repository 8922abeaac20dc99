"""launch/align.sh: a model of Hugging Face's is aligned, and goes back to its libraries."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import quick

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import lm  # noqa: E402
from lm.alignment.replies import replies  # noqa: E402
from lm.data import Example  # noqa: E402
from lm.inference import SamplingConfig  # noqa: E402
from lm.tokenizers import TokenizerConfig, train  # noqa: E402
from lm.tokenizers.export import huggingface_files  # noqa: E402

CLONE = pathlib.Path(__file__).resolve().parents[2]
ANSWERS = {
    "Where is the cat?": "In the barn.",
    "Where is the dog?": "On the hill.",
    "Is it warm?": "Yes.",
    "Is it cold?": "No.",
}
FLAGS = (
    "--config.data.block_size=64", "--config.data.batch_size=8", "--config.train.steps=4",
    "--config.train.log_every=2", "--config.model.compute_dtype=float32",
    "--sft.train.steps=100", "--sft.optimizer.learning_rate=2e-2", "--sft.train.eval_every=0",
    "--sft.checkpoint.every=10", "--sft.prompt=", "--ppo.train.steps=2", "--ppo.rollout.prompts=8",
    "--ppo.rollout.max_new_tokens=16", "--ppo.learning.epochs=1",
)  # fmt: skip


def write_inputs(place):
    """A random Llama with a tokenizer, as transformers saves it, and what it is to learn from."""
    torch.manual_seed(0)
    tokenizer = train(TokenizerConfig(kind="byte", chat_template="chatml"), [])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place / "llama")
    for name, data in huggingface_files(tokenizer).items():
        (place / "llama" / name).write_bytes(data)
    asked = list(ANSWERS.items()) * 8
    lines = {
        "chats": [{"messages": [message("user", q), message("assistant", a)]} for q, a in asked],
        "pairs": [{"prompt": q, "chosen": a, "rejected": "What?"} for q, a in asked],
        "prompts": [{"prompt": q} for q in ANSWERS],
    }
    for name, several in lines.items():
        text = "".join(json.dumps(line) + "\n" for line in several)
        (place / f"{name}.jsonl").write_text(text)


def message(role, content):
    return {"role": role, "content": content}


def start(place, *flags):
    files = (f"{name}.jsonl" for name in ("chats", "pairs", "prompts"))
    own = {"LM_CACHE_DIR": str(place / "tokens"), "XLA_FLAGS": quick.FLAGS}
    return subprocess.Popen(
        ["bash", str(CLONE / "launch" / "align.sh"), "llama", *files, "out", *FLAGS,
         f"--config.train.compilation_cache={place / 'xla'}", *flags],
        cwd=place, env={**os.environ, "PYTHON": sys.executable, **own}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """What the script makes, told to leave in the middle of SFT and run again; and what it said."""
    place = tmp_path_factory.mktemp("align")
    write_inputs(place)
    process = start(place)
    deadline = time.monotonic() + 300
    while not any((place / "out" / "sft" / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    left = process.returncode
    process = start(place)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:] + errors[-3000:]
    return types.SimpleNamespace(place=place, out=place / "out", left=left, output=output)


def their_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


@pytest.mark.slow
def test_told_to_leave_it_goes_on_where_it_was_and_done_it_does_nothing(aligned):
    assert aligned.left == 75
    assert "resuming at step" in aligned.output
    before = {p: p.stat().st_mtime_ns for p in aligned.out.rglob("*") if p.is_file()}
    process = start(aligned.place)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    done = [line.split(": ", 1)[1] for line in errors.splitlines()]
    assert done == [f"{name}: done" for name in ("sft", "reward", "ppo", "hf", "adapter")]
    assert before == {p: p.stat().st_mtime_ns for p in aligned.out.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_transformers_computes_and_says_what_the_aligned_run_does(aligned):
    run = lm.load(aligned.out / "ppo")
    model = transformers.AutoModelForCausalLM.from_pretrained(aligned.out / "hf")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40)).tolist()
    found = np.asarray(run.model(tokens))
    np.testing.assert_allclose(found, their_logits(model, tokens), atol=1e-4)
    # It is another model than the one that PPO began from.
    assert np.abs(found - np.asarray(lm.load(aligned.out / "sft").model(tokens))).max() > 1e-4

    tokenizer = transformers.AutoTokenizer.from_pretrained(aligned.out / "hf")
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=20)
    said = replies(run, [Example((message("user", question),)) for question in ANSWERS], greedy)
    for question, reply in zip(ANSWERS, said):
        ids = tokenizer.apply_chat_template(
            [message("user", question)], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        written = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == reply
    assert said == list(ANSWERS.values())  # SFT taught it, and PPO left it that


@pytest.mark.slow
def test_peft_computes_what_the_run_of_sft_does(aligned):
    base = transformers.AutoModelForCausalLM.from_pretrained(aligned.place / "llama")
    tokens = np.random.default_rng(1).integers(0, 256, (2, 40)).tolist()
    alone = their_logits(base, tokens)
    adapted = their_logits(peft.PeftModel.from_pretrained(base, aligned.out / "adapter"), tokens)
    found = np.asarray(lm.load(aligned.out / "sft").model(tokens))
    np.testing.assert_allclose(found, adapted, atol=1e-4)
    assert np.abs(adapted - alone).max() > 0.1

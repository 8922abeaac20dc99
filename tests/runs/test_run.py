"""`lm.load` and the generate job: a run directory is all they need."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_run import write_tiny_run

import lm
from lm.config import ConfigError, defaults
from lm.inference import SamplingConfig
from lm.jobs.generate import GenerateJob
from lm.jobs.generate import run as generate_job
from lm.models import bind
from lm.tokenizers import TokenizerConfig, train


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    path.mkdir()
    write_tiny_run(path, steps=(3, 5))
    return path


@pytest.fixture(scope="module")
def run(directory):
    return lm.load(directory)


def test_importing_lm_does_not_import_jax():
    code = "import sys, lm; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_holds_what_its_directory_says(run, directory):
    assert run.step == 5
    assert run.config == json.loads((directory / "config.json").read_text())
    assert run.tokenizer.kind == "byte"
    assert [record["loss"] for record in run.metrics] == [5.0, 4.0]
    assert lm.load(directory, step=3).step == 3


def test_the_model_takes_lists_and_gives_the_logits_of_its_parameters(run):
    tokens = [run.encode("cat"), run.encode("dog")]
    assert tokens[0] == [256, *b"cat"]
    logits_BTV = run.model(tokens)
    assert logits_BTV.shape == (2, 4, 257)
    expected = bind(run.skeleton, run.params)(np.array(tokens))
    np.testing.assert_allclose(logits_BTV, expected, atol=1e-5)


def test_what_a_model_computes_in_is_its_own_or_as_asked(run, directory):
    assert run.skeleton.config.compute_dtype == run.config["model"].get("compute_dtype", "auto")
    exact, rounded = (lm.load(directory, compute_dtype=d) for d in ("float32", "bfloat16"))
    tokens = [run.encode("cat")]
    apart = np.abs(exact.model(tokens) - rounded.model(tokens)).max()
    assert 1e-5 < apart < 0.1
    with pytest.raises(ConfigError, match="compute_dtype='float31'"):
        lm.load(directory, compute_dtype="float31")


@pytest.mark.parametrize(
    "tokens, words",
    [
        ([[1, 2], [3]], "different lengths"),
        ([1, 2], "must be rows"),
        ([[257]], "0 … 256"),
        ([[0] * 33], "context is 32"),
    ],
)
def test_the_model_refuses_impossible_tokens(run, tokens, words):
    with pytest.raises(ConfigError, match=words):
        run.model(tokens)


def test_lists_of_prompts_and_samples(run):
    texts = run.generate(["a", "bc"], max_new_tokens=4, num_samples=2)
    assert [text[0] for text in texts] == ["a", "a", "b", "b"]
    assert run.generate([]) == []
    assert isinstance(run.generate(max_new_tokens=4), str)
    assert run.generate("a", max_new_tokens=np.int64(4), temperature=np.float32(0)).startswith("a")
    assert len(run.generate("a", max_new_tokens=4, num_samples=3)) == 3


def test_streamed_text_joins_to_what_decoding_all_tokens_gives(run):
    # Random bytes: unfinished and invalid characters of every kind.
    prompts = ["héllo 🙂", ""]
    settings = SamplingConfig(max_new_tokens=12, temperature=2.0, num_samples=4)
    ids = [run.encode(prompt) for prompt in prompts]
    texts = [prompt for prompt in prompts for _ in range(4)]
    for row, text in run.generator.generate(ids, settings, seed=1).texts():
        assert text
        texts[row] += text
    drawn = np.concatenate(list(run.generator.generate(ids, settings, seed=1)), 1)
    for row, tokens in enumerate(drawn.tolist()):
        tokens = [token for token in tokens if token >= 0]
        assert texts[row] == run.tokenizer.decode(ids[row // 4] + tokens)
    assert texts == run.generate(prompts, **vars(settings), seed=1)


def test_what_the_context_cannot_hold_is_said(run):
    greedy = {"max_new_tokens": 1, "temperature": 0}
    with pytest.warns(UserWarning, match=r"outgrew the model's context of 32 .* last 24 to 32"):
        run.generate("The cat sat on the mat.", max_new_tokens=30)
    long = "x" * 10 + "the cat sat on the mat and ran."
    with pytest.warns(UserWarning, match="only the last of the prompt's 42 tokens"):
        text = run.generate(long, **greedy)
    read = run.model([[256, *long[-31:].encode()]])  # begin-of-text stays in front
    assert text == long + run.tokenizer.decode([int(read[0, -1].argmax())])
    with pytest.raises(ConfigError, match=r"prompt is 42 tokens long.*context is 32"):
        run.generate(long, truncate_prompt=False)


def test_a_model_of_one_stream_starts_from_the_prompt_or_a_line_break(tmp_path):
    write_tiny_run(tmp_path, end_of_text=False)
    run = lm.load(tmp_path)
    assert run.encode("cat") == list(b"cat")
    assert run.encode("") == [10]
    characters = train(TokenizerConfig(kind="char", vocab_size=20), ["the cat"])
    (tmp_path / "other").mkdir()
    write_tiny_run(tmp_path / "other", end_of_text=False, tokenizer=characters)
    with pytest.raises(ConfigError, match="prompt='' has no tokens"):
        lm.load(tmp_path / "other").encode("")


def test_an_empty_text_without_a_template_starts_from_begin_of_text(tmp_path):
    write_tiny_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["framing"] = {"before": [], "after": []}  # as of GPT-2's directory
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = lm.load(tmp_path)
    assert (run.encode("cat"), run.encode("")) == (list(b"cat"), [run.tokenizer.bos_id])


@pytest.mark.parametrize(
    "prompt, settings, words",
    [
        (None, {}, "prompt=None must be text"),
        (["a", 3], {}, "prompt=3 must be text"),
        (b"a", {}, "prompt=b'a' must be text"),
        ("a\udce9", {}, "prompt='a.udce9' is no text"),
        ("a", {"temperature": "hot"}, "temperature='hot' must be float"),
        ("a", {"temperature": float("nan")}, "temperature=nan must be"),
        ("a", {"top_k": 1.5}, "top_k=1.5 must be int"),
        ("a", {"seed": "x"}, "seed='x' must be a whole number"),
        ("a", {"num_samples": 10**9}, "num_samples=1000000000"),
    ],
)
def test_what_is_no_prompt_and_no_setting_is_named(run, prompt, settings, words):
    with pytest.raises(ConfigError, match=words):
        run.generate(prompt, **settings)


def wider(path):
    config = json.loads((path / "config.json").read_text())
    config["model"]["width"] = 64
    (path / "config.json").write_text(json.dumps(config))


HARMS = {
    "another tokenizer": (
        lambda path: train(TokenizerConfig(kind="char"), ["the cat"]).save(path / "tokenizer"),
        "not the tokenizer the model was trained with",
    ),
    "no checkpoint": (lambda path: shutil.rmtree(path / "checkpoints"), "no checkpoint yet"),
    "another model": (wider, "saved with another configuration"),
    "half a config": (
        lambda path: (path / "config.json").write_text("{"),
        r"config\.json is damaged",
    ),
    "a config alone": (lambda path: shutil.rmtree(path / "tokenizer"), "no tokenizer"),
    "Hugging Face's": (
        lambda path: (path / "config.json").write_text('{"model_type": "gpt2"}'),
        "has no weights",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_no_whole_run_is_told_apart(harm, tmp_path):
    change, words = HARMS[harm]
    write_tiny_run(tmp_path)
    change(tmp_path)
    with pytest.raises(ConfigError, match=words):
        lm.load(tmp_path)


def test_what_is_no_directory_of_a_run_is_told_apart(directory, tmp_path):
    cases = [
        (directory.parent / "tinny", "does not exist .did you mean 'tiny'"),
        (directory / "config.json", "is a file"),
        (tmp_path, "no config.json, no tokenizer"),
    ]
    for path, words in cases:
        with pytest.raises(ConfigError, match=words):
            lm.load(path)


def job(directory, **fields):
    config = defaults(GenerateJob)
    config.update({"init_from": str(directory), "max_new_tokens": 6, **fields})
    return config


def test_the_job_prints_the_texts_it_returns(directory, capsys, run):
    texts = generate_job(job(directory, prompt="The cat"), "unused")
    printed = capsys.readouterr()
    assert printed.out == texts[0] + "\n"
    assert texts[0] == run.generate("The cat", max_new_tokens=6)
    where, timing = printed.err.splitlines()
    assert where == f"{directory} at step 5:" and len(timing) <= 100
    for word in ("6 tokens", "tokens/s", "first after", "one every"):
        assert word in timing
    texts = generate_job(job(directory, prompt="ab", num_samples=3), "unused")
    blocks = [f"--- sample {i + 1}\n{text}\n" for i, text in enumerate(texts)]
    assert capsys.readouterr().out == "".join(blocks)


def test_the_job_reads_prompts_from_files_and_pipes(directory, tmp_path, monkeypatch):
    expected = generate_job(job(directory, prompt="The cat"), "unused")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "prompt.txt").write_text("The cat\n", encoding=encoding)
        from_file = job(directory, prompt_file=str(tmp_path / "prompt.txt"))
        assert generate_job(from_file, "unused") == expected
    for field in ("prompt", "prompt_file"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The cat\n")))
        assert generate_job(job(directory, **{field: "-"}), "unused") == expected


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"init_from": ""}, "config.init_from=''"),
        ({"prompt": "a", "prompt_file": "b"}, "config.prompt_file='b' must be empty"),
        ({"prompt_file": "/nowhere"}, "config.prompt_file='/nowhere' cannot be read"),
        (
            {"prompt": "x" * 40, "truncate_prompt": False},
            "prompt is 41 tokens long, but the model's context is 32",
        ),
        ({"temperature": -0.5}, "config.temperature=-0.5"),
    ],
)
def test_the_job_names_what_is_wrong(directory, fields, words):
    with pytest.raises(ConfigError) as error:
        generate_job(job(directory, **fields), "unused")
    assert words in str(error.value) and "\n" not in str(error.value)

"""Many prompts from a file of JSON lines: every text, once, whatever happens in between."""

import json

import jax
import pytest
from tiny_run import write_talker

import lm
from lm.__main__ import guarded, run
from lm.inference import batch

NEW = 6


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("runs") / "talker", max_length=64)


@pytest.fixture
def generate(talker, tmp_path, capsys):
    """What a batch of these lines leaves: its code, its output file and what is said."""

    def batch_of(lines, **fields):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "in.jsonl").write_text("\n".join(texts) + "\n")
        fields = {"init_from": talker, "max_new_tokens": NEW, **fields}
        fields = {"batch_file": tmp_path / "in.jsonl", **fields}
        fields = {"output_file": tmp_path / "out.jsonl", **fields}
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        code = guarded(run, ["--config=configs/generate.py", *words])
        return code, tmp_path / "out.jsonl", capsys.readouterr().err

    return batch_of


def read(path):
    """What a file of lines holds, by id."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


HELLO = [{"role": "user", "content": "Hello!"}]
LINES = [
    {"prompt": "The cat sat"},
    "",
    {"id": "long", "prompt": "x" * 100, "max_new_tokens": 9, "logprobs": 0},
    {"id": 7, "messages": HELLO, "temperature": 0},
    {"prompt": "", "num_samples": 3, "top_k": 5},
]


def test_a_text_is_that_of_its_line_alone_whatever_was_done_before(generate, talker):
    code, out, errors = generate(LINES, temperature=0)
    assert code == 0, errors
    assert "4 of 4 lines" in errors
    found = read(out)
    assert found.keys() == {1, "long", 7, 5}
    loaded = lm.load(talker)
    text = loaded.generate("The cat sat", temperature=0, max_new_tokens=NEW)
    assert found[1]["text"] == text.removeprefix("The cat sat")
    assert found["long"]["tokens"] <= 9 and found["long"]["logprob"] < 0
    assert "logprob" not in found[1]
    assert len(found[5]["samples"]) == 3
    template = loaded.chat_template()
    sampling = lm.inference.SamplingConfig(
        temperature=0, max_new_tokens=NEW, stop_ids=template.ends[0]
    )
    texts = loaded.generator.generate([template.encode(HELLO)], sampling).texts()
    assert found[7]["text"] == "".join(text for _, text in texts)


def test_what_a_kill_left_is_done_the_next_time_and_nothing_twice(generate, monkeypatch):
    lines = [{"prompt": f"The {i}", "id": f"é{i}"} for i in range(12)]
    code, out, _ = generate(lines)
    assert code == 0
    whole = read(out)
    written = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(written[:5]) + written[5][:7])  # torn in the middle of a character
    asked = []
    real = batch.texts
    monkeypatch.setattr(batch, "texts", lambda e, left, s: asked.extend(left) or real(e, left, s))
    assert generate(lines)[0] == 0
    assert read(out) == whole  # drawn from the same seeds
    assert len(asked) == 7
    before = out.read_bytes()
    code, _, errors = generate(lines)
    assert code == 0 and "all 12 lines were done before" in errors and out.read_bytes() == before


def test_a_stop_string_ends_a_text_before_it(generate, talker):
    prompt = {"prompt": "The cat", "max_new_tokens": 20, "temperature": 0}
    _, out, _ = generate([prompt])
    text = read(out)[1]["text"]
    stop = text[3:5]
    out.unlink()
    assert generate([{**prompt, "stop": [stop]}])[0] == 0
    found = read(out)[1]
    assert found["text"] == text[: text.index(stop)] and found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 2: it is damaged"),
        ("[]", "line 2: it is damaged: not a JSON object"),
        ({}, "line 2: it must have either 'prompt' or 'messages'"),
        ({"prompt": 3}, "line 2: prompt=3 must be text"),
        ({"messages": {}}, "line 2: messages must be a list"),
        ({"messages": [{"content": "a"}]}, "line 2: messages[0] must be an object with a 'role'"),
        ({"prompt": "a", "temprature": 1}, "did you mean 'temperature'"),
        ({"prompt": "a", "temperature": -1}, "line 2: sampling.temperature=-1"),
        ({"prompt": "a", "stop_ids": [999]}, "999 is not a token"),
        ({"prompt": "a", "id": None}, "line 2: id=None must be text or a whole number"),
        ({"prompt": "a", "id": 1}, "line 2: id=1 is line 1's already"),
        ({"prompt": "a" * 99, "truncate_prompt": False}, "line 2: prompt is 100 tokens long"),
    ],
)
def test_a_line_that_cannot_be_done_is_named_before_any_is(generate, line, says):
    code, out, errors = generate([{"prompt": "a"}, line])
    assert code == 2 and says in errors and "in.jsonl, line 2" in errors
    assert errors.count("\n") == 1 and not out.exists()


def test_another_batchs_output_is_not_touched(generate, tmp_path):
    for content, says in [
        ('{"id": "other"}\n', "line 1: id='other' is of no line of"),
        ("text\n", "line 1: it is damaged"),
    ]:
        (tmp_path / "out.jsonl").write_text(content)
        code, out, errors = generate([{"prompt": "a"}])
        assert code == 2 and says in errors and out.read_text() == content
    for fields, says in [
        (dict(output_file=""), "must both be set"),
        (dict(output_file=tmp_path / "in.jsonl"), "to different files"),
        (dict(output_file=tmp_path / "no" / "out.jsonl"), "there is no directory"),
        (dict(batch_file=tmp_path / "none.jsonl"), "none.jsonl cannot be read"),
        (dict(prompt="a"), "config.prompt='a' is not for a batch"),
        (dict(num_beams=4), "config.num_beams=4 is not for a batch"),
    ]:
        code, _, errors = generate([{"prompt": "a"}], **fields)
        assert code == 2 and says in errors


def test_what_no_text_tells_is_refused(generate, talker, capsys):
    words = ["--config=configs/generate.py", f"--config.init_from={talker}"]
    assert guarded(run, [*words, "--config.logprobs=2"]) == 2
    assert "config.logprobs=2 is not part of a text" in capsys.readouterr().err
    assert guarded(run, ["--config=configs/chat.py", *words[1:], "--config.logprobs=2"]) == 2
    assert "config.logprobs=2 is not part of a reply" in capsys.readouterr().err
    code, _, errors = generate(['{"prompt": "a"}'], prompt_logprobs=2)
    assert code == 2 and "config.prompt_logprobs=2 is not part of a text" in errors


@pytest.mark.parametrize("job", ["generate", "chat", "serve"])
def test_programs_are_kept_for_the_next_command(job, tmp_path, monkeypatch):
    directory, home = jax.config.jax_compilation_cache_dir, str(tmp_path)
    monkeypatch.setenv("HOME", home)
    words = [f"--config=configs/{job}.py", f"--config.init_from={home}/none"]
    try:
        for told, kept in ((None, f"{home}/.cache/lm/xla"), (f"{home}/own", f"{home}/own")):
            jax.config.update("jax_compilation_cache_dir", told)
            assert guarded(run, words) == 2
            assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", directory)

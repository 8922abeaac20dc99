"""Talking with a model through the command line: turns, commands, a full context, Ctrl-C."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import tiny_huggingface
from tiny_run import write_talker

import lm
from lm.__main__ import guarded, run
from lm.inference import SamplingConfig
from lm.inference.generate import Generation

NEW = 6  # tokens of a reply


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("runs") / "talker", max_length=128)


@pytest.fixture
def chat(talker, monkeypatch, capsys, tmp_path):
    """What a session with these lines leaves: its code, output, errors and messages."""

    def session(*lines, **fields):
        fields = {"init_from": talker, "max_new_tokens": NEW, "temperature": 0, **fields}
        saved = tmp_path / "talk.jsonl"
        text = "\n".join([*lines, f"/save {saved}"]) + "\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        code = guarded(run, ["--config=configs/chat.py", *words])
        out, errors = capsys.readouterr()
        messages = json.loads(saved.read_text())["messages"] if saved.exists() else []
        return code, out, errors, messages

    return session


def replies(talker, messages, system=()):
    """What the model says to each message, given all before it."""
    loaded = lm.load(talker)
    template = loaded.chat_template()
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW, stop_ids=template.ends[0])
    said = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            ids = template.encode(messages[:i])
            texts = loaded.generator.generate([ids], sampling).texts()
            said.append("".join(text for _, text in texts))
    return said


def test_each_reply_is_the_models_to_the_whole_conversation(chat, talker):
    code, out, errors, messages = chat("Hello!", "", "  And <|im_end|> now?", system="Be brief.")
    assert code == 0
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in messages[:4:2]] == ["Be brief.", messages[2]["content"]]
    assert messages[3]["content"] == "  And <|im_end|> now?"
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert said == replies(talker, messages)
    assert out == "".join(text + "\n" for text in said)
    assert errors.count("tokens/s") == 2 and errors.count("first after") == 2


def test_what_is_taken_back_was_never_said(chat):
    plain = chat("One", "Two")[3]
    # Greedy: another reply is the same again.
    assert chat("More", "/reset", "One", "Other", "/undo", "Two", "/retry")[3] == plain
    first, again = (
        chat("One", *more, temperature=2.0)[3][-1]["content"] for more in ([], ["/retry"])
    )
    assert first != again


def test_a_message_of_several_lines_stands_between_quotes(chat):
    messages = chat('"""', "One", "/reset", 'Two"""', '"""Three"""')[3]
    assert [m["content"] for m in messages[::2]] == ["One\n/reset\nTwo", "Three"]


def test_a_line_that_cannot_be_followed_ends_nothing(chat):
    lines = {
        "/resett": "error: /resett is no command: /help lists them",
        "/undo": "error: there is no message to take back",
        "/save": "error: /save needs the name of a file",
        "/save /nowhere/at/all": "error: /save /nowhere/at/all: No such file",
        "x" * 200: "error: the message makes",
        "/help": "/retry ",
    }
    code, _, errors, messages = chat(*lines, "Hello!")
    assert code == 0 and all(says in errors for says in lines.values())
    assert [m["role"] for m in messages] == ["user", "assistant"]


def test_the_oldest_turns_leave_a_full_context(chat, talker):
    code, _, errors, messages = chat(*["Twenty characters :)"] * 5, system="Brief.")
    assert code == 0 and len(messages) == 11
    notes = [line for line in errors.splitlines() if "left out" in line]
    assert notes and "context of 128 tokens is full: the oldest 1 of" in notes[0]
    # What the model read last is the system's message and the turns that were not left out.
    left_out = int(notes[-1].partition("oldest ")[2].split()[0])
    read = [messages[0], *messages[1 + 2 * left_out :]]
    assert replies(talker, read)[-1] == messages[-1]["content"]


def test_ctrl_c_stops_a_reply_and_not_the_program(chat, monkeypatch):
    whole = Generation.__iter__
    asked = []

    def interrupted(self):
        asked.append(self)
        for i, tokens in enumerate(whole(self)):
            if len(asked) == 1 and i == 1:
                raise KeyboardInterrupt
            yield tokens

    monkeypatch.setattr(Generation, "__iter__", interrupted)
    code, _, errors, messages = chat("One", "Two")
    assert code == 0 and errors.count("note: stopped") == 1
    assert [m["role"] for m in messages] in (["user", "assistant"] * 2, ["user", "assistant"])


def test_a_base_model_is_talked_to_only_where_a_template_is_chosen(chat, tmp_path):
    tiny_huggingface.write_directory(tmp_path / "base")
    code, _, errors, _ = chat("Hi", init_from=tmp_path / "base")
    assert code == 2 and "config.chat_template=''" in errors and "chat_template=chatml" in errors


def test_mistakes_are_one_line(chat, talker, tmp_path):
    for fields, says in [
        (dict(chat_template="chatm"), "did you mean 'chatml'"),
        (dict(num_samples=2), "config.num_samples=2 must be 1"),
        (dict(init_from=""), "config.init_from='' must name"),
    ]:
        code, _, errors, _ = chat("Hi", **fields)
        assert code == 2 and says in errors and errors.count("\n") == 1


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_a_reply_and_ctrl_d_leaves(talker):
    ours, theirs = pty.openpty()
    words = ["--config=configs/chat.py", f"--config.init_from={talker}"]
    words += ["--config.max_new_tokens=1000000", "--config.stop_at_end_of_text=False"]
    program = subprocess.Popen(
        [sys.executable, "main.py", *words],
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""

    def until(text):
        nonlocal shown
        began = time.monotonic()
        while text not in shown and time.monotonic() - began < 300:
            shown += os.read(ours, 4096)
        shown = shown.partition(text)[2]

    until(b"> ")
    told = False
    for _ in range(60):  # one that comes while the prompt is still being written goes unnoticed
        program.send_signal(signal.SIGINT)  # at the prompt it leaves the program alone
        if told := bool(select.select([program.stderr], [], [], 1)[0]):
            break
    assert told
    os.write(ours, b"Hello\n")
    until(b"Hello")
    until(b"> ")
    os.write(ours, b"\x04")
    assert program.wait(300) == 0
    assert b"Ctrl-D leaves" in program.stderr.read()

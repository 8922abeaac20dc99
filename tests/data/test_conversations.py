"""Lines of conversations in the forms of others, and errors that name file, line and field."""

import dataclasses
import gzip
import json

import pytest

from lm.config import ConfigError
from lm.data import DataConfig, examples
from lm.data.lines import LINES
from lm.data.storage import GENERATED

ASKED = {"role": "user", "content": "Where is the cat?"}
SAID = {"role": "assistant", "content": "On the mat."}
WRONG = {"role": "assistant", "content": "In the sea."}
TOLD = {"role": "system", "content": "Be brief."}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path, objective="", notify=lambda line: None, **fields):
    config = DataConfig(path=str(path), validation_fraction=0.0, **fields)
    train, validation = examples(config, 0, objective, notify)
    assert validation == []
    return train[0]


@pytest.mark.parametrize(
    "line, prompt, replies",
    [
        ({"messages": [TOLD, ASKED, SAID]}, (), ((TOLD, ASKED, SAID),)),
        ({"prompt": ASKED["content"], "response": "On the mat."}, (ASKED,), ((SAID,),)),
        ({"prompt": [TOLD, ASKED], "completion": [SAID]}, (TOLD, ASKED), ((SAID,),)),
        (
            {"system": "Be brief.", "prompt": ASKED["content"], "completion": "On the mat."},
            (TOLD, ASKED),
            ((SAID,),),
        ),
        (
            {"instruction": "Where is", "input": "the cat?", "output": "On the mat."},
            ({"role": "user", "content": "Where is\n\nthe cat?"},),
            ((SAID,),),
        ),
        (
            {"instruction": ASKED["content"], "input": "", "output": "On the mat."},
            (ASKED,),
            ((SAID,),),
        ),
        (
            {"prompt": ASKED["content"], "chosen": "On the mat.", "rejected": [WRONG]},
            (ASKED,),
            ((SAID,), (WRONG,)),
        ),
        (
            {"chosen": [TOLD, ASKED, SAID], "rejected": [TOLD, ASKED, WRONG, ASKED, SAID]},
            (TOLD, ASKED),
            ((SAID,), (WRONG, ASKED, SAID)),
        ),
        (
            {"prompt": ASKED["content"], "chosen": [ASKED, SAID], "rejected": [ASKED, WRONG]},
            (ASKED,),
            ((SAID,), (WRONG,)),
        ),
        ({"prompt": ASKED["content"], "answer": "mat"}, (ASKED,), ()),
    ],
)
def test_every_form_is_known_by_its_fields(tmp_path, line, prompt, replies):
    (found,) = read(write(tmp_path / "a.jsonl", line))
    assert (found.prompt, found.replies) == (prompt, replies)
    if "answer" in line:
        assert found.fields == {"answer": "mat"}
    assert found.question[-1]["content"].startswith("Where is")
    assert found.answer in ("On the mat.", "")


def test_labels_margins_tools_and_weights_come_along(tmp_path):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    call = {"function": {"name": "look", "arguments": '{"at": 1}'}, "type": "function"}
    talk = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (found,) = read(write(tmp_path / "a.jsonl", {"messages": talk, "tools": [tool]}))
    assert found.tools == [tool]
    called = {"name": "look", "arguments": {"at": 1}}
    assert found.replies[0][1] == {
        "role": "assistant", "tool_calls": [{"function": called, "type": "function"}]
    }  # fmt: skip
    (found,) = read(
        write(tmp_path / "b.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2})
    )
    assert found.margin == 2.0
    lines = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, 1)]
    assert [f.label for f in read(write(tmp_path / "c.jsonl", *lines))] == [True, False, True]


def test_files_may_be_packed_several_and_not_lines(tmp_path):
    line = {"messages": [ASKED, SAID]}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(line).encode() + b"\n\n"))
    (tmp_path / "b.json").write_text(json.dumps([line, line]))
    found = read(tmp_path / "*.js*")
    assert len(found) == 3
    assert [f.place.split("/")[-1] for f in found] == [
        "a.jsonl.gz line 1", "b.json record 1", "b.json record 2"
    ]  # fmt: skip


BAD = [
    ({"messages": [{"content": "a"}]}, r"messages\[0\].role must be text"),
    ({"messages": [ASKED, {"role": "assistant"}]}, r"messages\[1\].content must be text"),
    ({"messages": []}, "messages must be a list of messages"),
    ({"message": [ASKED]}, "of no form.*did you mean 'messages'"),
    ({"prompt": 3, "response": "a"}, "prompt must be text, not int"),
    ({"prompt": [SAID], "response": "a"}, "prompt must not end with a reply"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, "label='yes' must be true or false"),
    ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
    ({"chosen": [ASKED, SAID], "rejected": [TOLD, WRONG]}, r"chosen\[0\] must be the assistant's"),
    (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        r"messages\[1\].tool_calls\[0\] must name its function",
    ),
    (["a"], "must be an object"),
]


@pytest.mark.parametrize("line, says", BAD)
def test_a_bad_line_is_named_with_its_file_and_field(tmp_path, line, says):
    with pytest.raises(ConfigError, match=f"data.path: .*a.jsonl line 1: .*{says}"):
        read(write(tmp_path / "a.jsonl", line))


def test_later_bad_lines_are_left_out_and_told_or_refused(tmp_path):
    good = {"messages": [ASKED, SAID]}
    path = write(tmp_path / "a.jsonl", good, {"messages": "hello"}, {"prompt": "a"}, good)
    with open(path, "a") as file:
        file.write("{\n")
    told = []
    assert len(read(path, "sft", told.append)) == 2
    assert [line.split("a.jsonl ")[1] for line in told] == [
        "line 2: messages must be a list of messages",
        "line 3: messages is missing",
        "line 5: not JSON",
    ]
    with pytest.raises(ConfigError, match="line 2: messages must be"):
        read(path, "sft", on_bad_file="refuse")


def test_a_form_of_no_use_to_the_objective_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [ASKED, SAID]})
    with pytest.raises(ConfigError, match="'messages', and objective 'dpo' needs 'preference'"):
        read(path, "dpo")
    with pytest.raises(ConfigError, match="line 1: prompt is missing"):
        read(path, "sft", format="prompt_response")


def test_equal_questions_are_on_one_side_and_none_is_on_both(tmp_path):
    lines = [
        {"prompt": f"question {n % 50}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(200)
    ]
    config = DataConfig(path=str(write(tmp_path / "a.jsonl", *lines)), validation_fraction=0.2)
    (train,), (validation,) = examples(config, 0, "dpo")
    assert len(train) + len(validation) == 200 and len(validation) > 10
    asked = [{one.prompt[0]["content"] for one in side} for side in (train, validation)]
    assert not asked[0] & asked[1]
    few = dataclasses.replace(config, path=str(write(tmp_path / "b.jsonl", *lines[:3])))
    (train,), (validation,) = examples(few, 0, "dpo")
    assert (len(train), len(validation)) == (2, 1)


def test_other_fields_come_along_and_a_file_of_its_own_may_be_held_out(tmp_path):
    line = {"prompt": "a", "response": "b", "answer": [1, 2], "tools": []}
    config = DataConfig(
        path=str(write(tmp_path / "a.jsonl", line)),
        validation_path=str(write(tmp_path / "b.jsonl", {**line, "prompt": "c"})),
    )
    (train,), (validation,) = examples(config, 0, "sft")
    assert [one.fields for one in train] == [{"response": "b", "answer": [1, 2]}]
    assert [one.question[0]["content"] for one in validation] == ["c"]


def test_generated_lines_have_some_of_their_own_to_validate_on():
    for name, objective in (("instructions", "sft"), ("preferences", "reward"), ("prompts", "")):
        config = DataConfig(path=f"storyworld_{name}", num_documents=20, validation_fraction=0.2)
        (train,), (validation,) = examples(config, 3, objective)
        assert (len(train), len(validation)) == (20, 4)
        assert train == examples(config, 3, objective)[0][0]
        stories = [{one.question[0]["content"] for one in side} for side in (train, validation)]
        assert not stories[0] & stories[1]
    assert {"storyworld", "translation", *LINES} == {*GENERATED}
    with pytest.raises(ConfigError, match="did you mean 'storyworld_prompts'"):
        examples(DataConfig(path="storyworld_promts"), 3)
    with pytest.raises(ConfigError, match="'storyworld' holds texts, and conversations"):
        examples(DataConfig(path="storyworld"), 3, "sft")

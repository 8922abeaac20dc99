"""Tasks of lm-evaluation-harness in an examination: local ones, which need no network."""

import functools
import json
import sys
from unittest import mock

import jax
import pytest
from test_main import main
from tiny_run import write_talker, write_tiny_run

from lm.evaluation.core import TASKS
from lm.jobs import evaluate
from lm.parallel.layout import lay_out

lm_eval = pytest.importorskip("lm_eval")

CHOICE = """
output_type: multiple_choice
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITTEN = """
output_type: generate_until
doc_to_text: query
doc_to_target: "{{choices[gold]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: digits
    filter:
      - function: regex
        regex_pattern: "never (written)"
      - function: take_first
"""
WHOLE = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: query
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, a run that chats, and three tasks of twenty documents."""
    place = tmp_path_factory.mktemp("benchmarks")
    write_tiny_run(place / "run", max_length=32)
    write_talker(place / "talker", max_length=128)
    with (place / "documents.jsonl").open("w") as file:
        for i in range(20):
            query = f"The cat {i} is in the" + " big" * (4 if i < 3 else 0)  # some do not fit
            file.write(json.dumps({"query": query, "choices": ["mat", "box"], "gold": i % 2}))
            file.write("\n")
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("whole", WHOLE)):
        write_task(place / f"{name}.yaml", name, text, place)
    return place


def write_task(path, name, text, place):
    data = f"  data_files:\n    test: {place}/documents.jsonl\n"
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n{data}test_split: test"
    path.write_text(head + text)


def examine(place, *words, run="run", out="out"):
    words = [f"--config.harness.{word.replace('HERE', str(place))}" for word in words]
    one = functools.partial(lay_out, devices=jax.devices()[:1])
    with mock.patch.object(evaluate, "lay_out", one):
        code, _, error = main(
            "--config=configs/evaluate.py", f"--config.init_from={place / run}",
            f"--workdir={place / out}", "--config.suites=harness", *words,
        )  # fmt: skip
    card = place / out / "card.json"
    return code, json.loads(card.read_text())["sections"]["harness"] if code == 0 else error


def test_local_tasks_come_with_intervals_and_what_was_cut_or_not_understood(place):
    code, found = examine(
        place, *(f"tasks=HERE/{name}.yaml" for name in ("choice", "written", "whole"))
    )
    assert code == 0, found
    scores = {score["name"]: score for score in found["scores"]}
    assert [*scores] == ["choice acc", "written exact_match (digits)", "whole bits_per_byte"]
    choice, written, whole = scores.values()
    assert choice["chance"] == 0.5 and choice["unparsed"] is None
    assert choice["estimate"]["value"] == pytest.approx(sum(choice["items"]) / 20)
    assert 0 < choice["estimate"]["low"] < choice["estimate"]["value"] < choice["estimate"]["high"]
    assert choice["truncated"] == written["truncated"] == 3
    assert written["unparsed"] == 20 and written["estimate"]["value"] == 0
    assert whole["items"] == [] and whole["estimate"]["error"] > 0  # no mean: it is resampled
    assert whole["better"] == "lower"
    # An interrupted examination asks for nothing twice; other weights are asked anew.
    cache = place / "out" / "harness.jsonl"
    answers = cache.read_text()
    assert len(answers.splitlines()) == 20 * 2 + 20 + 20
    assert examine(place, "tasks=HERE/choice.yaml")[1]["scores"][0] == choice
    assert cache.read_text() == answers
    write_tiny_run(place / "other", steps=(4,), max_length=32)
    shared = f"cache={cache}"
    examine(place, "tasks=HERE/choice.yaml", "limit=2", shared, run="other", out="others")
    assert len(cache.read_text().splitlines()) == 80 + 4


def test_a_chat_model_is_asked_in_its_template(place):
    words = "tasks=HERE/choice.yaml", "limit=2", "num_fewshot=1", "apply_chat_template"
    code, found = examine(place, *words, run="talker", out="talked")
    assert code == 0, found
    assert "<|im_start|>" in found["samples"][0]["parts"]["asked"]
    assert found["tables"][0]["rows"][0][3:] == [1, 2]  # shots, documents
    code, error = examine(place, *words)
    assert code == 2 and "config.harness.apply_chat_template=True" in error


MISTAKES = {
    "no task": ([], ["config.suites='harness'", "config.harness.tasks names none"]),
    "missing file": (["tasks=HERE/choize.yaml"], ["no such file", "choice.yaml"]),
    "broken file": (["tasks=HERE/documents.jsonl"], ["documents.jsonl", "cannot be loaded"]),
    "missing data": (["tasks=HERE/nodata.yaml"], ["nodata.yaml", "cannot be loaded"]),
    "too many shots": (["tasks=HERE/choice.yaml", "num_fewshot=21"],
        ["config.harness.num_fewshot=21", "choice has 20 documents"]),
    "too long": (["tasks=HERE/written.yaml", "max_new_tokens=32"],
        ["config.harness.max_new_tokens=32", "written asks for 32", "context has 32"]),
    "no directory": (["tasks=HERE/choice.yaml", "include_path=HERE/none"],
        ["config.harness.include_path", "not a directory"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_a_line_before_any_work(place, name):
    words, said = MISTAKES[name]
    task = (place / "choice.yaml").read_text().replace("documents.jsonl", "none.jsonl")
    (place / "nodata.yaml").write_text(task)
    code, error = examine(place, *words, out="mistaken")
    line = error.splitlines()[-1]
    assert code == 2 and line.startswith("error: "), error
    assert all(part in line for part in said), line
    assert not (place / "mistaken" / "harness.jsonl").exists()


def test_without_the_harness_the_way_to_install_it_is_told(place, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lm.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, error = examine(place, "tasks=HERE/choice.yaml")
    assert code == 2 and "pip install 'lm[eval]'" in error and len(error.splitlines()) == 1


def test_core_is_reported_where_all_its_tasks_are(place, tmp_path, monkeypatch):
    import lm_eval.tasks

    alone = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults: alone(None, include_path),
    )
    for task in TASKS[:-1]:
        write_task(tmp_path / f"{task.name}.yaml", task.name, CHOICE, place)
    words = "core", f"include_path={tmp_path}", "limit=4"
    code, found = examine(place, *words)
    assert code == 0, found
    assert "for want of 1 of its 22 tasks" in found["about"]
    assert found["scores"][0]["name"] == "CORE hellaswag_zeroshot acc"
    assert found["tables"][-1]["rows"][0][0] == TASKS[-1].name
    write_task(tmp_path / "last.yaml", TASKS[-1].name, CHOICE, place)
    code, found = examine(place, *words)
    rows = {row[0]: row[1:] for row in found["tables"][-1]["rows"]}
    assert rows["arc_easy"][:2] == [10, 0.25] and rows["commonsense_qa"][:2] == [10, 0.403]
    assert found["scores"][0]["name"] == "CORE"
    by_hand = [(accuracy - chance) / (1 - chance) for _, chance, accuracy, _ in rows.values()]
    assert found["scores"][0]["estimate"]["value"] == pytest.approx(sum(by_hand) / 22)


@pytest.mark.slow
def test_its_own_tasks_are_found_by_name(place, monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager()  # reads thousands of files
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)
    assert {task.harness for task in TASKS if task.harness} <= {*manager.task_index}
    code, error = examine(place, "tasks=arc_eazy")
    assert code == 2 and "no such task (did you mean 'arc_easy'" in error

"""Public benchmarks and task files of one's own, through lm-evaluation-harness (extra [eval])."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lm.config import ConfigError, Count, Path, check, to_dict
from lm.evaluation.card import NotApplicable, Sample, Score, Section, Table, digest
from lm.evaluation.core import TASKS, CoreTask, centred, core
from lm.evaluation.statistics import NORMAL, Estimate, bootstrap, mean, share
from lm.evaluation.subject import Subject
from lm.training.checkpoint_files import fingerprint

if TYPE_CHECKING:
    from lm.evaluation.harness import HarnessModel

_FIELD = "config.harness"
_DRAWS = 1000  # resamples for the standard error of a score that is no mean
_INVALID = ("[invalid]", "invalid")  # what the harness's filters make of what they cannot parse
_SHOWN = 3  # samples of each task


@dataclasses.dataclass(frozen=True)
class HarnessSettings:
    """Which tasks of lm-evaluation-harness, and how much of them."""

    tasks: tuple[str, ...] = ()  # names of tasks, groups and tags, or YAML files of your own
    core: bool = False  # DCLM's CORE: its 22 tasks, as far as their data can be had
    include_path: Path = ""  # a directory of task files, which are found by name too
    limit: Count = 0  # documents of each task, the first ones; 0: all
    num_fewshot: Count | None = None  # examples before each question; None: what the task says
    max_new_tokens: Count = 0  # of a written answer; 0: what the task says, or 256
    apply_chat_template: bool = False  # ask in the model's chat template
    # A file of answers that are not asked for again; "": harness.jsonl in the run directory.
    cache: Path = ""


class _Asked(NamedTuple):
    """What is run at once: a task, or a group of them."""

    name: str
    loaded: Mapping[str, Any]  # as TaskManager.load has it
    core: CoreTask | None = None
    chance: float = 0.0  # of `core`


def measure(subject: Subject, settings: HarnessSettings, seed: int) -> Section:
    """Scores of each task, as the harness computes them, with the documents' own ones.

    Raises:
      NotApplicable: no task is named.
      ConfigError: the harness is not installed; a task or its data is missing; more examples than
        documents; an answer that is too long for the context.
    """
    if not (settings.tasks or settings.core):
        raise NotApplicable(f"{_FIELD}.tasks names none")
    try:
        from lm.evaluation.harness import HarnessModel
    except ImportError as error:
        raise ConfigError(
            f"{_FIELD}.tasks needs the package {error.name!r}: pip install 'lm[eval]'"
        ) from None
    check(
        subject.template is not None or not settings.apply_chat_template,
        f"{_FIELD}.apply_chat_template=True: {subject.run.directory} has no chat template",
    )
    asked, missing = _all(settings)
    for one in asked:
        for task in one.loaded["tasks"].values():
            _prepare(task, settings, subject.max_length, one.core)
    config = to_dict(subject.scorer.config)
    weights = f"{fingerprint(subject.run.params)} {digest([config])}"
    model = HarnessModel(subject, settings.cache, weights, seed)
    scores: list[Score] = []
    samples: list[Sample] = []
    rows: list[list[Any]] = []
    counted: dict[str, tuple[Estimate, float]] = {}
    for one in asked:
        model.cut.clear()
        results = _evaluate(model, one, settings)
        found = list(_scores(one, results, model.cut))
        seen = {score.name for score in scores}  # a task may be in several groups
        scores += [score for _, score in found if score.name not in seen]
        for name, said in results["samples"].items():
            samples += _samples(name, said)
            label = f"CORE {one.core.name}" if one.core else name
            shots, version = results["n-shot"][name], results["versions"][name]
            rows.append([label, name, str(version), shots, len({s["doc_id"] for s in said})])
        if one.core:
            counted[one.core.name] = _accuracy(one.core, dict(found)), one.chance
    tables = [Table("Tasks", ["task", "of the harness", "version", "shots", "documents"], rows)]
    about = "Tasks of lm-evaluation-harness, which also scores the answers."
    if settings.core:
        about += " " + _core_about(missing)
        tables.append(_core_table(counted))
        if missing:
            tables.append(Table("Missing for CORE", ["task", "why"], [*missing.items()]))
        else:
            score = Score(
                "CORE",
                core(counted),
                "higher",
                "mean centred accuracy, DCLM's 22 tasks",
                chance=0.0,
            )
            scores.insert(0, score)
    if settings.limit:
        about += f" At most {settings.limit:,} documents of each."
    return Section("harness", "Benchmarks", about, scores, tables, (), samples)


# ---- Tasks


def _all(settings: HarnessSettings) -> tuple[list[_Asked], dict[str, str]]:
    """What is asked, loaded; and which tasks of CORE are not to be had, and why."""
    from lm_eval.tasks import TaskManager

    include = pathlib.Path(settings.include_path).expanduser() if settings.include_path else None
    check(
        include is None or include.is_dir(),
        f"{_FIELD}.include_path={settings.include_path!r} is not a directory",
    )
    # To read thousands of its own files takes the harness many seconds.
    alone = [_alone(name) for name in settings.tasks]
    manager = TaskManager(include_path=include, include_defaults=settings.core or not all(alone))
    asked = [_Asked(name, _load(manager, name)) for name in dict.fromkeys(settings.tasks)]
    missing: dict[str, str] = {}
    for task in TASKS if settings.core else ():
        entry = manager.task_index.get(task.name)
        path = entry and entry.yaml_path
        theirs = not (include and path and include.resolve() in path.resolve().parents)
        name = task.harness if theirs else task.name
        own_chance = task.own_chance is not None and not theirs
        try:
            check(bool(name), "the harness has no such task: give one in include_path")
            loaded = _load(manager, name)
        except ConfigError as error:
            missing[task.name] = str(error)
            continue
        chance = task.own_chance if own_chance else task.chance
        asked.append(_Asked(task.name, loaded, task, chance))
    check(
        bool(asked),
        f"{_FIELD}.core=True: none of its tasks can be had; {next(iter(missing.values()), '')}",
    )
    return asked, missing


def _alone(name: str) -> bool:
    """Whether it is a file with a task, which needs no other file to be known.

    Raises:
      ConfigError: it is the path of a file, and there is none.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        return not any(one.startswith("group:") for one in text.splitlines())
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        near = _meant(name, map(str, path.parent.glob("*.y*ml")))
        raise ConfigError(f"{_FIELD}.tasks={name!r}: there is no such file{near}")
    return False


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [*known], 3, 0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _load(manager: Any, name: str) -> Mapping[str, Any]:
    check(
        name in manager.task_index or pathlib.Path(name).expanduser().is_file(),
        f"{_FIELD}.tasks={name!r}: the harness has no such task" + _meant(name, manager.all_tasks),
    )
    try:
        with _quietly():
            return manager.load([name])
    except Exception as error:  # of the harness, of a data set's code, or of the network
        said = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        raise ConfigError(f"{_FIELD}.tasks={name!r} cannot be loaded: {kind}: {said}") from None


def _prepare(
    task: Any, settings: HarnessSettings, max_length: int, of_core: CoreTask | None
) -> None:
    """Sets what `settings` say, and finds what cannot work before any work is done."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from lm.evaluation.harness import MAX_NEW_TOKENS, sampling_of

    name = task.config.task
    shots = of_core.shots if of_core else settings.num_fewshot
    said = task.config.num_fewshot
    if shots is None or (said == 0 and not of_core):  # a task's own 0 is meant, the harness holds
        shots = said or 0
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as whoever runs the harness itself
    if shots:
        with _quietly():
            docs = task.fewshot_docs()
            there = len(docs) if hasattr(docs, "__len__") else len([*docs])
        split = getattr(getattr(task, "fewshot_cfg", None), "split", None)
        there -= split is not None and split == task.config.test_split  # not the question itself
        check(
            shots <= there,
            f"{_FIELD}.num_fewshot={shots}: {name} has {there} documents to take examples from",
        )
    check(
        not getattr(task, "UNSAFE_CODE", False),
        f"{_FIELD}.tasks: {name} runs the code that a model writes, which is not done here",
    )
    check(
        not getattr(task, "MULTIMODAL", False),
        f"{_FIELD}.tasks: {name} shows pictures, and the model reads text",
    )
    if task.OUTPUT_TYPE == "generate_until":
        if settings.max_new_tokens:
            kwargs = {"max_gen_toks": settings.max_new_tokens}
            task.set_config("generation_kwargs", kwargs, update=True)
        limit = sampling_of(task.config.generation_kwargs or {}).max_new_tokens
        check(
            limit < max_length,
            f"{_FIELD}.max_new_tokens={settings.max_new_tokens}: {name} asks for {limit} new "
            f"tokens ({MAX_NEW_TOKENS} where it does not say), and the model's context has "
            f"{max_length}: set it lower",
        )


def _evaluate(model: HarnessModel, one: _Asked, settings: HarnessSettings) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate

    with _quietly():
        return evaluate(
            lm=model,
            task_dict=one.loaded,
            limit=settings.limit or None,
            bootstrap_iters=_DRAWS,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the harness prints; its standard errors without processes of their own."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ---- Scores


def _scores(
    one: _Asked, results: Mapping[str, Any], cut: Mapping[str, set]
) -> Iterator[tuple[str, Score]]:
    """(metric, score) of each task, and of each group over its tasks."""
    for name, values in results["results"].items():
        task, said = one.loaded["tasks"].get(name), results["samples"].get(name, [])
        better = results["higher_is_better"].get(name, {})
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            here = [s for s in said if s["filter"] == chosen and metric in s]
            raw = [s[metric] for s in here]
            items = _items(raw, value)
            aggregate = task and task.aggregation().get(metric)
            label = f"CORE {one.core.name}" if one.core else name
            parsed = task is not None and task.OUTPUT_TYPE == "generate_until" and chosen != "none"
            yield (
                metric,
                Score(
                    f"{label} {metric}" + (f" ({chosen})" if chosen != "none" else ""),
                    _estimate(
                        metric, value, error, items, raw or [None] * values["sample_len"], aggregate
                    ),
                    {True: "higher", False: "lower"}.get(better.get(metric), "none"),
                    f"{len(one.loaded['tasks'])} tasks" if task is None else "",
                    unparsed=sum(_unparsed(s["filtered_resps"]) for s in here) if parsed else None,
                    truncated=None if task is None else len(cut.get(name, ())),
                    chance=_chance(task, metric, here),
                    items=items,
                    fraction=bool(items) and min(items) >= 0 and max(items) <= 1,
                    asked=digest([name, metric, chosen, *(s["doc_hash"] for s in here)])
                    if items
                    else "",
                ),
            )


def _items(values: Sequence[Any], mean_of_them: float) -> list[float]:
    """Each document's score, if the task's is their mean."""
    if not values or not all(
        isinstance(v, bool | int | float) or hasattr(v, "item") for v in values
    ):
        return []
    found = [float(v) for v in values]
    same = math.isclose(sum(found) / len(found), mean_of_them, rel_tol=1e-6, abs_tol=1e-9)
    return found if same else []


def _estimate(
    metric: str, value: float, error: Any, items: Sequence[float], raw: Sequence[Any], sum_up: Any
) -> Estimate:
    """With the harness's standard error, which of a mean is that of `statistics.mean`.

    Where the harness has none, the task's own way to sum up is bootstrapped. The interval of a
    perplexity is that of its logarithm, so that it has no negative end.
    """
    if items:
        return share(items) if {*items} <= {0.0, 1.0} else mean(items)
    if not (isinstance(error, int | float) and math.isfinite(error)):
        if not sum_up:
            return Estimate(value, math.nan, -math.inf, math.inf, len(raw), len(raw))
        drawn = bootstrap(lambda some: sum_up([raw[i] for i in some]), len(raw), draws=_DRAWS)
        error = drawn.error
    low, high = value - NORMAL * error, value + NORMAL * error
    if metric.endswith("perplexity") and value > 0:
        factor = math.exp(min(NORMAL * error / value, 99.0))
        low, high = value / factor, value * factor
    return Estimate(value, error, low, high, len(raw), len(raw))


def _unparsed(answers: Sequence[Any]) -> bool:
    return any(
        one in _INVALID or (isinstance(one, list | tuple) and {*map(str, one)} <= {*_INVALID})
        for one in answers
    )


def _chance(task: Any, metric: str, said: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a choice among several, by accuracy: one of as many as there are."""
    if task is None or task.OUTPUT_TYPE != "multiple_choice" or not said:
        return None
    if metric not in ("acc", "acc_norm", "acc_bytes", "exact_match"):
        return None
    try:
        return sum(1 / len(task.doc_to_choice(s["doc"])) for s in said) / len(said)
    except Exception:  # a task with code of its own
        return None


def _samples(name: str, said: Sequence[Mapping[str, Any]]) -> Iterator[Sample]:
    for one in said[:_SHOWN]:
        asked = one["arguments"]
        answers = one["filtered_resps"]
        if len(asked) > 1 and all(isinstance(a, tuple | list) for a in answers):
            best = max(range(len(asked)), key=lambda i: answers[i][0])
            answer = str(asked[best][-1])
        else:
            answer = str(answers[0])
        right = next((one[m] for m in one["metrics"] if one[m] in (0, 1)), None)
        parts = {"task": name, "asked": str(asked[0][0])[-600:], "answer": answer}
        parts["right"] = str(one["target"])
        yield Sample(parts, None if right is None else bool(right))


# ---- CORE


def _accuracy(task: CoreTask, found: Mapping[str, Score]) -> Estimate:
    for metric in (task.metric, "acc_norm", "acc", "exact_match", "em", "contains"):
        if metric in found:
            return found[metric].estimate
    raise ConfigError(f"{_FIELD}.core: {task.name} has no accuracy, but {', '.join(found)}")


def _core_about(missing: Mapping[str, str]) -> str:
    if not missing:
        return (
            "CORE centres each accuracy: 0 is chance, 1 is all right. Prompts are the harness's "
            "but for tasks in include_path, so it is near to DCLM's own figure and not the same."
        )
    return f"CORE is not reported, for want of {len(missing)} of its {len(TASKS)} tasks."


def _core_table(counted: Mapping[str, tuple[Estimate, float]]) -> Table:
    rows = [
        [task.name, task.shots, chance, estimate.value, centred(estimate.value, chance)]
        for task in TASKS
        if task.name in counted
        for estimate, chance in [counted[task.name]]
    ]
    return Table("CORE", ["task", "shots", "chance", "accuracy", "centred"], rows)

"""The command line: words become values by the type of the field, whatever they look like."""

import copy
import functools
import math
import operator
import os
import re
import subprocess
import sys
import typing

import pytest
import tiny_jobs

import lm
from lm import command
from lm.__main__ import JOBS
from lm.command import read
from lm.config import ConfigError, defaults, to_dict, view

CONFIGS = sorted(path.stem for path in (tiny_jobs.REPOSITORY / "configs").glob("*.py"))
TEXTS = (
    "True", "1,2", '{"a": 1}', "'quoted'", '"', "None", "[1]", "007", "1e3", "", " ", "(a, b)",
    "é\n\u2028", "--config.x=1", "a=b", "-",
)  # fmt: skip
TWO = ("--config.data.path=a", "--config.data.path=b")


def section(name: str) -> type:
    module, _, kind = JOBS[name].rpartition(".")
    return getattr(__import__(module, fromlist=[kind]), kind)


def at(config, field: str):
    return functools.reduce(operator.getitem, field.split("."), config)


def fields_of(job: str, wanted) -> list[str]:
    return [f for f, hint in command._leaves(section(job)).items() if wanted(hint)]


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.chdir(tiny_jobs.REPOSITORY)


@pytest.mark.parametrize("name", CONFIGS)
def test_text_arrives_to_the_letter_in_every_field_of_text(name):
    job = read([f"--config={name}"], JOBS).config.job
    several = typing.Union[str, tuple[str, ...]]  # noqa: UP007
    for field in fields_of(job, lambda hint: hint in (str, str | tuple[str, ...], several)):
        for text in TEXTS if field != "job" else ():
            assert (
                at(read([f"--config={name}", f"--config.{field}={text}"], JOBS).config, field)
                == text
            )
    for field in fields_of(job, lambda hint: hint == tuple[str, ...]):
        words = [f"--config.{field}={text}" for text in TEXTS]
        assert at(read([f"--config={name}", *words], JOBS).config, field) == TEXTS


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--config.prompt=a", "--config.prompt=b"], "prompt", ("a", "b")),
        (["--config.prompt", "a b"], "prompt", "a b"),
        (["-config.seed=7"], "seed", 7),
        (["--config.zero", "-1"], "zero", -1),
        (["--config.seed=1", "--config.seed=2"], "seed", 2),
        (["--config.model.dropout=1e-1"], "model.dropout", 0.1),
        (["--config.model.dropout=0"], "model.dropout", 0.0),
        (["--config.model.bias"], "model.bias", True),
        (["--config.model.bias=true"], "model.bias", True),
        (["--noconfig.data.shuffle"], "data.shuffle", False),
        (["--config.model.num_kv_heads=2"], "model.num_kv_heads", 2),
        (["--config.sample.top_k=None"], "sample.top_k", None),
        (["--config.data.weights=1,2.5", *TWO], "data.weights", (1.0, 2.5)),
        (["--config.data.weights=(1, 2.5)", *TWO], "data.weights", (1.0, 2.5)),
        (["--config.data.weights="], "data.weights", ()),
        (["--config.tokenizer.special_tokens="], "tokenizer.special_tokens", ()),
        (["--config.tokenizer.eos_token=None"], "tokenizer.eos_token", None),
        (["--config.data.path=caf\udce9"], "data.path", "café"),  # a Latin-1 terminal's byte
    ],
)
def test_words_become_values_by_the_type_of_the_field(words, field, value):
    asked = read([*words, "--config=quickstart"], JOBS)
    found = at(to_dict(view(asked.section, asked.config)), field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config.model.num_layrs=3"], "config.model.num_layrs .* config.model.num_layers?"),
        (["--config.learning_rate=3"], "config.optimizer.learning_rate?"),
        (["--config.model.n_head=3"], "config.model.num_heads?"),
        (["--config.train.batch_size=3"], "config.data.batch_size?"),
        (["--config.fsdp=3"], "config.mesh.fsdp?"),
        (["--config.model.seq_len=3"], "config.data.block_size?"),
        (["--config.block_size=3"], "config.data.block_size?"),
        (["--learning_rate=3"], "--config.optimizer.learning_rate?"),
        (["--lr", "3"], "--config.optimizer.learning_rate?"),
        (["--workdri=x"], "--workdri is not a flag .*'workdir'?"),
        (["--config.model=3"], "config.model is a section"),
        (["--config.seed.x=3"], "config.seed.x is not a known field"),
        (["--workdir"], "--workdir needs a value"),
        (["--config=quickstrat"], "--config=quickstrat does not exist .*'quickstart'?"),
        (["train"], "'train' is not a flag"),
    ],
)
def test_what_does_not_exist_is_one_line_with_the_nearest_that_does(words, line):
    with pytest.raises(ConfigError) as error:
        read(words, JOBS)  # without --config as well
    assert re.search(line.replace("?", r"\?"), str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_the_names_of_other_codebases_are_answered_by_ours():
    known = {job: command._leaves(section(job)) for job in JOBS}
    for name, field in command.ALIASES.items():
        job = next(job for job in JOBS if field in known[job])
        for asked in (name, f"{field.rpartition('.')[0] or 'model'}.{name}"):
            if asked not in known[job] and name != "model":
                assert command._meant(asked, section(job)) == field, asked


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("import lm.nothing\n", "line 1: ModuleNotFoundError"),
        ("\nx = 1\n", "has no function get_config"),
        ("def get_config():\n    return undefined\n", "line 2: NameError: .*undefined"),
    ],
)
def test_a_config_that_cannot_be_run_names_its_line(tmp_path, source, line):
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError, match=line):
        read([f"--config={tmp_path}/mine.py"], JOBS)


def test_a_bare_name_is_a_config_here_and_else_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(["--config=story"], JOBS).workdir == "runs/story"
    assert read(["--config=configs/story.py"], JOBS).config.job == "train"
    (tmp_path / "configs").mkdir()
    text = "from lm.configs import generate\n\nget_config = generate.get_config\n"
    (tmp_path / "configs" / "story.py").write_text(text, encoding="utf-8")
    assert read(["--config=story"], JOBS).config.job == "generate"


def test_help_lists_the_configs_and_shows_the_fields_of_one():
    text = command.help_text([], JOBS, "lm")
    for name in CONFIGS:
        assert re.search(rf"^  {name} +\w+", text, re.MULTILINE)
    words = ["--config=quickstart", "--config.model.width=96"]
    text = command.help_text(words, JOBS, "lm")
    assert text.startswith("Raw text to a model that writes little stories")
    assert re.search(r"^  width=96 +\(at least 1\)$", text, re.MULTILINE)
    assert re.search(r"^  steps=1800 +optimizer steps \(at least 1\)$", text, re.MULTILINE)
    assert "0 nothing, 1 the" in text  # a comment that stands above its field


ODD = (
    -1, 0, 1, 2**20, 2**31, 2**63, 10**30, 10**5000, -1.0, 0.0, 0.5, 1e308, math.nan, math.inf, "",
    " ", "\0", "\ud800", "~nobody/x", "a/" * 3000, "x" * 300, "\n", "auto", None, True, [], [0],
    [""], ["a", 1], {}, {"a": 1}, b"a", object(),
)  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_an_odd_value_in_any_field_is_accepted_or_named_in_one_line(job):
    """Whatever a config file assigns or a run's config.json holds."""
    kind, config = section(job), to_dict(defaults(section(job)))
    config |= {"init_from": "x"} if "init_from" in config else {}
    for field in command._leaves(kind):
        *outer, last = field.split(".")
        for value in ODD:
            changed = copy.deepcopy(config)
            functools.reduce(operator.getitem, outer, changed)[last] = value
            try:
                view(kind, changed)
            except ConfigError as error:
                line = str(error)
                assert "\n" not in line, line[:300]
                named = last in line or "config." in line
                assert named, line[:300]


def test_a_clone_called_lm_is_the_package_from_the_folder_it_lies_in(tmp_path):
    (tmp_path / "lm").symlink_to(tiny_jobs.REPOSITORY)
    code = "import lm, lm.config; print(lm.__version__, lm.load, lm.config.view)"
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"{lm.__version__} <function load"), done.stderr


@pytest.mark.parametrize("config", ["story", "corpus", "plan"])
def test_a_workdir_in_the_home_directory_is_there(config):
    assert read([f"--config={config}", "--workdir=~/x"], JOBS).workdir == os.path.expanduser("~/x")

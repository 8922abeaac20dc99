"""The command line: every mistake ends in one line that says what to do, and costs nothing."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny_jobs

CONFIG = "--config=tests/tiny_jobs.py"

# name → (arguments after --config and --workdir, words that the line must have). RUN is the
# directory of a finished run, NEW one that does not exist, HERE a place for files.
MISTAKES = {
    "misspelt field": (["--config.model.widht=3"], ["model.widht", "width"]),
    "misspelt section": (["--config.modle.width=3"], ["modle", "model"]),
    "wrong type": (["--config.model.width=broad"], ["model.width", "broad", "int"]),
    "wrong choice": (
        ["--config.optimizer.name=adamx"],
        ["config.optimizer.name='adamx'", "did you mean 'adamw'"],
    ),
    "width and heads": (
        ["--config.model.width=30", "--config.model.num_heads=4"],
        ["config.model.width=30", "config.model.num_heads=4", "use num_heads=5"],
    ),
    "batch and accumulation": (
        ["--config.train.accumulation=3"],
        ["config.data.batch_size=8", "multiple of 3"],
    ),
    "cadence": (
        ["--config.train.steps_per_dispatch=5"],
        ["config.train.steps_per_dispatch=5", "must divide", "24"],
    ),
    "long warm-up": (
        ["--config.optimizer.warmup_steps=100"],
        ["optimizer.warmup_steps=100", "at most the 24 steps"],
    ),
    "unknown job": (["--config.job=trian"], ["config.job='trian'", "did you mean 'train'"]),
    "not a flag": (["train"], ["'train' is not a flag"]),
    "misspelt flag": (["--wrokdir=x"], ["wrokdir", "workdir"]),
    "negative mesh": (["--config.mesh.tensor=3"], ["config.mesh", "tensor=3", "1"]),
    "block and context": (
        ["--config.model.max_length=16"],
        ["config.data.block_size=32", "config.model.max_length=16"],
    ),
    "vocabulary too small": (
        ["--config.model.vocab_size=100"],
        ["config.model.vocab_size=100", "257"],
    ),
    "missing corpus": (["--config.data.path=HERE/none.txt"], ["data.path", "none.txt"]),
    "empty corpus": (["--config.data.path=HERE/empty.txt"], ["data.path", "empty.txt"]),
    "binary corpus": (
        ["--config.data.path=HERE/binary.txt", "--config.data.on_bad_file=refuse"],
        ["binary.txt", "on_bad_file"],
    ),
    "short corpus": (
        ["--config.data.path=HERE/short.txt", "--config.data.packing=concat"],
        ["data.block_size=32", "short.txt"],
    ),
    "init_from nothing": (
        ["--config.init_from=HERE/rnu"],
        ["config.init_from=", "does not exist", "did you mean", "run"],
    ),
    "init_from no run": (
        ["--config.init_from=HERE"],
        ["config.init_from=", "not the directory of a training run"],
    ),
    "init_from another model": (
        ["--config.init_from=RUN", "--config.model.width=32"],
        ["config.init_from=", "model.width=16", "says 32", "set config.model.width=16"],
    ),
    "workdir below a file": (["--workdir=HERE/short.txt/run"], ["--workdir=", "not a directory"]),
    "workdir is a file": (["--workdir=HERE/short.txt"], ["--workdir=", "not a directory"]),
    "run of another config": (
        ["--workdir=RUN", "--config.model.width=32"],
        ["--workdir=", "config.model.width=16", "says 32", "choose another --workdir"],
    ),
    "run of another corpus": (
        ["--workdir=RUN", "--config.data.path=HERE/short.txt"],
        ["--workdir=", "config.data.path='storyworld'", "short.txt"],
    ),
    "truncated config.json": (
        ["--workdir=HERE/truncated"],
        ["--workdir=", "config.json cannot be read", "choose another"],
    ),
    "tokenizer of another run": (
        ["--workdir=HERE/swapped"],
        ["--workdir=", "tokenizer/ is not the one", "put the original back"],
    ),
    "a new start in a damaged run": (
        ["--workdir=RUN", "--config.seed=5"],
        ["--workdir=", "config.seed=0", "says 5"],
    ),
}
# The same with configs/generate.py.
GENERATE_MISTAKES = {
    "no run": (["--config.init_from=HERE/rnu"], ["HERE/rnu does not exist", "run"]),
    "not a run": (["--config.init_from=HERE"], ["not the directory of a training run"]),
    "prompt too long": (
        ["--config.init_from=RUN", "--config.prompt=" + "The cat sat on the mat. " * 4],
        ["prompt", "32"],
    ),
    "swapped tokenizer": (
        ["--config.init_from=HERE/swapped"],
        ["tokenizer is not the tokenizer", "put the original back"],
    ),
    "truncated run": (["--config.init_from=HERE/truncated"], ["config.json cannot be read"]),
    "negative temperature": (
        ["--config.init_from=RUN", "--config.temperature=-1.0"],
        ["config.temperature=-1.0"],
    ),
}


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every case's (code, output, errors), the files before and after them, and their place."""
    here = tmp_path_factory.mktemp("main")
    (here / "empty.txt").write_bytes(b"")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (here / "short.txt").write_text("A cat.")
    run = tiny_jobs.run(here, "run", checkpoint__every=0)
    for name in ("truncated", "swapped"):
        shutil.copytree(run, here / name)
    config = here / "truncated" / "config.json"
    config.write_bytes(config.read_bytes()[:100])
    trained = tiny_jobs.run(
        here, "other", tokenizer__kind="char", train__steps=2, checkpoint__every=0
    )
    shutil.rmtree(here / "swapped" / "tokenizer")
    shutil.copytree(trained / "tokenizer", here / "swapped" / "tokenizer")

    def arguments(words, config):
        caches = [f"--config.data.cache_dir={here}/tokens", "--config.train.compilation_cache="]
        words = [w.replace("HERE", str(here)).replace("RUN", str(run)) for w in words]
        return [config, f"--workdir={here}/new", *(caches if config == CONFIG else []), *words]

    cases = {name: arguments(words, CONFIG) for name, (words, _) in MISTAKES.items()}
    for name, (words, _) in GENERATE_MISTAKES.items():
        cases[f"generate: {name}"] = arguments(words, "--config=configs/generate.py")
    cases["missing config"] = ["--config=configs/quickstrat.py"]
    cases["resumes"] = arguments(["--workdir=RUN"], CONFIG)
    cases["diverges"] = arguments(
        ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0"]
        + ["--config.train.on_spike=stop", f"--workdir={here}/diverged"],
        CONFIG,
    )
    before = contents(here)
    file = here / "cases.json"
    file.write_text(json.dumps(cases))
    environment = {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"}
    driver = subprocess.run(
        [sys.executable, "tests/forked_main.py", str(file)],
        cwd=tiny_jobs.REPOSITORY,
        env={**environment, "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    results = json.loads(driver.stdout.splitlines()[-1])
    return results, before, contents(here), here


def assert_one_line(outcome, words, here):
    code, _, errors = outcome
    assert code == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    for word in words:
        assert word.replace("HERE", str(here)) in errors


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_and_code_two(outcomes, name):
    results, _, _, here = outcomes
    assert_one_line(results[name], MISTAKES[name][1], here)


@pytest.mark.parametrize("name", GENERATE_MISTAKES)
def test_a_mistake_in_generation_ends_in_one_line_and_code_two(outcomes, name):
    results, _, _, here = outcomes
    assert_one_line(results[f"generate: {name}"], GENERATE_MISTAKES[name][1], here)


def test_a_missing_config_file_is_named_with_the_nearest(outcomes):
    results, _, _, here = outcomes
    words = ["configs/quickstrat.py does not exist", "did you mean 'configs/quickstart.py'"]
    assert_one_line(results["missing config"], words, here)


def test_no_mistake_writes_or_changes_anything(outcomes):
    _, before, after, here = outcomes
    assert not (here / "new").exists()
    assert not (here / "run" / "run").exists()
    ours = {name for name in before if not name.startswith(("run/loss.png", "run/tensorboard/"))}
    assert {name for name in ours if before[name] != after.get(name)} == set()
    # Going on with a finished run is no mistake, but has nothing to do either.
    allowed = ("run/tensorboard/", "diverged/", "tokens/", "cases.json")
    assert [n for n in after if n not in before and not n.startswith(allowed)] == []


@pytest.mark.parametrize(
    "name",
    [
        "wrong choice",
        "width and heads",
        "long warm-up",
        "cadence",
        "batch and accumulation",
        "run of another config",
        "truncated config.json",
        "init_from no run",
        "workdir is a file",
    ],
)
def test_what_needs_no_corpus_is_checked_before_there_is_one(outcomes, name):
    assert outcomes[0][name][1] == ""  # the job's first line of output names the tokenizer


def test_going_on_with_a_finished_run_is_fine(outcomes):
    code, output, errors = outcomes[0]["resumes"]
    assert (code, errors) == (0, "")
    assert "resuming at step 24" in output


def test_a_run_that_diverges_ends_in_one_line_and_code_one(outcomes):
    code, _, errors = outcomes[0]["diverges"]
    assert code == 1
    assert errors.startswith("error: step ") and errors.count("\n") == 1
    assert "data epoch" in errors and "optimizer.learning_rate" in errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config=configs/quickstart.py", "--config.model.widht=3"], ["widht", "width"]),
        (["--config=configs/story.py", "--config.model.width=30"], ["config.model.width=30"]),
    ],
)
def test_a_process_of_its_own_says_the_same(tmp_path, arguments, words):
    arguments = [sys.executable, "main.py", f"--workdir={tmp_path}/run", *arguments]
    process = tiny_jobs.start(arguments)
    output, errors = process.communicate(timeout=300)
    assert_one_line((process.returncode, output, errors), words, tmp_path)
    assert not list(tmp_path.iterdir())

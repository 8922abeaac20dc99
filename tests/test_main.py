"""The command line: every mistake ends in one line that says what to do, and costs nothing."""

import contextlib
import io
import os
import pathlib
import runpy
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import tiny_jobs

from lm import files
from lm.jobs import train

CONFIG = "--config=tests/tiny_jobs.py"

GENERATE = "--config=configs/generate.py"
# name → (fields, or flags, besides --config and --workdir; words that the line must have). RUN is
# the directory of a finished run, HERE the place it lies in.
MISTAKES = {
    "prompt without a mask": (["objective.name=masked", "model.architecture=encoder",
        "tokenizer.mask_token=True", "prompt=The cat"],
        ["config.prompt='The cat' cannot be asked", "where a token is to be guessed"]),
    "prompt that is not to be cut": (["prompt=" + "cat " * 9, "sample.truncate_prompt=False"],
        ["cannot be asked", "37 tokens long", "context is 32"]),
    "misspelt field": (["model.widht=3"],
        ["config.model.widht is not a known field", "did you mean config.model.width?"]),
    "misspelt section": (["modle.width=3"],
        ["config.modle.width is not a known field", "did you mean config.model.width?"]),
    "wrong type": (["model.width=broad"], ["model.width", "broad", "int"]),
    "wrong choice": (["optimizer.name=adamx"],
        ["config.optimizer.name='adamx'", "did you mean 'adamw'"]),
    "width and heads": (["model.width=30", "model.num_heads=4"],
        ["config.model.width=30", "config.model.num_heads=4", "use num_heads=3"]),
    "batch and accumulation": (["train.accumulation=3"],
        ["config.data.batch_size=8", "multiple of 3"]),
    "cadence": (["train.steps_per_dispatch=5"],
        ["config.train.steps_per_dispatch=5", "must divide", "24"]),
    "negative warm-up": (["optimizer.warmup_steps=-1"],
        ["config.optimizer.warmup_steps=-1", "must be at least 0"]),
    "warm-up longer than the decay": (["optimizer.warmup_steps=20", "optimizer.decay_steps=10"],
        ["config.optimizer.warmup_steps=20", "at most decay_steps=10"]),
    "unknown job": (["job=trian"], ["config.job='trian'", "did you mean 'train'"]),
    "model beyond memory": (["model.width=1048576", "model.num_layers=999"],
        ["config.model: ", "GiB", "make it smaller"]),
    "batch beyond memory": (["data.batch_size=1048576", "data.block_size=1048576"],
        ["config.data.batch_size=1048576", "GiB"]),
    "beyond 64 bits": ([f"data.num_threads={10**30}"],
        [f"config.data.num_threads={10**30} must be at most 1024"]),
    "unknown user": (["data.path=~nobodyatall/x"],
        ["config.data.path='~nobodyatall/x'", "no user 'nobodyatall'"]),
    "unknown user's workdir": (["--workdir=~nobodyatall/x"], ["--workdir=", "no user"]),
    "name too long": (["init_from=" + "x" * 256], ["init_from=", "longer than 255"]),
    "workdir too long": (["--workdir=" + "x/" * 2500], ["--workdir=", "longer than 4095"]),
    "not finite": (["optimizer.learning_rate=nan"], ["learning_rate=nan", "at least 0"]),
    "negative mesh": (["mesh.tensor=3"], ["config.mesh", "tensor=3", "1"]),
    "block and context": (["model.max_length=16"],
        ["config.data.block_size=32", "config.model.max_length=16"]),
    "vocabulary too small": (["model.vocab_size=100"], ["config.model.vocab_size=100", "257"]),
    "missing corpus": (["data.path=HERE/none.txt"], ["data.path", "none.txt"]),
    "impossible corpus name": (["data.path=a\0b"], ["data.path='a\\x00b'"]),
    "second corpus missing": (["data.path=HERE/short.txt,no.txt"], ["data.path='no.txt'"]),
    "empty corpus": (["data.path=HERE/empty.txt"], ["data.path", "empty.txt"]),
    "binary corpus": (["data.path=HERE/binary.txt", "data.on_bad_file=refuse"],
        ["binary.txt", "on_bad_file"]),
    "short corpus": (["data.path=HERE/short.txt", "data.packing=concat"],
        ["data.block_size=32", "short.txt"]),
    "tokenizer of another kind": (["tokenizer.path=RUN/tokenizer", "tokenizer.kind=char"],
        ["config.tokenizer.path=", "kind='char' is not the kind", "set kind='byte'"]),
    "special token of one letter": (["tokenizer.kind=wordpiece", "tokenizer.eos_token=e"],
        ["config.tokenizer", "special token 'e'", "longer than a character"]),
    "init_from nothing": (["init_from=HERE/rnu"],
        ["config.init_from=", "does not exist", "did you mean", "run"]),
    "init_from no run": (["init_from=HERE"],
        ["config.init_from=", "not the directory of a training run"]),
    "init_from another model": (["init_from=RUN", "model.width=32"],
        ["config.init_from=", "model.width=16", "says 32", "leave these fields out"]),
    "workdir below a file": (["--workdir=HERE/short.txt/run"], ["--workdir=", "not a directory"]),
    "workdir is a file": (["--workdir=HERE/short.txt"], ["--workdir=", "not a directory"]),
    "run of another config": (["--workdir=RUN", "model.width=32"],
        ["--workdir=", "config.model.width=16", "says 32", "choose another --workdir"]),
    "run of another corpus": (["--workdir=RUN", "data.path=HERE/short.txt"],
        ["--workdir=", "config.data.path='storyworld'", "short.txt"]),
    "truncated config.json": (["--workdir=HERE/truncated"],
        ["--workdir=", "config.json is damaged", "choose another"]),
    "tokenizer of another run": (["--workdir=HERE/swapped"],
        ["--workdir=", "tokenizer/ is not the one", "put the original back"]),
    "run of another seed": (["--workdir=RUN", "seed=5"],
        ["--workdir=", "config.seed=0", "says 5", "--config.init_from=", "parameters"]),
    "missing config": (["--config=configs/quickstrat.py", "model.width=32"],
        ["configs/quickstrat.py does not exist", "did you mean 'configs/quickstart.py'"]),
    "more steps than batches": (["data.epochs=1"],
        ["config.train.steps=24 is more than the ", "batches of config.data.epochs=1"]),
    # Of generation:
    "generate: no run": ([GENERATE, "init_from=HERE/rnu"],
        ["rnu does not exist (did you mean 'run'?)"]),
    "generate: swapped tokenizer": ([GENERATE, "init_from=HERE/swapped"],
        ["tokenizer is not the tokenizer", "put the original back"]),
    "generate: truncated run": ([GENERATE, "init_from=HERE/truncated"], ["config.json is damaged"]),
    "generate: no checkpoint": ([GENERATE, "init_from=HERE/early"],
        ["early has no checkpoint yet"]),
    "generate: prompt of other bytes": ([GENERATE, "init_from=RUN", "prompt_file=HERE/latin.txt"],
        ["config.prompt_file=", "latin.txt", "neither UTF-8 nor UTF-16"]),
    "generate: more samples than memory": ([GENERATE, "init_from=RUN", "num_samples=1000000000"],
        ["num_samples=1000000000"]),
}  # fmt: skip
# Those that need neither a corpus nor a tokenizer, and are found before there is one.
CHEAP = (
    "wrong choice", "width and heads", "negative warm-up", "warm-up longer than the decay",
    "cadence", "batch and accumulation", "run of another config", "run of another corpus",
    "truncated config.json", "init_from no run", "init_from another model", "workdir is a file",
)  # fmt: skip


def main(*arguments: str, devices: int = 1) -> tuple[int, str, str]:
    """Exit code, output and errors of `python main.py *arguments`, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["main.py", *arguments]),
        contextlib.chdir(tiny_jobs.REPOSITORY),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        tiny_jobs.devices(devices),
        tiny_jobs.undrawn(),
    ):
        try:
            runpy.run_path("main.py", run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code or 0
    return code, out.getvalue(), err.getvalue()


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """Every file below `directory`, but for the token cache."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "tokens" not in path.relative_to(directory).parts[:1]
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A place with a finished run, damaged copies of it, and files that are no corpora."""
    here = tmp_path_factory.mktemp("main")
    (here / "empty.txt").write_bytes(b"")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (here / "short.txt").write_text("A cat.")
    (here / "latin.txt").write_bytes(b"caf\xe9 \xe0")
    run = tiny_jobs.run(here, "run", checkpoint__every=0)
    few = {"train__steps": 2, "checkpoint__every": 0}
    other = tiny_jobs.run(here, "other", tokenizer__kind="char", **few)
    for name in ("truncated", "swapped", "again", "early"):
        shutil.copytree(run, here / name)
    shutil.rmtree(here / "early" / "checkpoints")
    config = here / "truncated" / "config.json"
    config.write_bytes(config.read_bytes()[:100])
    shutil.rmtree(here / "swapped" / "tokenizer")
    shutil.copytree(other / "tokenizer", here / "swapped" / "tokenizer")
    return here


def arguments(here, words):
    """The command line of fields and flags, of `CONFIG` unless they name another."""
    words = [w.replace("HERE", str(here)).replace("RUN", str(here / "run")) for w in words]
    words = [word if word.startswith("--") else f"--config.{word}" for word in words]
    if not any(word.startswith("--config=") for word in words):
        caches = [f"--config.data.cache_dir={here}/tokens", "--config.train.compilation_cache="]
        words = [CONFIG, *caches, *words]
    return [f"--workdir={here}/new", *words]


def assert_one_line(outcome, words):
    code, _, errors = outcome
    assert code == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    for word in words:
        assert word in errors


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_and_code_two_and_changes_nothing(here, name):
    before = contents(here)
    given, words = MISTAKES[name]
    outcome = main(*arguments(here, given))
    assert_one_line(outcome, words)
    assert contents(here) == before
    assert not (here / "new").exists()
    if name in CHEAP:
        assert outcome[1] == ""  # a job's first line of output names the tokenizer


def test_a_book_of_ones_own_trains_and_is_validated_on_its_end(here):
    book, cache = here / "lr[1e-3] [/red].txt", f"--config.data.cache_dir={here}/tokens"
    book.parent.mkdir(parents=True)
    book.write_text("The cat sat on the mat, and the dog looked at it.\n" * 60)
    small = ["num_layers=1", "num_heads=2", "width=16"]
    code, output, errors = main(
        "--config=configs/quickstart.py", f"--config.data.path={book}", f"--workdir={here}/book",
        cache, *(f"--config.model.{field}" for field in small), "--config.train.steps=2",
        "--config.tokenizer.vocab_size=300", "--config.optimizer.warmup_steps=1",
        "--config.train.log_every=2", "--config.train.eval_every=2", "--config.checkpoint.every=0",
        "--config.train.compilation_cache=", "--config.prompt=",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    (line,) = [line for line in output.splitlines() if "held out" in line]
    assert str(book) in line and "1 document, too few" in line and "data.split='hash'" in line
    assert "eval_loss" in (here / "book" / "metrics.jsonl").read_text()


def test_no_filter_is_none_and_zero_and_a_long_text_slides_on(here):
    given = [GENERATE, "init_from=RUN", "prompt=" + "cat " * 9, "max_new_tokens=9"]
    texts = set()
    for off in ("None", "0"):
        code, text, notes = main(*arguments(here, [*given, f"top_k={off}", f"top_p={off}"]))
        assert code == 0 and text.startswith("cat cat ")
        assert "only the last of the prompt's 37 tokens" in notes
        assert "outgrew the model's context of 32" in notes
        texts.add(text)
    assert len(texts) == 1


def test_a_mask_token_asked_of_a_tokenizer_without_one_is_added(here):
    code, output, errors = main(*arguments(here, [
        "--workdir=HERE/masked", "tokenizer.path=RUN/tokenizer", "tokenizer.mask_token=True",
        "objective.name=masked", "model.architecture=encoder", "train.steps=2",
        "checkpoint.every=0",
    ]))  # fmt: skip
    assert (code, errors) == (0, "")
    assert "tokenizer: byte, 258 tokens" in output


def test_going_on_with_a_finished_run_is_no_mistake(here):
    code, output, errors = main(*arguments(here, ["--workdir=HERE/again"]))
    assert (code, errors) == (0, "")
    assert "finished: 24 of 24 steps" in output and "config.train.steps" in output


def test_a_run_directory_alone_says_what_goes_on_in_it(here):
    shutil.copytree(here / "run", here / "alone")
    code, output, errors = main(f"--workdir={here}/alone", "--config.train.steps=26")
    assert (code, errors) == (0, "")
    assert "resuming at step 24" in output
    assert tiny_jobs.checkpoint_steps(here / "alone")[-1] == 26


def test_a_prompt_is_text_whatever_it_looks_like(here):
    prompt = """{'a': 1}, "None" """
    words = ["--config=generate", "init_from=RUN", "max_new_tokens=1", f"prompt={prompt}"]
    code, output, _ = main(*arguments(here, words))
    assert code == 0 and output.startswith(prompt)


def test_a_run_whose_checkpoints_are_all_damaged_is_neither_resumed_nor_believed(here):
    checkpoints = here / "damaged" / "checkpoints"
    shutil.copytree(here / "run", checkpoints.parent)
    shutil.copytree(checkpoints / "00000024", checkpoints / "00000016")
    truncated = checkpoints / "00000024" / "state" / "_METADATA"
    truncated.write_bytes(truncated.read_bytes()[:100])
    before = contents(checkpoints)
    words = [
        "00000024 is damaged (state/_METADATA has 100 bytes instead of ",
        "00000016 is damaged (it is that of step 24, renamed)",
        "another --workdir or remove",
    ]
    source = "init_from=HERE/damaged"
    assert_one_line(main(*arguments(here, ["--workdir=HERE/damaged"])), words)
    assert_one_line(main(*arguments(here, ["--workdir=HERE/child", source])), words)
    assert_one_line(main(*arguments(here, [GENERATE, source])), words)
    assert contents(checkpoints) == before


def test_a_run_goes_on_despite_a_damaged_record_and_folders_that_are_no_steps(here, caplog):
    run = here / "stained"
    shutil.copytree(here / "run", run)
    for name in ("²", "٣", "9" * 200):
        (run / "checkpoints" / name).mkdir()
    records = (run / "metrics.jsonl").read_bytes()
    first, second, rest = records.split(b"\n", 2)
    stained = b"\n".join([first, second.replace(b"l", b"\xff", 1), b"[" * 9999, rest])
    (run / "metrics.jsonl").write_bytes(stained)
    code, output, errors = main(*arguments(here, ["--workdir=HERE/stained"]))
    assert code == 0, errors
    assert "finished: 24 of 24" in output
    (notice,) = [record.getMessage() for record in caplog.records]
    assert "metrics.jsonl: 2 of 13 lines are damaged and left out" in notice
    assert (run / "metrics.jsonl").read_bytes() == first + b"\n" + rest


def test_a_run_may_lie_in_a_directory_of_any_name(here, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(here))
    name = r"lr[1e-3]/a\b/50% a b/#x?y=1/naïve"
    few = ["train.steps=4", "train.log_every=2", "checkpoint.every=2"]
    code, _, errors = main(*arguments(here, [f"--workdir=HERE/{name}", *few]))
    assert (code, errors) == (0, "")
    shutil.rmtree(here / name / "checkpoints" / "00000004")
    code, output, errors = main(*arguments(here, [f"--workdir=HERE/{name}", *few]))
    assert (code, errors) == (0, "") and "resuming at step 2" in output
    given = [GENERATE, f"init_from=HERE/{name}", "prompt=The cat"]
    code, output, errors = main(*arguments(here, given))
    assert code == 0 and "The cat" in output, errors


def test_a_second_run_in_a_directory_is_refused(here):
    with files.lock(here / "again" / "checkpoints" / "lock"):
        before = contents(here)
        outcome = main(*arguments(here, ["--workdir=HERE/again"]))
        assert_one_line(outcome, [f"in use by process {os.getpid()} on ", "another --workdir"])
        assert outcome[1] == "" and contents(here) == before


def test_a_run_that_came_and_went_meanwhile_is_not_overwritten(here, monkeypatch):
    set_up = train.set_up

    def late(*arguments, **fields):
        shutil.copytree(here / "run", here / "between")
        return set_up(*arguments, **fields)

    monkeypatch.setattr(train, "set_up", late)
    outcome = main(*arguments(here, ["--workdir=HERE/between", "model.width=32"]))
    assert_one_line(outcome, ["holds a run with config.model.width=16", "says 32"])
    assert contents(here / "between") == contents(here / "run")


def test_a_checkpoint_that_the_disk_does_not_take_ends_in_one_line(here, caplog):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    given = ["--workdir=HERE/large", "model.width=128", "train.steps=2", "checkpoint.every=0"]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        outcome = main(*arguments(here, given))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(outcome, ["large/checkpoints: step 2 could not be saved: a file", "ulimit -f"])
    assert not caplog.records  # Orbax has three tracebacks for it


def test_a_warm_up_longer_than_the_run_is_cut_to_a_tenth_of_it(here):
    given = ["--workdir=HERE/warm", "optimizer.warmup_steps=100", "train.steps=20"]
    code, output, errors = main(*arguments(here, given))
    assert (code, errors) == (0, "")
    notice = "optimizer.warmup_steps=100 is more than the run's 20 steps: cut to a tenth of them, 2"
    assert output.count(notice) == 1
    rates = dict(tiny_jobs.losses(here / "warm", "learning_rate"))
    assert rates[2] == pytest.approx(1e-2 * 2 / 3)
    assert rates[4] > rates[2] and rates[20] < 0.2e-2


def test_a_run_that_diverges_ends_in_one_line_and_code_one_and_saves_numbers_alone(here):
    """The loss overflows by itself, and is left out until it does so too often."""
    code, _, errors = main(*arguments(here, [
        "--workdir=HERE/wild", "optimizer.learning_rate=1e30", "optimizer.clip_norm=0.0",
        "train.max_spikes=5", "checkpoint.every=2",
    ]))  # fmt: skip
    assert code == 1
    assert errors.startswith("error: step ") and errors.count("\n") == 1
    assert "data epoch" in errors and "optimizer.learning_rate" in errors
    assert all(np.isfinite(value).all() for value in tiny_jobs.parameters(here / "wild").values())


def test_output_that_nobody_reads_on_is_no_mistake():
    process = tiny_jobs.start([sys.executable, "main.py", "--help"])
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=300) == 141


def test_a_process_of_its_own_says_the_same(tmp_path):
    given = ["--config=configs/quickstart.py", "--config.model.widht=3"]
    process = tiny_jobs.start([sys.executable, "main.py", f"--workdir={tmp_path}/run", *given])
    output, errors = process.communicate(timeout=300)
    assert_one_line((process.returncode, output, errors), ["config.model.widht"])
    assert not list(tmp_path.iterdir())

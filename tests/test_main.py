"""The command line: every mistake ends in one line that says what to do, and costs nothing."""

import contextlib
import io
import os
import pathlib
import runpy
import shutil
import sys
from unittest import mock

import pytest
import tiny_jobs

from lm import files
from lm.jobs import train

CONFIG = "--config=tests/tiny_jobs.py"

# name → (arguments after --config and --workdir, words that the line must have). RUN is the
# directory of a finished run, HERE the place it lies in.
MISTAKES = {
    "prompt without a mask": (
        [
            "--config.objective.name=masked",
            "--config.model.architecture=encoder",
            "--config.tokenizer.mask_token=True",
            "--config.prompt=The cat",
        ],
        ["config.prompt='The cat' cannot be asked", "where a token is to be guessed"],
    ),
    "prompt that is not to be cut": (
        ["--config.prompt=" + "cat " * 9, "--config.sample.truncate_prompt=False"],
        ["cannot be asked", "37 tokens long", "context is 32"],
    ),
    "misspelt field": (
        ["--config.model.widht=3"],
        ["config.model.widht is not a known field", "did you mean config.model.width?"],
    ),
    "unheard-of field": (["--config.model.xyzzy=3"], ["config.model.xyzzy is not a known field"]),
    "misspelt section": (
        ["--config.modle.width=3"],
        ["config.modle.width is not a known field", "did you mean config.model.width?"],
    ),
    "missing config": (
        ["--config=configs/quickstrat.py"],
        ["configs/quickstrat.py does not exist", "did you mean 'configs/quickstart.py'"],
    ),
    "missing config with fields": (
        ["--config=configs/quickstrat.py", "--config.model.width=32"],
        ["configs/quickstrat.py does not exist", "did you mean 'configs/quickstart.py'"],
    ),
    "wrong type": (["--config.model.width=broad"], ["model.width", "broad", "int"]),
    "wrong choice": (
        ["--config.optimizer.name=adamx"],
        ["config.optimizer.name='adamx'", "did you mean 'adamw'"],
    ),
    "width and heads": (
        ["--config.model.width=30", "--config.model.num_heads=4"],
        ["config.model.width=30", "config.model.num_heads=4", "use num_heads=3"],
    ),
    "batch and accumulation": (
        ["--config.train.accumulation=3"],
        ["config.data.batch_size=8", "multiple of 3"],
    ),
    "cadence": (
        ["--config.train.steps_per_dispatch=5"],
        ["config.train.steps_per_dispatch=5", "must divide", "24"],
    ),
    "negative warm-up": (
        ["--config.optimizer.warmup_steps=-1"],
        ["config.optimizer.warmup_steps=-1", "must be at least 0"],
    ),
    "warm-up longer than the decay": (
        ["--config.optimizer.warmup_steps=20", "--config.optimizer.decay_steps=10"],
        ["config.optimizer.warmup_steps=20", "at most decay_steps=10"],
    ),
    "unknown job": (["--config.job=trian"], ["config.job='trian'", "did you mean 'train'"]),
    "not a flag": (["train"], ["'train' is not a flag"]),
    "misspelt flag": (["--wrokdir=x"], ["wrokdir", "workdir"]),
    "model beyond memory": (
        ["--config.model.width=1048576", "--config.model.num_layers=999"],
        ["config.model: ", "GiB", "make it smaller"],
    ),
    "batch beyond memory": (
        ["--config.data.batch_size=1048576", "--config.data.block_size=1048576"],
        ["config.data.batch_size=1048576", "GiB"],
    ),
    "beyond 64 bits": (
        [f"--config.data.num_threads={10**30}"],
        [f"config.data.num_threads={10**30} must be at most 1024"],
    ),
    "unknown user": (
        ["--config.data.path=~nobodyatall/x"],
        ["config.data.path='~nobodyatall/x'", "no user 'nobodyatall'"],
    ),
    "unknown user's workdir": (["--workdir=~nobodyatall/x"], ["--workdir=", "no user"]),
    "name too long": (["--config.init_from=" + "x" * 256], ["init_from=", "longer than 255"]),
    "workdir too long": (["--workdir=" + "x/" * 2500], ["--workdir=", "longer than 4095"]),
    "not finite": (["--config.optimizer.learning_rate=nan"], ["learning_rate=nan", "at least 0"]),
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
    "impossible corpus name": (["--config.data.path=a\0b"], ["data.path='a\\x00b'"]),
    "second corpus missing": (["--config.data.path=HERE/short.txt,no.txt"], ["data.path='no.txt'"]),
    "empty corpus": (["--config.data.path=HERE/empty.txt"], ["data.path", "empty.txt"]),
    "binary corpus": (
        ["--config.data.path=HERE/binary.txt", "--config.data.on_bad_file=refuse"],
        ["binary.txt", "on_bad_file"],
    ),
    "short corpus": (
        ["--config.data.path=HERE/short.txt", "--config.data.packing=concat"],
        ["data.block_size=32", "short.txt"],
    ),
    "tokenizer of another kind": (
        ["--config.tokenizer.path=RUN/tokenizer", "--config.tokenizer.kind=char"],
        ["config.tokenizer.path=", "kind='char' is not the kind", "set kind='byte'"],
    ),
    "special token of one letter": (
        ["--config.tokenizer.kind=wordpiece", "--config.tokenizer.eos_token=e"],
        ["config.tokenizer", "special token 'e'", "longer than a character"],
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
        ["config.init_from=", "model.width=16", "says 32", "leave these fields out"],
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
        ["--workdir=", "config.json is damaged", "choose another"],
    ),
    "tokenizer of another run": (
        ["--workdir=HERE/swapped"],
        ["--workdir=", "tokenizer/ is not the one", "put the original back"],
    ),
    "run of another seed": (
        ["--workdir=RUN", "--config.seed=5"],
        ["--workdir=", "config.seed=0", "says 5", "--config.init_from=", "parameters"],
    ),
}
# Those that need neither a corpus nor a tokenizer, and are found before there is one.
CHEAP = (
    "wrong choice",
    "width and heads",
    "negative warm-up",
    "warm-up longer than the decay",
    "cadence",
    "batch and accumulation",
    "run of another config",
    "run of another corpus",
    "truncated config.json",
    "init_from no run",
    "init_from another model",
    "workdir is a file",
)
# The same with configs/generate.py.
GENERATE_MISTAKES = {
    "no run": (["--config.init_from=HERE/rnu"], ["rnu does not exist (did you mean 'run'?)"]),
    "not a run": (["--config.init_from=HERE"], ["not the directory of a training run"]),
    "prompt too long": (
        ["--config.init_from=RUN", "--config.prompt=" + "cat " * 9, "--config.truncate_prompt=0"],
        ["prompt is 37 tokens", "context is 32"],
    ),
    "swapped tokenizer": (
        ["--config.init_from=HERE/swapped"],
        ["tokenizer is not the tokenizer", "put the original back"],
    ),
    "truncated run": (["--config.init_from=HERE/truncated"], ["config.json is damaged"]),
    "negative temperature": (
        ["--config.init_from=RUN", "--config.temperature=-1.0"],
        ["config.temperature=-1.0"],
    ),
    "no checkpoint": (["--config.init_from=HERE/early"], ["early has no checkpoint yet"]),
    "prompt of other bytes": (
        ["--config.init_from=RUN", "--config.prompt_file=HERE/latin.txt"],
        ["config.prompt_file=", "latin.txt", "neither UTF-8 nor UTF-16"],
    ),
    "more samples than memory": (
        ["--config.init_from=RUN", "--config.num_samples=1000000000"],
        ["num_samples=1000000000"],
    ),
}


def main(*arguments: str, devices: int = 1) -> tuple[int, str, str]:
    """Exit code, output and errors of `python main.py *arguments`, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["main.py", *arguments]),
        contextlib.chdir(tiny_jobs.REPOSITORY),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        tiny_jobs.devices(devices),
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


def arguments(here, words, config=CONFIG):
    caches = [f"--config.data.cache_dir={here}/tokens", "--config.train.compilation_cache="]
    words = [w.replace("HERE", str(here)).replace("RUN", str(here / "run")) for w in words]
    configs = [] if any(word.startswith("--config=") for word in words) else [config]
    ours = caches if configs == [CONFIG] else []
    return [*configs, f"--workdir={here}/new", *ours, *words]


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


@pytest.mark.parametrize("name", GENERATE_MISTAKES)
def test_a_mistake_in_generation_ends_in_one_line_and_code_two(here, name):
    before = contents(here)
    given, words = GENERATE_MISTAKES[name]
    outcome = main(*arguments(here, given, "--config=configs/generate.py"))
    assert_one_line(outcome, words)
    assert contents(here) == before


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
        "--config.train.compilation_cache=", "--config.prompt=The cat",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    (line,) = [line for line in output.splitlines() if "held out" in line]
    assert str(book) in line and "1 document, too few" in line and "data.split='hash'" in line
    assert "eval_loss" in (here / "book" / "metrics.jsonl").read_text()


def test_no_filter_is_none_and_zero_and_a_long_text_slides_on(here):
    given = ["--config.init_from=RUN", "--config.prompt=" + "cat " * 9, "--config.max_new_tokens=9"]
    texts = set()
    for off in ("None", "0"):
        filters = [f"--config.top_k={off}", f"--config.top_p={off}"]
        code, text, notes = main(
            *arguments(here, [*given, *filters], "--config=configs/generate.py")
        )
        assert code == 0 and text.startswith("cat cat ")
        assert "only the last of the prompt's 37 tokens" in notes
        assert "outgrew the model's context of 32" in notes
        texts.add(text)
    assert len(texts) == 1


def test_a_mask_token_asked_of_a_tokenizer_without_one_is_added(here):
    code, output, errors = main(*arguments(here, [
        "--config.tokenizer.path=RUN/tokenizer", "--config.tokenizer.mask_token=True",
        "--config.objective.name=masked", "--config.model.architecture=encoder",
        "--config.train.steps=2", "--config.checkpoint.every=0", "--workdir=HERE/masked",
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
    words = ["--config.init_from=RUN", "--config.max_new_tokens=1", f"--config.prompt={prompt}"]
    code, output, _ = main(*arguments(here, words, "--config=generate"))
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
    source = "--config.init_from=HERE/damaged"
    assert_one_line(main(*arguments(here, ["--workdir=HERE/damaged"])), words)
    assert_one_line(main(*arguments(here, ["--workdir=HERE/child", source])), words)
    assert_one_line(main(*arguments(here, [source], "--config=configs/generate.py")), words)
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
    few = ["--config.train.steps=4", "--config.train.log_every=2", "--config.checkpoint.every=2"]
    code, _, errors = main(*arguments(here, [f"--workdir=HERE/{name}", *few]))
    assert (code, errors) == (0, "")
    shutil.rmtree(here / name / "checkpoints" / "00000004")
    code, output, errors = main(*arguments(here, [f"--workdir=HERE/{name}", *few]))
    assert (code, errors) == (0, "") and "resuming at step 2" in output
    given = [f"--config.init_from=HERE/{name}", "--config.prompt=The cat"]
    code, output, errors = main(*arguments(here, given, "--config=configs/generate.py"))
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
    outcome = main(*arguments(here, ["--workdir=HERE/between", "--config.model.width=32"]))
    assert_one_line(outcome, ["holds a run with config.model.width=16", "says 32"])
    assert contents(here / "between") == contents(here / "run")


def test_a_checkpoint_that_the_disk_does_not_take_ends_in_one_line(here, caplog):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    given = ["--workdir=HERE/large", "--config.model.width=128", "--config.train.steps=2"]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        outcome = main(*arguments(here, [*given, "--config.checkpoint.every=0"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(outcome, ["large/checkpoints: step 2 could not be saved: a file", "ulimit -f"])
    assert not caplog.records  # Orbax has three tracebacks for it


def test_a_warm_up_longer_than_the_run_is_cut_to_a_tenth_of_it(here):
    fields = ["--config.optimizer.warmup_steps=100", "--config.train.steps=20"]
    code, output, errors = main(*arguments(here, ["--workdir=HERE/warm", *fields]))
    assert (code, errors) == (0, "")
    notice = "optimizer.warmup_steps=100 is more than the run's 20 steps: cut to a tenth of them, 2"
    assert output.count(notice) == 1
    rates = dict(tiny_jobs.losses(here / "warm", "learning_rate"))
    assert rates[2] == pytest.approx(1e-2 * 2 / 3)
    assert rates[4] > rates[2] and rates[20] < 0.2e-2


def test_a_run_that_diverges_ends_in_one_line_and_code_one(here):
    fields = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0"]
    code, _, errors = main(
        *arguments(here, ["--workdir=HERE/wild", "--config.train.on_spike=stop", *fields])
    )
    assert code == 1
    assert errors.startswith("error: step ") and errors.count("\n") == 1
    assert "data epoch" in errors and "optimizer.learning_rate" in errors


def test_output_that_nobody_reads_on_is_no_mistake():
    process = tiny_jobs.start([sys.executable, "main.py", "--help"])
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=300) == 141


@pytest.mark.parametrize(
    "given, words",
    [
        (["--config=configs/quickstart.py", "--config.model.widht=3"], ["config.model.widht"]),
        (["--config=configs/story.py", "--config.model.width=33"], ["config.model.width=33"]),
    ],
)
def test_a_process_of_its_own_says_the_same(tmp_path, given, words):
    process = tiny_jobs.start([sys.executable, "main.py", f"--workdir={tmp_path}/run", *given])
    output, errors = process.communicate(timeout=300)
    assert_one_line((process.returncode, output, errors), words)
    assert not list(tmp_path.iterdir())

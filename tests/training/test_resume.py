"""A run that was killed and started again is, to the last bit, the run that never was."""

import json
import os
import random
import signal
import time

import pytest
import tiny_jobs
from test_main import main

from lm.training.config import TrainingInterrupted
from lm.training.loop import Loop, termination_flag

# Dropout, accumulation, packing, several epochs and several steps a dispatch, all at once. Losses
# are logged every fourth step and saved every sixth, so that a save falls between two records.
HARD = {
    "model__dropout": 0.1,
    "train__accumulation": 2,
    "train__log_every": 4,
    "checkpoint__every": 6,
}


class Killed(BaseException):
    """What nothing in the project catches."""


def run_killed(monkeypatch, tmp_path, name, at_dispatch, **fields):
    """Trains until the `at_dispatch`-th call of the step, which does not come back."""
    calls = iter(range(1, 1000))
    original = Loop._dispatch

    def sabotaged(self, *arguments):
        if next(calls) == at_dispatch:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_dispatch", sabotaged)
        with pytest.raises(Killed):
            tiny_jobs.run(tmp_path, name, **fields)
    return tmp_path / name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(place):
    """The uninterrupted runs, by packing."""
    kinds = ("best_fit", "concat")
    return {k: tiny_jobs.run(place, f"whole_{k}", **HARD, data__packing=k) for k in kinds}


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_killed_anywhere_and_restarted_is_bitwise_the_uninterrupted_run(
    monkeypatch, place, whole, packing, caplog
):
    fields = {**HARD, "data__packing": packing}
    name = f"killed_{packing}"
    for at_dispatch in (2, 5, 4):  # before any save; after step 6, mid-epoch; after step 12
        directory = run_killed(monkeypatch, place, name, at_dispatch, **fields)
        assert not tiny_jobs.losses(directory) or tiny_jobs.losses(directory)[-1][0] < 24
    assert tiny_jobs.checkpoint_steps(directory) == [6, 12]
    newest = directory / "checkpoints" / "00000012"
    if packing == "concat":  # and what was saved last is half of a file now
        largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    caplog.clear()
    tiny_jobs.run(place, name, **fields)
    tiny_jobs.assert_same_run(directory, whole[packing])
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == (packing == "concat")
    assert all(str(newest) in warning and "\n" not in warning for warning in warnings)


@pytest.mark.parametrize(
    "number, name, ending",
    [
        (signal.SIGTERM, "SIGTERM", TrainingInterrupted),
        (signal.SIGINT, "Ctrl-C", KeyboardInterrupt),
    ],
)
def test_a_signal_between_two_records_saves_says_where_and_goes_on(
    monkeypatch, place, whole, capsys, number, name, ending
):
    fields = {**HARD, "data__packing": "best_fit"}
    original = Loop._report

    def terminate_at_ten(self, dispatch):
        if dispatch.step == 10 and not terminated:
            terminated.append(os.kill(os.getpid(), number))
        return original(self, dispatch)

    terminated = []
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_report", terminate_at_ten)
        with pytest.raises(ending):
            tiny_jobs.run(place, name, **fields, prompt="The cat")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    directory = place / name
    saved = tiny_jobs.checkpoint_steps(directory)[-1]
    assert 10 <= saved < 16
    assert f"{name}: saved step {saved}; the same command goes on there" in capsys.readouterr().out
    assert not (directory / "samples.txt").exists()  # whoever sends SIGTERM does not wait for long
    tiny_jobs.run(place, name, **fields)
    tiny_jobs.assert_same_run(directory, whole["best_fit"])


def test_a_second_ctrl_c_ends_the_process_at_once():
    with termination_flag() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_resumed_run_tells_one_story(monkeypatch, place):
    fields = {"train__eval_every": 8, "data__validation_fraction": 0.3, "data__split": "position"}
    directory = run_killed(monkeypatch, place, "story", 8, **fields)
    assert tiny_jobs.losses(directory)[-1][0] > 8  # logged, lost, and to be logged again
    tiny_jobs.run(place, "story", drawn=True, **fields)
    for field, every in (("loss", 2), ("eval_loss", 8)):
        steps = [step for step, _ in tiny_jobs.losses(directory, field)]
        assert steps == list(range(every, 25, every))
    tokens = [count for _, count in tiny_jobs.losses(directory, "tokens")]
    assert tokens == sorted(tokens)
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_may_change_its_rhythm_but_never_loses_it(place, monkeypatch):
    fields = {"train__steps_per_dispatch": 1, "train__log_every": 1, "checkpoint__every": 5}
    directory = run_killed(monkeypatch, place, "rhythm", 7, **fields)
    assert tiny_jobs.checkpoint_steps(directory) == [5]
    # Two steps a dispatch would pass by every checkpoint and the end from step 5 on.
    tiny_jobs.run(place, "rhythm", train__steps_per_dispatch=0, checkpoint__every=6)
    assert tiny_jobs.checkpoint_steps(directory)[-2:] == [18, 24]


def read_steps(directory):
    try:
        return [step for step, _ in tiny_jobs.losses(directory)]
    except (OSError, json.JSONDecodeError):  # not there yet, or half a line
        return []


LONGER = {**HARD, "train__steps": 60, "checkpoint__async_save": False}


@pytest.fixture(scope="module")
def unbroken(place):
    return tiny_jobs.run(place, "unbroken", **LONGER)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_is_bitwise_replaced_by_the_next(place, unbroken, signal_number):
    name = f"killed_{signal_number}"
    chance = random.Random(int(signal_number))
    arguments = tiny_jobs.command(place, name, **LONGER)
    process = tiny_jobs.start(arguments)
    after = chance.randrange(8, 32)
    while process.poll() is None and max(read_steps(place / name), default=0) < after:
        time.sleep(0.002)
    time.sleep(chance.random() * 0.05)
    process.send_signal(signal_number)
    output, errors = process.communicate(timeout=300)
    assert max(read_steps(place / name)) < 60  # it was still on its way
    if signal_number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        sigterm = signal_number == signal.SIGTERM
        assert process.returncode == (75 if sigterm else 130)  # 75: to be started again
        assert ("SIGTERM" if sigterm else "Ctrl-C") + ": saved step" in output
        assert errors == ("" if sigterm else "interrupted\n")

    code, output, errors = main(*arguments[2:])
    assert code == 0 and "resuming at step" in output, errors
    tiny_jobs.assert_same_run(place / name, unbroken)

"""Training as a whole: what must not change the result, and what happens when a step goes wrong."""

import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny_jobs

from lm import tokenizers
from lm.config import ConfigError
from lm.data.batches import BatchIterator
from lm.jobs import train
from lm.models import ModelConfig
from lm.parallel import compiler
from lm.training.config import TrainConfig, TrainingStopped
from lm.training.evaluate import make_evaluate
from lm.training.loop import Loop
from lm.training.progress import Progress
from lm.training.workload import Workload

# The loss that the tiny config reports for its steps 1 to 3, in float32 on a CPU. Update it, with a
# word in the commit, when a change is meant to alter what is computed: the data, the initial
# values, the model, the optimizer. Never update it for one that is meant to be neutral.
GOLDEN = 5.33013


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def assert_close_parameters(one, other):
    a, b = tiny_jobs.parameters(one), tiny_jobs.parameters(other)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)


# ---- What must not change the result ---------------------------------------------------------

TEN = {"train__steps": 10, "checkpoint__every": 0, "train__log_every": 1}
# SGD, because Adam divides by the gradient's own size: where a gradient is all rounding, so is its
# update, and parameters would differ by a learning rate without anything being wrong.
PLAIN = {"optimizer__name": "sgd", "optimizer__learning_rate": 0.3, "train__steps_per_dispatch": 1}


@pytest.fixture(scope="module")
def plain(place):
    return tiny_jobs.run(place, "plain", **TEN, **PLAIN)


def test_the_first_three_steps_give_the_recorded_loss(place):
    fields = {"train__steps": 3, "train__log_every": 3, "train__steps_per_dispatch": 3}
    directory = tiny_jobs.run(place, "golden", **fields, checkpoint__every=0)
    [(step, loss)] = tiny_jobs.losses(directory)
    assert step == 3
    assert loss == pytest.approx(GOLDEN, abs=1e-4), (
        f"the loss of steps 1 to 3 is {loss:.6f}, not {GOLDEN}: if the change at hand is meant to "
        "alter data, initial values, model or optimizer, update GOLDEN; if not, it has a bug"
    )


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_is_full_batch_with_documents_of_unequal_length(place, plain, accumulation):
    name = f"accumulation_{accumulation}"
    directory = tiny_jobs.run(place, name, **TEN, **PLAIN, train__accumulation=accumulation)
    losses, expected = (np.array(tiny_jobs.losses(run)) for run in (directory, plain))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close_parameters(directory, plain)


def test_several_steps_a_dispatch_are_the_same_steps(place, plain):
    fields = {**TEN, **PLAIN, "train__steps_per_dispatch": 5, "train__log_every": 5}
    directory = tiny_jobs.run(place, "dispatch", **fields)
    every_step, per_five = tiny_jobs.losses(plain), tiny_jobs.losses(directory)
    assert [step for step, _ in per_five] == [5, 10]
    # Rows hold unequal numbers of targets, so the mean over five steps is nearly, not exactly, the
    # mean of their means; the parameters are what must agree.
    assert per_five[0][1] == pytest.approx(np.mean([v for _, v in every_step[:5]]), abs=0.02)
    assert_close_parameters(directory, plain)


def test_padding_changes_no_statistic_of_routers_and_is_no_token(place):
    """Rows of one document each, with little padding and with much."""
    path = place / "short.jsonl"
    documents = ("".join(chr(97 + (3 * n + k) % 26) for k in range(5 + n)) for n in range(24))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    fields = {"data__path": str(path), "data__packing": "none", "train__steps": 4}
    experts = {"model__num_experts": 4, "model__activation": "swiglu", "model__expert_width": 16}
    runs = [
        tiny_jobs.run(place, f"padded_{size}", **fields, **experts, data__block_size=size)
        for size in (32, 64)
    ]
    for name in ("loss", "load_balancing", "router_z", "max_load", "tokens"):
        one, other = (np.array(tiny_jobs.losses(run, name)) for run in runs)
        np.testing.assert_allclose(one, other, rtol=1e-4, err_msg=name)
    prefix = tiny_jobs.run(place, "given", **fields, objective__name="prefix")
    assert tiny_jobs.losses(prefix, "tokens") == tiny_jobs.losses(runs[0], "tokens")


def test_evaluation_counts_every_validation_target_once(place, monkeypatch):
    seen = []

    def spy(training, batches, frozen):
        seen.append((batches.num_targets, len(batches)))
        return make_evaluate(training, batches, frozen)

    monkeypatch.setattr(train, "make_evaluate", spy)
    fields = {
        "data__split": "position",
        "data__validation_fraction": 0.5,
        "train__eval_batch_size": 5,  # which does not divide the number of rows
        "train__steps": 2,
        "train__log_every": 0,
    }
    directory = tiny_jobs.run(place, "evaluated", **fields, checkpoint__every=0)
    [(targets, batches)] = seen
    assert tiny_jobs.losses(directory, "eval_tokens") == [(2, targets)]
    assert targets > 0 and batches > 1


@pytest.mark.parametrize("kind", ["char", "wordpiece"])
def test_bits_per_byte_are_of_the_bytes_that_are_predicted(place, kind):
    """Of what the tokenizer leaves of a text, when it does not know some of its characters."""
    text = "a cat sat on a mat\n" * 20
    (place / "known.txt").write_text(text)
    (place / "unknown.txt").write_text(text + "ω" * 500)
    directory = tiny_jobs.run(
        place,
        f"lossy_{kind}",
        **{"tokenizer__kind": kind, "tokenizer__vocab_size": 80, "train__steps": 2},
        data__path=str(place / "known.txt"),
        data__validation_path=str(place / "unknown.txt"),
    )
    of = {
        name: tiny_jobs.losses(directory, f"eval_{name}")[-1][1]
        for name in ("loss", "tokens", "bits_per_byte")
    }
    tokenizer = tokenizers.load(directory / "tokenizer")
    left = tokenizer.decode(tokenizer.encode((place / "unknown.txt").read_text())).encode()
    predicted = of["loss"] * of["tokens"] / np.log(2) / of["bits_per_byte"]
    assert predicted == pytest.approx(len(left), rel=1e-5)


def test_fine_tuning_starts_from_the_given_parameters(place, plain):
    # Nothing moves at a learning rate of zero.
    fields = {**TEN, **PLAIN, "optimizer__learning_rate": 0.0, "optimizer__weight_decay": 0.0}
    directory = tiny_jobs.run(place, "tuned", **fields, init_from=str(plain), seed=1)
    a, b = tiny_jobs.parameters(plain), tiny_jobs.parameters(directory)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_the_compiler_gets_options_of_ours_where_they_are_asked_for_alone(place, monkeypatch):
    monkeypatch.setattr(compiler, "options", lambda kind: {"xla_of_the_future": "true"})
    few = {"train__steps": 2, "checkpoint__every": 0}
    tiny_jobs.run(place, "compiled", **few)
    with pytest.raises(ConfigError, match=r"compiler='tuned' .*xla_of_the_future"):
        tiny_jobs.run(place, "tuned_compiler", **few, train__compiler="tuned")


def test_a_profile_window_writes_a_trace(place):
    fields = {"train__profile_start": 3, "train__profile_steps": 2}
    directory = tiny_jobs.run(place, "profiled", **TEN, **{**PLAIN, **fields})
    assert list((directory / "profile").rglob("*.xplane.pb"))


# ---- When a step goes wrong ------------------------------------------------------------------


def poison(monkeypatch, changes):
    """Applies the change of its number to a training batch, wherever it comes up."""
    original = BatchIterator.__next__

    def poisoned(self):
        number = self._next
        batch = original(self)
        if number in changes:
            batch = changes[number]({name: value.copy() for name, value in batch.items()})
        return batch

    monkeypatch.setattr(BatchIterator, "__next__", poisoned)


def infinite(batch):
    batch["weights"][0, 0] = np.inf
    return batch


def weightless(batch):
    batch["weights"][:] = 0
    return batch


def gibberish(batch):
    batch["targets"] = np.random.default_rng(0).integers(0, 256, batch["targets"].shape, np.int32)
    return batch


def assert_finite(directory):
    assert all(np.isfinite(value).all() for value in tiny_jobs.parameters(directory).values())
    assert all(np.isfinite(value) for _, value in tiny_jobs.losses(directory))
    assert all(np.isfinite(value) for _, value in tiny_jobs.losses(directory, "tokens"))


def test_a_batch_with_nothing_to_learn_has_loss_0_and_a_warning(place, monkeypatch, capsys):
    poison(monkeypatch, {4: weightless, 5: weightless})
    directory = tiny_jobs.run(place, "weightless", train__steps=8)
    losses = dict(tiny_jobs.losses(directory))
    assert losses[6] == 0 and min(losses[4], losses[8]) > 1
    assert "step 5: nothing to learn in this batch: its loss is 0" in capsys.readouterr().out
    assert_finite(directory)


@pytest.mark.parametrize("stride", [1, 2])
def test_skip_leaves_out_the_step_and_names_its_data(place, monkeypatch, capsys, stride):
    poison(monkeypatch, {10: infinite})
    directory = tiny_jobs.run(place, f"skip_{stride}", train__steps_per_dispatch=stride)
    epoch, row = divmod(10 * 8, rows_per_epoch(directory))
    lines = [line for line in capsys.readouterr().out.splitlines() if "update skipped" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"step 11, data epoch {epoch} row {row}: loss ")
    assert tiny_jobs.losses(directory, "spikes") == [(11, 1)]
    assert_finite(directory)


def test_a_skipped_step_changes_nothing(place, monkeypatch):
    fields = {"train__steps": 2, "train__steps_per_dispatch": 1, "checkpoint__every": 1}
    poison(monkeypatch, {1: infinite})
    directory = tiny_jobs.run(place, "unchanged", **fields)
    before, after = tiny_jobs.parameters(directory, 1), tiny_jobs.parameters(directory, 2)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("offload", [False, True])
def test_after_a_skipped_step_the_logged_rate_is_applied_and_the_decay_ends(
    place, monkeypatch, offload
):
    # Without a gradient parameters shrink by the rate times the weight decay.
    poison(monkeypatch, {3: infinite, 5: weightless})
    schedule = {"schedule": "linear", "final_fraction": 0.0, "learning_rate": 0.5}
    decay = {"name": "sgd", "b1": 0.0, "weight_decay": 0.5, "decay": "all"}
    directory = tiny_jobs.run(
        place,
        f"rates_{offload}",
        **{f"optimizer__{name}": value for name, value in {**schedule, **decay}.items()},
        train__offload_optimizer=offload,
        train__steps=8,
        train__steps_per_dispatch=1,
        checkpoint__every=1,
        checkpoint__keep=8,
    )
    rates = dict(tiny_jobs.losses(directory, "learning_rate"))
    assert rates == pytest.approx({2: 0.4375, 4: 0.3125, 6: 0.1875, 8: 0.0625})
    before, after = tiny_jobs.parameters(directory, 5), tiny_jobs.parameters(directory, 6)
    for name in before:
        np.testing.assert_allclose(after[name], before[name] * (1 - 0.5 * rates[6]), rtol=1e-6)


def test_a_finite_spike_counts_where_the_config_says_how_high(place, monkeypatch, capsys):
    poison(monkeypatch, {14: gibberish})
    calm = tiny_jobs.run(place, "tolerant")
    assert not tiny_jobs.losses(calm, "spikes")
    watchful = tiny_jobs.run(place, "watchful", train__spike_nats=1.0)
    assert tiny_jobs.losses(watchful, "spikes") == [(15, 1)]
    assert "step 15, data epoch" in capsys.readouterr().out


def test_rollback_goes_on_from_the_checkpoint_with_later_data(place, monkeypatch, capsys):
    poison(monkeypatch, {12: infinite})
    directory = tiny_jobs.run(place, "rollback", train__on_spike="rollback")
    output = capsys.readouterr().out
    assert "step 13, data epoch 1 row" in output and "rolling back" in output
    assert "rolled back to step 8; the data goes on from here" in output
    assert tiny_jobs.checkpoint_steps(directory)[-1] == 24
    extra = json.loads((directory / "checkpoints" / "00000024" / "extra.json").read_text())
    # The dispatch of steps 13 and 14 was bad, and 15 and 16 had been dispatched when it was read.
    assert extra["data"]["batch"] == 24 + (16 - 8)
    steps = [step for step, _ in tiny_jobs.losses(directory)]
    assert steps == list(range(2, 25, 2))  # the abandoned steps' records are gone
    assert tiny_jobs.losses(directory, "rolled_back_from") == [(8, 16)]
    assert_finite(directory)


def test_killed_after_a_rollback_and_restarted_is_bitwise_the_same(place, monkeypatch):
    poison(monkeypatch, {4: infinite, 12: infinite})
    fields = {"train__on_spike": "rollback", "checkpoint__every": 2, "train__steps": 16}
    whole = tiny_jobs.run(place, "rolled_whole", **fields)
    original = Loop._roll_back

    class Killed(BaseException):
        pass

    def killed(self):
        step = self._step
        state = original(self)
        if step > 6:
            raise Killed
        return state

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_roll_back", killed)
        with pytest.raises(Killed):
            tiny_jobs.run(place, "rolled_killed", **fields)
    again = tiny_jobs.run(place, "rolled_killed", **fields)
    tiny_jobs.assert_same_run(again, whole)


def test_the_data_position_is_right_after_a_rollback_too(place, monkeypatch, capsys):
    """Two bad batches: the second is met with the data ahead of the steps, and named as it is."""
    poison(monkeypatch, {9: infinite, 20: infinite})
    directory = tiny_jobs.run(place, "ahead", train__on_spike="rollback", data__shuffle=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "rolling back" in line]
    epochs_and_rows = [tuple(map(int, line.split(":")[0].split()[4::2])) for line in lines]
    per_epoch = rows_per_epoch(directory)
    assert epochs_and_rows == [divmod(9 * 8, per_epoch), divmod(20 * 8, per_epoch)]


def rows_per_epoch(directory):
    """From the run's own config, by building its data again."""
    from lm.config import view
    from lm.data import DataConfig, prepare, train_batches

    config = json.loads((directory / "config.json").read_text())
    data = view(DataConfig, config["data"])
    corpora, _ = prepare(data, tokenizers.load(directory / "tokenizer"), config["seed"])
    return sum(rows.num_rows for rows in train_batches(data, corpora, seed=0).rows)


def test_rollback_without_a_checkpoint_stops_and_says_so(place, monkeypatch):
    poison(monkeypatch, {2: infinite})
    with pytest.raises(TrainingStopped, match="nothing to roll back to yet: lower checkpoint"):
        tiny_jobs.run(place, "too_early", train__on_spike="rollback")


def test_stop_ends_the_run_and_leaves_the_last_checkpoint(place, monkeypatch):
    poison(monkeypatch, {12: infinite})
    with pytest.raises(TrainingStopped) as stopped:
        tiny_jobs.run(place, "stop", train__on_spike="stop")
    message = str(stopped.value)
    assert message.startswith("step 13, data epoch 1 row ") and "\n" not in message
    directory = place / "stop"
    assert tiny_jobs.checkpoint_steps(directory) == [8]
    monkeypatch.undo()
    # With the data mended, the run goes on from there.
    tiny_jobs.run(place, "stop", train__on_spike="stop")
    assert tiny_jobs.checkpoint_steps(directory)[-1] == 24
    assert_finite(directory)


def test_too_many_spikes_stop_the_run_whatever_the_action(place, monkeypatch):
    poison(monkeypatch, dict.fromkeys(range(6, 100), infinite))
    with pytest.raises(TrainingStopped, match="more than 3 spikes"):
        tiny_jobs.run(place, "hopeless", train__max_spikes=3)


def test_a_run_too_short_to_log_a_loss_ends_well(place):
    fields = {"train__steps": 2, "train__log_every": 10, "checkpoint__every": 0}
    directory = tiny_jobs.run(place, "short", drawn=True, **fields)
    assert tiny_jobs.checkpoint_steps(directory) == [2]
    assert not (directory / "loss.png").exists()


# ---- The rates that are logged ---------------------------------------------------------------


class Machine:
    """A device, its host, and a clock that only their work moves.

    A step is 100 tokens and takes the device a second. The first call compiles for 100 s, a call
    takes 0.01 s besides, and evaluations and checkpoints 50 s.

    Args:
      waits: seconds the host takes for the batch of a step.
      within: whether the device works while it is called, or after the call has returned.
    """

    def __init__(self, waits: float, within: bool):
        self.waits, self.within = waits, within
        self.now = self.free = self.paused = 0.0
        self.began = self.ended = 0.0  # when the first dispatch was done, and the last one

    def __next__(self):
        self.now += self.waits
        return {"inputs": np.zeros((1, 1))}

    def get_state(self):
        return {}

    def set_state(self, state):
        raise AssertionError("nobody moves it")

    def call(self, state, batch, frozen):
        stride = len(batch["inputs"])
        self.now += 0.01 if self.began else 100.0
        self.free = max(self.now, self.free) + stride
        self.now = self.free if self.within else self.now
        self.began, self.ended = self.began or self.free, self.free - self.paused
        ones = ("nats", "grad_norm", "learning_rate")
        metrics = {"weight": 100.0, "tokens": 100.0, "skipped": 0, **dict.fromkeys(ones, 1.0)}
        return state, {name: Pending(self, np.full(stride, v)) for name, v in metrics.items()}

    def pause(self, *args, **named):
        assert self.now >= self.free, "the state is not there yet"
        self.now += 50.0
        self.paused += 50.0
        return {}


class Pending:
    """An array that a machine is working on."""

    def __init__(self, machine: Machine, value: np.ndarray):
        self.machine, self.value, self.end = machine, value, machine.free

    def is_ready(self):
        return self.machine.now >= self.end

    def block_until_ready(self):
        self.machine.now = max(self.machine.now, self.end)
        return self

    def __array__(self, *args, **named):
        return self.block_until_ready().value


@pytest.mark.parametrize("within", [False, True], ids=["after the call", "within the call"])
@pytest.mark.parametrize("waits", [0.0, 1.5], ids=["fed", "starved"])
@pytest.mark.parametrize(
    "stride, log_every, eval_every, start",
    [(1, 1, 0, 0), (1, 10, 20, 0), (2, 10, 20, 0), (5, 10, 30, 10), (10, 10, 20, 0), (2, 2, 4, 0)],
)
def test_rates_are_the_tokens_and_the_time_of_the_device(
    within, waits, stride, log_every, eval_every, start
):
    """Without the call that compiles, and without evaluations and checkpoints."""
    machine, records = Machine(waits, within), []
    ignore = mock.Mock(spec=Progress)
    cadences = dict(steps=60, log_every=log_every, eval_every=eval_every)
    workload = Workload(
        ModelConfig(vocab_size=8, max_length=8), 8, 8,
        train=TrainConfig(**cadences, steps_per_dispatch=stride),
    )  # fmt: skip
    loop = Loop(
        SimpleNamespace(workload=workload, step=machine.call, put=lambda batch, **_: batch),
        machine,
        machine.pause,
        SimpleNamespace(save=machine.pause, wait=lambda: None),
        30,
        SimpleNamespace(write=lambda step, record: records.append(record)),
        ignore,
        directory=None,
        clock=lambda: machine.now,
    )
    loop.run(None, start, {})
    tokens = [100 * log_every] * ((60 - start) // log_every)
    tokens[0] -= 100 * stride
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    assert len(rates) == sum(n > 0 for n in tokens)
    assert max(rates) <= 100 + 1e-9  # as fast as it can work
    assert waits or min(rates) > 98
    seconds = sum(n / rate for n, rate in zip(filter(None, tokens), rates, strict=True))
    assert seconds == pytest.approx(machine.ended - machine.began)

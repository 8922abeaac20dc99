import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_main import main

from lm.config import ConfigError
from lm.training import plots
from lm.training.metrics import MetricsWriter, read_metrics
from lm.training.plots import plot_losses
from lm.training.progress import Progress

ROOT = pathlib.Path(__file__).parents[2]


def test_what_is_written_is_read(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(2.5), "tokens": 768, "grad_norm": jnp.float32(0.5)})
        writer.write(2, {"loss": 2.25, "eval_loss": 2.0})
    records = read_metrics(tmp_path / "run")
    assert records == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records == [
        {"step": 1, "loss": 2.5, "tokens": 768, "grad_norm": 0.5},
        {"step": 2, "loss": 2.25, "eval_loss": 2.0},
    ]


def test_every_line_is_json_even_when_the_loss_is_not_a_number(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": np.float32("inf")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["loss"] is None
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_resuming_drops_what_will_be_repeated(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(10, 60, 10):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # killed in the middle of a line
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30, 40, 50]
    with MetricsWriter(tmp_path, start_step=30) as writer:
        writer.write(40, {"loss": 4.5})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, 30.0),
        (40, 4.5),
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_tensorboard_reads_one_story(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "lr[1e-3] naïve"
    with MetricsWriter(run) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / step, "eval_loss": math.nan})
    with MetricsWriter(run, start_step=1) as writer:
        writer.write(2, {"loss": 7.0})
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_tensorflow_and_matplotlib_stay_out():
    code = """
        import sys, tempfile
        from lm.training import metrics, plots
        assert "matplotlib" not in sys.modules and "tensorboard" not in sys.modules
        with metrics.MetricsWriter(tempfile.mkdtemp()) as writer:
            writer.write(1, {"loss": 1.0})
        assert "tensorboard" in sys.modules
        assert not {"tensorflow", "torch"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


def test_killed_run_keeps_every_record(tmp_path):
    code = """
        import os, signal, sys
        from lm.training.metrics import MetricsWriter
        writer = MetricsWriter(sys.argv[1])
        for step in range(100):
            writer.write(step, {"loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, check=False, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(read_metrics(tmp_path)) == 100


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_reported_once_and_training_goes_on(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer._file = pathlib.Path("/dev/full").open("w")  # noqa: SIM115
    for step in range(3):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert sum("metrics are being lost" in r.getMessage() for r in caplog.records) == 1


def test_unusable_directories_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*choose another --workdir"):
        MetricsWriter(tmp_path / "file")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(ConfigError, match=r"/tensorboard: metrics cannot be written here"):
        MetricsWriter(tmp_path)
    with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be read|nothing cannot be read"):
        read_metrics(tmp_path / "nothing")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_have_one_format():
    file, now = io.StringIO(), iter([0.0, 10.0, 20.0])
    with Progress(2000, file=file, clock=lambda: next(now)) as progress:
        progress.update(100, {"loss": 2.5})
        metrics = {"tokens_per_second": 52_123, "mfu": 0.4126, "data_wait": 0.002, "other": 1}
        progress.update(200, {"loss": np.float32(1.5), "eval_loss": 1.75, **metrics})
        progress.print("evaluated [all] of it")
        progress.update(2000, {"loss": math.nan})
    assert file.getvalue().splitlines() == [
        "step  100/2000  loss 2.5000",
        "step  200/2000  loss 1.5000  eval 1.7500  52.1k tokens/s  mfu 41.3%  data 0.2%"
        "  0:03:00 left",
        "evaluated [all] of it",
        "step 2000/2000  loss nan",
    ]


def test_terminal_gets_a_bar_and_the_text_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    file = Terminal()
    with Progress(10, file=file) as progress:
        progress.update(5, {"loss": 1.25, "tokens_per_second": 900})
        progress.print("text [bold]as it is[/bold]")
        progress.update(10, {"loss": 1.125})
    shown = file.getvalue()
    assert "text [bold]as it is[/bold]" in shown and "━" in shown
    assert "step 10/10  loss 1.1250  900 tokens/s" in shown


@pytest.mark.parametrize("width", [60, 80, 100])
def test_time_left_and_mfu_and_a_bar_fit_in_every_terminal(monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    now = iter([0.0, 10.0, 20.0])
    with Progress(2000, file=Terminal(), clock=lambda: next(now)) as progress:

        def shown():
            console = Console(file=io.StringIO(), width=width)
            console.print(progress._bar.get_renderable())
            [line] = console.file.getvalue().splitlines()
            assert len(line) <= width and "…" not in line
            assert line.index("step") > 6  # the bar, and a space
            return line

        progress.compiling(True)
        assert shown().rstrip().endswith("step    0/2000  compiling")
        progress.compiling(False)
        assert "compiling" not in shown()
        speed = {"tokens_per_second": 52_123, "mfu": 0.4126, "data_wait": 0.002}
        for step in (100, 200):
            progress.update(step, {"loss": 1.5, **speed})
        progress.update(200, {"eval_loss": 1.75, "eval_bits_per_byte": 0.8123})
        for text in ("step  200/2000", "loss 1.5000", "mfu 41.3%", "0:06:00 left"):
            assert text in shown()
        assert ("eval 1.7500" in shown()) == (width >= 100)


def test_loss_is_plotted(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": math.nan})
        with pytest.raises(ConfigError, match="no finite loss to plot"):
            plot_losses(tmp_path)
        for step in range(1, 200):
            loss = math.nan if step == 50 else 2 + 2 / step
            writer.write(step, {"loss": loss, "tokens": 100 * step})
            if step % 50 == 0:
                writer.write(step, {"eval_loss": 2.1 + 2 / step})
    assert plot_losses(tmp_path) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_runs_are_compared(tmp_path):
    for name, loss in (("$a_1$", 2.0), ("_b", 3.0)):
        with MetricsWriter(tmp_path / "runs" / name) as writer:
            for step in (1, 2, 3):
                values = {"loss": loss / step, "tokens": 10 * step, "tokens_per_second": 100 * step}
                writer.write(step, values)
            writer.write(2, {"eval_loss": loss})
            writer.write(3, {"eval_loss": loss + 0.5})
    (tmp_path / "runs" / "notes").mkdir()
    given = ["--config=compare_runs", f"--config.runs={tmp_path}/runs", f"--workdir={tmp_path}/out"]
    code, output, errors = main(*given, "--config.against=tokens")
    assert (code, errors) == (0, "")
    rows = [line.split() for line in output.splitlines()]
    assert rows[1:3] == [
        ["$a_1$", "3", "0.6667", "2.5000", "2.0000", "200"],
        ["_b", "3", "1.0000", "3.5000", "3.0000", "200"],
    ]
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    code, _, errors = main(*given[:1], f"--config.runs={tmp_path}/runs/notes", *given[2:])
    assert (code, errors.count("\n")) == (2, 1) and "notes' is no run" in errors


def test_a_comparison_is_drawn_as_it_is_labelled(tmp_path, monkeypatch):
    records = [{"step": s, "loss": 1 / s, "tokens": 10 * s} for s in (1, 2)]
    evaluated = [*records, {"step": 2, "eval_loss": 0.7}]
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.plot_runs({"$a$": records, "_b": evaluated}, tmp_path / "x.png", "tokens")
    [axes] = drawn[0].axes
    assert axes.get_title() == "Training loss, and evaluation loss as points"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "loss (nats per token)")
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["$a$", "./_b"]
    assert not any(text.get_parse_math() for text in texts)
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert points[1] == [[10, 1], [20, 0.5]] and points[-1] == [[20, 0.7]]

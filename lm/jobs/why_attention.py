"""Why attention: what recurrent networks could not do, measured, in one report.

Three parts of one story. A gradient on its way back through time shrinks at every token of a
recurrent network, and does not through attention (Hochreiter 1991; Bengio et al. 1994). An encoder
that must put any source into one vector fails on long ones, and attention over all its states mends
that (Bahdanau et al. 2015). And a state that waits for the one before leaves a machine idle that
could work on all tokens at once (Vaswani et al. 2017).
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import ml_collections
from rich.console import Console

from lm.config import to_dict, view
from lm.experiments.why_attention.config import WhyAttentionJob
from lm.experiments.why_attention.measure import (
    measure_bottleneck,
    measure_gradients,
    measure_speed,
)
from lm.experiments.why_attention.report import plot, report, tables
from lm.files import write_json
from lm.parallel.platform import keep_buffers


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Measures what a `WhyAttentionJob` asks for, and prints it.

    Writes `report.md`, `why_attention.png`, `results.json` and `config.json` into `workdir`.

    Returns:
      What `results.json` holds.

    Raises:
      ConfigError: a field that makes no sense, or a directory that cannot be written.
    """
    job = view(WhyAttentionJob, config)
    if jax.default_backend() == "cpu":
        keep_buffers()
    directory = pathlib.Path(workdir).expanduser()
    write_json(directory / "config.json", to_dict(job))
    console = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    results = {
        "gradients": measure_gradients(job, console.print),
        "bottleneck": measure_bottleneck(job, console.print),
        "speed": measure_speed(job, console.print),
    }
    results["seconds"] = round(time.perf_counter() - began, 1)
    write_json(directory / "results.json", results)
    for table in tables(results):
        console.print(f"\n{table}", markup=False)
    plot(results, directory / "why_attention.png")
    page = report(results, job.bottleneck.steps)
    (directory / "report.md").write_text(page, encoding="utf-8")
    console.print(f"{directory}/report.md · {directory}/why_attention.png")
    return results

"""Pictures of a run of learning from rewards, from its metrics.jsonl."""

from __future__ import annotations

import pathlib

from lm.training.metrics import read_metrics
from lm.training.plots import INK, bare, figure_of, save, series

# What is drawn, one picture each: its title, and the metrics in it.
PANELS = {
    "reward": ("reward", "eval_reward"),
    "KL to the reference (nats a response)": ("kl",),
    "entropy (nats a token)": ("entropy",),
    "clip fraction": ("clip_fraction", "value_clip_fraction"),
    "explained variance": ("explained_variance",),
    "response length (tokens)": ("response_length",),
    "end-of-text rate": ("end_rate",),
    "seconds": ("rollout_seconds", "scoring_seconds", "update_seconds"),
}


def plot_curves(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws `workdir/curves.png`, and returns its path; None where nothing was measured."""
    records = read_metrics(workdir)
    panels = {
        title: found
        for title, names in PANELS.items()
        if (found := {name: xy for name in names if (xy := series(records, name))[0]})
    }
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = figure_of(figsize=(9, 2.2 * rows), dpi=130, layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, 2, place)
        for name, (steps, values) in lines.items():
            axes.plot(steps, values, linewidth=1.4, label=name.partition("_seconds")[0])
        axes.set_title(title, color=INK, fontsize=10)
        bare(axes)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    figure.supxlabel("iteration", color=INK, fontsize=9)
    return save(figure, workdir / "curves.png")

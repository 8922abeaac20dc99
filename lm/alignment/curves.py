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
    every = dict.fromkeys(name for record in records for name in record)
    parts = [n for n in every if n.startswith("reward_") and not n.endswith("_std")]
    panels = {}
    for title, names in {**PANELS, "reward": (*PANELS["reward"], *parts)}.items():
        lines = {name: series(records, name) for name in names}
        if found := {name: line for name, line in lines.items() if line[0]}:
            panels[title] = found
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = figure_of(figsize=(9, 2.2 * rows), dpi=130, layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, 2, place)
        for name, (steps, values) in lines.items():
            if title == "seconds" and len(steps) > 1:  # the first one compiles
                steps, values = steps[1:], values[1:]
            label = name.removesuffix("_seconds")
            if name in parts:
                label = f"{name.removeprefix('reward_')} (a part)"
            axes.plot(steps, values, linewidth=1.4, label=label)
        axes.set_title(title, color=INK, fontsize=10)
        bare(axes)
        if title == "explained variance":  # far below where returns are all alike
            axes.set_ylim(max(-1, axes.get_ylim()[0]), 1)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    figure.supxlabel("iteration", color=INK, fontsize=9)
    return save(figure, workdir / "curves.png")

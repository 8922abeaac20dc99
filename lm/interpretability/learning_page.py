"""What `lm.interpretability.learning` and `landscape` find, as sections of a page."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.config import AboveZero, Positive, ShareBelowOne, Size
from lm.evaluation.card import Section, Table, picture
from lm.interpretability import landscape as land
from lm.interpretability import learning
from lm.interpretability.learning import Params, Rows
from lm.interpretability.pictures import Panel, dress, panels
from lm.models import ModelConfig, param_specs, skeleton
from lm.training.plots import COLOURS, figure_of


@dataclasses.dataclass(frozen=True)
class DepthSettings:
    """The plain deep stack that is compared with the ordinary one."""

    layers: Size = 12
    width: Size = 64
    steps: Positive = 100  # of training, on the documents


@dataclasses.dataclass(frozen=True)
class DropoutSettings:
    """Two small models, one trained with dropout."""

    rate: ShareBelowOne = 0.2
    steps: Positive = 400


@dataclasses.dataclass(frozen=True)
class LandscapeSettings:
    """How much of the loss's landscape is drawn."""

    points: Positive = 21  # along each direction
    grid: Positive = 15  # along each side of a plane
    reach: AboveZero = 1.0  # to both sides, in lengths of a filter-normalised random direction


class Moment(NamedTuple):
    """A checkpoint, watched."""

    step: int
    flow: learning.Flow
    gradients: Mapping[str, np.ndarray]  # norms, as of `learning.by_layer`
    sizes: Mapping[str, np.ndarray]  # of parameters


def watch(model: Any, rows: Rows, checkpoints: Mapping[int, Params]) -> list[Moment]:
    """Each checkpoint's forward and backward pass on the same rows."""
    specs = param_specs(model)

    @jax.jit
    def look(params):
        flow = learning.flow(model, params, rows)
        norms = learning.by_layer(flow.gradients, specs), learning.by_layer(params, specs)
        return flow._replace(gradients={}), *norms

    looked = {step: look(dict(params)) for step, params in checkpoints.items()}
    return [Moment(step, *jax.tree.map(np.asarray, seen)) for step, seen in looked.items()]


def gradients(moments: Sequence[Moment]) -> Section:
    """Gradient norms by layer, by component and by depth of the stream."""
    norms = {m.step: m.gradients for m in moments}
    found, table = _norms(norms, None, "gradient norm", "Gradient norms by step")
    found.append(_by_depth("at the residual stream", moments, "backward", log=True))
    with_loss = [(m.step, float(m.flow.loss), *row[1:]) for m, row in zip(moments, table.rows)]
    table = Table(table.title, ("step", "loss", *table.head[1:]), with_loss)
    last, layers = moments[-1], len(learning.of_layers(moments[-1].gradients))
    rows = [(n, *map(float, x)) for n, x in last.gradients.items() if len(x) == layers]
    head = ("parameter", *(f"layer {i}" for i in range(layers)))
    about = (
        "Norms of the mean loss's gradient on the same documents at each checkpoint. Where they "
        "shrink from the last layer to the first they vanish, where they grow they explode."
    )
    return Section(
        "gradients", "Gradients", about,
        tables=[table, Table(f"Gradient norms at step {last.step:,}", head, rows)],
        pictures=[picture("Gradient norms over training", panels(found))],
    )  # fmt: skip


def updates(model: Any, checkpoints: Mapping[int, Params], moments: Sequence[Moment]) -> Section:
    """How far parameters move a step, as a share of their size."""
    specs, steps, moved = param_specs(model), [*checkpoints], {}
    for before, after in itertools.pairwise(steps):
        old, new = checkpoints[before], checkpoints[after]
        away = {name: (new[name] - old[name]) / (after - before) for name in old}
        moved[after] = learning.by_layer(away, specs)
    sizes = [m.sizes for m in moments[:-1]]
    found, table = _norms(moved, sizes, "share a step", "Update to weight, a step, up to each step")
    about = (
        "‖θ′ − θ‖ / ‖θ‖ of one checkpoint and the next, by the steps between them. Steps that turn "
        "back on themselves count less than their length."
    )
    drawn = picture("Update-to-weight ratios", panels(found))
    return Section("updates", "Updates", about, tables=[table], pictures=[drawn])


def scale(model: Any, moments: Sequence[Moment]) -> Section:
    """The size of the residual stream by depth, and the gains of norms over training."""
    last, offset = moments[-1], float(model.config.norm_unit_offset)
    gains = {
        name.removesuffix(".scale"): [float(np.mean(m.sizes[name])) for m in moments]
        for name in last.sizes
        if name.endswith("norm.scale") and not offset
    }
    gains = {n: np.array(x) / model.config.width**0.5 for n, x in gains.items() if "qk" not in n}
    found = [_by_depth("residual stream", moments, "streams", ylabel="root mean square")]
    if gains:
        found.append(Panel("gains of norms, mean of layers", [m.step for m in moments], gains))
    head = ("layers below", "root mean square")
    rows = [(i, float(x)) for i, x in enumerate(last.flow.streams)]
    about = (
        "Each layer adds to the stream, which grows with depth. A norm divides by its size: a "
        "sublayer reads numbers of size 1 times the gain however large the stream is, and what a "
        "layer of a given output adds is a smaller share of it, the deeper the layer."
    )
    return Section(
        "scale", "Scale", about, tables=[Table("Residual stream at the end", head, rows)],
        pictures=[picture("Scale by depth", panels(found))],
    )  # fmt: skip


def adam(steps: Mapping[int, Params], rates: Mapping[int, float]) -> Section:
    """Sizes of Adam's steps, read from its state in each checkpoint."""
    quantiles, curves, rows = (0.05, 0.25, 0.5, 0.75, 0.95), {}, []
    for step, directions in steps.items():
        groups: dict[str, list[np.ndarray]] = {}
        for name, x in directions.items():
            (component,) = learning.of_components({name: np.ones(1)})
            groups.setdefault(component, []).append(np.abs(np.asarray(x)).reshape(-1))
        for component, found in groups.items():
            at = np.quantile(np.concatenate(found), quantiles)
            curves.setdefault(component, []).append(at[2])
            rows.append((step, component, *map(float, at), rates[step] * float(at[2])))
    drawn = panels([Panel("median of |m̂| / (√v̂ + ε)", [*steps], curves, ylabel="learning rates")])
    head = ("step", "component", *(f"{q:.0%}" for q in quantiles), "median × learning rate")
    about = (
        "Adam moves a parameter by rate × m̂ / (√v̂ + ε): by the learning rate where its gradients "
        "agree in sign, by less where they are noise. Quantiles over a component's parameters."
    )
    tables = [Table("|m̂| / (√v̂ + ε) at each checkpoint", head, rows)]
    pictures = [picture("Adam's steps", drawn)]
    return Section("adam", "Adam's steps", about, tables=tables, pictures=pictures)


def depth(
    config: ModelConfig, rows: Rows, settings: DepthSettings, seed: int
) -> tuple[Section, Any]:
    """A deep stack with and without residuals and norms, at its start and trained; its figure."""
    sizes = {"num_layers": settings.layers, "width": settings.width}
    small = _small(config, rows, **sizes)
    step = learning.trainer(small, 1e-3)
    fit = lambda steps, *how: learning.fit(step, small, rows, steps, 8, seed, *how)[1]  # noqa: E731
    seen = {kind: fit(settings.steps, taken) for kind, taken in KINDS.items()}
    scales = {
        f"{kind}, weights × {gain:g}": fit(1, KINDS[kind], gain)[0]
        for kind in ("residuals and norms", "neither")
        for gain in (0.5, 1, 2)
    }
    losses = {kind: np.array([flow.loss for flow in flows]) for kind, flows in seen.items()}
    window = max(1, settings.steps // 15)
    smooth = {kind: _running(values, window) for kind, values in losses.items()}
    start = {kind: flows[0] for kind, flows in seen.items()}
    backward = {kind: flow.backward for kind, flow in start.items()}
    streams = {kind: flow.streams for kind, flow in start.items()}
    by_gain = {kind: flow.backward for kind, flow in scales.items()}
    places, name = range(settings.layers + 1), f"{settings.layers} layers, untrained"
    figure = panels(
        [
            Panel(f"Gradient: {name}", places, backward, "layers below", "gradient norm", True),
            Panel("by the scale of weights", places, by_gain, "layers below", "", True),
            Panel(f"Stream: {name}", places, streams, "layers below", "root mean square", True),
            Panel("Training", range(1, settings.steps + 1), smooth, "step", "loss, nats", True),
        ],
        figsize=(9.6, 8),
    )  # fmt: skip
    table = [
        (
            kind, float(np.float64(backward[kind][0]) / max(backward[kind][-1], 1e-300)),
            float(streams[kind][-1] / streams[kind][0]), float(values[:window].mean()),
            float(values[-window:].mean()),
        )
        for kind, values in losses.items()
    ]  # fmt: skip
    head = (
        "blocks", "gradient, first over last", "stream, last over first", "loss at first",
        "loss at the end",
    )  # fmt: skip
    about = (
        "The same blocks, with each sublayer's output in place of the stream and not on top of it, "
        "and with norms that return what they are given. Without residual connections a gradient "
        "passes through every weight on its way down and is multiplied by each: with depth it "
        "vanishes or explodes, as the scale of the weights has it. Residual connections lead it "
        "past them; norms keep the stream, and so the gradient, of a size."
    )
    pictures = [picture("Deep stacks", figure)]
    tables = [Table("Deep stacks", head, table)]
    return Section("depth", "Depth", about, tables=tables, pictures=pictures), figure


def dropout(config: ModelConfig, rows: Rows, settings: DropoutSettings, seed: int) -> Section:
    """Two small models, one trained with dropout: how redundant their units are."""
    cut, shares, models = 3 * len(rows.tokens_BT) // 4, np.linspace(0, 0.8, 9), []
    learnt, unseen = (Rows(*(x[part] for x in rows)) for part in (slice(cut), slice(cut, None)))
    rates = 0.0, settings.rate
    for rate in rates:
        small = _small(config, rows, num_layers=2, width=64, dropout=rate)
        step = learning.trainer(small, 3e-3)
        models.append(learning.fit(step, small, learnt, settings.steps, 16, seed)[0])
    model = skeleton(small)
    seen = learning.redundancy(model, models, Rows(*(x[: len(unseen[0])] for x in learnt)), [0.0])
    found = learning.redundancy(model, models, unseen, shares, seed)
    table = [
        (rate, float(a.losses[0]), float(b.losses[0]), float(b.losses[3]), b.rank, b.similarity)
        for rate, a, b in zip(rates, seen, found)
    ]
    head = (
        "dropout", "loss, trained on", "loss, unseen", f"loss, {shares[3]:.0%} of units cut",
        "effective rank / width", "mean |correlation|",
    )  # fmt: skip
    curves = {f"dropout {rate:g}": one.losses for rate, one in zip(rates, found)}
    drawn = Panel("Loss where units are cut", shares, curves, "share of units", "nats a token")
    about = (
        f"Two models of two layers after {settings.steps} steps on {cut} documents, without "
        "dropout and with it. Units are the numbers that attention and MLPs add to the stream; the "
        "same ones are cut for all tokens, and the rest is scaled up. A model that lost units at "
        "random while it learnt hangs on none of them: others do their work, too."
    )
    tables, pictures = [Table("Redundancy", head, table)], [picture("Redundancy", panels([drawn]))]
    return Section("dropout", "Dropout", about, tables=tables, pictures=pictures)


def landscape(
    model: Any, rows: Rows, checkpoints: Mapping[int, Params], adam: Params | None,
    settings: LandscapeSettings, seed: int,
) -> Section:  # fmt: skip
    """The loss along directions and over planes, around the last checkpoint."""
    specs, loss = param_specs(model), learning.mean_loss(model, rows)
    params = dict([*checkpoints.values()][-1])
    around = land.Around(loss, params)
    keys = jax.random.split(jax.random.key(seed), 2)
    one, other = (land.random_direction(key, params, specs) for key in keys)
    slope = jax.jit(jax.grad(loss))(params)
    directions = {"random, filter-normalised": one, "against the gradient": _minus(slope)}
    if adam is not None:
        whole = {name: adam.get(name, 0 * p) for name, p in params.items()}
        directions["Adam's next step"] = _minus(whole)
    way = land.trajectory([*checkpoints.values()]) if len(checkpoints) > 2 else None
    if way:
        directions["training's way, reversed"] = way.axes[0]
    at = np.linspace(-settings.reach, settings.reach, settings.points)
    scaled = {name: land.scaled(d, land.global_norm(one)) for name, d in directions.items()}
    curves = {name: around.at(at[:, None], d) for name, d in scaled.items()}
    table = [(n, around.curvature(d), float(curves[n].min())) for n, d in scaled.items()]
    side = np.linspace(-settings.reach, settings.reach, settings.grid)
    planes = [("Random plane", side, side, (one, other), np.zeros((1, 2)))]
    if way:
        low, high = way.points_S2.min(0), way.points_S2.max(0)
        wide = 0.2 * (high - low).max()
        sides = np.linspace(low - wide, high + wide, settings.grid).T
        title = f"Plane of training: {way.shares_2.sum():.0%} of its way"
        planes.append((title, *sides, way.axes, way.points_S2))
    figure = figure_of(figsize=(5.2 * len(planes), 4.2), layout="constrained")
    spots = figure.subplots(1, len(planes), squeeze=False)[0]
    for axes, (title, x, y, pair, points) in zip(spots, planes):
        places = np.stack([part.ravel() for part in np.meshgrid(x, y)], 1)
        values = around.at(places, *pair).reshape(len(y), len(x))
        axes.clabel(axes.contour(x, y, values, 14, cmap="viridis", linewidths=1), fontsize=7)
        axes.plot(*points.T, "o-", color=COLOURS[1], markersize=3, linewidth=1)
        axes.plot([0], [0], "*", color=COLOURS[1], markersize=10)
        dress(axes, title)
        axes.grid(False)
    lines = Panel("Loss along directions", at, curves, "distance", "loss, nats a token", True)
    about = (
        "Around the last checkpoint (★), on the documents. A random direction is as long in "
        "each filter as the filter (Li et al. 2018), and the others as long as it. The plane of "
        "training is that of the first two principal components of the way from checkpoint to "
        "checkpoint. What is flat in two dimensions need not be so in the others."
    )
    head = ("direction", "curvature dᵀHd / dᵀd", "lowest loss on it")
    return Section(
        "landscape", "Landscape", about, tables=[Table("Directions", head, table)],
        pictures=[
            picture("Loss along directions", panels([lines], figsize=(6, 4.4))),
            picture("Loss over planes", figure),
        ],
    )  # fmt: skip


# What `learning.without` takes: residual connections, norms.
KINDS = {
    "residuals and norms": (0.0, 0.0), "residuals, no norms": (0.0, 1.0),
    "norms, no residuals": (1.0, 0.0), "neither": (1.0, 1.0),
}  # fmt: skip


def _small(config: ModelConfig, rows: Rows, **fields: Any) -> ModelConfig:
    """An ordinary pre-norm decoder, with the run's vocabulary."""
    length = rows.tokens_BT.shape[1]
    # Embeddings begin with a size of 1, and matrices keep the size of what they read.
    begin = {"initializer": "lecun", "initializer_std": 1.0, "tie_embeddings": False}
    fields = {"vocab_size": config.vocab_size, "max_length": length, **begin, **fields}
    return ModelConfig(compute_dtype="float32", **fields)


def _norms(
    norms: Mapping[int, Mapping], sizes: Sequence[Mapping] | None, ylabel: str, title: str
) -> tuple[list[Panel], Table]:
    """Norms by step (`learning.by_layer`), or their shares of others: drawn, and as a table."""
    layers, parts = map(
        list, zip(*((learning.of_layers(n), learning.of_components(n)) for n in norms.values()))
    )
    for i, size in enumerate(sizes or ()):
        layers[i] = layers[i] / learning.of_layers(size)
        whole = learning.of_components(size)
        parts[i] = {name: x / max(whole[name], 1e-30) for name, x in parts[i].items()}
    by_layer = {f"layer {i}": values for i, values in enumerate(np.transpose(layers))}
    by_part = {name: [part[name] for part in parts] for name in parts[0]}
    rows = [(step, *map(float, part.values())) for step, part in zip(norms, parts)]
    found = [
        Panel("by layer", [*norms], by_layer, ylabel=ylabel, log=True),
        Panel("by component", [*norms], by_part, log=True),
    ]
    return found, Table(title, ("step", *parts[0]), rows)


def _by_depth(title: str, moments: Sequence[Moment], field: str, **style: Any) -> Panel:
    """One of the flow's numbers from the first layer to the last, at five steps or fewer."""
    shown = sorted({*np.linspace(0, len(moments) - 1, 5).astype(int)})
    curves = {f"step {moments[i].step:,}": getattr(moments[i].flow, field) for i in shown}
    depth = len(next(iter(curves.values())))
    return Panel(title, range(depth), curves, "layers below", **style)


def _minus(direction: Params) -> Params:
    return {name: -x for name, x in direction.items()}


def _running(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and those before it, `window` at most."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return (sums[last] - sums[first]) / (last - first)

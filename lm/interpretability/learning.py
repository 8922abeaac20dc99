"""Learning, seen from inside: gradients, steps, scales and redundancy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.config import view
from lm.interpretability.embeddings import effective_rank
from lm.models import ModelConfig, bind, init, param_specs, skeleton
from lm.models.hooks import Tap, no_tap
from lm.parallel.sharding import ParamSpec
from lm.runs.directory import CHECKPOINTS
from lm.runs.sources import Source
from lm.training.checkpoints import restore_parameters
from lm.training.config import OptimizerConfig, TrainConfig
from lm.training.optimizer import make_optimizer

Params = Mapping[str, jax.Array]


class Rows(NamedTuple):
    """Texts to predict, one a row; after its end a row has no targets."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray  # 1 where there is a target

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], length: int) -> Rows:
        """The first `length` tokens of each text to read, and the one after each to predict."""
        ids = np.zeros((len(texts), length + 1), np.int32)
        for row, text in zip(ids, texts):
            row[: len(text)] = text[: length + 1]
        sizes = np.array([len(text) for text in texts])[:, None]
        return cls(ids[:, :-1], ids[:, 1:], (np.arange(1, length + 1) < sizes).astype(np.float32))


def mean_loss(model, rows: Rows, tap: Callable[[], Tap] = lambda: no_tap, key=None):
    """A function of parameters: the mean loss of `rows`, nats a target.

    Args:
      model: the skeleton of a decoder.
      tap: makes the tap of a call (`lm.models.hooks`).
      key: turns dropout on.
    """

    def loss(params: Params) -> jax.Array:
        bound = bind(model, params)
        logits_BTV = bound(jnp.asarray(rows.tokens_BT), tap=tap(), dropout_key=key)
        nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows.targets_BT)
        return jnp.sum(nats_BT * rows.weights_BT) / jnp.sum(rows.weights_BT)

    return loss


# ---- Gradients and updates


def by_layer(values: Params, specs: Mapping[str, ParamSpec]) -> dict[str, jax.Array]:
    """The Euclidean norm of each parameter, or gradient: of each layer's part [layers], or [1]."""
    found = {}
    for name, x in values.items():
        x = x if specs[name].axes[0] == "layers" else x[None]
        squares = jnp.square(x.astype(jnp.float32))
        found[name] = jnp.sqrt(jnp.sum(squares, tuple(range(1, x.ndim))))
    return found


def of_layers(norms: Mapping[str, jax.Array]) -> np.ndarray:
    """Of `by_layer`: the norm of each layer's parts together [layers]."""
    stacks = [
        [np.square(x) for name, x in norms.items() if name.startswith(stack)]
        for stack in ("dense_blocks.", "blocks.")
    ]
    return np.sqrt(np.concatenate([np.sum(some, 0) for some in stacks if some]))


def of_components(norms: Mapping[str, jax.Array]) -> dict[str, float]:
    """Of `by_layer`: the norm of all layers' `attention.query` together, and so on; of all norms'
    gains and biases as one."""
    found: dict[str, float] = {}
    for name, x in norms.items():
        parts = name.split(".")[-2:]
        component = "norms" if "norm" in parts[0] else ".".join(parts).replace("_bias", "")
        found[component] = found.get(component, 0.0) + float(np.sum(np.square(x)))
    return {name: squares**0.5 for name, squares in found.items()}


class Flow(NamedTuple):
    """A forward and a backward pass, by depth."""

    loss: jax.Array
    gradients: Params
    streams: jax.Array  # root mean square of the residual stream [1 + layers]
    backward: jax.Array  # Euclidean norm of the loss's gradient there


def flow(model, params: Params, rows: Rows, tap: Callable[[], Tap] = lambda: no_tap, key=None):
    """A `Flow` whose streams are the embedding and what each layer leaves. Jit-safe.

    The gradient at a stream is that of numbers added to it. Arguments as of `mean_loss`.
    """
    sites = ["embedding", *(f"blocks.{i}.residual_after" for i in range(model.config.num_layers))]

    def loss(params, added):
        streams = {}

        def tapped() -> Tap:
            inner = tap()

            def one(name, value):
                value = inner(name, value)
                if name in added:
                    streams[name] = jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32))))
                    value = value + added[name].astype(value.dtype)
                return value

            return one

        value = mean_loss(model, rows, tapped, key)(params)
        return value, jnp.stack([streams[site] for site in sites])

    shape = (*rows.tokens_BT.shape, model.config.width)
    added = {site: jnp.zeros(shape, jnp.float32) for site in sites}
    differentiated = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, streams), (gradients, at) = differentiated(dict(params), added)
    backward = jnp.stack([jnp.linalg.norm(at[site]) for site in sites])
    return Flow(value, gradients, streams, backward)


def without(residuals: float | jax.Array, norms: float | jax.Array) -> Callable[[], Tap]:
    """Makes taps that take residual connections (1; 0: none) or norms out of pre-norm blocks.

    What a sublayer writes then stands in place of the stream, not on top of it; and RMSNorm, of
    gain 1, returns what it is given. The amounts may be traced: one program serves all four kinds.
    """

    def make() -> Tap:
        stream = {}

        def tap(name: str, value: jax.Array) -> jax.Array:
            site = name.rpartition(".")[2]
            if site == "inverse_scale":
                return jnp.where(norms > 0, jnp.ones_like(value), value)
            if site in ("residual_middle", "residual_after"):
                value = jnp.where(residuals > 0, value - stream["before"], value)
            if site.startswith("residual_"):
                stream["before"] = value
            return value

        return tap

    return make


def trainer(config: ModelConfig, rate: float) -> Callable:
    """A compiled step of plain Adam of a `Rows`, for `fit`: what `without` takes comes last."""
    model, adam = skeleton(config), optax.adam(rate)

    @jax.jit
    def step(params, state, rows, key, residuals, norms):
        tap = without(residuals, norms)
        seen = flow(model, params, rows, tap, key if config.dropout else None)
        updates, state = adam.update(seen.gradients, state)
        return optax.apply_updates(params, updates), state, seen._replace(gradients={})

    return step


def fit(
    step: Callable, config: ModelConfig, rows: Rows, steps: int, batch: int, seed: int,
    without: tuple[float, float] = (0.0, 0.0), gain: float = 1.0,
) -> tuple[dict[str, jax.Array], list[Flow]]:  # fmt: skip
    """A model trained on random rows: its parameters, and what each step saw before it moved.

    Args:
      step: `trainer(config, rate)`.
      gain: multiplies the initial weights of all blocks.
    """
    params = init(param_specs(skeleton(config)), jax.random.key(seed))
    within = [n for n in params if n.startswith("blocks.") and not n.endswith("scale")]
    params |= {name: gain * params[name] for name in within}
    state, seen, rng = optax.adam(0.0).init(params), [], np.random.default_rng(seed)
    for key in jax.random.split(jax.random.key(seed), steps):
        drawn = rng.integers(0, len(rows.tokens_BT), batch)
        params, state, one = step(params, state, Rows(*(x[drawn] for x in rows)), key, *without)
        seen.append(one)
    return params, seen


# ---- Adam


def adam_state(state: optax.OptState) -> optax.ScaleByAdamState | None:
    """Adam's part of an optimizer's state; None where there is none."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    return next((x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)), None)


def adam_steps(state: optax.ScaleByAdamState, config: OptimizerConfig) -> dict[str, jax.Array]:
    """m̂ / (√v̂ + ε) of each parameter (Kingma & Ba 2015): the step, in learning rates.

    Its size is at most about 1, where gradients agree in sign, and near 0 where they are noise.
    """
    first, second = (1 - b**state.count for b in (config.b1, config.b2))
    return {
        name: (state.mu[name] / first) / (jnp.sqrt(state.nu[name] / second) + config.eps)
        for name in state.mu
    }


def adam_history(
    source: Source, kept: list[int]
) -> tuple[dict[int, Params], dict[int, float], str]:
    """At each checkpoint Adam's direction and the learning rate; or none, and why."""
    config, specs = source.config, param_specs(skeleton(source.model))
    if config.get("job") != "train" or source.base is not None or source.checkpoint:
        return {}, {}, "no optimizer's state of a whole model's training"
    settings = view(OptimizerConfig, config["optimizer"], "optimizer")
    optimizer = make_optimizer(settings, view(TrainConfig, config["train"], "train").steps, specs)
    shapes = {n: jax.ShapeDtypeStruct(spec.shape, "float32") for n, spec in specs.items()}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(optimizer.init, shapes),
    )
    if adam_state(abstract) is None:
        return {}, {}, f"optimizer.name={settings.name!r} keeps no moments as Adam's"
    steps = {}
    for step in kept:
        _, state = restore_parameters(
            source.directory / CHECKPOINTS, step, abstract, part="optimizer"
        )
        steps[step] = adam_steps(adam_state(state), settings)
    return steps, {step: float(optimizer.schedule(step)) for step in kept}, ""


# ---- Redundancy


class Redundancy(NamedTuple):
    """How much units do that others do, too."""

    rank: float  # effective rank of a layer's units over their number, mean of layers
    similarity: float  # mean absolute correlation of two units of a layer
    losses: np.ndarray  # of `shares`: the loss where so many units of each layer are cut away


def redundancy(
    model, models: Sequence[Params], rows: Rows, shares: Sequence[float], seed: int = 0
) -> list[Redundancy]:
    """Of what attention and MLPs add to the stream, in each of several models of one kind.

    The same random coordinates of a layer are cut for all tokens, and the rest is scaled up, as
    dropout does (Srivastava et al. 2014).
    """
    ends, kept = ("mlp.output", "attention.output"), rows.weights_BT > 0

    @jax.jit
    def look(params, share, key):
        keys, found = iter(jax.random.split(key, 2 * model.config.num_layers)), {}

        def tap(name, value):
            if name.endswith(ends):
                found[name] = value
                left = jax.random.uniform(next(keys), value.shape[-1:]) >= share
                value = value * left / jnp.maximum(jnp.mean(left), 1e-6)
            return value

        return mean_loss(model, rows, lambda: tap)(params), found

    results, keys = [], jax.random.split(jax.random.key(seed), 4)
    for params in models:
        ranks, similarities = [], []
        for x_BTD in look(params, 0.0, keys[0])[1].values():
            x_ND = np.asarray(x_BTD, np.float64)[kept]
            x_ND = (x_ND - x_ND.mean(0)) / np.maximum(x_ND.std(0), 1e-12)
            ranks.append(effective_rank(x_ND) / x_ND.shape[1])
            matrix = np.abs(x_ND.T @ x_ND) / len(x_ND)
            similarities.append((matrix.sum() - np.trace(matrix)) / (matrix.size - len(matrix)))
        losses = [np.mean([look(params, share, key)[0] for key in keys]) for share in shares]
        one = Redundancy(float(np.mean(ranks)), float(np.mean(similarities)), np.array(losses))
        results.append(one)
    return results

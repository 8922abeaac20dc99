"""The loss around a point: along directions, over planes, and the way that training took there.

Parameters and directions are dicts from name to array, as everywhere; a loss is a function of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.sharding import ParamSpec
from lm.training.optimizer import global_norm, matrix_axes

Params = Mapping[str, jax.Array]
Loss = Callable[[Params], jax.Array]


def normalised(direction: Params, params: Params, specs: Mapping[str, ParamSpec]) -> Params:
    """`direction` with each filter as long as that of `params` (Li et al. 2018, §4); 0 of vectors.

    A filter is what one unit reads: a column of a layer's matrix, all of its heads' and experts'
    apart; of a table of tokens or positions, a row. Gains and biases stay where they are.
    """
    found = {}
    for name, d in direction.items():
        axes = matrix_axes(specs[name])
        if axes is None:
            found[name] = jnp.zeros_like(d)
            continue
        table = {"vocab", "length", "type"} & {*specs[name].axes}
        over = axes.columns if table else axes.rows
        length = lambda x, over=over: jnp.sqrt(jnp.sum(jnp.square(x), over, keepdims=True))  # noqa: E731
        found[name] = d / jnp.maximum(length(d), 1e-30) * length(params[name])
    return found


def random_direction(
    key: jax.Array, params: Params, specs: Mapping[str, ParamSpec]
) -> dict[str, jax.Array]:
    """Normal numbers, `normalised`."""
    keys = jax.random.split(key, len(params))
    drawn = {n: jax.random.normal(k, params[n].shape) for k, n in zip(keys, sorted(params))}
    return normalised(drawn, params, specs)


def scaled(direction: Params, length: float | jax.Array) -> Params:
    """`direction` with this Euclidean norm, all numbers together."""
    factor = length / jnp.maximum(global_norm(direction), 1e-30)
    return {name: d * factor for name, d in direction.items()}


class Around:
    """The loss around a point, by two programs for all directions."""

    def __init__(self, loss: Loss, params: Params):
        self.params = dict(params)

        def moved(params, one, other, a, b):
            return loss({n: p + a * one[n] + b * other[n] for n, p in params.items()})

        def bent(params, unit):
            def along(a):
                return loss({n: p + a * unit[n] for n, p in params.items()})

            zero = jnp.zeros((), next(iter(params.values())).dtype)
            return jax.grad(jax.grad(along))(zero)

        self._moved, self._bent = jax.jit(moved), jax.jit(bent)

    def at(self, places_NK: Sequence[Sequence[float]], *directions: Params) -> np.ndarray:
        """The loss [N] at the point + Σ_k places[n, k] · directions[k], which are one or two."""
        pair = [dict(d) for d in (directions * 2)[:2]]
        places = [(*place, 0.0)[:2] for place in places_NK]
        return np.array([self._moved(self.params, *pair, *place) for place in places])

    def curvature(self, direction: Params) -> float:
        """dᵀHd / dᵀd, the loss's second derivative along a direction."""
        return float(self._bent(self.params, dict(scaled(direction, 1.0))))


class Trajectory(NamedTuple):
    """Training's way in the plane that holds most of it."""

    axes: list[Params]  # two unit directions
    points_S2: np.ndarray  # each checkpoint's coordinates; the last one's are (0, 0)
    shares_2: np.ndarray  # of the squared distances from the last one


def trajectory(points: Sequence[Params]) -> Trajectory:
    """The first two principal components of the checkpoints' distances from the last (ibid., §7).

    With only two checkpoints there is one direction; the second axis is then 0.
    """
    last = points[-1]
    away = [{name: p[name] - last[name] for name in last} for p in points[:-1]]
    gram = np.array([[sum(float(jnp.vdot(a[n], b[n])) for n in last) for b in away] for a in away])
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    axes = []
    for k in range(2):
        kept = k < len(values) and values[k] > 1e-12 * max(values[0], 1e-300)
        weights = vectors[:, k] / np.sqrt(values[k]) if kept else np.zeros(len(away))
        axes.append({n: sum(float(w) * a[n] for w, a in zip(weights, away)) for n in last})
    at = [[sum(float(jnp.vdot(a[n], x[n])) for n in last) for x in axes] for a in away]
    shares = values[:2] / max(values.sum(), 1e-300)
    return Trajectory(axes, np.array([*at, [0.0, 0.0]]), np.pad(shares, (0, 2 - len(shares))))

"""Layers shared in a pipeline compute what they compute on one device, and talk to neighbours."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import PartitionSpec

from lm.config import ConfigError
from lm.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from lm.parallel.pipeline import bubble_fraction, choose_microbatches, pipeline
from lm.planning import hlo, hlo_runs
from lm.planning.collectives import collectives

LAYERS, WIDTH = 24, 5


def layer(w, index, x, along, shared):
    """Depends on its place, on its row's companions and on what all share; x[:, 0] counts layers.

    Where the count is wrong, so on whatever an idle stage works on, it is NaN and so is all of its
    gradient.
    """
    mark, memory = along
    wrong = jnp.where(x[:, :1] == index, 0.0, jnp.nan)
    h = jnp.tanh(x @ w + memory * mark[:, None] + shared["b"] * (index + 1)) * (1 + wrong)
    x = (x + h * jnp.sqrt(1 + wrong)).at[:, 0].set(x[:, 0] + 1)
    return x, {"squares": jnp.sum(h**2), "rows": jnp.float32(x.shape[0])}


def stage_fn(layers, first, x, along, shared):
    indices = first + jnp.arange(layers["w"].shape[0])
    return jax.lax.scan(
        lambda x, wi: layer(wi[0], wi[1], x, along, shared), x, (layers["w"], indices)
    )


class Case(NamedTuple):
    mesh: dict[str, int]
    per_stage: int  # micro-batches
    rounds: int = 1
    by_hand: tuple[str, ...] = ()
    remat: bool = False


CASES = {
    "gpipe": Case({"stage": 4, "data": 2}, 1),
    "more": Case({"stage": 2, "data": 2, "fsdp": 2}, 4, by_hand=("data", "fsdp"), remat=True),
    "circular": Case({"stage": 4, "data": 2}, 2, rounds=3, by_hand=("data",)),
    "even": Case({"stage": 2, "data": 2, "tensor": 2}, 2, rounds=2, remat=True),
    "common": Case({"stage": 4, "data": 1, "tensor": 2}, 1, rounds=6),  # V and S share a factor
    "odd": Case({"stage": 2, "data": 2, "expert": 2}, 3, rounds=3, by_hand=("data", "fsdp")),
}

SLOW = ("more", "even", "common", "odd")


def problem(case: Case):
    """Arguments on one device, and the same function of them alone and in the pipeline."""
    rng = np.random.default_rng(0)
    rows = case.mesh["stage"] * case.per_stage * 8
    x = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    x[:, 0] = 0
    arguments = (
        {"w": rng.normal(0, 0.3, (LAYERS, WIDTH, WIDTH)).astype(np.float32)},
        x,
        (rng.integers(0, 3, rows), rng.normal(size=(rows, WIDTH)).astype(np.float32)),
        {"b": rng.normal(size=WIDTH).astype(np.float32)},
    )

    def alone(*arguments):
        return stage_fn(arguments[0], 0, *arguments[1:])

    def piped(*arguments):
        return pipeline(
            stage_fn,
            *arguments,
            microbatches=case.mesh["stage"] * case.per_stage,
            rounds=case.rounds,
            whole_axes=case.by_hand,
            policy=jax.checkpoint_policies.nothing_saveable if case.remat else None,
        )

    return arguments, alone, piped


def with_gradient(function):
    def call(stacked, x, along, shared):
        mark, memory = along

        def of(stacked, x, memory, shared):
            return function(stacked, x, (mark, memory), shared)

        out, pull = jax.vjp(of, stacked, x, memory, shared)
        weights = jnp.arange(LAYERS, dtype=jnp.float32)
        return out, pull((jnp.cos(out[0]), {"squares": weights, "rows": jnp.zeros(LAYERS)}))

    return call


def placed(arguments, mesh):
    stacked, *rest, shared = arguments
    rows = jax.NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    layers = jax.NamedSharding(mesh, PartitionSpec("stage"))
    return jax.device_put(stacked, layers), *jax.device_put(rest, rows), shared


@pytest.mark.parametrize(
    "name", ["gpipe", "circular", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_a_pipeline_computes_what_one_device_does(name):
    arguments, alone, piped = problem(CASES[name])
    expected = tiny_models.compiled(with_gradient(alone))(*arguments)
    mesh = make_mesh(MeshConfig(**CASES[name].mesh))
    with jax.set_mesh(mesh):
        actual = tiny_models.compiled(with_gradient(piped))(*placed(arguments, mesh))

    def same(expected, actual):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    jax.tree.map(same, expected, actual)
    (x, statistics), _ = actual
    rows = arguments[1].shape[0]
    assert x.sharding.shard_shape(x.shape)[0] <= rows // CASES[name].mesh["stage"]
    np.testing.assert_array_equal(statistics["rows"], np.full(LAYERS, rows))


def compiled_collectives(name):
    arguments, _, piped = problem(CASES[name])
    mesh = make_mesh(MeshConfig(**CASES[name].mesh))
    with jax.set_mesh(mesh):

        def gradient(stacked, x, along, shared):
            forward = lambda stacked, x: piped(stacked, x, along, shared)[0]  # noqa: E731
            out, pull = jax.vjp(forward, stacked, x)
            return pull(out)

        lowered = tiny_models.compiled(gradient).lower(*placed(arguments, mesh))
        program = hlo.parse(lowered.compile().as_text())
    return collectives(hlo_runs.runs(program), mesh.shape), mesh


def test_stages_talk_only_to_their_neighbours():
    found, mesh = compiled_collectives("gpipe")
    stride = mesh.size // mesh.shape["stage"]
    across = [c for c in found if "stage" in c.axes]
    assert across and {c.kind for c in across} == {"collective-permute"}
    for permutation in across:
        sender, receiver = permutation.group  # the furthest pair
        assert permutation.axes == ("stage",) and abs(sender - receiver) == stride


def test_gradients_of_layers_are_added_up_once_over_the_axes_that_hold_them_whole():
    found, _ = compiled_collectives("circular")
    over_data = [c for c in found if "data" in c.axes]
    assert over_data and all(c.kind == "all-reduce" and c.trips == 1 for c in over_data)


def loops(jaxpr):
    """Every scan in a jaxpr, those inside others too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from loops(inner)


@pytest.mark.parametrize("name", ["gpipe", "circular", "even"])
def test_ticks_are_as_many_as_the_bubble_says_and_keep_no_copies_of_layers(name):
    case = CASES[name]
    arguments, _, piped = problem(case)
    with jax.set_mesh(make_mesh(MeshConfig(**case.mesh))):
        jaxpr = jax.make_jaxpr(with_gradient(piped))(*arguments).jaxpr
    stages, block = case.mesh["stage"], LAYERS // (case.mesh["stage"] * case.rounds)
    work = case.rounds * stages * case.per_stage
    ticks = work + stages - 1
    bubble = bubble_fraction(stages, stages * case.per_stage, case.rounds)
    assert bubble == pytest.approx(1 - work / ticks)
    over_ticks = [loop for loop in loops(jaxpr) if loop.params["length"] == ticks]
    assert len(over_ticks) == 2  # forward and backward
    kept = [out.aval.shape for loop in over_ticks for out in loop.outvars]
    assert (ticks, block, WIDTH, WIDTH) not in kept


def test_the_bubble_is_that_of_the_papers():
    assert bubble_fraction(4, 8) == 3 / 11  # Huang et al. 2019
    assert bubble_fraction(4, 8, 2) == 3 / 19  # Narayanan et al. 2021
    assert bubble_fraction(1, 1) == 0


def test_micro_batches_are_as_asked_or_four_a_stage_where_rows_divide():
    chosen = [
        (0, 4, 64, 2, 16),
        (0, 4, 8, 1, 8),
        (0, 2, 12, 2, 6),
        (0, 2, 14, 1, 2),
        (2, 2, 64, 4, 2),
    ]
    for asked, stages, rows, ways, number in chosen:
        assert choose_microbatches(asked, stages, rows, ways) == number
    for asked in (6, 16):
        with pytest.raises(ConfigError, match=f"config.mesh.microbatches={asked} .*24 rows"):
            choose_microbatches(asked, 4, 24)


def test_layers_that_do_not_divide_are_refused():
    case = Case({"stage": 4, "data": 2}, 1, rounds=5)
    arguments, _, piped = problem(case)
    with (
        jax.set_mesh(make_mesh(MeshConfig(**case.mesh))),
        pytest.raises(ConfigError, match=r"stage=4 × rounds=5.*24 layers.*config.model.num_layers"),
    ):
        jax.eval_shape(piped, *arguments)

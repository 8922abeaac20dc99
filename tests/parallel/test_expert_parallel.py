"""Experts on other devices: tokens travel to them and back, and nothing else changes."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import PartitionSpec

from lm.models import bind, param_specs
from lm.models.hooks import no_tap
from lm.models.moe import dispatch
from lm.models.moe.experts import Experts
from lm.models.params import stack
from lm.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from lm.parallel.sharding import PARAMETER_RULES, WHOLE_RULES, parameter_shardings

B, T, D, E, F = 8, 6, 8, 8, 12

slow = pytest.mark.slow


def config(**fields):
    sizes = {"num_experts": E, "width": D, "expert_width": F, "activation": "swiglu"}
    return tiny_models.config(**{**sizes, **fields})


def params(module, skew=0.0):
    """Values in general position; with `skew`, most tokens choose the first experts."""
    values = {}
    for name, spec in param_specs(module).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values[name] = rng.normal(0, 0.5, spec.shape).astype(np.float32)
    # A direction that all inputs share.
    values["router"][..., 0, :] += skew * np.linspace(1, -1, values["router"].shape[-1])
    return values


def inputs(rows=B, length=T):
    x = np.random.default_rng(1).normal(size=(rows, length, D)).astype(np.float32)
    x[..., 0] = 1
    return x


def padding():
    """One row ends early, one begins late and one consists of padding."""
    valid = np.ones((B, T), bool)
    valid[0, 4:] = valid[1, :3] = valid[5] = False
    return valid


def outcome(cfg, values, x, valid=None):
    """((gradients by parameters and input), (output, what the router did))."""

    def score(values, x):
        out, stats = bind(Experts(cfg), values)(x, no_tap, valid)
        total = jnp.sum(jnp.sin(jnp.arange(out.size)) * out.ravel())
        return total + 0.3 * stats.balance + 0.1 * stats.z, (out, stats)

    return jax.grad(score, (0, 1), has_aux=True)(values, x)


def on(mesh, cfg, values, x, valid=None, rules=PARAMETER_RULES):
    """The compiled gradient on `mesh`, and its arguments there."""
    shardings = parameter_shardings(param_specs(Experts(cfg)), mesh, rules)
    rows = batch_sharding(mesh)
    function = tiny_models.compiled(
        functools.partial(outcome, cfg),
        in_shardings=(shardings, rows, None if valid is None else rows),
        out_shardings=((shardings, rows), None),
    )
    return function, (values, x, valid)


def close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance),
        actual,
        expected,
    )


@functools.cache
def alone(skew, masked, **fields):
    cfg = config(**fields)
    arguments = (params(Experts(cfg), skew), inputs(), padding() if masked else None)
    return jax.device_get(
        tiny_models.compiled(functools.partial(outcome, cfg))(*arguments)
    ), arguments


TIGHT = (("capacity_factor", 0.5),)
DEEPSEEK = (
    ("experts_per_token", 3),
    ("router_score", "sigmoid"),
    ("router_normalize", False),
    ("shared_experts", 1),
)

GPT_OSS = (("expert_bias", True), ("activation", "swiglu_clipped"), ("activation_limit", 0.5))

CASES = [
    pytest.param({"expert": 4, "data": 2}, (), 3.0, id="data2-expert4-skewed"),
    pytest.param({"expert": 4, "tensor": 2}, TIGHT + GPT_OSS, 0.0, id="expert4-tensor2-capacity"),
    pytest.param({"expert": 2, "fsdp": 2, "tensor": 2}, GPT_OSS, 3.0, id="gpt-oss", marks=slow),
    pytest.param({"expert": 8}, DEEPSEEK, 1.0, id="expert8-deepseek", marks=slow),
    pytest.param({"expert": 2, "data": 4}, TIGHT + DEEPSEEK, 0.5, id="both", marks=slow),
    pytest.param({"expert": 2, "fsdp": 4}, (), 3.0, id="fsdp4-expert2", marks=slow),
    pytest.param({"expert": 4, "context": 2}, TIGHT, 1.0, id="context2-capacity", marks=slow),
    pytest.param({"expert": 2, "fsdp": 2, "tensor": 2}, DEEPSEEK, 1.0, id="three", marks=slow),
]


@pytest.mark.parametrize(("sizes", "fields", "skew"), CASES)
def test_many_devices_compute_what_one_does(sizes, fields, skew, monkeypatch):
    # So little room that the skewed queues take several turns.
    monkeypatch.setattr(dispatch, "rooms", lambda tokens, k, experts, ways: (3, 2))
    fields = dict(fields)
    expected, arguments = alone(skew, True, **fields)
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    with jax.set_mesh(mesh):
        function, arguments = on(mesh, config(**fields), *arguments)
        close(function(*arguments), expected)


@pytest.mark.parametrize("window", [(3, 2), (12, 1)], ids=str)
@pytest.mark.parametrize("skew", [0.0, 30.0])
@slow
def test_the_room_in_a_turn_changes_nothing(window, skew, monkeypatch):
    """Also where all tokens choose the experts of one device, and where one turn is enough."""
    monkeypatch.setattr(dispatch, "rooms", lambda *_: window)
    expected, arguments = alone(skew, False)
    (_, (_, stats)), _ = alone(30.0, False)
    assert stats.max_load == 4 * stats.tokens  # two of eight experts take everything
    mesh = make_mesh(MeshConfig(expert=4, data=2))
    with jax.set_mesh(mesh):
        function, arguments = on(mesh, config(), *arguments)
        close(function(*arguments), expected)


def test_room_is_for_an_even_share_and_a_little_more_but_never_more_than_can_come():
    # 4,096 tokens of two choices over eight devices: 1,024 each, and a quarter.
    assert dispatch.rooms(4096, 2, 1, 8) == (1280, 320)
    assert dispatch.rooms(4096, 6, 8, 8) == (3840, 960)
    assert dispatch.rooms(100, 2, 1, 2)[0] == 100  # one expert there: no token goes twice
    assert dispatch.rooms(4, 2, 4, 2)[0] == 8  # decoding: one turn


@pytest.mark.parametrize(
    ("rows", "length", "fields"),
    [
        pytest.param(8, 1, {}, id="a-token-a-device"),
        pytest.param(2, 1, {}, id="fewer-rows-than-devices"),
        pytest.param(3, 5, {"capacity_factor": 0.5}, id="rows-do-not-divide"),
        pytest.param(8, 4, {"num_experts": 6, **dict(GPT_OSS)}, id="experts-do-not-divide"),
        pytest.param(3, 5, dict(GPT_OSS), id="rows-do-not-divide-dropless"),
        pytest.param(8, 4, {"num_experts": 6, "capacity_factor": 0.5}, id="nor-with-capacity"),
    ],
)
@slow
def test_what_does_not_divide_stays_where_it_is(rows, length, fields):
    cfg, x = config(**fields), inputs(rows, length)
    values = params(Experts(cfg))
    run = tiny_models.compiled(functools.partial(outcome, cfg))
    expected = run(values, x)
    mesh = make_mesh(MeshConfig(expert=4, data=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(values, parameter_shardings(param_specs(Experts(cfg)), mesh))
        close(run(placed, x), expected)


@slow
@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 0.5}], ids=["dropless", "capacity"])
def test_layers_scanned_inside_a_pipeline_stage_compute_what_they_do_alone(fields, monkeypatch):
    monkeypatch.setattr(dispatch, "rooms", lambda *_: (3, 2))
    cfg = config(num_experts=4, **fields)
    layers = stack(Experts(cfg), 4)
    values = params(layers, 2.0)
    x = np.stack([inputs(4), -inputs(4)])  # of two stages

    def body(x, layer):
        out, stats = layer(x, no_tap)
        return x + out, stats

    def stage(values, x):
        policy = jax.checkpoint_policies.save_only_these_names("product")
        x, stats = jax.lax.scan(jax.checkpoint(body, policy=policy), x[0], bind(layers, values))
        total = jnp.sum(jnp.sin(jnp.arange(x.size)) * x.ravel())
        return (total + 0.3 * jnp.sum(stats.balance) + 0.1 * jnp.sum(stats.z))[None]

    def alone(values, x):
        def own(s):
            return {name: value[2 * s : 2 * s + 2] for name, value in values.items()}

        return sum(stage(own(s), x[s : s + 1])[0] for s in (0, 1))

    expected = tiny_models.compiled(jax.value_and_grad(alone, (0, 1)))(values, x)

    def pipeline(values, x):
        split = jax.shard_map(
            stage,
            in_specs=PartitionSpec("stage"),
            out_specs=PartitionSpec("stage"),
            axis_names={"stage"},
            check_vma=False,
        )
        return jnp.sum(split(values, x))

    mesh = make_mesh(MeshConfig(stage=2, expert=2, data=2))
    with jax.set_mesh(mesh):
        values = jax.device_put(values, parameter_shardings(param_specs(layers), mesh))
        close(tiny_models.compiled(jax.value_and_grad(pipeline, (0, 1)))(values, x), expected, 3e-5)


def collectives(text, kind):
    """The shapes that every collective of a kind makes, as they stand in compiled HLO."""
    made = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return [shape for shapes in made for shape in re.findall(r"\w\d+\[[\d,]*\]", shapes)]


def numbers(shape):
    sizes = [int(n) for n in re.search(r"\[(.*)\]", shape)[1].split(",") if n]
    return int(np.prod(sizes))


@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 0.5}], ids=["dropless", "capacity"])
def test_tokens_travel_by_all_to_all_and_nothing_is_gathered(fields, monkeypatch):
    monkeypatch.setattr(dispatch, "rooms", lambda *_: (3, 2))
    cfg = config(**fields)
    mesh = make_mesh(MeshConfig(expert=4, data=2))
    with jax.set_mesh(mesh):
        values = params(Experts(cfg))
        function, arguments = on(mesh, cfg, values, inputs(), rules=WHOLE_RULES)
        text = function.lower(*arguments).compile().as_text()
    assert collectives(text, "all-to-all")
    assert not collectives(text, "all-gather")
    # What is summed over devices: gradients of the matrices held, of the router, and statistics.
    assert max(map(numbers, collectives(text, "all-reduce"))) <= E // 4 * D * F


@slow
def test_split_parameters_are_gathered_for_the_experts_here_alone_and_again_backwards(monkeypatch):
    monkeypatch.setattr(dispatch, "rooms", lambda *_: (3, 2))
    layers = stack(Experts(config()), 3)
    mesh = make_mesh(MeshConfig(expert=2, fsdp=4, data=1))
    shardings = parameter_shardings(param_specs(layers), mesh)
    here = E // 2 * D * F

    def score(values, x):
        def body(x, layer):
            return x + layer(x, no_tap)[0], None

        return jnp.sum(jax.lax.scan(body, x, bind(layers, values))[0] ** 2)

    with jax.set_mesh(mesh):
        function = tiny_models.compiled(
            jax.grad(score), in_shardings=(shardings, batch_sharding(mesh)), out_shardings=shardings
        )
        text = function.lower(params(layers), inputs()).compile().as_text()
    assert collectives(text, "all-to-all")
    assert max(map(numbers, collectives(text, "all-gather"))) == here
    assert not any(f"[3,{E // 2},{size}]" in text for size in (f"{D},{F}", f"{F},{D}"))

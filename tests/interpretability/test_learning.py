"""Gradients, steps, scales and landscapes whose values are known, and a tiny run by its page."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_jobs
import tiny_models

from lm import __main__ as entry
from lm.config import ConfigError, defaults
from lm.interpretability import landscape, learning
from lm.interpretability.learning import Rows
from lm.interpretability.learning_page import KINDS
from lm.jobs import learning as job
from lm.models import bind, param_specs, skeleton
from lm.objectives import ObjectiveConfig, token_loss
from lm.parallel.sharding import ParamSpec
from lm.training.config import OptimizerConfig
from lm.training.optimizer import make_optimizer

CONFIG = tiny_models.config(num_layers=3, width=16, num_heads=2, mlp_width=24)
PARAMS = tiny_models.params(CONFIG)
ROWS = Rows.of([[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7]], 6)


def test_rows_predict_the_next_token_up_to_their_end():
    assert ROWS.tokens_BT.tolist() == [[1, 2, 3, 4, 5, 6], [9, 8, 7, 0, 0, 0]]
    assert ROWS.targets_BT[1, :2].tolist() == [8, 7]
    assert ROWS.weights_BT.sum(1).tolist() == [6, 2]


@pytest.fixture(scope="module")
def flow():
    return tiny_models.compiled(lambda x: learning.flow(skeleton(CONFIG), x, ROWS))(PARAMS)


def test_gradients_are_those_of_training(flow):
    """The loss is the objective's own mean, and norms are those of jax.grad's arrays."""
    batch = {"inputs": ROWS.tokens_BT, "targets": ROWS.targets_BT, "weights": ROWS.weights_BT}

    def loss(params):
        summed, metrics = token_loss(bind(skeleton(CONFIG), params), batch, ObjectiveConfig())
        return summed / metrics["weight"]

    value, gradients = tiny_models.compiled(jax.value_and_grad(loss))(PARAMS)
    assert flow.loss == pytest.approx(float(value), rel=1e-5)
    norms = learning.by_layer(flow.gradients, param_specs(skeleton(CONFIG)))
    for name, gradient in gradients.items():
        parts = gradient if name.startswith("blocks.") else [gradient]
        wanted = [np.linalg.norm(np.ravel(part)) for part in parts]
        assert norms[name] == pytest.approx(wanted, rel=1e-4), name
    blocks = [g for name, g in gradients.items() if name.startswith("blocks.")]
    layers = [np.sqrt(sum(np.sum(g[i] ** 2) for g in blocks)) for i in range(3)]
    assert learning.of_layers(norms) == pytest.approx(layers, rel=1e-4)
    parts = learning.of_components(norms)
    assert parts["mlp.up"] == pytest.approx(np.linalg.norm(gradients["blocks.mlp.up"]), rel=1e-4)
    whole = float(optax.tree.norm(gradients))
    assert np.linalg.norm([*parts.values()]) == pytest.approx(whole, rel=1e-4)


def test_the_gradient_of_a_stream_is_what_a_push_of_it_does(flow):
    model = skeleton(CONFIG)
    assert flow.streams.shape == flow.backward.shape == (4,)

    @tiny_models.compiled
    def by_hand(params):
        seen = {}
        bind(model, params)(ROWS.tokens_BT, tap=lambda n, x: seen.setdefault(n, x))
        sites = ["embedding", *(f"blocks.{i}.residual_after" for i in range(3))]

        def moved(added):
            tap = lambda name, x: x + added if name == "embedding" else x  # noqa: E731
            return learning.mean_loss(model, ROWS, lambda: tap)(params)

        slope = jax.grad(moved)(jnp.zeros_like(seen["embedding"]))
        return [jnp.sqrt(jnp.mean(jnp.square(seen[s]))) for s in sites], jnp.linalg.norm(slope)

    sizes, slope = by_hand(PARAMS)
    assert flow.streams == pytest.approx(np.array(sizes), rel=1e-4)
    assert flow.backward[0] == pytest.approx(float(slope), rel=1e-4)


def test_without_residuals_and_norms_sublayers_stand_alone():
    """By hand: a stack of two layers whose attention and MLP read and replace the stream."""
    config = tiny_models.config(num_layers=1, width=16, num_heads=2, mlp_width=24)
    params = {n: x if "norm" not in n else np.ones_like(x) for n, x in PARAMS.items()}
    params = {n: x[:1] if n.startswith("blocks.") else x for n, x in params.items()}
    seen, model = {}, bind(skeleton(config), params)

    def logits(kind):
        tap = learning.without(*KINDS[kind])()
        seen.clear()
        return model(ROWS.tokens_BT, tap=lambda n, x: seen.setdefault(n, tap(n, x)))

    plain = model(ROWS.tokens_BT, tap=lambda n, x: x)
    assert logits("residuals and norms") == pytest.approx(np.asarray(plain))
    neither = logits("neither")
    hidden = np.asarray(jax.nn.gelu(seen["blocks.0.attention.output"] @ params["blocks.mlp.up"][0]))
    wanted = hidden @ params["blocks.mlp.down"][0]
    assert seen["blocks.0.residual_after"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    head = params["embedding.tokens"] if config.tie_embeddings else params["head"]
    assert np.asarray(neither) == pytest.approx(wanted @ head.T, rel=1e-3, abs=1e-5)
    streams = seen["blocks.0.residual_middle"] - seen["blocks.0.attention.output"]
    assert np.abs(streams).max() < 1e-6
    logits("residuals, no norms")
    assert seen["blocks.0.mlp_norm.inverse_scale"] == pytest.approx(1)
    whole = seen["blocks.0.residual_before"] + seen["blocks.0.attention.output"]
    assert seen["blocks.0.residual_middle"] == pytest.approx(np.asarray(whole), abs=1e-6)


def test_adams_steps_are_those_of_its_state():
    config = OptimizerConfig(b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.0, clip_norm=0.0)
    specs = {"w": ParamSpec((3,), ("embed",), None)}
    optimizer = make_optimizer(config, 10, specs)
    params, state = {"w": jnp.zeros(3)}, optimizer.init({"w": jnp.zeros(3)})
    assert learning.adam_state({"other": 1}) is None
    for gradient in ([1.0, 1.0, 0.0], [1.0, -1.0, 0.0]):
        updates, state = optimizer.update(
            {"w": jnp.array(gradient)}, state, params, learning_rate=jnp.float32(0.5)
        )
    found = learning.adam_steps(learning.adam_state(state), config)["w"]
    mean, root = (0.9 * 0.1 - 0.1) / (1 - 0.81), 1 + 1e-3
    assert found == pytest.approx([1 / root, mean / root, 0], rel=1e-5)
    assert -0.5 * found == pytest.approx(np.asarray(updates["w"]), rel=1e-5)  # as optax moved it


# ---- Landscape

SPECS = {
    "up": ParamSpec((4, 3), ("embed", "mlp"), None),
    "table": ParamSpec((5, 4), ("vocab", "embed"), None),
    "gain": ParamSpec((4,), ("embed",), None),
}
POINT = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=spec.shape), jnp.float32)
    for i, (name, spec) in enumerate(SPECS.items())
}


def quadratic(params):
    """Σ weight · θ², of curvature 2 · weight in each part."""
    return sum(w * jnp.sum(params[n] ** 2) for w, n in zip((1, 2, 3), ("gain", "table", "up")))


def test_a_quadratic_loss_has_a_parabola_for_its_landscape():
    around = landscape.Around(quadratic, POINT)
    one, other = (landscape.random_direction(jax.random.key(k), POINT, SPECS) for k in (0, 1))
    at = np.linspace(-1, 1, 9)
    line = around.at(at[:, None], one)
    a, b, c = np.polyfit(at, line, 2)
    size = float(quadratic(one))
    slope = sum(float(jnp.vdot(jax.grad(quadratic)(POINT)[n], one[n])) for n in one)
    assert (a, b, c) == pytest.approx((size, slope, float(quadratic(POINT))), rel=1e-3)
    assert np.abs(np.diff(line, 3)).max() < 1e-3 * np.abs(line).max()
    length = float(landscape.global_norm(one))
    assert around.curvature(one) == pytest.approx(2 * size / length**2, rel=1e-4)
    gain = {n: jnp.ones_like(x) * (n == "gain") for n, x in POINT.items()}
    assert around.curvature(gain) == pytest.approx(2, rel=1e-4)
    both = around.at([(0.5, -0.25)], one, other)[0]
    moved = {n: POINT[n] + 0.5 * one[n] - 0.25 * other[n] for n in POINT}
    assert both == pytest.approx(float(quadratic(moved)), rel=1e-5)


def test_filters_of_a_direction_are_as_long_as_those_of_the_model():
    found = landscape.random_direction(jax.random.key(0), POINT, SPECS)
    for name, axis in (("up", 0), ("table", 1)):  # columns of a matrix, rows of a table
        lengths = [np.linalg.norm(x[name], axis=axis) for x in (found, POINT)]
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)
    assert not found["gain"].any()
    scaled = landscape.scaled(found, 7.0)
    assert float(optax.tree.norm(scaled)) == pytest.approx(7, rel=1e-5)


def test_a_way_in_a_plane_is_found_whole():
    axes = [{n: x * (n == name) for n, x in POINT.items()} for name in ("up", "table")]
    ways = [(3, 1), (2, -1), (1, 0.5), (0, 0)]
    points = [{n: POINT[n] + a * axes[0][n] + b * axes[1][n] for n in POINT} for a, b in ways]
    way = landscape.trajectory(points)
    assert way.shares_2.sum() == pytest.approx(1, abs=1e-5) and way.shares_2[0] > way.shares_2[1]
    for at, point in zip(way.points_S2, points):
        for name in POINT:
            back = sum(x * axis[name] for x, axis in zip(at, way.axes))
            assert POINT[name] + back == pytest.approx(np.asarray(point[name]), abs=1e-4)
    single = landscape.trajectory(points[2:])
    assert single.shares_2.tolist() == [1, 0] and not any(x.any() for x in single.axes[1].values())


def test_units_that_others_copy_are_told_from_units_of_their_own(monkeypatch):
    """A mean loss that is given what a model writes, in place of a model."""
    rng = np.random.default_rng(0)
    own, one = rng.normal(size=(2, 200, 6)), rng.normal(size=(2, 200, 1))

    def mean_loss(model, rows, tap):
        def loss(written):
            return jnp.sum(tap()("blocks.0.mlp.output", written["x"]) ** 2)

        return loss

    monkeypatch.setattr(learning, "mean_loss", mean_loss)
    model = types.SimpleNamespace(config=types.SimpleNamespace(num_layers=1))
    rows = Rows(*(np.ones((2, 200)) for _ in range(3)))
    models = [{"x": jnp.asarray(x, jnp.float32)} for x in (own, np.repeat(one, 6, -1))]
    apart, alike = learning.redundancy(model, models, rows, [0.0, 1.0])
    assert apart.rank > 0.95 and apart.similarity < 0.1
    assert alike.rank == pytest.approx(1 / 6, rel=1e-2) and alike.similarity == pytest.approx(1)
    assert apart.losses[0] == pytest.approx((own**2).sum(), rel=1e-4) and apart.losses[1] == 0


# ---- By the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_jobs.run(tmp_path_factory.mktemp("runs"), "watched", checkpoint__keep=9)


@pytest.mark.slow
def test_a_page_follows_a_run(run, tmp_path):
    words = f"""--config=configs/interpret/learning.py --config.init_from={run} --workdir={tmp_path}
        --config.path=storyworld --config.documents=4 --config.length=8 --config.depth.layers=1
        --config.depth.width=16 --config.depth.steps=3 --config.dropout.steps=2
        --config.landscape.points=3 --config.landscape.grid=3"""
    assert entry.guarded(entry.run, words.split()) == 0
    page = json.loads((tmp_path / "learning.json").read_text(encoding="utf-8"))
    sections = page["sections"]
    names = ["gradients", "updates", "scale", "adam", "depth", "dropout", "landscape"]
    assert [*sections] == names and not page["left_out"]
    # Updates are the differences of two checkpoints.
    head, rows = (sections["updates"]["tables"][0][key] for key in ("head", "rows"))
    old, new = tiny_jobs.parameters(run, 16), tiny_jobs.parameters(run, 24)
    ratio = np.linalg.norm(new["embedding.tokens"] - old["embedding.tokens"]) / 8
    ratio /= np.linalg.norm(old["embedding.tokens"])
    assert [row[0] for row in rows] == [16, 24]
    assert rows[1][head.index("embedding.tokens")] == pytest.approx(ratio, rel=1e-4)
    adam = sections["adam"]["tables"][0]["rows"]
    assert {row[0] for row in adam} == {8, 16, 24}
    for _, _, *quantiles, median in adam:
        assert 0 <= quantiles[0] <= quantiles[2] <= quantiles[4] < 3
        assert 0 < median <= 1e-2 * quantiles[2] + 1e-9
    # The loss where the run stands is on every line through it.
    _, loss, *_ = sections["gradients"]["tables"][0]["rows"][-1]
    lowest = [row[2] for row in sections["landscape"]["tables"][0]["rows"]]
    assert len(lowest) == 4 and max(lowest) <= loss * (1 + 1e-5)
    assert [row[0] for row in sections["depth"]["tables"][0]["rows"]] == [*KINDS]
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "learning.html").read_text(encoding="utf-8")
    assert html.count('<svg role="img"') == sum(len(s["pictures"]) for s in sections.values())
    assert "://" not in html.replace("http://www.w3.org", "")  # no network


def test_what_cannot_be_watched_is_said_in_a_line(run, tmp_path):
    config = defaults(job.LearningJob)
    with pytest.raises(ConfigError, match=r"config\.init_from='' must name"):
        job.run(config, str(tmp_path))
    config.init_from = str(run)
    with pytest.raises(ConfigError, match=r"config\.path='': .*held no documents out"):
        job.run(config, str(tmp_path))
    config.parts = ("gradient",)
    with pytest.raises(ConfigError, match=r"did you mean 'gradients'"):
        job.run(config, str(tmp_path))

"""What a mixture of experts computes, whichever way the work is shared out."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec

from lm.models import bind, param_specs
from lm.models.hooks import no_tap, reading, replacing
from lm.models.moe import experts
from lm.models.moe.experts import Experts
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import parameter_shardings

B, T, D = 4, 6, 8


def config(**fields):
    sizes = {"num_experts": 4, "width": D, "expert_width": 12, "activation": "swiglu"}
    return tiny_models.config(**{**sizes, **fields})


def params(module):
    values = {}
    for name, spec in param_specs(module).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values[name] = rng.normal(0, 0.5, spec.shape).astype(np.float32)
    return values


def inputs(batch=B, length=T):
    return np.random.default_rng(1).normal(size=(batch, length, D)).astype(np.float32)


def padding():
    """The first row ends, the second begins and the third consists of padding."""
    valid = np.ones((B, T), bool)
    valid[0, 4:] = valid[1, :3] = valid[2] = False
    return valid


def scalar(out, stats):
    """Something that depends on every output and on both losses."""
    total = jnp.sum(jnp.sin(jnp.arange(out.size)) * out.ravel())
    return total + 0.3 * jnp.sum(stats.balance) + 0.1 * jnp.sum(stats.z)


def outcome(cfg, values, x, valid=None):
    """(output, stats), and the gradient of `scalar` by parameters and input."""

    def score(values, x):
        out, stats = bind(Experts(cfg), values)(x, no_tap, valid)
        return scalar(out, stats), (out, stats)

    return jax.grad(score, (0, 1), has_aux=True)(values, x)


@functools.partial(tiny_models.compiled, static_argnums=0)
def output(cfg, values, x, valid=None):
    return bind(Experts(cfg), values)(x, no_tap, valid)


compiled_outcome = tiny_models.compiled(outcome, static_argnums=0)


def admitted(cfg, chosen, valid):
    """Which choices find room, counted one by one: [B, T, k]."""
    batch, length, k = chosen.shape
    room = length
    if cfg.capacity_factor:
        room = math.ceil(cfg.capacity_factor * length * k / cfg.num_experts)
    kept = np.zeros(chosen.shape, bool)
    for b in range(batch):
        load = np.zeros(cfg.num_experts, int)
        for t in range(length):
            for j in range(k):
                if valid[b, t] and load[chosen[b, t, j]] < room:
                    load[chosen[b, t, j]] += 1
                    kept[b, t, j] = True
    return kept


def ranked(cfg, values, logits):
    """What experts are chosen by, counted one by one."""
    if not cfg.router_bias:
        return logits
    scores = 1 / (1 + np.exp(-logits)) + values["correction_bias"]
    groups = np.sort(scores.reshape(*scores.shape[:2], cfg.router_groups, -1), -1)
    best = np.argsort(-groups[..., -2:].sum(-1), -1)[..., : cfg.router_group_limit]
    size = cfg.num_experts // cfg.router_groups
    for b, t, expert in np.ndindex(scores.shape):
        if expert // size not in best[b, t]:
            scores[b, t, expert] = -np.inf
    return scores


def naive_outcome(cfg, values, x, valid=None):
    """The same by computing every expert for every token, with decisions made in NumPy."""
    valid = np.ones(x.shape[:2], bool) if valid is None else valid
    logits = np.asarray(x, np.float64) @ values["router"] + values.get("router_logit_bias", 0)
    chosen = np.argsort(-ranked(cfg, values, logits), -1, kind="stable")
    chosen = chosen[..., : cfg.experts_per_token]
    kept = admitted(cfg, chosen, valid)
    hits = chosen[..., None] == np.arange(cfg.num_experts)

    def mlp(x, up, gate, down, up_bias=0, gate_bias=0, down_bias=0):
        up, gate = x @ up + up_bias, x @ gate + gate_bias
        if cfg.activation == "swiglu_clipped":
            limit = cfg.activation_limit
            gate, up = jnp.minimum(gate, limit), jnp.maximum(jnp.minimum(up, limit), -limit)
            return (gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)) @ down + down_bias
        return (jax.nn.silu(gate) * up) @ down + down_bias

    def score(values, x):
        logits = jnp.matmul(x, values["router"], precision="highest")
        logits += values.get("router_logit_bias", 0)
        sigmoid = cfg.router_score == "sigmoid"
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
        weights = jnp.take_along_axis(scores, chosen, -1)
        if cfg.router_normalize:
            weights /= weights.sum(-1, keepdims=True)
        weights *= cfg.router_scale
        weights_BTE = jnp.einsum("btk,btke->bte", weights * kept, hits.astype(np.float32))
        matrices = (values["up"], values["gate"], values["down"])
        if cfg.expert_bias:
            matrices += (values["up_bias"], values["gate_bias"], values["down_bias"])
        each_EBTD = jax.vmap(functools.partial(mlp, x))(*matrices)
        out = jnp.einsum("bte,ebtd->btd", weights_BTE, each_EBTD)
        if cfg.shared_experts:
            out += mlp(x, *(values[f"shared.{name}"] for name in ("up", "gate", "down")))
        tokens, k = valid.sum(), cfg.experts_per_token
        if sigmoid:
            scores /= scores.sum(-1, keepdims=True)
        stats = experts.RouterStats(
            tokens=jnp.float32(tokens),
            chosen_E=jnp.float32((hits * valid[..., None, None]).sum((0, 1, 2))),
            probability_E=(scores * valid[..., None]).sum((0, 1)),
            z=(valid * jax.nn.logsumexp(logits, -1) ** 2).sum(),
            dropped=jnp.float32((valid[..., None] & ~kept).sum() / k),
        )
        return scalar(out, stats), (out, stats)

    return tiny_models.compiled(jax.grad(score, (0, 1), has_aux=True))(values, x)


def close(a, b, tolerance=3e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b
    )


_GPT_OSS = {"expert_bias": True, "activation": "swiglu_clipped", "activation_limit": 0.5}
VARIANTS = {
    "mixtral": {},
    "deepseek": {
        "num_experts": 7,
        "experts_per_token": 3,
        "router_score": "sigmoid",
        "shared_experts": 2,
        "bias": True,
    },
    "deepseek v3": {
        "num_experts": 9,
        "experts_per_token": 4,
        "router_score": "sigmoid",
        "router_bias": True,
        "router_groups": 3,
        "router_group_limit": 2,
        "router_scale": 2.5,
    },
    "tight": {"capacity_factor": 0.4, "num_experts": 5, "router_normalize": False},
    "gpt_oss": _GPT_OSS,
    "gpt_oss_tight": {**_GPT_OSS, "capacity_factor": 0.4, "num_experts": 5},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_token_gets_its_experts_and_no_other(name):
    cfg = config(**VARIANTS[name])
    values = params(Experts(cfg))
    arguments = (cfg, values, inputs(), padding() if "tight" in name else None)
    close(compiled_outcome(*arguments), naive_outcome(*arguments))


@pytest.mark.parametrize("rows", [0, 4], ids=["ragged_dot", "4"])
def test_dropless_gives_the_same_in_blocks_of_any_size(rows, monkeypatch):
    monkeypatch.setattr(experts, "_has_ragged_dot", lambda: rows == 0)
    monkeypatch.setattr(experts, "_block_rows", lambda *_: rows)
    cfg = config()
    values = params(Experts(cfg))
    values["router"][:, 2] = -10 * values["router"][:, 1]  # an expert of extremes
    arguments = (cfg, values, np.abs(inputs()), padding())
    close(
        tiny_models.compiled(functools.partial(outcome, cfg))(*arguments[1:]),
        naive_outcome(*arguments),
    )


def test_empty_experts_get_no_gradient():
    cfg = config(experts_per_token=1)
    values = params(Experts(cfg))
    values["router"][:] = 0  # a tie, which the first expert wins
    (gradient, _), (_, stats) = compiled_outcome(cfg, values, inputs())
    assert np.abs(gradient["up"][0]).max() > 0
    for name in ("up", "gate", "down"):
        np.testing.assert_array_equal(gradient[name][1:], 0)
    assert stats.max_load == 4 * stats.tokens


def test_room_for_all_drops_nothing():
    values = params(Experts(config()))
    dropless = compiled_outcome(config(), values, inputs(), padding())
    # 1.7 is room for 5.1 of 6 tokens; at 2 there could be no overflow and there is no limit.
    roomy = compiled_outcome(config(capacity_factor=1.65), values, inputs(), padding())
    close(dropless, roomy)


@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 0.5}])
def test_a_token_never_changes_what_happens_before_it(fields):
    cfg = config(**fields)
    values, x = params(Experts(cfg)), inputs()
    before, _ = output(cfg, values, x)
    for t in (1, 4):
        changed = x.copy()
        changed[:, t] += np.random.default_rng(t).normal(size=(B, D))
        after, _ = output(cfg, values, changed)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 0.5}])
def test_what_stands_on_padding_changes_nothing(fields):
    cfg = config(**fields)
    values, x, valid = params(Experts(cfg)), inputs(), padding()
    noisy = np.where(valid[..., None], x, 100)
    (a, stats_a), (b, stats_b) = (output(cfg, values, each, valid) for each in (x, noisy))
    close(a[valid], b[valid])
    close(stats_a, stats_b)
    np.testing.assert_array_equal(b[~valid], 0)
    nothing = compiled_outcome(cfg, values, x, np.zeros_like(valid))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), nothing)


def test_balance_is_one_when_balanced_and_the_number_of_experts_when_collapsed():
    cfg = config(num_experts=D, experts_per_token=1)
    values = params(Experts(cfg))
    values["router"][:] = 50 * np.eye(D)
    each_expert_once = np.broadcast_to(np.eye(D, dtype=np.float32), (B, D, D))
    _, stats = output(cfg, values, each_expert_once)
    np.testing.assert_allclose(stats.balance / stats.tokens, 1, rtol=1e-6)
    np.testing.assert_allclose(stats.max_load / stats.tokens, 1, rtol=1e-6)
    _, stats = output(cfg, values, each_expert_once[:, :1])
    np.testing.assert_allclose(stats.balance / stats.tokens, D, rtol=1e-6)


@pytest.mark.slow
def test_parameters_split_without_a_mesh_in_context_give_the_same():
    cfg = config()
    values = params(Experts(cfg))
    alone = compiled_outcome(cfg, values, inputs(), padding())
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    shardings = parameter_shardings(param_specs(Experts(cfg)), mesh)
    x = jax.device_put(inputs(), NamedSharding(mesh, PartitionSpec("data")))
    close(alone, compiled_outcome(cfg, jax.device_put(values, shardings), x, padding()))


def test_bfloat16_routes_as_float32_does():
    cfg = config()
    values = params(Experts(cfg))
    x = jnp.asarray(inputs(), jnp.bfloat16)
    (gradient, dx), (out, stats) = compiled_outcome(cfg, values, x)
    exact, exact_stats = output(cfg, values, np.asarray(x, np.float32))
    assert out.dtype == dx.dtype == jnp.bfloat16 and gradient["router"].dtype == jnp.float32
    close(stats, exact_stats, 1e-6)
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.1, rtol=0.05)


def test_a_tap_reads_and_replaces_the_choice():
    cfg = config()
    values = params(Experts(cfg))

    @functools.partial(tiny_models.compiled, static_argnums=0)
    def edited(edit, x):
        seen = {}
        look, change = reading(seen), replacing({"chosen": edit} if edit else {})
        out, _ = bind(Experts(cfg), values)(x, lambda name, value: look(name, change(name, value)))
        return out, seen

    out, seen = edited(None, inputs())
    assert seen["router"].shape == (B, T, 4)
    assert seen["chosen"].shape == seen["weights"].shape == (B, T, 2)
    np.testing.assert_allclose(seen["weights"].sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(seen["output"], out)
    backwards, _ = edited(lambda chosen: chosen[..., ::-1], inputs())
    close(backwards, out)  # a sum knows no order
    moved, _ = edited(lambda chosen: (chosen + 1) % 4, inputs())
    assert not np.allclose(moved, out)

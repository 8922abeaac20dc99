"""Policy losses: by the papers' formulas in plain loops, sums that masks and cuts do not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy_reference as reference
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.config import ConfigError
from lm.objectives.policy import LOSSES, PolicyConfig, policy_loss, value_loss

MASK_BT = np.array(
    [
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],  # fills the batch
        [1, 1, 0, 0, 1, 1, 0, 0],  # a tool's words in between
    ],
    np.float32,
)
FIELDS = ("old_logprob", "ref_logprob", "rollout_logprob", "advantage", "value", "return")
OURS = ("logprob", "entropy", "new_value")  # what a gradient goes through
ALL = PolicyConfig(
    clip_low=0.2, clip_high=0.3, kl_coefficient=0.1, entropy_coefficient=0.05,
    value_coefficient=0.5, importance_cap=1.1, max_response=9,
)  # fmt: skip
EACH = pytest.mark.parametrize("loss", LOSSES)


def example(seed=0, fill=None, mask_BT=MASK_BT):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(0, 0.3, mask_BT.shape) for name in (*FIELDS, *OURS)}
    for name in ("logprob", "old_logprob", "ref_logprob", "rollout_logprob"):
        arrays[name] -= 1.5
    # RLOO and GRPO: one advantage a response.
    arrays["advantage"] = np.repeat(rng.normal(0, 1, (len(mask_BT), 1)), mask_BT.shape[1], 1)
    if fill is not None:
        arrays = {name: np.where(mask_BT > 0, x, fill) for name, x in arrays.items()}
    return {"weights": mask_BT, **{name: np.float32(x) for name, x in arrays.items()}}


def only(given, *names):
    return {name: given[name] for name in ("weights", "advantage", *names)}


@functools.partial(jax.jit, static_argnums=1)
def run(given, config):
    """Loss, metrics, and the gradients of log-probs, entropies and values."""
    batch = {name: x for name, x in given.items() if name not in OURS}

    def total(logprob_BT, entropy_BT, value_BT):
        return policy_loss(logprob_BT, entropy_BT, batch, config, value_BT)

    ours = [given[name] for name in OURS]
    (loss, metrics), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*ours)
    return loss, metrics, gradients


@EACH
def test_every_loss_is_its_papers(loss):
    config, given = PolicyConfig(loss, 0.2, 0.3, max_response=9), example()
    form = LOSSES[loss]
    names = [given[name] for name in ("logprob", "old_logprob", "advantage")]
    if loss == "cispo":
        expected = reference.cispo(*names, MASK_BT, 0.3)
    else:
        expected = reference.policy(form.ratio, form.mean, *names, MASK_BT, 0.2, 0.3, 9)
    _, metrics = policy_loss(given["logprob"], given["entropy"], only(given, "old_logprob"), config)
    np.testing.assert_allclose(metrics["nats"] / metrics["weight"], expected, atol=1e-5)
    assert metrics["weight"] == (12 if form.mean == "tokens" else 3)
    assert metrics["tokens"] == 12


def test_the_quantities_of_ppo_are_those_of_plain_loops():
    given = example()
    given["advantage"] = example(1)["entropy"]  # one a token
    _, metrics, _ = run(given, PolicyConfig(clip_low=0.2, clip_high=0.3))
    means = {name: x / metrics["weight"] for name, x in metrics.items()}
    names = [given[name] for name in ("logprob", "old_logprob", "advantage")]
    expected = dict(zip(
        ("ratio", "clip_fraction", "approx_kl"),
        reference.statistics(*names, MASK_BT, 0.2, 0.3),
    ))  # fmt: skip
    expected["policy_loss"] = reference.policy("token", "tokens", *names, MASK_BT, 0.2, 0.3)
    expected["value_loss"], expected["value_clip_fraction"] = reference.critic(
        given["new_value"], given["value"], given["return"], MASK_BT, 0.2
    )
    expected["entropy"] = given["entropy"][MASK_BT > 0].mean()
    expected["nats"] = expected["policy_loss"] + 0.1 * expected["value_loss"]
    for name, value in expected.items():
        np.testing.assert_allclose(means[name], value, atol=1e-5, err_msg=name)
    assert 0 < means["clip_fraction"] < 1 and 0 < means["value_clip_fraction"] < 1
    # Where nothing is to be gained, nothing is cut off.
    equal = given | {"advantage": np.zeros_like(MASK_BT)}
    assert run(equal, PolicyConfig())[1]["clip_fraction"] == 0


@EACH
@pytest.mark.parametrize("fill", [np.nan, 100.0, -np.inf])
def test_what_stands_at_masked_places_changes_no_bit(loss, fill):
    config = dataclasses.replace(ALL, loss=loss)
    plain, filled = (run(example(fill=f), config) for f in (0.0, fill))
    jax.tree.map(np.testing.assert_array_equal, filled, plain)
    assert all(not np.any(np.asarray(g)[MASK_BT == 0]) for g in filled[2])
    assert np.isfinite(jax.tree.reduce(lambda a, b: a + np.sum(b), plain, 0.0))


def test_of_nothing_but_masked_places_the_loss_and_its_gradient_are_zero():
    given = example(fill=np.nan, mask_BT=np.zeros_like(MASK_BT))
    for loss in LOSSES:
        assert not any(np.any(x) for x in jax.tree.leaves(run(given, replaced(loss))))


def replaced(loss):
    return dataclasses.replace(ALL, loss=loss)


@EACH
def test_cutting_and_padding_a_batch_change_nothing(loss):
    given, config = example(), replaced(loss)
    whole = run(given, config)
    parts = [
        run({k: x[rows] for k, x in given.items()}, config) for rows in (slice(2), slice(2, 4))
    ]
    for name, value in whole[1].items():
        np.testing.assert_allclose(sum(p[1][name] for p in parts), value, rtol=1e-5, atol=1e-6)
    for index, gradient in enumerate(whole[2]):
        joined = np.concatenate([p[2][index] for p in parts])
        np.testing.assert_allclose(joined, gradient, rtol=1e-5, atol=1e-6)
    order = [3, 0, 2, 1]
    width = ((0, 3), (4, 2))
    padded = {
        k: np.pad(x[order], width, constant_values=0 if k == "weights" else np.nan)
        for k, x in given.items()
    }
    loss, metrics, gradients = run(padded, config)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        (loss, metrics, [g[:4, 4:-2] for g in gradients]),
        (whole[0], whole[1], [g[np.array(order)] for g in whole[2]]),
    )


@EACH
def test_a_mesh_changes_nothing(loss):
    given, config = example(mask_BT=np.tile(MASK_BT, (2, 1))), replaced(loss)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    split = jax.device_put(given, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, run(split, config), run(given, config))


@EACH
def test_before_any_update_the_ratio_is_exactly_one(loss):
    given = example()
    given["old_logprob"] = given["ref_logprob"] = given["rollout_logprob"] = given["logprob"]
    _, metrics, _ = run(given, replaced(loss))
    assert metrics["clip_fraction"] == metrics["approx_kl"] == metrics["kl"] == 0
    for name in ("ratio", "importance"):  # of tokens, or of each response's mean
        np.testing.assert_allclose(metrics[name], metrics["weight"], rtol=1e-6)
    without = {k: x for k, x in given.items() if k != "old_logprob"}
    jax.tree.map(
        np.testing.assert_array_equal, run(without, replaced(loss)), run(given, replaced(loss))
    )


@EACH
@pytest.mark.parametrize("far", [-200.0, 200.0])
def test_a_ratio_that_overflows_leaves_the_gradient_finite_where_it_is_clipped(loss, far):
    given = example()
    given["old_logprob"] = given["logprob"] - np.float32(far)
    given["advantage"] = np.abs(given["advantage"]) * np.sign(far)
    config = PolicyConfig(loss, max_response=9)
    batch = only(given, "old_logprob")
    gradient = jax.grad(lambda x: policy_loss(x, given["entropy"], batch, config)[0])(
        given["logprob"]
    )
    assert np.all(np.isfinite(gradient))
    assert loss == "cispo" or not np.any(gradient)


def test_stale_rollouts_weigh_at_most_the_cap():
    given, config = example(), PolicyConfig("dapo", importance_cap=1.1)
    stale = np.exp(given["old_logprob"] - given["rollout_logprob"])
    assert np.any(stale[MASK_BT > 0] > 1.1) and np.any(stale[MASK_BT > 0] < 1)
    capped, metrics, _ = run(given, config)
    weighted = given | {"advantage": given["advantage"] * np.minimum(stale, 1.1)}
    plain, *_ = run(weighted, PolicyConfig("dapo"))
    np.testing.assert_allclose(capped, plain, rtol=1e-5)
    mean = np.minimum(stale, 1.1)[MASK_BT > 0].mean()
    np.testing.assert_allclose(metrics["importance"] / metrics["weight"], mean, rtol=1e-5)


def test_bfloat16_is_widened_before_anything_is_added():
    given = example()
    narrow = {k: jnp.asarray(x, jnp.bfloat16) for k, x in given.items()}
    wide = {k: x.astype(jnp.float32) for k, x in narrow.items()}
    loss, metrics, gradients = run(narrow, ALL)
    assert loss.dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, (loss, metrics), run(wide, ALL)[:2])


def test_a_value_may_leave_the_old_one_freely_or_by_the_clip():
    given = example()
    loss, metrics = value_loss(given["new_value"], given, PolicyConfig(value_clip=0.0))
    errors = (given["new_value"] - given["return"])[MASK_BT > 0]
    np.testing.assert_allclose(loss, 0.5 * np.square(errors).sum(), rtol=1e-5)
    assert metrics["value_clip_fraction"] == 0
    clipped, metrics = value_loss(given["new_value"], given, PolicyConfig(value_clip=0.1))
    assert clipped > loss and metrics["value_clip_fraction"] > 0


def test_dr_grpo_needs_its_constant():
    with pytest.raises(ConfigError, match=r"policy.max_response=0 must be above 0"):
        run(example(), PolicyConfig("dr_grpo"))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def five_tokens():
    """Two distributions over five tokens, and ∇KL(p‖q), ∇KL(q‖p) of p's logits."""
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(0, 1, (2, 5))
    log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (logits, ref))
    p, q = np.exp(log_p), np.exp(log_q)
    return logits, log_q, p * (log_p - log_q - p @ (log_p - log_q)), p - q


def expected_gradient(config, logits, old_logits, log_q, advantage):
    """E over the five tokens, drawn from `old_logits`, of the loss's gradient."""

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)
        log_old = jax.nn.log_softmax(old_logits)
        total = 0.0
        for token in range(5):  # a response of one token each
            batch = {
                "weights": jnp.ones((1, 1)),
                "advantage": advantage[token].reshape(1, 1),
                "old_logprob": log_old[token].reshape(1, 1),
                "ref_logprob": log_q[token].reshape(1, 1),
            }
            drawn, _ = policy_loss(log_p[token].reshape(1, 1), jnp.zeros((1, 1)), batch, config)
            total += jax.lax.stop_gradient(jnp.exp(log_old[token])) * drawn
        return total

    return jax.grad(loss)(jnp.asarray(logits))


@EACH
def test_the_gradient_of_the_kl_term_is_that_of_the_kl(loss, float64):
    logits, log_q, exact, backwards = five_tokens()
    none = np.zeros(5)
    config = PolicyConfig(loss, kl_coefficient=1.0, max_response=1)
    ours = expected_gradient(config, logits, logits, log_q, none)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10)
    # Off policy too, whatever drew the tokens.
    ours = expected_gradient(config, logits, logits[::-1].copy(), log_q, none)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10)
    # GRPO's own descends another divergence.
    published = dataclasses.replace(config, kl_estimator="k3")
    theirs = expected_gradient(published, logits, logits, log_q, none)
    np.testing.assert_allclose(theirs, backwards, rtol=0, atol=1e-10)
    assert np.abs(theirs - exact).max() > 0.05


@EACH
def test_the_gradient_of_k1_in_the_reward_is_that_of_the_kl(loss, float64):
    logits, log_q, exact, _ = five_tokens()
    k1 = jax.nn.log_softmax(logits) - log_q
    config = PolicyConfig(loss, max_response=1)
    ours = expected_gradient(config, logits, logits, log_q, -k1)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10)


def test_trl_s_reports_of_ppo_changed_with_padding_and_ours_do_not():
    # TRL's PPO, up to 1.12, filled padding's log-probs with 1 and took means over all places.
    given = example(mask_BT=np.ones((2, 4), np.float32))
    padded = {
        k: np.pad(x, ((0, 0), (0, 12)), constant_values=k != "weights") for k, x in given.items()
    }

    def theirs(given):
        log_ratio = given["logprob"] - given["old_logprob"]
        return 0.5 * np.square(log_ratio).mean(), np.exp(log_ratio).mean()

    assert theirs(padded)[0] == pytest.approx(theirs(given)[0] / 4, rel=1e-5)
    assert theirs(padded)[1] == pytest.approx((theirs(given)[1] + 3) / 4, rel=1e-5)
    ours = [run(x, PolicyConfig())[1] for x in (given, padded)]
    for name in ("approx_kl", "ratio", "entropy", "clip_fraction"):
        np.testing.assert_allclose(ours[1][name], ours[0][name], rtol=1e-5)

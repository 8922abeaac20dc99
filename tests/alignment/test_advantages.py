"""Advantages: by the papers' formulas in plain loops, blind to what is masked."""

import numpy as np
import policy_reference as reference
import pytest

from lm.alignment.advantages import (
    AdvantageConfig,
    adapted,
    at_last,
    estimate,
    explained_variance,
    gae,
    group_advantages,
    k1,
    leave_one_out,
    whiten,
)
from lm.config import ConfigError, view

# Two tokens, six, none (a row that fills a batch), four with a gap (a tool's words), one, eight.
MASK_NT = np.array(
    [
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ],
    np.float32,
)
ENDED_N = np.array([True, False, True, True, True, False])
CONFIGS = {
    "gae": AdvantageConfig(kl_coefficient=0.3, missing_end_penalty=0.7, gamma=0.9),
    "white": AdvantageConfig(whiten_rewards=True, gae_lambda=0.5),
    "plain": AdvantageConfig(whiten_advantages=False, kl_coefficient=0.0),
    "group": AdvantageConfig(name="group"),
    "batch": AdvantageConfig(name="group", scale="batch"),
    "unscaled": AdvantageConfig(name="group", scale="none", missing_end_penalty=1.0),
    "leave_one_out": AdvantageConfig(name="leave_one_out"),
}


def experience(seed=0, fill=None):
    rng = np.random.default_rng(seed)
    names = ("logprob_NT", "ref_logprob_NT", "value_NT")
    arrays = {name: rng.normal(-1, 1, MASK_NT.shape).astype(np.float32) for name in names}
    if fill is not None:
        arrays = {name: np.where(MASK_NT > 0, x, fill) for name, x in arrays.items()}
    score_N = rng.normal(0, 2, len(MASK_NT))
    return {"score_N": score_N, "mask_NT": MASK_NT, "ended_N": ENDED_N, "group_size": 3, **arrays}


def test_gae_does_not_see_the_value_behind_a_response():
    advantage, returns = gae([[0, 1, 0]], [[0, 0, 100]], [[1, 1, 0]], 1.0, 0.95)
    np.testing.assert_allclose(advantage, [[0.95, 1, 0]], rtol=1e-12)
    np.testing.assert_allclose(returns, [[0.95, 1, 0]], rtol=1e-12)


def test_whitening_without_mean_shift_keeps_the_mean():
    x = np.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    white = whiten(x, np.ones_like(x), shift_mean=False)
    np.testing.assert_allclose(white[0], [0.0508, 0.4381, 0.8254], atol=5e-5)
    np.testing.assert_allclose(white.mean(), 1.6)
    white = whiten(x, np.ones_like(x))
    np.testing.assert_allclose([white.mean(), white.std()], [0, 1], atol=1e-6)


@pytest.mark.parametrize("name", ["gae", "white", "plain"])
def test_every_token_is_as_the_papers_say(name):
    config, given = CONFIGS[name], experience()
    ours = estimate(config, **given)
    reward = reference.rewards(
        given["score_N"], ENDED_N, config.missing_end_penalty, config.kl_coefficient,
        given["logprob_NT"], given["ref_logprob_NT"], MASK_NT,
    )  # fmt: skip
    np.testing.assert_allclose(ours.reward_NT, reward, atol=1e-5)
    if config.whiten_rewards:
        reward = reference.whitened(reward, MASK_NT, shift_mean=False)
    advantage, returns = reference.gae(
        reward, given["value_NT"], MASK_NT, config.gamma, config.gae_lambda
    )
    np.testing.assert_allclose(ours.return_NT, returns, atol=1e-5)
    if config.whiten_advantages:
        advantage = reference.whitened(advantage, MASK_NT, shift_mean=True)
    np.testing.assert_allclose(ours.advantage_NT, advantage, atol=1e-5)


@pytest.mark.parametrize("fill", [np.nan, 100.0, -np.inf])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_at_masked_places_changes_no_bit(name, fill):
    plain = estimate(CONFIGS[name], **experience(fill=0.0))
    filled = estimate(CONFIGS[name], **experience(fill=fill))
    for ours, theirs in zip(filled, plain):
        np.testing.assert_array_equal(ours, theirs)
    masked = [x[MASK_NT == 0] for x in (plain.advantage_NT, plain.return_NT, plain.reward_NT)]
    assert not np.any(masked)
    given = experience(fill=fill)
    value = explained_variance(given["value_NT"], plain.return_NT, MASK_NT)
    assert value == explained_variance(experience()["value_NT"], plain.return_NT, MASK_NT)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    given, width = experience(), {"left": (5, 0), "right": (0, 5)}[side]
    padded = {
        key: np.pad(x, ((0, 0), width), constant_values=0 if key == "mask_NT" else np.nan)
        if key.endswith("NT")
        else x
        for key, x in given.items()
    }
    places = slice(5, None) if side == "left" else slice(-5)
    for ours, theirs in zip(estimate(CONFIGS[name], **padded), estimate(CONFIGS[name], **given)):
        ours = ours[:, places] if ours.ndim == 2 else ours
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_whitening_makes_responses_depend_on_their_companions():
    given = experience()
    rows = slice(3, 6)
    part = {key: x[rows] if isinstance(x, np.ndarray) else x for key, x in given.items()}
    for name in ("plain", "group", "unscaled", "leave_one_out"):
        whole, alone = estimate(CONFIGS[name], **given), estimate(CONFIGS[name], **part)
        np.testing.assert_allclose(whole.advantage_NT[rows], alone.advantage_NT, rtol=1e-12)


def test_the_score_stands_at_the_last_token_whatever_follows():
    placed = at_last([1.0, 2, 3, 4, 5, 6], MASK_NT)
    n, t = placed.nonzero()
    assert list(zip(n, t, placed[n, t])) == [
        (0, 2, 1), (1, 7, 2), (3, 5, 4), (4, 4, 5), (5, 7, 6)
    ]  # fmt: skip


def test_groups_of_equal_reward_have_exactly_no_advantage():
    equal = np.repeat([0.1, -3.7, 1e6 / 3], 3)
    for scale in ("group", "batch", "none"):
        assert not group_advantages(equal, 3, scale).any()
    assert not leave_one_out(equal, 3).any()


def test_group_advantages_are_those_of_their_papers():
    reward = np.array([1.0, 2, 6, 0, 0, 3])
    of_group = [(1 - 3) / 7**0.5, (2 - 3) / 7**0.5, 3 / 7**0.5]  # variance (4 + 1 + 9) / 2
    np.testing.assert_allclose(group_advantages(reward, 3)[:3], of_group, rtol=1e-4)
    np.testing.assert_allclose(group_advantages(reward, 3, "none"), [-2, -1, 3, -1, -1, 2])
    by_batch = np.array([-2, -1, 3, -1, -1, 2]) / reward.std(ddof=1)
    np.testing.assert_allclose(group_advantages(reward, 3, "batch"), by_batch, rtol=1e-4)
    others = [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3 - 0]
    np.testing.assert_allclose(leave_one_out(reward, 3), others)


@pytest.mark.parametrize("size", [1, 4])
def test_groups_that_cannot_be_are_refused(size):
    with pytest.raises(ConfigError, match=f"{size} responses a prompt"):
        group_advantages(np.arange(6.0), size)


def test_the_adaptive_coefficient_follows_the_kl():
    # Ziegler et al. 2019: K_β = 0.1 for 1,000 responses.
    assert adapted(0.2, 12.0, 6.0, 1000) == pytest.approx(0.2 * (1 + 0.1 * 0.2))
    assert adapted(0.2, 6.6, 6.0, 1000) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted(0.2, 0.0, 6.0, 1000) == pytest.approx(0.2 * (1 - 0.1 * 0.2))
    assert adapted(0.2, 6.0, 6.0, 1000) == 0.2


@pytest.mark.parametrize("name", ["k2", "k3", "abs"])
def test_another_kl_in_the_reward_is_refused_with_the_reason(name):
    with pytest.raises(
        ConfigError, match=rf"config.ppo.kl_estimator='{name}' must be 'k1'.*gradient of KL"
    ):
        view(AdvantageConfig, {"kl_estimator": name}, "config.ppo")


def test_k1_in_the_reward_has_the_gradient_of_the_kl_and_k3_has_not():
    # The policy gradient of a reward, over five tokens: Σ p·reward·∇log p.
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(0, 1, (2, 5))
    log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (logits, ref))
    p, score_gradient = np.exp(log_p), np.eye(5) - np.exp(log_p)  # [token, logit]

    def policy_gradient(reward):
        return (p * reward) @ score_gradient

    def kl(logits):
        log_p = logits - np.log(np.exp(logits).sum())
        return np.exp(log_p) @ (log_p - log_q)

    exact = p * (log_p - log_q - kl(logits))  # ∇KL(p‖q) of the logits
    step = 1e-5 * np.eye(5)
    numeric = [(kl(logits + h) - kl(logits - h)) / 2e-5 for h in step]
    np.testing.assert_allclose(exact, numeric, atol=1e-9)
    ours = k1(log_p[None], log_q[None], np.ones((1, 5)))[0]
    np.testing.assert_allclose(policy_gradient(-ours), -exact, atol=1e-10)
    k3 = np.expm1(log_q - log_p) + ours
    assert p @ k3 == pytest.approx(kl(logits))  # its value is right
    assert np.abs(policy_gradient(-k3) + exact).max() > 0.05


def test_estimates_need_what_they_are_made_from():
    given = experience()
    with pytest.raises(ConfigError, match="critic"):
        estimate(AdvantageConfig(), **{**given, "value_NT": None})
    with pytest.raises(ConfigError, match="reference"):
        estimate(AdvantageConfig(), **{**given, "ref_logprob_NT": None})
    without = estimate(AdvantageConfig(kl_coefficient=0.0), **{**given, "ref_logprob_NT": None})
    assert not without.kl_N.any()


# What TRL's PPO made of a response up to its last version, 1.12, by its formulas.


def trl_advantages(score, length, kl, value, gamma=1.0, lam=0.95):
    """Of one response with `length` tokens, which padding of any length follows."""
    width = len(value)
    value = np.where(np.arange(width) > length, 0, value)  # one place past the end is kept
    reward = np.where(np.arange(width) < length, -kl, 0.0)
    reward[length if length < width else length - 1] += score  # past the end, where there is room
    advantage = np.zeros(width)
    later = 0.0
    for t in reversed(range(width)):
        after = value[t + 1] if t < width - 1 else 0.0
        later = reward[t] + gamma * after - value[t] + gamma * lam * later
        advantage[t] = later
    return advantage


def test_a_score_one_past_the_end_is_discounted_and_lets_padding_in():
    kl, length, score = 0.0, 3, 1.0
    value = np.array([0.1, 0.2, 0.3, 5.0, 0.0])

    def ours(value):
        mask = np.arange(len(value)) < length
        reward = at_last([score], mask[None])
        return gae(reward, value[None], mask[None], 1.0, 0.95)[0][0, :length]

    theirs = trl_advantages(score, length, kl, value)[:length]
    # Ours: the last token earns the score, less what was expected.
    np.testing.assert_allclose(ours(value)[-1], score - 0.3)
    # Theirs: it earns λ of the score and 1 − λ of a value read off padding, for 5.0 or any number.
    np.testing.assert_allclose(theirs[-1], 0.95 * score + 0.05 * 5.0 - 0.3)
    # So the same response is worth something else where no padding follows it.
    unpadded = trl_advantages(score, length, kl, value[:length])
    assert np.abs(unpadded - theirs).max() > 0.1
    np.testing.assert_array_equal(ours(value[:length]), ours(value))

"""From scores to advantages: by how much a drawn token was better than expected.

Made once, on the host, where the experience lies: NumPy, in float64, of arrays [N, T] whose row is
a response and whose place is that of a target (`lm.data.batches`). `mask_NT` is above 0 where the
policy chose the target: its words and the end-of-text it drew. What stands elsewhere, NaN even,
changes nothing, and results are 0 there. Gaps are allowed (other speakers' turns, tool results).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lm.config import NotNegative, Positive, Share, check


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How scores become advantages."""

    # gae: PPO, from a critic's values. group: GRPO. leave_one_out: RLOO.
    name: Literal["gae", "group", "leave_one_out"] = "gae"
    kl_coefficient: NotNegative = 0.05  # β of the penalty for leaving the reference, in the reward
    kl_estimator: str = "k1"  # of that penalty; no other is right
    kl_target: NotNegative = 0.0  # nats a response that β is adapted to; 0: β is fixed
    kl_horizon: Positive = 10_000  # responses after which β has changed by at most a fifth
    missing_end_penalty: NotNegative = 0.0  # off the score of a response without end-of-text
    gamma: Share = 1.0  # GAE's discount of what comes a token later
    gae_lambda: Share = 0.95  # 1: all of the reward to come; 0: one token of it, then the critic
    whiten_rewards: bool = False  # GAE: variance 1, the mean stays
    whiten_advantages: bool = True  # GAE: mean 0, variance 1
    # group: divided by the group's standard deviation (GRPO), by the batch's, or not (Dr. GRPO)
    scale: Literal["group", "batch", "none"] = "group"

    def validate(self, prefix: str) -> None:
        """Raises ConfigError for another estimator of KL than k1."""
        check(
            self.kl_estimator == "k1",
            f"{prefix}.kl_estimator={self.kl_estimator!r} must be 'k1', log π − log π_ref of the "
            "drawn token: as a reward it alone has the gradient of KL(π‖π_ref); k2 and k3 "
            "are estimates of its value, whose reward pulls elsewhere",
        )


class Estimate(NamedTuple):
    """What `estimate` makes of experience."""

    advantage_NT: np.ndarray
    return_NT: np.ndarray  # what the critic should have said; of GAE alone, else 0
    reward_NT: np.ndarray  # before whitening
    kl_N: np.ndarray  # Σ k1 of each response, nats


def estimate(
    config: AdvantageConfig,
    score_N: ArrayLike,
    mask_NT: ArrayLike,
    logprob_NT: ArrayLike,
    ref_logprob_NT: ArrayLike | None,
    *,
    ended_N: ArrayLike,
    value_NT: ArrayLike | None = None,
    group_size: int = 1,
    kl_coefficient: float | None = None,
) -> Estimate:
    """Advantages of a batch of responses.

    PPO (Ziegler et al. 2019; Ouyang et al. 2022): reward −β·k1 at each token, the score at the
    last, whitened without mean shift, GAE, whitened. GRPO and RLOO: of each response's whole
    reward, score − β·Σ k1, what is above its group's; the same at all of its tokens.

    Args:
      score_N: from the reward model or function.
      mask_NT: above 0 where the policy chose the token.
      logprob_NT: of the drawn tokens, under the policy that drew them.
      ref_logprob_NT: under the reference; None where there is none, and β is 0.
      ended_N: whether the response drew its end-of-text.
      value_NT: the critic's, of what is before each token; GAE needs it.
      group_size: responses of a prompt, which are neighbours.
      kl_coefficient: β now, where it is adapted; config's unless given.
    """
    beta = config.kl_coefficient if kl_coefficient is None else kl_coefficient
    score_N = np.asarray(score_N, np.float64)
    score_N = np.where(ended_N, score_N, score_N - config.missing_end_penalty)
    check(beta == 0 or ref_logprob_NT is not None, f"β={beta} needs the reference's log-probs")
    check(config.name != "gae" or value_NT is not None, "GAE needs the critic's values")
    k1_NT = k1(logprob_NT, logprob_NT if ref_logprob_NT is None else ref_logprob_NT, mask_NT)
    reward_NT = at_last(score_N, mask_NT) - beta * k1_NT
    if config.name == "gae":
        white = config.whiten_rewards
        rewards_NT = whiten(reward_NT, mask_NT, shift_mean=False) if white else reward_NT
        advantage_NT, return_NT = gae(
            rewards_NT, value_NT, mask_NT, config.gamma, config.gae_lambda
        )
        if config.whiten_advantages:
            advantage_NT = whiten(advantage_NT, mask_NT)
        return Estimate(advantage_NT, return_NT, reward_NT, k1_NT.sum(1))
    if config.name == "group":
        advantage_N = group_advantages(reward_NT.sum(1), group_size, config.scale)
    else:
        advantage_N = leave_one_out(reward_NT.sum(1), group_size)
    advantage_NT = _masked(np.broadcast_to(advantage_N[:, None], reward_NT.shape), mask_NT)
    return Estimate(advantage_NT, np.zeros_like(reward_NT), reward_NT, k1_NT.sum(1))


def _masked(x_NT: ArrayLike, mask_NT: ArrayLike) -> np.ndarray:
    """float64, 0 at masked places."""
    return np.where(np.asarray(mask_NT) > 0, np.asarray(x_NT, np.float64), 0.0)


def k1(logprob_NT: ArrayLike, ref_logprob_NT: ArrayLike, mask_NT: ArrayLike) -> np.ndarray:
    """log π − log π_ref of the drawn tokens: its mean over the policy's draws is KL(π‖π_ref).

    E[k1·∇log π] = ∇KL(π‖π_ref), which is what a reward of −k1 descends. Of the other estimates
    (Schulman 2020) k3 = π_ref/π − 1 + k1 has the same mean and less variance, but
    E[k3·∇log π] = ∇KL(π‖π_ref) + E_ref[∇log π]: another direction.
    """
    return _masked(logprob_NT, mask_NT) - _masked(ref_logprob_NT, mask_NT)


def adapted(
    coefficient: float, kl: float, target: float, responses: int, horizon: int = 10_000
) -> float:
    """The next β: larger where `kl`, the mean over responses, is above `target`.

    β·(1 + clip(kl/target − 1, −0.2, 0.2)·responses/horizon) (Ziegler et al. 2019, §2.2).
    """
    return coefficient * (1 + float(np.clip(kl / target - 1, -0.2, 0.2)) * responses / horizon)


def at_last(score_N: ArrayLike, mask_NT: ArrayLike) -> np.ndarray:
    """[N, T]: each score at its response's last token, the end-of-text itself where it was drawn.

    A row without tokens has no place for one.
    """
    last_NT = np.cumsum((np.asarray(mask_NT) > 0)[:, ::-1], 1)[:, ::-1] == 1
    last_NT &= np.asarray(mask_NT) > 0
    return _masked(np.broadcast_to(np.asarray(score_N)[:, None], last_NT.shape), last_NT)


def gae(
    reward_NT: ArrayLike, value_NT: ArrayLike, mask_NT: ArrayLike, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimates, and returns (Schulman et al. 2016, eq. 16).

    A_t = r_t + γ·V_{t'} − V_t + γλ·A_{t'}, where t' is the row's next token that is not masked;
    beyond the last, V and A are 0: the response is over. The return is A + V.
    """
    mask_NT = np.asarray(mask_NT) > 0
    reward_NT, value_NT = _masked(reward_NT, mask_NT), _masked(value_NT, mask_NT)
    advantage_NT = np.zeros_like(reward_NT)
    value_N = later_N = np.zeros(len(reward_NT))
    for t in reversed(range(reward_NT.shape[1])):
        delta_N = reward_NT[:, t] + gamma * value_N - value_NT[:, t]
        later_N = np.where(mask_NT[:, t], delta_N + gamma * lam * later_N, later_N)
        value_N = np.where(mask_NT[:, t], value_NT[:, t], value_N)
        advantage_NT[:, t] = np.where(mask_NT[:, t], later_N, 0.0)
    return advantage_NT, advantage_NT + value_NT


def whiten(x_NT: ArrayLike, mask_NT: ArrayLike, *, shift_mean: bool = True) -> np.ndarray:
    """With variance 1 over what is not masked, and mean 0 or (`shift_mean=False`) the old one.

    The variance divides by the number of tokens, not by one less.
    """
    x_NT, count = _masked(x_NT, mask_NT), max(1, np.count_nonzero(np.asarray(mask_NT) > 0))
    mean = x_NT.sum() / count
    centred_NT = _masked(x_NT - mean, mask_NT)
    white_NT = centred_NT / np.sqrt(np.square(centred_NT).sum() / count + 1e-8)
    return white_NT if shift_mean else _masked(white_NT + mean, mask_NT)


def _groups(reward_N: ArrayLike, size: int) -> np.ndarray:
    """Rewards less their group's first, [groups, size]: exactly 0 where all are equal."""
    reward_N = np.asarray(reward_N, np.float64)
    check(
        size > 1 and len(reward_N) % size == 0,
        f"{size} responses a prompt: advantages over one's group need at least 2, and "
        f"a number that divides that of all responses, {len(reward_N)}",
    )
    groups_GK = reward_N.reshape(-1, size)
    return groups_GK - groups_GK[:, :1]


def group_advantages(
    reward_N: ArrayLike, size: int, scale: Literal["group", "batch", "none"] = "group"
) -> np.ndarray:
    """Rewards less their group's mean, over a standard deviation + 10⁻⁴.

    `scale`: the group's deviation (GRPO; Shao et al. 2024, §4.1), the batch's, or none at all
    (Dr. GRPO; Liu et al. 2025), which does not favour prompts of nearly equal rewards. A group of
    equal rewards has exactly 0. Deviations divide by one less than their number.

    Raises:
      ConfigError: groups of one response, or of a size that does not divide N.
    """
    offset_GK = _groups(reward_N, size)
    centred_GK = offset_GK - offset_GK.mean(1, keepdims=True)
    if scale == "group":
        centred_GK = centred_GK / (offset_GK.std(1, ddof=1, keepdims=True) + 1e-4)
    elif scale == "batch":
        centred_GK = centred_GK / (np.std(np.asarray(reward_N, np.float64), ddof=1) + 1e-4)
    return centred_GK.reshape(-1)


def leave_one_out(reward_N: ArrayLike, size: int) -> np.ndarray:
    """Rewards less the mean of the group's others (RLOO; Kool et al. 2019; Ahmadian et al. 2024).

    Raises:
      ConfigError: groups of one response, or of a size that does not divide N.
    """
    offset_GK = _groups(reward_N, size)
    others_GK = (offset_GK.sum(1, keepdims=True) - offset_GK) / (size - 1)
    return (offset_GK - others_GK).reshape(-1)


def explained_variance(value_NT: ArrayLike, return_NT: ArrayLike, mask_NT: ArrayLike) -> float:
    """1 − Var(return − value) / Var(return): 1 where the critic is right, 0 where it is blind."""
    kept_NT = np.asarray(mask_NT) > 0
    returns = np.asarray(return_NT, np.float64)[kept_NT]
    errors = returns - np.asarray(value_NT, np.float64)[kept_NT]
    return float(1 - errors.var() / max(returns.var(), 1e-12)) if len(returns) else 0.0

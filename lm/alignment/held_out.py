"""How a reward model does on pairs that it has not seen, and the scale that its rewards get."""

from __future__ import annotations

import jax
import numpy as np

from lm.config import check
from lm.data.batches import EvaluationBatches
from lm.models import bind
from lm.objectives.reward import pair_rewards
from lm.parallel.mesh import replicated
from lm.training.setup import Training

BINS = 10  # of the probabilities from a half to one


def held_out_rewards(
    training: Training, params: dict[str, jax.Array], pairs: EvaluationBatches
) -> np.ndarray:
    """The rewards of all pairs, float32 [N, 2]: of the chosen reply and of the rejected one.

    Call it within `layout.active()`, on all processes.

    Raises:
      ConfigError: a reward that is not finite.
    """

    def rewards(params, batch):
        found = pair_rewards(bind(training.model, params), batch)
        return found.reward_P2, found.there_P

    rewards = jax.jit(rewards, out_shardings=replicated(training.workload.layout.mesh))
    found = []
    for batch in pairs:
        reward_P2, there_P = map(np.asarray, rewards(params, training.put(batch, pairs)))
        found.append(reward_P2[there_P])
    reward_N2 = np.concatenate(found)
    check(
        bool(np.isfinite(reward_N2).all()),
        "the reward model's rewards are not finite: lower config.optimizer.learning_rate",
    )
    return reward_N2


def accuracy(reward_N2: np.ndarray) -> float:
    """The share of pairs whose chosen reply has the greater reward."""
    return float(np.mean(reward_N2[:, 0] > reward_N2[:, 1]))


def calibration_error(reward_N2: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error of σ(r_chosen − r_rejected) (Guo et al. 2017, eq. 3).

    Of a pair the model predicts, with a probability of a half or more, which reply was chosen. Of
    the pairs whose probability falls into the same of so many equal bins, the mean probability
    should be the share that it gets right; this is how far off it is in the mean over all pairs.
    """
    difference_N = reward_N2[:, 0].astype(np.float64) - reward_N2[:, 1]
    probability_N = 1 / (1 + np.exp(-np.abs(difference_N)))
    right_N = np.where(difference_N == 0, 0.5, difference_N > 0)
    bin_N = np.minimum((2 * probability_N - 1) * bins, bins - 1).astype(int)
    off = np.bincount(bin_N, probability_N - right_N, bins)
    return float(np.abs(off).sum() / len(reward_N2))

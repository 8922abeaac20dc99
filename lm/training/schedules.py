"""Learning-rate schedules: pure functions from the step to the learning rate.

A step counts from 0: `schedule(0)` is the rate of the first update. Every schedule starts with the
same linear warm-up, at step `s` of `w` warm-up steps

    peak * (s + 1) / (w + 1)        s < w

which is nanoGPT's: the first update already moves, and the peak is reached at step `w`. Then, with
r = (s - w) / (d - w), how far the decay has come by step `s` of `decay_steps` d, and
`final = final_fraction * peak`:

    constant       peak
    linear         peak + r * (final - peak)
    cosine         final + (peak - final) * (1 + cos(pi r)) / 2        (Loshchilov & Hutter 2017)
    inverse_sqrt   peak * sqrt((w + 1) / (s + 1))     (Vaswani et al. 2017; Raffel et al. 2020)
    wsd            peak, then linearly to final over the last `decay_fraction` of the d steps
                   (warm-up, stable, decay: Hu et al. 2024; Hägele et al. 2024)

From step `d` on, linear, cosine and wsd stay at `final`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import check
from lm.training.config import OptimizerConfig

Schedule = Callable[[Any], jax.Array]


def warmup_of(config: OptimizerConfig, total_steps: int) -> int:
    """Steps of warm-up: as configured, or a tenth of a run that is shorter than that."""
    return total_steps // 10 if config.warmup_steps > total_steps else config.warmup_steps


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The configured schedule: step (int or integer array, traced or not) → float32 rate.

    Raises:
      ConfigError: the warm-up is longer than the decay.
    """
    name, peak, final_fraction = config.schedule, config.learning_rate, config.final_fraction
    warmup_steps, end = warmup_of(config, total_steps), config.decay_steps or total_steps
    check(
        name in ("constant", "inverse_sqrt") or warmup_steps <= end,
        f"config.optimizer.warmup_steps={warmup_steps} must be at most decay_steps={end}",
    )
    # The stable part of wsd is a warm-up that is over: its decay starts where the others start
    # theirs, only later.
    start = warmup_steps
    if name == "wsd":
        start = max(warmup_steps, round(end * (1 - config.decay_fraction)))

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)
        if end == start:
            progress = jnp.where(step >= end, 1.0, 0.0)
        if name == "constant":
            decay = jnp.ones_like(step)
        elif name == "inverse_sqrt":
            decay = jnp.sqrt((warmup_steps + 1) / (step + 1))
        elif name == "cosine":
            decay = final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            decay = 1 + progress * (final_fraction - 1)
        warmup = (step + 1) / (warmup_steps + 1)
        return peak * jnp.where(step < warmup_steps, warmup, decay)

    return schedule

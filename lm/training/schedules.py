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

from lm.config import check, check_choice

Schedule = Callable[[Any], jax.Array]
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")


def make_schedule(
    name: str,
    peak: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_fraction: float = 0.0,
    decay_fraction: float = 0.2,
    prefix: str = "config.optimizer",
) -> Schedule:
    """The schedule `name`: step (int or integer array, traced or not) -> float32 rate.

    Args:
      name: one of `SCHEDULES`.
      peak: learning rate at the end of the warm-up.
      total_steps: optimizer steps of the whole run.
      warmup_steps: steps before the peak.
      decay_steps: step at which the decay ends; 0 means `total_steps`.
      final_fraction: rate after the decay, as a fraction of `peak`.
      decay_fraction: share of `decay_steps` that wsd spends decaying.
      prefix: where the fields live, for error messages.

    Raises:
      ConfigError: an unknown name, or numbers that do not fit each other.
    """
    check_choice(f"{prefix}.schedule", name, SCHEDULES)
    end = decay_steps or total_steps
    check(total_steps > 0, f"total_steps={total_steps} must be positive")
    check(peak >= 0, f"{prefix}.learning_rate={peak} must not be negative")
    check(warmup_steps >= 0, f"{prefix}.warmup_steps={warmup_steps} must not be negative")
    check(decay_steps >= 0, f"{prefix}.decay_steps={decay_steps} must not be negative")
    check(
        warmup_steps <= total_steps,
        f"{prefix}.warmup_steps={warmup_steps} must be at most the {total_steps} steps of the run",
    )
    check(
        name in ("constant", "inverse_sqrt") or warmup_steps <= end,
        f"{prefix}.warmup_steps={warmup_steps} must be at most decay_steps={end}",
    )
    check(
        0 <= final_fraction <= 1,
        f"{prefix}.final_fraction={final_fraction} must be between 0 and 1",
    )
    check(
        0 <= decay_fraction <= 1,
        f"{prefix}.decay_fraction={decay_fraction} must be between 0 and 1",
    )
    # The stable part of wsd is a warm-up that is over: its decay starts where the others start
    # theirs, only later.
    start = max(warmup_steps, round(end * (1 - decay_fraction))) if name == "wsd" else warmup_steps

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

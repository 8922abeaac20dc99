"""What keeps a mixture of experts in use: the losses of its routers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.models.moe.experts import RouterStats
from lm.objectives.config import ObjectiveConfig


def router_loss(
    stats: RouterStats, config: ObjectiveConfig, weight: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The routers' summed loss (Fedus et al. 2021, eq. 4; Zoph et al. 2022, eq. 5), and metrics.

    Each term is a mean over tokens and over the layers that have experts, so that coefficients do
    not depend on depth; times `weight`, so that dividing once by the global batch's weight gives
    the mean back. The load-balancing loss of a batch is not the sum of its parts': under gradient
    accumulation it is each micro-batch's own, weighted as the micro-batch's loss is. (Data-parallel
    devices share one micro-batch, and the parts that pass through a pipeline are added up first, so
    the number of either changes nothing.)

    Args:
      stats: of all layers, along a leading axis or of one.
      config: has the coefficients.
      weight: summed weight of the batch's targets, float32.

    Returns:
      The summed loss to differentiate, and metrics, which divided by the summed weight are:
      `load_balancing` (1 is balanced), `router_z` (mean squared logsumexp), `dropped` (the fraction
      of choices that found no room), `max_load` (the busiest expert's share, 1 is even).
    """
    per_token = weight / jnp.maximum(jnp.sum(stats.tokens), 1)
    metrics = {
        "load_balancing": per_token * jnp.sum(stats.balance),
        "router_z": per_token * jnp.sum(stats.z),
        "dropped": per_token * jnp.sum(stats.dropped),
        "max_load": per_token * jnp.sum(stats.max_load),
    }
    loss = config.load_balancing * metrics["load_balancing"] + config.router_z * metrics["router_z"]
    return loss, metrics

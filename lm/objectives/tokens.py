"""Predicting tokens: next ones, hidden ones, or those of a counterpart.

One loss for all of them. What is to be predicted, and from what, is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm.models import Model
from lm.models.moe.experts import RouterStats
from lm.models.text import Text
from lm.objectives.config import ObjectiveConfig
from lm.objectives.cross_entropy import linear_cross_entropy

Batch = Mapping[str, jax.Array]


def token_loss(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    max_targets: int = 0,
    rows_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss of a batch's targets (see `lm.data` for its fields).

    A batch whose rows are one document each may leave out `positions` and `segment_ids`, and have
    `filled`, false for padding, in their place; without it there is none.

    Args:
      model: bound.
      batch: of arrays [B, T], or [B, S] on an encoder-decoder's source side.
      dropout_key: turns dropout on.
      max_targets: no row has more targets than this; where it is fewer than the row's places,
        logits are made at that many places alone. 0: any number.
      rows_B: each row's number in the whole batch, for dropout; 0, 1, 2, … unless given.

    Returns:
      The summed loss to differentiate, and summed metrics: `nats` (cross-entropy without
      regularisers), `weight` (targets), `tokens` (places that are not padding) and, where there
      are experts, the router's.
    """
    text = text_of(batch, rows_B)
    source = None
    if "source" in batch:
        source = Text.of(
            batch["source"],
            positions_BT=batch.get("source_positions"),
            segments_BT=batch.get("source_segment_ids"),
            rows_B=rows_B,
        )
    x_BTD, router = model.forward(text, source, dropout_key)
    targets_BT, weights_BT = batch["targets"], batch["weights"]
    if 0 < max_targets < weights_BT.shape[1]:
        x_BTD, targets_BT, weights_BT = _gathered(max_targets, x_BTD, targets_BT, weights_BT)
    loss, nats = linear_cross_entropy(
        model.readout(x_BTD),
        model.output_weights(),
        targets_BT,
        weights_BT,
        bias_V=model.output_bias(),
        z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
        softcap=model.config.logits_softcap,
        chunk=config.chunk if weights_BT is batch["weights"] else 0,
    )
    weight = jnp.sum(batch["weights"])
    metrics = {"nats": nats, "weight": weight, "tokens": num_tokens(text)}
    return with_router(loss, metrics, router, config)


def text_of(batch: Batch, rows_B: jax.Array | None = None) -> Text:
    """The text that a batch's head reads: all of it, but for an encoder-decoder's source."""
    return Text.of(
        batch["inputs"],
        positions_BT=batch.get("positions"),
        segments_BT=batch.get("segment_ids"),
        prefix_BT=batch.get("prefix"),
        filled_BT=batch.get("filled"),
        rows_B=rows_B,
    )


def reply_rows(batch: Batch, rows_B: jax.Array | None = None) -> tuple[Batch, jax.Array | None]:
    """Replies side by side [B, N, T] as rows [B·N, T], which keeps the mesh's split of B.

    Returns:
      Those fields that are of tokens; and the rows' numbers, where `rows_B` gives those of B.
    """
    rows = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items() if x.ndim == 3}
    if rows_B is None:
        return rows, None
    N = batch["inputs"].shape[1]
    return rows, (rows_B[:, None] * N + jnp.arange(N, dtype=rows_B.dtype)).reshape(-1)


def num_tokens(text: Text) -> jax.Array:
    """How many of a text's places are not padding, float32."""
    valid_BT = jnp.ones_like(text.tokens_BT) if text.valid_BT is None else text.valid_BT
    return jnp.sum(valid_BT, dtype=jnp.float32)


def with_router(
    loss: jax.Array,
    metrics: dict[str, jax.Array],
    stats: RouterStats | None,
    config: ObjectiveConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A summed loss and its metrics, `weight` among them, with the routers', if there are any."""
    if stats is None:
        return loss, metrics
    routing, routing_metrics = router_loss(stats, config, metrics["weight"])
    return loss + routing, {**metrics, **routing_metrics}


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


def _gathered(count: int, x_BTD, targets_BT, weights_BT):
    """The same at each row's `count` heaviest places alone: all of its targets, if no more."""
    weights_BM, places_BM = jax.lax.top_k(weights_BT, count)
    targets_BM = jnp.take_along_axis(targets_BT, places_BM, axis=1)
    x_BMD = jnp.take_along_axis(x_BTD, places_BM[..., None], axis=1)
    return x_BMD, targets_BM, weights_BM

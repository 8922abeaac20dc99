"""Which of two replies is better: the reward model's loss, and the rewards of a batch of pairs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.models import Model
from lm.models.moe.experts import RouterStats
from lm.models.text import Text, last_places
from lm.objectives.config import ObjectiveConfig
from lm.objectives.tokens import Batch, reply_rows, with_router


class Pairs(NamedTuple):
    """What a reward model says of a batch of P pairs."""

    reward_P2: jax.Array  # float32, of the chosen reply and of the rejected one
    there_P: jax.Array  # whether both replies are there; else the pair is padding
    tokens: jax.Array  # places that are read, float32
    router: RouterStats | None


def bradley_terry(
    chosen_P: jax.Array, rejected_P: jax.Array, margin_P: jax.Array | float = 0.0
) -> jax.Array:
    """−log σ(chosen − rejected − margin) [P] (Bradley & Terry 1952; Touvron et al. 2023, eq. 2)."""
    return jax.nn.softplus(rejected_P - chosen_P + margin_P)


def reward_loss(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    rows_P: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed Bradley–Terry loss of a batch of pairs.

    With `config.centering` · (r_chosen + r_rejected)² beside it, which keeps rewards around 0
    (Eisenstein et al. 2023, §3). A pair of which a reply has no target weighs nothing.

    Args:
      model: bound, with a classifier of one label.
      batch: as of `pair_rewards`, and perhaps `margin` [P]: by how much the chosen reply should
        be better.
      config, dropout_key: as of `token_loss`.
      rows_P: each pair's number in the whole batch; 0, 1, 2, … unless given.

    Returns:
      The summed loss to differentiate, and summed metrics: `nats` (without centering), `weight`
      (pairs), `tokens`, `accuracy` (pairs ranked right), `margin` (r_chosen − r_rejected) and
      `reward` (the mean of both).
    """
    pairs = pair_rewards(model, batch, dropout_key, rows_P)
    chosen_P, rejected_P = pairs.reward_P2[:, 0], pairs.reward_P2[:, 1]

    def summed(x_P: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(pairs.there_P, x_P, 0), dtype=jnp.float32)

    margin_P = jnp.where(pairs.there_P, batch.get("margin", 0.0), 0)  # else a NaN would spread
    nats = summed(bradley_terry(chosen_P, rejected_P, margin_P))
    loss = nats
    if config.centering:
        loss += config.centering * summed((chosen_P + rejected_P) ** 2)
    metrics = {
        "nats": nats,
        "weight": summed(jnp.ones_like(chosen_P)),
        "tokens": pairs.tokens,
        "accuracy": summed(chosen_P > rejected_P),
        "margin": summed(chosen_P - rejected_P),
        "reward": summed((chosen_P + rejected_P) / 2),
    }
    return with_router(loss, metrics, pairs.router, config)


def pair_rewards(
    model: Model,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    rows_P: jax.Array | None = None,
) -> Pairs:
    """The rewards of pairs of replies, each read from its last target: the reply's end-of-turn.

    Args:
      batch: `inputs`, `targets` and `weights` [P, 2, T], and `segment_ids` with `positions`, or
        `filled`, or neither where there is no padding; 0 is the chosen reply, 1 the rejected one.
        A row is one document.
      model, dropout_key, rows_P: as of `reward_loss`.
    """
    rows, rows_R = reply_rows(batch, rows_P)
    filled = rows["segment_ids"] > 0 if "segment_ids" in rows else rows.get("filled", True)
    ends_RT = last_places(rows["weights"])
    # The last target may stand nowhere among the inputs: it goes behind the input that predicts it.
    # Where no place is left there, the row's first token makes room.
    full_R1 = ends_RT[:, -1:]
    last_RT = jnp.where(full_R1, ends_RT, jnp.pad(ends_RT, ((0, 0), (1, 0)))[:, :-1])

    def placed(inputs_RT: jax.Array, targets_RT: jax.Array) -> jax.Array:
        last_R1 = jnp.sum(jnp.where(ends_RT, targets_RT, 0), axis=1, keepdims=True)
        return jnp.where(last_RT & ~full_R1, last_R1, inputs_RT)

    positions_RT = rows.get("positions")
    if positions_RT is not None:
        positions_RT = placed(positions_RT, positions_RT + 1)
    tokens_RT = jnp.where(full_R1, rows["targets"], placed(rows["inputs"], rows["targets"]))
    segments_RT = (filled | last_RT).astype(jnp.int32)
    text = Text.of(
        tokens_RT,
        positions_BT=positions_RT,
        segments_BT=segments_RT,
        rows_B=rows_R,
    )
    x_RTD, router = model.forward(text, None, dropout_key)
    reward_R = model.classify(x_RTD, last_RT)[:, 0]
    return Pairs(
        reward_R.reshape(-1, 2),
        jnp.any(last_RT, axis=1).reshape(-1, 2).all(axis=1),
        jnp.sum(segments_RT, dtype=jnp.float32),
        router,
    )

"""How faithful a dictionary is, on text it has not learned from.

    fvu   fraction of variance unexplained: Σ‖y − ŷ‖² / Σ‖y − ȳ‖², all dimensions together
    l0    features that fire at a token, of a layer
    dead  share of features that fire at no token
    loss recovered  (H_ablated − H_spliced) / (H_ablated − H_clean), H the model's cross-entropy
          in nats a token: with what the dictionary rebuilds in place of the activations, with them
          replaced by zeros or by their mean over the batch, and as it is

Every token counts, the first of a document too. With `all` layers replaced, each dictionary layer
reads what the layers below, replaced already, have left to it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.interpretability.dictionaries import Dictionary
from lm.models import Model, bind
from lm.models.activations import trace
from lm.models.hooks import Tap
from lm.parallel.mesh import replicated
from lm.training.step import Batch

KEEP, REBUILD, ZERO, MEAN = range(4)  # what becomes of a layer's target


class Faithfulness(NamedTuple):
    """What was measured; of every layer, and of all replaced at once where it says so."""

    tokens: float
    nats: float  # a token, of the model as it is
    fvu_L: np.ndarray
    l0_L: np.ndarray
    density_LF: np.ndarray  # share of tokens at which each feature fires
    spliced: dict[int, np.ndarray]  # nats a token by what becomes of the target: [L + 1], all last

    @property
    def dead(self) -> float:
        """Share of features that never fired."""
        return float((self.density_LF == 0).mean())

    def recovered(self, against: int) -> np.ndarray:
        """Loss recovered [L + 1], against `ZERO` or `MEAN`."""
        lost = self.spliced[against] - self.nats
        return (self.spliced[against] - self.spliced[REBUILD]) / np.where(lost == 0, np.nan, lost)

    def summary(self) -> dict[str, float]:
        """Means over layers, as metrics.jsonl has them; `eval_loss` is of all layers replaced."""
        return {
            "eval_loss": float(self.spliced[REBUILD][-1]),
            "eval_loss_clean": float(self.nats),
            "eval_fvu": float(self.fvu_L.mean()),
            "eval_l0": float(self.l0_L.mean()),
            "eval_dead": self.dead,
            "eval_loss_recovered": float(self.recovered(ZERO)[:-1].mean()),
            "eval_loss_recovered_mean": float(self.recovered(MEAN)[:-1].mean()),
            "eval_loss_recovered_all": float(self.recovered(ZERO)[-1]),
        }


def splicing(dictionary: Dictionary, fate_L: jax.Array, valid_BT: jax.Array) -> Tap:
    """A tap that replaces targets: of layer l by what `fate_L[l]` says."""
    read: dict[int, jax.Array] = {}
    says: dict[int, jax.Array] = {}

    def rebuilt(index: int) -> jax.Array:
        y = dictionary.b_dec[index]
        for row, (k, to) in enumerate(dictionary.pairs):
            if to == index:
                y += says[k] @ dictionary.W_dec[row]
        return y if dictionary.W_skip is None else y + read[index] @ dictionary.W_skip[index]

    def tap(name, value):
        if name in dictionary.sources:
            index = dictionary.sources.index(name)
            read[index] = value.astype(jnp.float32)
            says[index] = dictionary.encode_one(index, read[index])
        if name in dictionary.targets:
            index = dictionary.targets.index(name)
            weights_BT1 = valid_BT[..., None].astype(jnp.float32)
            mean_D = jnp.sum(value * weights_BT1, (0, 1)) / jnp.maximum(jnp.sum(weights_BT1), 1)
            options = (value, rebuilt(index), 0.0, mean_D)
            options = [jnp.broadcast_to(x, value.shape).astype(value.dtype) for x in options]
            return jax.lax.select_n(fate_L[index], *options)
        return value

    return tap


def text_fields(batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
    """What a batch knows of its text, as `trace` takes it, and which tokens are no padding."""
    names = {"segment_ids": "segments_BT", "positions": "positions_BT", "filled": "filled_BT"}
    fields = {ours: batch[name] for name, ours in names.items() if name in batch}
    filled = fields.get("filled_BT", fields.get("segments_BT"))
    valid_BT = jnp.ones(batch["inputs"].shape, bool) if filled is None else filled > 0
    return fields, valid_BT


def on_all(mesh: jax.sharding.Mesh | None) -> Callable[..., Any]:
    """`jax.jit` of a function whose results every host is to have."""
    return functools.partial(jax.jit, out_shardings=replicated(mesh) if mesh else None)


def make_measure(
    model: Model, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., Faithfulness]:
    """A function (dictionary, base parameters, batches) → `Faithfulness`; compiled once a shape.

    Args:
      model: the skeleton of the model whose activations they are.
      mesh: whose devices share the batches; None: one device has them.
    """

    @on_all(mesh)
    def rebuilding(base, dictionary, batch):
        fields, valid_BT = text_fields(batch)
        names = list(dict.fromkeys((*dictionary.sources, *dictionary.targets)))
        found = trace(bind(model, base), batch["inputs"], names=names, **fields)
        x_LBTD, y_LBTD = (
            jnp.stack([found[name] for name in names]).astype(jnp.float32)
            for names in (dictionary.sources, dictionary.targets)
        )
        a_LBTF = dictionary.encode(x_LBTD)
        w_BT1 = valid_BT[..., None].astype(jnp.float32)
        error_LBTD = jnp.square(y_LBTD - dictionary.decode(a_LBTF, x_LBTD))
        return {
            "error": jnp.sum(error_LBTD * w_BT1, (1, 2, 3)),
            "sums": jnp.sum(y_LBTD * w_BT1, (1, 2)),
            "squares": jnp.sum(jnp.square(y_LBTD) * w_BT1, (1, 2, 3)),
            "fired": jnp.sum((a_LBTF > 0) * w_BT1, (1, 2)),
            "tokens": jnp.sum(w_BT1),
        }

    @on_all(mesh)
    def nats(base, dictionary, batch, fate_L):
        fields, valid_BT = text_fields(batch)
        tap = splicing(dictionary, fate_L, valid_BT)
        logits_BTV = bind(model, base)(batch["inputs"], tap=tap, **fields)
        log_p_BTV = jax.nn.log_softmax(logits_BTV)
        log_p_BT = jnp.take_along_axis(log_p_BTV, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(log_p_BT * batch["weights"]), jnp.sum(batch["weights"])

    def measure(
        dictionary: Dictionary, base: Mapping[str, jax.Array], batches: Iterable[Batch]
    ) -> Faithfulness:
        L = dictionary.num_layers
        fates = {(KEEP, L): np.full(L, KEEP)}
        for fate, index in itertools.product((REBUILD, ZERO, MEAN), range(L + 1)):
            alone = np.where(np.arange(L) == index, fate, KEEP)
            fates[fate, index] = alone if index < L else np.full(L, fate)
        sums: dict[Any, Any] = {}
        for batch in batches:
            found = rebuilding(base, dictionary, batch)
            found["nats"] = {key: nats(base, dictionary, batch, f) for key, f in fates.items()}
            found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            sums = found if not sums else jax.tree.map(np.add, sums, found)
        tokens = sums["tokens"]
        variance_L = sums["squares"] - np.square(sums["sums"]).sum(-1) / tokens
        loss = {key: total / max(weight, 1.0) for key, (total, weight) in sums["nats"].items()}
        return Faithfulness(
            float(tokens),
            float(loss[KEEP, L]),
            sums["error"] / np.maximum(variance_L, 1e-20),
            sums["fired"].sum(-1) / tokens,
            sums["fired"] / tokens,
            {f: np.array([loss[f, i] for i in range(L + 1)]) for f in (REBUILD, ZERO, MEAN)},
        )

    return measure

"""What our models with an encoder compute, under the names that their oracles use.

Shared by the golden tests, which need no torch, and the parity tests, which do.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm.models import bind, skeleton
from lm.models.hooks import no_tap, reading
from lm.models.huggingface import to_tensors
from lm.models.huggingface.read import open_checkpoint

IGNORED = -100  # a label that does not count


def load(directory, **changes):
    """Family, ModelConfig (in float32, with `changes`) and parameters of a directory."""
    checkpoint = open_checkpoint(directory)
    config = dataclasses.replace(checkpoint.config, compute_dtype="float32", **changes)
    return checkpoint.family, config, checkpoint.parameters()


def cross_entropy(logits, labels):
    """Mean over labels that count."""
    counts = labels != IGNORED
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.where(counts, labels, 0)[..., None], -1
    )
    return -jnp.sum(picked[..., 0] * counts) / counts.sum()


def arguments(batch):
    """The model's arguments of a batch, and where its outputs are compared."""
    if "source" in batch:
        named = {"segments_BT": batch["mask"], "source_segments_BS": batch["source_mask"]}
        return (batch["source"], batch["inputs"]), named
    return (batch["inputs"],), {"segments_BT": batch["mask"], "types_BT": batch.get("types")}


def streams(config, seen, last, prefix=""):
    """The residual streams that transformers calls hidden states, of one stack."""
    count = config.encoder_layers if prefix else config.num_layers
    found = [seen[f"{prefix}embedding"]]
    found += [seen[f"{prefix}blocks.{i}.residual_after"] for i in range(count)]
    return [*found[:-1], last]


def outputs(config, params, batch, tap=no_tap):
    """The loss, and everything to be compared but hidden states and gradients: name → array."""
    model, found, loss = bind(skeleton(config), params), {}, 0.0
    texts, named = arguments(batch)
    found["last"] = x_BTD = model.hidden(*texts, tap=tap, **named)
    if "labels" in batch:
        found["logits"] = model.unembed(x_BTD)
        loss += cross_entropy(found["logits"], batch["labels"])
    if "classes" in batch:
        found["scores"] = model.classify(x_BTD)
        loss += cross_entropy(found["scores"], batch["classes"])
    if "cotangent" in batch:  # no head: any function of the outputs will do
        loss += jnp.mean(x_BTD * batch["cotangent"] * batch["mask"][..., None])
        if config.pooler:
            found["pooled"] = model.pool(x_BTD)
            loss += jnp.mean(found["pooled"] * batch["cotangent"][:, 0])
    return loss, found


def computed(config, params, batch):
    """Loss, outputs and hidden states, name → array, of layers one by one."""
    seen = {}
    loss, found = outputs(config, params, batch, reading(seen))
    last = found.pop("last")
    found |= {f"hidden.{i}": h for i, h in enumerate(streams(config, seen, last))}
    if "source" in batch:
        model = bind(skeleton(config), params)
        memory = model.encode(batch["source"], segments_BS=batch["source_mask"])
        memories = streams(config, seen, memory, "encoder.")
        found |= {f"encoder_hidden.{i}": h for i, h in enumerate(memories)}
    return {"loss": loss, **found}


@functools.partial(jax.jit, static_argnums=0)
def _gradients(config, params, batch):
    return jax.grad(lambda params: outputs(config, params, batch)[0])(params)


def gradients(family, config, params, batch):
    """The gradient of the loss through scanned layers, under the tensors' names.

    With the family's prefix and without: a model without a head may have it or not.
    """
    found = _gradients(dataclasses.replace(config, scan_layers=True), params, batch)
    found = to_tensors(family, config, {name: np.asarray(g) for name, g in found.items()})
    return {name.removeprefix(family.base_prefix): g for name, g in found.items()} | found


def worst(found, expected, batch):
    """The largest difference of each output where the batch is not padding."""
    assert set(found) == set(expected)
    errors = {}
    for name, theirs in expected.items():
        ours, theirs = np.asarray(found[name]), np.asarray(theirs)
        assert ours.shape == theirs.shape, name
        if theirs.ndim == 3:
            mask = batch["source_mask" if name.startswith("encoder_") else "mask"]
            ours, theirs = ours[mask > 0], theirs[mask > 0]
        errors[name] = float(np.abs(ours - theirs).max())
    return errors


# A bias of all keys moves every score of a query alike, and softmax does not see it.
WITHOUT_EFFECT = ("key.bias", "k_proj.bias")


def worst_gradients(ours, theirs):
    """The largest difference of each tensor's gradient, relative to the largest number in it."""
    assert set(theirs) <= set(ours)
    errors = {}
    for name, expected in theirs.items():
        size = np.abs(expected).max()
        if name.endswith(WITHOUT_EFFECT):
            size = max(np.abs(g).max() for n, g in theirs.items() if n.endswith("bias"))
        assert size > 0, name
        errors[name] = float(np.abs(ours[name] - expected).max() / size)
    return errors


def greedy(config, params, source, source_mask, start, stop, pad, steps):
    """Greedy search from the decoder's start token, `pad` after the row's `stop`: [B, 1 + …].

    It ends when all rows have, or after `steps` tokens.
    """
    model = bind(skeleton(config), params)
    new_cache = jax.jit(lambda *source: model.new_cache(len(source[0]), steps, *source))
    cache = new_cache(source, source_mask)
    extend = jax.jit(lambda params, *a: bind(skeleton(config), params).extend(*a))
    unembed = jax.jit(lambda params, x: bind(skeleton(config), params).unembed(x))
    rows = [np.full(len(source), start)]
    done = np.zeros(len(source), bool)
    for step in range(steps):
        positions = jnp.full((len(source), 1), step)
        x_B1D, cache = extend(params, jnp.asarray(rows[-1])[:, None], positions, cache)
        chosen = np.asarray(unembed(params, x_B1D)[:, 0].argmax(-1))
        rows.append(np.where(done, pad, chosen))
        done |= chosen == stop
        if done.all():
            break
    return np.stack(rows, 1)

"""What our models of Hugging Face's families compute, under the names that their oracles use.

Shared by the golden tests, which need no torch, and the parity tests, which do. A batch is a dict:
inputs and mask [B, T]; positions; types; source and source_mask; labels and classes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import compiled

from lm.models import bind, skeleton
from lm.models.hooks import no_tap, reading
from lm.models.huggingface import to_tensors
from lm.models.huggingface.read import open_checkpoint
from lm.models.text import last_places

IGNORED = -100  # a label that does not count
OUTPUTS, GRADIENTS = 2e-5, 1e-4  # absolute; of the largest number in a tensor


def load(directory, **changes):
    """Family, ModelConfig (in float32, with `changes`) and parameters of a directory."""
    checkpoint = open_checkpoint(directory)
    config = dataclasses.replace(checkpoint.config, compute_dtype="float32", **changes)
    return checkpoint.family, config, checkpoint.parameters()


def text_batch(rows: int = 4, length: int = 13, alike: bool = False) -> dict[str, np.ndarray]:
    """Random tokens for a decoder, the rows padded on the right, on the left, not at all, …

    Where they are to be `alike`, all are as long: the third and fourth are padded on both sides.
    """
    tokens = np.random.default_rng(0).integers(3, 97, (rows, length), np.int32)
    mask = np.ones((rows, length), np.int32)
    mask[0::3, -4:] = 0
    mask[1::3, :3] = 0
    if alike:
        mask[:] = 1
        for row in range(rows):
            left = (0, 4, 1, 2)[row % 4]
            mask[row, :left] = mask[row, length - 4 + left :] = 0
    labels = np.full_like(tokens, IGNORED)
    labels[:, :-1] = np.where(mask[:, :-1] * mask[:, 1:], tokens[:, 1:], IGNORED)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    return {"inputs": tokens, "mask": mask, "labels": labels, "positions": positions}


def cross_entropy(logits, labels):
    """Mean over labels that count."""
    counts = labels != IGNORED
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.where(counts, labels, 0)[..., None], -1
    )
    return -jnp.sum(picked[..., 0] * counts) / counts.sum()


def arguments(batch):
    """The model's arguments of a batch."""
    named = {"segments_BT": batch["mask"], "positions_BT": batch.get("positions")}
    if "source" in batch:
        named["source_segments_BS"] = batch["source_mask"]
        return (batch["source"], batch["inputs"]), named
    return (batch["inputs"],), {**named, "types_BT": batch.get("types")}


def streams(config, seen, last, prefix=""):
    """The residual streams that transformers calls hidden states, of one stack."""
    count = config.encoder_layers if prefix else config.num_layers
    found = [seen[f"{prefix}embedding"]]
    found += [seen[f"{prefix}blocks.{i}.residual_after"] for i in range(count)]
    name = "encoder_hidden" if prefix else "hidden"
    return {f"{name}.{i}": stream for i, stream in enumerate([*found[:-1], last])}


def outputs(config, params, batch, taps):
    """The loss, and everything to be compared but gradients: name → array."""
    model, found, loss, seen = bind(skeleton(config), params), {}, 0.0, {}
    texts, named = arguments(batch)
    x_BTD = model.hidden(*texts, tap=reading(seen) if taps else no_tap, **named)
    if taps:
        found |= streams(config, seen, x_BTD)
    if taps and "source" in batch:
        memory = bind(skeleton(config), jax.lax.stop_gradient(params)).encode(
            batch["source"], segments_BS=batch["source_mask"]
        )  # looked at, and nothing else: of the gradient it is no part
        found |= streams(config, seen, memory, "encoder.")
    if "labels" in batch:
        found["logits"] = model.unembed(x_BTD)
        loss += cross_entropy(found["logits"], batch["labels"])
    if "classes" in batch:
        found["scores"] = model.classify(x_BTD, last_places(batch["mask"]), batch["mask"])
        loss += cross_entropy(found["scores"], batch["classes"])
    if "cotangent" in batch:  # no head: any function of the outputs will do
        loss += jnp.mean(x_BTD * batch["cotangent"] * batch["mask"][..., None])
        if config.pooler:
            found["pooled"] = model.pool(x_BTD)
            loss += jnp.mean(found["pooled"] * batch["cotangent"][:, 0])
    return loss, {**found, "loss": loss}


@functools.partial(compiled, static_argnums=0)
def looked_at(config, params, batch):
    """Every output, hidden states among them, of layers one by one; no gradient."""
    return outputs(config, params, batch, taps=True)[1]


@functools.partial(compiled, static_argnums=(0, 1))
def _computed(config, taps, params, batch):
    return jax.grad(lambda params: outputs(config, params, batch, taps), has_aux=True)(params)


def computed(family, config, params, batch, taps=True):
    """Outputs (hidden states among them if `taps`, of layers one by one), and the gradient.

    The latter by the tensors' names, with the family's prefix and without: a model without a head
    may have it or not.
    """
    gradient, found = _computed(config, taps, params, batch)
    gradient = {name: np.asarray(array) for name, array in gradient.items()}
    tensors = to_tensors(family, config, gradient)
    return found, {n.removeprefix(family.base_prefix): g for n, g in tensors.items()} | tensors


def worst(found, expected, batch):
    """The largest difference of each output where the batch is not padding."""
    errors = {}
    for name, ours in found.items():
        ours, theirs = np.asarray(ours), np.asarray(expected[name])
        assert ours.shape == theirs.shape, name
        if theirs.ndim == 3:
            mask = batch["source_mask" if name.startswith("encoder_") else "mask"]
            ours, theirs = ours[mask > 0], theirs[mask > 0]
        errors[name] = float(np.abs(ours - theirs).max())
    return errors


def worst_gradients(ours, theirs):
    """The largest difference of each tensor's gradient, relative to the largest number in it.

    Some gradients are nothing but rounding: a bias of all keys moves every score of a query alike,
    and softmax does not see it. Those must be nothing here, too.
    """
    assert set(theirs) <= set(ours), set(theirs) - set(ours)
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    errors = {}
    for name, expected in theirs.items():
        size = np.abs(expected).max()
        if size < 1e-5 * largest:
            assert np.abs(ours[name]).max() < 1e-5 * largest, name
        else:
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

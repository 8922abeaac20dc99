"""What our decoders compute, under the names that their oracles use.

Shared by the golden tests, which need no torch, and the parity tests, which do.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from encoder_checks import streams
from tiny_models import compiled

from lm.models import bind, skeleton
from lm.models.hooks import no_tap, reading
from lm.models.huggingface import to_tensors

OUTPUTS, GRADIENTS = 2e-5, 1e-4  # absolute; of the largest number in a tensor
GOLDEN = {"rows": 2, "length": 10}  # of the batch that golden files are about


class Batch(typing.NamedTuple):
    """Tokens and which of them are not padding, both [B, T]."""

    tokens: np.ndarray
    mask: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Of each token in its text."""
        return np.maximum(np.cumsum(self.mask, 1) - 1, 0).astype(np.int32)


def random_batch(rows: int = 4, length: int = 13) -> Batch:
    """Random tokens, the rows padded on the right, on the left, not at all, and so on."""
    tokens = np.random.default_rng(0).integers(3, 97, (rows, length), np.int32)
    mask = np.ones((rows, length), np.int32)
    mask[0::3, -4:] = 0
    mask[1::3, :3] = 0
    return Batch(tokens, mask)


def computed(family, config, params, batch, taps=True):
    """Logits, hidden states [L + 1, B, T, D] if `taps`, and the gradient by tensors' names."""
    outputs, gradient = _computed(config, taps, params, *batch, batch.positions)
    gradient = {name: np.asarray(array) for name, array in gradient.items()}
    return outputs, to_tensors(family, config, gradient)


@functools.partial(compiled, static_argnums=(0, 1))
def _computed(config, taps, params, tokens, mask, positions):
    def loss(params):
        model, seen = bind(skeleton(config), params), {}
        x_BTD = model.hidden(
            tokens,
            positions_BT=positions,
            segments_BT=mask,
            tap=reading(seen) if taps else no_tap,
        )
        outputs = {"logits": model.unembed(x_BTD)}
        if taps:
            outputs["hidden"] = jnp.stack(streams(config, seen, x_BTD))
        logp = jax.nn.log_softmax(outputs["logits"][:, :-1])
        nats = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
        weights = mask[:, :-1] * mask[:, 1:]
        return jnp.sum(nats * weights) / weights.sum(), outputs

    gradient, outputs = jax.grad(loss, has_aux=True)(params)
    return outputs, gradient


def worst(ours, theirs, mask) -> float:
    """The largest absolute difference of two arrays […, B, T, N] where `mask` [B, T] holds."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs)[..., mask == 1, :].max())


def worst_gradient(ours, theirs) -> tuple[float, str]:
    """The largest difference in a tensor, relative to the largest number in it; and which tensor.

    Some gradients are nothing but rounding: a bias of all keys moves every score of a query alike,
    and softmax does not see it. Those must be nothing here, too.
    """
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    errors = {}
    for name, expected in theirs.items():
        size = np.abs(expected).max()
        if size < 1e-5 * largest:
            assert np.abs(ours[name]).max() < 1e-5 * largest, name
        else:
            errors[name] = float(np.abs(ours[name] - expected).max() / size)
    name = max(errors, key=errors.get)
    return errors[name], name

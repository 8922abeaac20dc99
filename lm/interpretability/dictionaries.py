"""Sparse dictionaries of activations: sparse autoencoders, transcoders, cross-layer transcoders.

One family: a_k = f(x_k W_enc + b_enc) at each layer k, and at each layer l

    y_l = Σ_k a_k W_dec^{k→l} + b_dec (+ x_l W_skip)

A sparse autoencoder reads and rebuilds the same site. A transcoder reads what an MLP reads and
writes what the MLP writes (Dunefsky et al. 2024); a cross-layer one writes to its own layer and all
later ones, k ≤ l (Ameisen et al. 2025). Training may use any of the architectures of
`lm.interpretability.dictionary_loss`; trained, each is one of two functions f of what a feature
reads, its pre-activation z: z where z > max(θ, 0), else 0 (`jumprelu`; plain ReLU has θ = 0); or
that for the k largest z of each token alone (`topk`).

    dictionary = lm.interpretability.dictionaries.load(DIR)
    traced = run.trace(tokens_BT, names=dictionary.sources)
    x_LBTD = jnp.stack([traced[name] for name in dictionary.sources])
    a_LBTF = dictionary.encode(x_LBTD)  # mostly zeros
    y_LBTD = dictionary.decode(a_LBTF, x_LBTD)  # ≈ the activations named dictionary.targets

It reads raw activations: whatever scales training used are folded into the weights, biases and
thresholds. L counts the dictionary's layers, F the features of each, D the width; P its pairs of
layers k ≤ l, which are L where no layer writes to another.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check, check_choice
from lm.files import read_json, write_json
from lm.models.huggingface import safetensors

SETTINGS, FILE = "dictionary.json", "dictionary.safetensors"
NUMBERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
SAID = ("kind", "layers", "source", "target", "k")
Kind = Literal["transcoder", "cross_layer", "sae"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*NUMBERS],
    meta_fields=[*SAID],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """A trained dictionary of several layers; a pytree of its arrays.

    Attributes:
      W_enc: [L, D, F], columns that features read with.
      b_enc: [L, F].
      W_dec: [P, F, D], vectors that features write; P = L, or the pairs (k, l) of `pairs`.
      b_dec: [L, D].
      threshold: [L, F], θ of each feature, in units of its pre-activation.
      W_skip: [L, D, D], or None.
      kind: "transcoder", "cross_layer" or "sae".
      layers: the model's layers that it reads, rising.
      source, target: sites of a block that it reads and rebuilds, such as "mlp.output".
      k: features of a token that are kept in each layer; 0: as many as reach their thresholds.
    """

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    threshold: jax.Array
    W_skip: jax.Array | None
    kind: Kind
    layers: tuple[int, ...]
    source: str
    target: str
    k: int = 0

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def num_features(self) -> int:
        """F."""
        return self.b_enc.shape[1]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the activations that it reads, one a layer."""
        return tuple(f"blocks.{layer}.{self.source}" for layer in self.layers)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the activations that it rebuilds."""
        return tuple(f"blocks.{layer}.{self.target}" for layer in self.layers)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Of each matrix of W_dec, which layer's features write to which: indices into `layers`."""
        return pairs(self.kind, self.num_layers)

    def decoder(self, index: int) -> tuple[tuple[int, ...], jax.Array]:
        """What layer `index` (into `layers`) writes: indices of the layers, and [those, F, D]."""
        rows = [row for row, (k, _) in enumerate(self.pairs) if k == index]
        reached = tuple(self.pairs[row][1] for row in rows)
        return reached, self.W_dec[rows[0] : rows[-1] + 1]

    def pre_activation(self, x_LxD: jax.Array) -> jax.Array:
        """[L, …, D] → [L, …, F], float32, before f."""
        return pre_activation(x_LxD, self.W_enc, self.b_enc)

    def encode(self, x_LxD: jax.Array) -> jax.Array:
        """What each feature says of activations [L, …, D] of all layers: [L, …, F], not negative.

        Each token's features depend on that token alone.
        """
        return self._fired(self.pre_activation(x_LxD), self.threshold)

    def encode_one(self, index: int, x_xD: jax.Array) -> jax.Array:
        """The same of one layer, `index` into `layers`: [..., D] → [..., F]."""
        z_1xF = pre_activation(x_xD[None], self.W_enc[index][None], self.b_enc[index][None])
        return self._fired(z_1xF, self.threshold[index][None])[0]

    def _fired(self, z_LxF: jax.Array, threshold_LF: jax.Array) -> jax.Array:
        a_LxF = jnp.where(z_LxF > jnp.maximum(beside(threshold_LF, z_LxF), 0), z_LxF, 0)
        return keep_largest(a_LxF, self.k) if self.k else a_LxF

    def decode(self, a_LxF: jax.Array, x_LxD: jax.Array | None = None) -> jax.Array:
        """What features write to the targets: [L, …, F] → [L, …, D].

        Args:
          a_LxF: as `encode` gives it.
          x_LxD: what was encoded; read where there is a W_skip.
        """
        y_LxD = decode(self.kind, a_LxF, self.W_dec) + beside(self.b_dec, a_LxF)
        if self.W_skip is not None:
            check(x_LxD is not None, "decode: a dictionary with W_skip needs x_LxD, what it read")
            y_LxD += jnp.einsum("l...d,lde->l...e", x_LxD.astype(jnp.float32), self.W_skip)
        return y_LxD

    def __call__(self, x_LxD: jax.Array) -> jax.Array:
        """The reconstruction [L, …, D] of the targets, from what is read."""
        return self.decode(self.encode(x_LxD), x_LxD)


def pairs(kind: Kind, num_layers: int) -> tuple[tuple[int, int], ...]:
    """(k, l) for every decoder matrix, in order: k rising, and of one k, l."""
    if kind != "cross_layer":
        return tuple((k, k) for k in range(num_layers))
    return tuple((k, to) for k in range(num_layers) for to in range(k, num_layers))


def beside(value_LF: jax.Array, x_LxF: jax.Array) -> jax.Array:
    """`value_LF` with dimensions of one, to broadcast against x_LxF."""
    between = (1,) * (x_LxF.ndim - value_LF.ndim)
    return value_LF.reshape(value_LF.shape[0], *between, *value_LF.shape[1:])


def pre_activation(x_LxD: jax.Array, W_enc: jax.Array, b_enc: jax.Array) -> jax.Array:
    """x W_enc + b_enc, float32: [L, …, D] → [L, …, F]."""
    z_LxF = jnp.einsum("l...d,ldf->l...f", x_LxD.astype(b_enc.dtype), W_enc)
    return z_LxF + beside(b_enc, z_LxF)


def decode(kind: Kind, a_LxF: jax.Array, W_dec: jax.Array) -> jax.Array:
    """Σ_k a_k W_dec^{k→l}: [L, …, F] → [L, …, D]; W_dec as of `Dictionary`."""
    L = a_LxF.shape[0]
    if kind != "cross_layer":
        return jnp.einsum("l...f,lfd->l...d", a_LxF, W_dec)
    y_LxD, row = jnp.zeros((*a_LxF.shape[:-1], W_dec.shape[-1]), a_LxF.dtype), 0
    for k in range(L):  # one product a layer that reads, with all that it writes
        written = jnp.einsum("...f,lfd->l...d", a_LxF[k], W_dec[row : row + L - k])
        y_LxD, row = y_LxD.at[k:].add(written), row + L - k
    return y_LxD


def keep_largest(a_xF: jax.Array, k: int) -> jax.Array:
    """The k largest of each row, and zeros; of equal ones the first."""
    F = a_xF.shape[-1]
    if k >= F:
        return a_xF
    _, chosen_xk = jax.lax.top_k(a_xF, k)
    kept_xF = jnp.put_along_axis(
        jnp.zeros(a_xF.shape, bool), chosen_xk, True, axis=-1, inplace=False
    )
    return jnp.where(kept_xF, a_xF, 0)


def save(dictionary: Dictionary, directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes dictionary.safetensors with the arrays by their names, and dictionary.json."""
    directory = pathlib.Path(directory)
    numbers = {name: getattr(dictionary, name) for name in NUMBERS}
    numbers = {name: np.asarray(x, np.float32) for name, x in numbers.items() if x is not None}
    write_json(directory / SETTINGS, {name: getattr(dictionary, name) for name in SAID})
    shapes = {name: value.shape for name, value in numbers.items()}
    safetensors.write_file(directory / FILE, shapes, "float32", iter(numbers.items()))
    return directory / FILE


def load(directory: str | os.PathLike[str]) -> Dictionary:
    """The dictionary that a run of `configs/interpret/transcoder.py` wrote into `directory`.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    directory = pathlib.Path(directory).expanduser()
    check(
        (directory / SETTINGS).is_file() and (directory / FILE).is_file(),
        f"{directory} holds no dictionary: train one there with configs/interpret/transcoder.py",
    )
    said, stored = read_json(directory / SETTINGS), safetensors.read_header(directory / FILE)
    missing = ({*NUMBERS} - {"W_skip"} - {*stored}) | ({*SAID} - {*said})
    check(not missing, f"{directory} holds a dictionary without {', '.join(sorted(missing))}")
    check_choice(f"{directory / SETTINGS}: kind", said["kind"], get_args(Kind))
    numbers = {name: jnp.asarray(stored[name].read()) for name in NUMBERS if name in stored}
    fields = {name: said[name] for name in SAID} | {"layers": tuple(said["layers"])}
    return Dictionary(**{"W_skip": None, **numbers}, **fields)

"""Lenses: what the model would say if it stopped after each layer; and maps of its stream.

All of them read the residual stream h_l, which stands in L + 1 places: the embedding and after each
block. With M_l and c_l of the lens, and the norm's statistics taken anew,

    logits_l = W_U · LN_f(M_l h_l + c_l) + b_U

logit lens     M = I, c = 0 (nostalgebraist 2020)
tuned lens     M and c trained, so that KL(last layer ‖ lens) is least (Belrose et al. 2023)
Jacobian lens  M_l = mean over tokens of ∂h_L/∂h_l at the token's own place, c = 0: what the later
               layers make of a small change, which is all they do where they are linear

What the head has besides (a soft cap, BERT's transform, an output scale) is honoured. After the
last block every lens says the model's own logits.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ConfigError, check
from lm.files import write_json
from lm.models import Model, bind
from lm.models.hooks import no_tap, reading
from lm.models.huggingface import safetensors
from lm.models.matmul import compute_dtype
from lm.parallel.sharding import ParamSpec
from lm.training.config import OptimizerConfig
from lm.training.optimizer import make_optimizer

FILE = "lens.safetensors"
_AT_ONCE = 64  # rows of Jacobians that are computed together
_HIGHEST = jax.lax.Precision.HIGHEST


class Lens(NamedTuple):
    """The affine map of each place's stream, float32; None in place of arrays: the logit lens."""

    matrix_LDD: Any = None  # [L + 1, D out, D in]
    bias_LD: Any = None

    def __call__(self, model: Model, x_LBTD: jax.Array) -> jax.Array:
        """Logits [L + 1, B, T, V] of the streams of all places (`streams`)."""
        return jax.lax.map(lambda each: unembed(model, _moved(*each)), (self._filled(x_LBTD)))

    def _filled(self, x_LBTD):
        places, width = x_LBTD.shape[0], x_LBTD.shape[-1]
        matrix_LDD, bias_LD = self
        if matrix_LDD is None:
            matrix_LDD = jnp.broadcast_to(jnp.eye(width), (places, width, width))
        if bias_LD is None:
            bias_LD = jnp.zeros((places, width))
        return x_LBTD, jnp.asarray(matrix_LDD), jnp.asarray(bias_LD)

    def save(self, directory: pathlib.Path, about: dict[str, Any]) -> None:
        """Writes `directory/lens.safetensors` and, with what the lens is of, `lens.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {k: np.asarray(v) for k, v in self._asdict().items() if v is not None}
        shapes = {name: array.shape for name, array in arrays.items()}
        safetensors.write_file(directory / FILE, shapes, "float32", iter(arrays.items()))
        write_json(directory / "lens.json", about)

    @classmethod
    def load(cls, directory: pathlib.Path, model: Model) -> Lens:
        """A lens that was saved.

        Raises:
          ConfigError: it is not there, or is that of a model of another size.
        """
        check((directory / FILE).is_file(), f"{directory} holds no lens: {FILE} is not there")
        stored = safetensors.read_header(directory / FILE)
        known = set(stored) <= set(cls._fields) and "matrix_LDD" in stored
        check(known, f"{directory / FILE} is no lens: it holds {', '.join(stored) or 'nothing'}")
        shape, width = stored["matrix_LDD"].shape, model.config.width
        wanted = (model.config.num_layers + 1, width, width)
        check(shape == wanted, f"{directory / FILE} has maps of {shape}; this model's are {wanted}")
        return cls(**{name: jnp.asarray(one.read()) for name, one in stored.items()})


def _moved(x_BTD, matrix_DD, bias_D):
    moved = jnp.einsum("btd,ed->bte", x_BTD, matrix_DD, precision=_HIGHEST) + bias_D
    return moved.astype(x_BTD.dtype)


def readable(model: Model) -> None:
    """Raises `ConfigError` unless the model has one stack of blocks with a stream, and a head."""
    config = model.config
    check(
        config.cell == "attention" and config.architecture != "encoder_decoder",
        f"a model with cell={config.cell!r}, architecture={config.architecture!r} has no single "
        "residual stream from embedding to logits: give a decoder or an encoder",
    )
    check(
        config.table_width == config.width,
        f"a model with embedding_width={config.embedding_width} in a stream of {config.width}: its "
        "head does not read the stream",
    )
    check(config.has_output_head, "a model without an output head has no logits for a lens to read")


def places(model: Model) -> list[str]:
    """The names of the streams that lenses read: of the embedding, and after each block."""
    return ["embedding", *(f"blocks.{i}.residual_after" for i in range(model.config.num_layers))]


def streams(model: Model, tokens_BT: jax.Array, **fields: jax.Array) -> jax.Array:
    """The residual stream in all `places` of a bound model, [L + 1, B, T, D]."""
    found, wanted = {}, places(model)
    model.hidden(tokens_BT, tap=reading(found, wanted.__contains__), **fields)
    return jnp.stack([found[name] for name in wanted])


def unembed(model: Model, x_BTD: jax.Array) -> jax.Array:
    """W_U · LN_f(x) + b_U of any residual stream, as the model does to its last: [B, T, V]."""
    if hasattr(model, "final_norm"):
        dtype = compute_dtype(model.config.compute_dtype)
        x_BTD = model.final_norm(x_BTD, no_tap).astype(dtype)
    return model.unembed(x_BTD)


def divergences(model: Model, lens: Lens, x_LBTD: jax.Array) -> jax.Array:
    """KL(last layer ‖ lens) of each place, nats, mean over tokens: [L + 1]. Differentiable."""
    last_BTV = jax.nn.log_softmax(unembed(model, x_LBTD[-1]))

    @jax.checkpoint  # logits of one place at a time
    def divergence(each):
        here_BTV = jax.nn.log_softmax(unembed(model, _moved(*each)))
        return jnp.sum(jnp.exp(last_BTV) * (last_BTV - here_BTV), -1).mean()

    return jax.lax.map(divergence, lens._filled(x_LBTD))


def train_tuned(
    skeleton: Model,
    params: dict[str, jax.Array],
    rows_NT: np.ndarray,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Lens, list[float]]:
    """A tuned lens (Belrose et al. 2023, §3), from the identity on, by AdamW.

    Args:
      skeleton, params: the model, which stays as it is.
      rows_NT: texts as rows of token ids; batches are drawn from them.
      steps, batch_size, learning_rate, seed: of the training; the rate falls to 0 by a cosine.

    Returns:
      The lens, and the loss of each step: KL, mean over tokens and places, in nats.
    """
    readable(skeleton)
    layers, width = skeleton.config.num_layers, skeleton.config.width
    # After the last block it stays the identity: the loss there is none, its gradient noise.
    specs = {
        "shift": ParamSpec((layers, width, width), ("layers", "embed", None), None),
        "bias": ParamSpec((layers, width), ("layers", "embed"), None),
    }
    settings = OptimizerConfig(
        learning_rate=learning_rate, weight_decay=0.0, b2=0.999, final_fraction=0.0
    )
    optimizer = make_optimizer(settings, steps, specs)

    def loss(lens, model, x_LBTD):
        return divergences(model, _whole(lens), x_LBTD)[:-1].mean()

    @jax.jit
    def step(params, lens, state, tokens_BT):
        model = bind(skeleton, params)
        x_LBTD = streams(model, tokens_BT)
        value, gradient = jax.value_and_grad(loss)(lens, model, x_LBTD)
        updates, state = optimizer.update(gradient, state, lens)
        return {name: lens[name] + updates[name] for name in lens}, state, value

    lens = {name: jnp.zeros(spec.shape) for name, spec in specs.items()}
    state, losses, rng = optimizer.init(lens), [], np.random.default_rng(seed)
    for _ in range(steps):
        batch_BT = rows_NT[rng.integers(len(rows_NT), size=batch_size)]
        lens, state, value = step(params, lens, state, batch_BT)
        losses.append(value)
    return _whole(lens), [float(value) for value in losses]


def _whole(lens: dict[str, jax.Array]) -> Lens:
    """The lens of trained shifts from the identity, which the last place has itself."""
    shift_LDD = jnp.pad(lens["shift"], ((0, 1), (0, 0), (0, 0)))
    return Lens(jnp.eye(shift_LDD.shape[-1]) + shift_LDD, jnp.pad(lens["bias"], ((0, 1), (0, 0))))


def jacobian(
    skeleton: Model, params: dict[str, jax.Array], rows_NT: np.ndarray, seed: int = 0, batch=8
) -> Lens:
    """The Jacobian lens, from the Jacobian at one place of each row, which is drawn.

    ∂h_L/∂h_l is exact there, with the norms, attention and MLPs as they are for this text; what a
    token does to those after it is not in it. As many backward passes as the model is wide.
    """
    readable(skeleton)
    names, width = places(skeleton), skeleton.config.width

    @jax.jit
    def of(params, tokens_BT, place_B):
        model, rows = bind(skeleton, params), jnp.arange(len(place_B))

        def last_BD(change_LBD):
            found = {}

            def tap(name, x_BTD):
                if name in names:
                    change_BD = change_LBD[names.index(name)].astype(x_BTD.dtype)
                    x_BTD = x_BTD.at[rows, place_B].add(change_BD)
                    found[name] = x_BTD
                return x_BTD

            model.hidden(tokens_BT, tap=tap)
            return found[names[-1]][rows, place_B].astype(jnp.float32)

        start = jnp.zeros((len(names), len(place_B), width))
        backward = jax.vjp(last_BD, start)[1]

        def row(one_D):
            return backward(jnp.broadcast_to(one_D, (len(place_B), width)))[0].mean(1)

        rows_DLD = jax.lax.map(row, jnp.eye(width), batch_size=min(_AT_ONCE, width))
        return rows_DLD.swapaxes(0, 1)

    rng, parts = np.random.default_rng(seed), []
    batch = min(batch, len(rows_NT))
    for first in range(0, len(rows_NT) - batch + 1, batch):
        tokens_BT = rows_NT[first : first + batch]
        parts.append(of(params, tokens_BT, rng.integers(tokens_BT.shape[1], size=batch)))
    return Lens(functools.reduce(jnp.add, parts) / len(parts))


def rows_of(texts: Sequence[Sequence[int]], length: int, between: int | None) -> np.ndarray:
    """Texts one after the other, cut into rows [N, T] of `length` tokens.

    Raises:
      ConfigError: they have fewer tokens than one row.
    """
    joined: list[int] = []
    for ids in texts:
        joined += [*ids, *([] if between is None else [between])]
    number = len(joined) // length
    if not number:
        raise ConfigError(f"the texts have {len(joined)} tokens, fewer than a row of {length}")
    return np.array(joined[: number * length], np.int32).reshape(number, length)


def stream_maps(model: Model, tokens_BT: jax.Array, **fields: jax.Array) -> dict[str, jax.Array]:
    """Sizes and directions along the residual stream.

    Returns:
      norm: ‖h_l‖ [L + 1, B, T]; to_last, to_next: cosines of h_l with the last stream [L + 1, B, T]
      and with the next [L, B, T]; attention, mlp: norms of what each block's writes [L, B, T], and
      attention_cosine, mlp_cosine: their cosines with the stream they came upon. Of a sublayer
      that is not there: 0.
    """
    found: dict[str, jax.Array] = {}
    wanted = ("embedding", "residual_before", "residual_middle", "residual_after", "output")
    tap = reading(found, lambda name: name.rsplit(".", 1)[-1] in wanted)
    model.hidden(tokens_BT, tap=tap, **fields)
    x_LBTD = jnp.stack([found[name] for name in places(model)]).astype(jnp.float32)
    maps = {
        "norm": jnp.linalg.norm(x_LBTD, axis=-1),
        "to_last": _cosine(x_LBTD, x_LBTD[-1]),
        "to_next": _cosine(x_LBTD[:-1], x_LBTD[1:]),
    }
    for part, before in (("attention", "residual_before"), ("mlp", "residual_middle")):
        written, met = [], []
        for i in range(model.config.num_layers):
            at = found[f"blocks.{i}.residual_before"]
            met.append(found.get(f"blocks.{i}.{before}", at))
            post = f"blocks.{i}.{part}_post_norm.output"
            plain = found.get(f"blocks.{i}.{part}.output", jnp.zeros_like(at))
            written.append(found.get(post, plain))
        maps[part] = jnp.linalg.norm(jnp.stack(written).astype(jnp.float32), axis=-1)
        maps[f"{part}_cosine"] = _cosine(jnp.stack(written), jnp.stack(met))
    return maps


def _cosine(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    over = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, -1) / jnp.where(over == 0, 1, over)

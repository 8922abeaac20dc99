"""Recurrent cells, and the loop that runs a layer of them along time.

    rnn   h = tanh(x·W + h·U + b)                                              (Elman 1990)
    gru   h = z ⊙ h + (1 - z) ⊙ tanh(x·W + b + r ⊙ (h·U + c))                  (Cho et al. 2014)
    lstm  c = f ⊙ c + i ⊙ tanh(x·W + h·U + b),  h = o ⊙ tanh(c)   (Hochreiter & Schmidhuber 1997;
          forget gates by Gers et al. 2000, their bias starts at 1)

with gates r, z, i, f, o each a sigmoid of its own x·W + h·U + b. The GRU resets after the matrix
product, as cuDNN and PyTorch do; Cho et al. reset before it, which takes a second product a token.

Everything is time-major, [T, B, …]. What a token brings to the gates is one product for all tokens
at once; only the product with the state waits in the loop.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.layers import dropout, weight_initializer
from lm.models.matmul import add_bias, cheap, compute_dtype, contract, masked_softmax
from lm.models.params import declare, stack, unstack
from lm.parallel.sharding import constrain

State = tuple[jax.Array, ...]  # (hidden,), and for an LSTM (hidden, memory); float32

# ---- Cells -----------------------------------------------------------------------------------
# What input and bias bring, [B, G, D]; what the state brings, [B, U, D]; the state before. They
# return the state after, and the gates, for taps.


def _rnn(p, u, state: State) -> tuple[State, State]:
    hidden = jnp.tanh(p[:, 0] + u[:, 0])
    return (hidden,), ()


def _gru(p, u, state: State) -> tuple[State, State]:
    reset, update = jax.nn.sigmoid(p[:, 0] + u[:, 0]), jax.nn.sigmoid(p[:, 1] + u[:, 1])
    candidate = jnp.tanh(p[:, 2] + reset * (p[:, 3] + u[:, 2]))
    return (update * state[0] + (1 - update) * candidate,), (reset, update)


def _lstm(p, u, state: State) -> tuple[State, State]:
    inward, forget, candidate, outward = (p[:, i] + u[:, i] for i in range(4))
    inward, forget, outward = map(jax.nn.sigmoid, (inward, forget, outward))
    memory = forget * state[1] + inward * jnp.tanh(candidate)
    return (outward * jnp.tanh(memory), memory), (inward, forget, outward)


class Kind(NamedTuple):
    """How many states a cell has, and how its gates are laid out."""

    step: Any
    states: int
    inputs: int  # products with the input
    biases: int  # a GRU has one more, which the reset gate scales
    from_state: tuple[int, ...]  # which of the latter the products with the state add to


KINDS = {
    "rnn": Kind(_rnn, 1, 1, 1, (0,)),
    "gru": Kind(_gru, 1, 3, 4, (0, 1, 3)),
    "lstm": Kind(_lstm, 2, 4, 4, (0, 1, 2, 3)),
}


# ---- The loop over time ----------------------------------------------------------------------


class Scan(NamedTuple):
    """What the loop over time is compiled for."""

    cell: str
    dtype: jnp.dtype
    backwards: bool = False
    watched: bool = False  # whether a tap wants the gates


class Boundaries(NamedTuple):
    """Which tokens change the state, and before which it starts anew; None: all, and none."""

    live_TB1: jax.Array | None = None
    restart_TB1: jax.Array | None = None


class Annotations(NamedTuple):
    """What additive attention reads: the encoder's output, and its keys, made once."""

    query_DD: jax.Array
    score_D: jax.Array
    keys_BSD: jax.Array
    values_BSD: jax.Array
    mask_TBS: jax.Array | None


class Passed(NamedTuple):
    """What the loop leaves behind, each [T, B, …]."""

    states: State
    read: jax.Array  # the hidden state that each token's products read
    gates: State
    context: jax.Array | None
    pattern: jax.Array | None


def _loop(loop: Scan, weights, projected_TBGD, start: State, rest) -> Passed:
    kind, restarts, (boundaries, starts, annotations) = KINDS[loop.cell], None, rest
    # Whole on every device: a loop that moves parts of them at every token would only move them.
    weights = {n: constrain(w.astype(loop.dtype), None, None, None) for n, w in weights.items()}
    if boundaries.restart_TB1 is not None:
        restarts = starts or jax.tree.map(lambda s: jnp.zeros((), s.dtype), start)
    scanned_starts = restarts if starts else None

    def step(state: State, now):
        p, live, restart, fresh, mask = now
        if restart is not None:
            fresh = fresh or restarts
            state = tuple(jnp.where(restart, f, s) for f, s in zip(fresh, state))
        read, context, pattern = state[0].astype(loop.dtype), None, None
        if annotations is not None:
            context, pattern = _look_back(read, annotations, mask)
            p = p + _spread(kind, contract("bd,dge->bge", context, weights["context"], jnp.float32))
        u = contract("bd,dge->bge", read, weights["state"], jnp.float32)
        after, gates = kind.step(p, u, state)
        if live is not None:
            after = tuple(jnp.where(live, a, s) for a, s in zip(after, state))
        gates = gates if loop.watched else ()
        return after, Passed(after, read, gates, context, pattern)

    mask_TBS = None if annotations is None else annotations.mask_TBS
    now = (projected_TBGD, boundaries.live_TB1, boundaries.restart_TB1, scanned_starts, mask_TBS)
    return jax.lax.scan(step, start, now, reverse=loop.backwards)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def through_time(loop: Scan, weights, projected_TBGD, start: State, rest) -> Passed:
    """Runs the cells along the first axis.

    The gradient of the weights in the loop is one product for all tokens, after the loop, where
    plain autodiff would add to it at every token.

    Args:
      weights: `state` [D, U, D] and, with attention, `context` [D, I, D], float32.
      projected_TBGD: what input and bias bring to the gates, float32.
      start: the state before the first token, each [B, D].
      rest: `Boundaries`, the states [T, B, D] to restart from (None: zeros), and `Annotations`.
    """
    return _loop(loop, weights, projected_TBGD, start, rest)


def _through_time_forward(loop, weights, projected_TBGD, start, rest):
    passed, pull = jax.vjp(functools.partial(_loop, loop, weights), projected_TBGD, start, rest)
    return passed, (pull, passed.read, passed.context)


def _through_time_backward(loop, saved, gradient):
    pull, read_TBD, context_TBD = saved
    dprojected, dstart, drest = pull(gradient)
    kind, dgates = KINDS[loop.cell], dprojected.astype(loop.dtype)
    spec, parts = "tbd,tbge->dge", jnp.array(kind.from_state)
    dweights = {"state": contract(spec, read_TBD, dgates[:, :, parts], jnp.float32)}
    if context_TBD is not None:
        inputs = dgates[:, :, : kind.inputs]
        dweights["context"] = contract(spec, context_TBD, inputs, jnp.float32)
    return dweights, dprojected, dstart, drest


through_time.defvjp(_through_time_forward, _through_time_backward)


def _spread(kind: Kind, x: jax.Array) -> jax.Array:
    """[…, I, D] as […, G, D]: a GRU's last bias gets nothing from the input."""
    widths = [(0, 0)] * (x.ndim - 2) + [(0, kind.biases - kind.inputs), (0, 0)]
    return jnp.pad(x, widths) if kind.biases > kind.inputs else x


def _look_back(hidden_BD: jax.Array, annotations: Annotations, mask_BS: jax.Array | None):
    """Bahdanau et al. 2015, §3.1: weights softmax(v·tanh(h·W + keys)), and the mean they give."""

    @cheap  # what tanh makes is as large as the encoder's output, for every target token
    def scores(query_BD, keys_BSD, score_D):
        return jnp.tanh(query_BD[:, None] + keys_BSD.astype(jnp.float32)) @ score_D

    query_BD = contract("bd,de->be", hidden_BD, annotations.query_DD, jnp.float32)
    scores_BS = scores(query_BD, annotations.keys_BSD, annotations.score_D)
    mask_BS = jnp.ones((1, 1), bool) if mask_BS is None else mask_BS
    pattern_BS = masked_softmax(scores_BS, mask_BS, hidden_BD.dtype)
    return contract("bs,bsd->bd", pattern_BS, annotations.values_BSD), pattern_BS


def boundaries(segments_BT: jax.Array | None, backwards: bool = False) -> Boundaries:
    """Where the state changes and restarts, read in either direction, along segment ids.

    Padding (segment 0) changes nothing: the segment goes on behind it.
    """
    if segments_BT is None:
        return Boundaries()
    order = segments_BT[:, ::-1] if backwards else segments_BT
    live = order != 0
    latest = jax.lax.cummax(jnp.where(live, jnp.arange(order.shape[1]), -1), 1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(order, jnp.maximum(before, 0), 1)
    restart = live & ((before < 0) | (order != previous))
    if backwards:
        live, restart = live[:, ::-1], restart[:, ::-1]
    return Boundaries(live.T[..., None], restart.T[..., None])


# ---- A layer ---------------------------------------------------------------------------------


class Cells(nnx.Module):
    """One layer of `hidden` cells that reads in one direction.

    Args:
      attends: whether they also read what attention found.
      started_by: size of the vector they make their first state of; 0: it is given to them.
    """

    def __init__(
        self, config: ModelConfig, hidden: int, attends: bool = False, started_by: int = 0
    ):
        D, H, kind = config.width, hidden, KINDS[config.cell]
        self.config, axes = config, ("embed", None, "mlp")
        inward = weight_initializer(config, D, H)
        self.input = declare((D, kind.inputs, H), axes, inward)
        self.state = declare((H, kind.inputs, H), axes, weight_initializer(config, H, H))
        self.bias = declare((kind.biases * H,), ("mlp",), _bias_initializer(config.cell))
        if attends:
            self.context = declare((D, kind.inputs, H), axes, inward)
        if started_by:
            initializer = weight_initializer(config, started_by, H)
            self.start = declare((started_by, H), ("embed", "mlp"), initializer)
            self.start_bias = declare((H,), ("mlp",), jax.nn.initializers.zeros)

    def __call__(
        self,
        x_TBD: jax.Array,
        start: State,
        boundaries: Boundaries,
        starts: State | None = None,
        annotations: Annotations | None = None,
        *,
        context_TBD: jax.Array | None = None,
        backwards: bool = False,
        tap: Tap = no_tap,
    ) -> Passed:
        """Runs the layer on `x_TBD`; see `through_time`.

        `context_TBD` is what a lower layer's attention found, instead of `annotations`; read
        `backwards`, the last token comes first.
        """
        kind, dtype = KINDS[self.config.cell], compute_dtype(self.config.compute_dtype)
        p = contract("tbd,dge->tbge", x_TBD, self.input[...], jnp.float32)
        weights = {"state": self.state[...]}
        if context_TBD is not None:
            p += contract("tbd,dge->tbge", context_TBD, self.context[...], jnp.float32)
        elif annotations is not None:
            weights["context"] = self.context[...]
        p = add_bias(_spread(kind, p), self.bias[...].reshape(kind.biases, -1))
        p = tapped(tap, "projected", constrain(p, None, "batch", None, None))
        start = tuple(constrain(state, "batch", None) for state in start)
        loop = Scan(self.config.cell, dtype, backwards, tap is not no_tap)
        passed = through_time(loop, weights, p, start, (boundaries, starts, annotations))
        if tap is not no_tap:
            if passed.gates:
                tapped(tap, "gates", jnp.stack(passed.gates, 2))
            if passed.pattern is not None:
                tapped(tap, "attention.pattern", passed.pattern)
            for extra in passed.states[1:]:
                tapped(tap, "memory", extra)
        hidden = tapped(tap, "state", constrain(passed.states[0], None, "batch", None))
        passed = passed._replace(states=(hidden, *passed.states[1:]))
        if passed.context is None:
            return passed
        return passed._replace(context=constrain(passed.context, None, "batch", None))

    def first_state(self, x: jax.Array) -> State:
        """The state that the vector [n, E] starts, each [n, H] (Bahdanau et al. 2015, A.2.2)."""
        made = contract("ne,eh->nh", x, self.start[...], jnp.float32)
        hidden = jnp.tanh(add_bias(made, self.start_bias[...]))
        return (hidden,) + (jnp.zeros_like(hidden),) * (KINDS[self.config.cell].states - 1)


def _bias_initializer(cell: str):
    def initializer(key, shape, dtype):
        bias = jnp.zeros(shape, dtype)
        quarter = shape[-1] // 4
        # A cell that starts by remembering has a gradient to learn from (Gers et al. 2000).
        return bias.at[quarter : 2 * quarter].set(1) if cell == "lstm" else bias

    return initializer


def tapped(tap: Tap, name: str, x_TB: jax.Array) -> jax.Array:
    """`tap` sees batch-major values."""
    return x_TB if tap is no_tap else tap(name, x_TB.swapaxes(0, 1)).swapaxes(0, 1)


def zeros(config: ModelConfig, *shape: int) -> State:
    """A state of zeros."""
    return (jnp.zeros(shape, jnp.float32),) * KINDS[config.cell].states


class Noise(NamedTuple):
    """What dropout is a function of: a key, and the number of each row in the whole batch."""

    key: jax.Array
    rows_B: jax.Array


def drop_between(
    x_TBD: jax.Array, config: ModelConfig, noise: Noise | None, index: int
) -> jax.Array:
    """Dropout between layers alone, never along time (Zaremba et al. 2014)."""
    if noise is None or not config.dropout:
        return x_TBD
    key = jax.random.fold_in(noise.key, index)
    return dropout(x_TBD, config.dropout, key, noise.rows_B, jnp.arange(x_TBD.shape[0])[:, None])


# ---- The encoder -----------------------------------------------------------------------------


class EncoderLayer(nnx.Module):
    """Cells that read backwards and, where attention follows, as many again that read forwards."""

    def __init__(self, config: ModelConfig):
        both = config.cross_attention
        hidden = config.width // 2 if both else config.width
        self.backward = Cells(config, hidden)
        if both:
            self.forward = Cells(config, hidden)


class Encoder(nnx.Module):
    """The encoder's layers; the token embedding is the decoder's."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.blocks = stack(EncoderLayer(config), config.encoder_layers)

    def run(
        self, x_SBD: jax.Array, segments_BS, noise: Noise | None, tap: Tap
    ) -> tuple[jax.Array, list[State]]:
        """The top layer's output, and the states of every layer's backward cells, [S, B, …]."""
        config, finals = self.config, []
        for index, layer in enumerate(unstack(self.blocks, config.encoder_layers)):
            x_SBD, outputs = drop_between(x_SBD, config, noise, index), []
            for name in ("forward", "backward"):
                if not hasattr(layer, name):
                    continue
                cells, backwards = getattr(layer, name), name == "backward"
                passed = cells(
                    x_SBD,
                    zeros(config, x_SBD.shape[1], cells.state.shape[0]),
                    boundaries(segments_BS, backwards),
                    backwards=backwards,
                    tap=within(tap, f"blocks.{index}.{name}"),
                )
                outputs.append(passed.states[0].astype(x_SBD.dtype))
            finals.append(passed.states)
            x_SBD = constrain(jnp.concatenate(outputs, -1), None, "batch", None)
        return x_SBD, finals

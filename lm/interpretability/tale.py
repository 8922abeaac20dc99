"""One token's tale: what becomes of it between the text and the next token, and the way back.

A token is an id, a row of the embedding, a place; then a residual stream that every block reads and
adds to: heads by reading other tokens' streams, the MLP by its neurons. The stream after the last
block is normed and multiplied into logits. Backwards, the loss of the next token has a gradient in
every stream and, in the end, in the row it all began with. All of it here is of one forward and one
backward pass, in float32.

What a write says is its *direct* effect: what it adds to each logit, the final norm's scale held
(`lm.interpretability.attribution`); what a stream says is the logit lens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ConfigError, check
from lm.interpretability.attribution import direct_logit_attribution, held
from lm.interpretability.lenses import readable, unembed
from lm.models import Model, bind, skeleton
from lm.models.activations import trace
from lm.models.layers import MLP

SAID, PROMOTED, NEURONS, NEIGHBOURS, LOGITS = 5, 3, 5, 8, 10  # how many are told of each


class Likely(NamedTuple):
    """Tokens in order of a score: probabilities, cosines, or what is added to a logit."""

    ids: list[int]
    scores: list[float]


@dataclasses.dataclass(frozen=True)
class Head:
    """What a head took: `pattern` over the tokens, the norm of its write, and what that says."""

    pattern: list[float]
    wrote: float
    promotes: Likely


@dataclasses.dataclass(frozen=True)
class Neuron:
    """A unit of an MLP: its value, the norm of what it wrote, and what that says."""

    number: int
    value: float
    wrote: float
    promotes: Likely


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block.

    Attributes:
      before, after: norms of the stream; `cosine` between the two.
      attention_gain, mlp_gain: what the norms before them multiply by, 1/√(variance + ε), if any.
      heads; attention_wrote: each head, and the norm of what attention wrote.
      neurons: the MLP's, those that wrote most; `mlp_wrote` its norm, `active` the share above 0.
      experts: those that were chosen, by number, with their weights, where there are some.
      says: what the stream after the block says (logit lens).
    """

    before: float
    after: float
    cosine: float
    attention_gain: float | None
    mlp_gain: float | None
    heads: list[Head]
    attention_wrote: float
    neurons: list[Neuron]
    mlp_wrote: float | None
    active: float | None
    experts: list[tuple[int, float]]
    says: Likely


@dataclasses.dataclass(frozen=True)
class Tale:
    """All of it.

    Attributes:
      ids, place, target: the prompt, which of its tokens the tale is of, and what is to come next.
      given: whether the prompt says what comes next; else it is what the model chose.
      row, neighbours: the norm of the embedding's row, and the rows nearest to it by cosine.
      position, position_cosine: the norm of what its place adds, and its cosine with the row; None
        where places are not added.
      streams: the residual stream [2L + 1, D], or L + 1 where attention and MLP act at once.
      stream_names: what each of them is after.
      layers, final_gain.
      logits: the likeliest next tokens; `logit`, `loss` of the target, in nats, and `entropy`.
      parts: name → what it added to the target's logit before a soft cap; with `parts_sum`, their
        sum; empty where the streams are no sum (post-norm).
      back: the norms of the loss's gradient by the streams, [L + 1, T]: after the embedding, and
        after each block, at each token.
      row_gradient, read_gradient: norms of the gradient by the row, and of the part of it that came
        through its being read (the rest, where the head is tied, through its being predicted).
      moved: towards which rows a step against the gradient moves it.
    """

    ids: list[int]
    place: int
    target: int
    given: bool
    row: float
    neighbours: Likely
    position: float | None
    position_cosine: float | None
    streams: np.ndarray
    stream_names: list[str]
    layers: list[Layer]
    final_gain: float | None
    logits: Likely
    logit: float
    loss: float
    entropy: float
    parts: dict[str, float]
    parts_sum: float
    back: np.ndarray
    row_gradient: float
    read_gradient: float
    moved: Likely


def tell(of: Model, params: Mapping[str, jax.Array], ids: Sequence[int], place: int = -1) -> Tale:
    """The tale of the token at `place` of `ids`.

    Args:
      of, params: the skeleton of a decoder, and its parameters.

    Raises:
      ConfigError: a model without attention, or without a head, or that is no decoder; or there is
        no such place.
    """
    readable(of)
    check(of.config.architecture == "decoder", "a tale is of a decoder, which says what comes next")
    check(-len(ids) <= place < len(ids), f"place={place} is not one of the prompt's {len(ids)}")
    place %= len(ids)
    of = skeleton(dataclasses.replace(of.config, compute_dtype="float32", quantization="none"))
    tokens_1T = jnp.asarray([ids], jnp.int32)
    forward = jax.jit(lambda params: _forward(bind(of, params), tokens_1T, place))
    seen = jax.tree.map(np.asarray, forward(params))
    chosen = int(seen["logits"].ids[0])
    given = place + 1 < len(ids)
    target = ids[place + 1] if given else chosen
    backward = jax.jit(lambda params: _backward(of, params, tokens_1T, place, target))
    back = jax.tree.map(np.asarray, backward(params))
    parts = _parts(of, params, tokens_1T, place, target)
    logp_V = seen["log_probabilities"]
    return Tale(
        ids=list(ids),
        place=place,
        target=target,
        given=given,
        layers=[_layer(one) for one in seen["layers"]],
        neighbours=_likely(_without(ids[place], seen["neighbours"])),
        logits=_likely(seen["logits"]),
        logit=float(seen["raw"][target]),
        loss=float(-logp_V[target]),
        entropy=float(-np.sum(np.exp(logp_V) * np.where(np.isfinite(logp_V), logp_V, 0))),
        parts=parts,
        parts_sum=float(sum(parts.values())),
        streams=seen["streams"],
        stream_names=_stream_names(of),
        **{name: _number(seen[name]) for name in ("row", "position", "position_cosine")},
        final_gain=_number(seen["final_gain"]),
        back=back["back"],
        row_gradient=float(back["row"]),
        read_gradient=float(back["read"]),
        moved=_likely(_without(ids[place], back["moved"])),
    )


def _forward(model: Model, tokens_1T, place: int) -> dict:
    found = trace(model, tokens_1T, names="*")
    at = {name: value[0, place].astype(jnp.float32) for name, value in found.items()}
    table_VD = model.embedding.tokens[...].astype(jnp.float32)
    row_D = table_VD[tokens_1T[0, place]]
    position_D = at.get("embedding.positions")
    layers, streams = [], [at["embedding"]]
    for index, block in enumerate(model.each_block()):
        name = f"blocks.{index}"
        layers.append(_of_block(model, block, name, found, at, place))
        streams += [
            at[f"{name}.{s}"] for s in ("residual_middle", "residual_after") if f"{name}.{s}" in at
        ]
    logp_V = jax.nn.log_softmax(at["logits"])
    top = jax.lax.top_k(logp_V, min(LOGITS, len(logp_V)))
    return {
        "row": jnp.linalg.norm(row_D),
        "neighbours": _nearest(table_VD, row_D),
        "position": None if position_D is None else jnp.linalg.norm(position_D),
        "position_cosine": None if position_D is None else _cosine(position_D, row_D),
        "layers": layers,
        "streams": jnp.stack(streams),
        "final_gain": at.get("final_norm.inverse_scale"),
        "logits": Likely(top[1], jnp.exp(top[0])),
        "raw": at["logits"],
        "log_probabilities": logp_V,
    }


def _of_block(model: Model, block, name: str, found, at, place: int) -> dict:
    before_D, after_D = at[f"{name}.residual_before"], at[f"{name}.residual_after"]
    pattern_HT = found[f"{name}.attention.pattern"][0, :, place].astype(jnp.float32)
    output_HCD = block.attention.output[...].astype(jnp.float32)
    wrote_HD = jnp.einsum("hc,hcd->hd", at[f"{name}.attention.heads"], output_HCD)
    wrote_HD = _through(
        getattr(block, "attention_post_norm", None), wrote_HD, at, name + ".attention_post_norm"
    )
    here = {
        "before": jnp.linalg.norm(before_D),
        "after": jnp.linalg.norm(after_D),
        "cosine": _cosine(before_D, after_D),
        "attention_gain": at.get(f"{name}.attention_norm.inverse_scale"),
        "mlp_gain": at.get(f"{name}.mlp_norm.inverse_scale"),
        "pattern": pattern_HT,
        "wrote": jnp.linalg.norm(wrote_HD, axis=-1),
        "promotes": _promoted(model, wrote_HD, at),
        "attention_wrote": jnp.linalg.norm(_written(at, name, "attention")),
        "mlp_wrote": None,
        "neurons": None,
        "active": None,
        "experts": None,
    }
    x_11D = after_D[None, None]
    says = jax.nn.log_softmax(unembed(model, x_11D)[0, 0])
    top = jax.lax.top_k(says, SAID)
    here["says"] = Likely(top[1], jnp.exp(top[0]))
    if f"{name}.mlp.output" in at:
        here["mlp_wrote"] = jnp.linalg.norm(_written(at, name, "mlp"))
    if f"{name}.mlp.chosen" in at:
        here["experts"] = at[f"{name}.mlp.chosen"], at[f"{name}.mlp.weights"]
    if isinstance(getattr(block, "mlp", None), MLP):
        hidden_F, down_FD = at[f"{name}.mlp.hidden"], block.mlp.down[...].astype(jnp.float32)
        sizes_F = jnp.abs(hidden_F) * jnp.linalg.norm(down_FD, axis=-1)
        _, most = jax.lax.top_k(sizes_F, min(NEURONS, len(sizes_F)))
        wrote_ND = hidden_F[most, None] * down_FD[most]
        wrote_ND = _through(
            getattr(block, "mlp_post_norm", None), wrote_ND, at, name + ".mlp_post_norm"
        )
        promotes = _promoted(model, wrote_ND, at)
        here["neurons"] = most, hidden_F[most], jnp.linalg.norm(wrote_ND, axis=-1), promotes
        here["active"] = jnp.mean(hidden_F > 0)
    return here


def _written(at, name: str, part: str):
    """What a sublayer added to the stream, after a norm of its own where there is one."""
    return at.get(f"{name}.{part}_post_norm.output", at[f"{name}.{part}.output"])


def _through(norm, wrote_xD, at, name: str):
    """What becomes of a part of what a norm reads, its scale held."""
    return wrote_xD if norm is None else held(norm, wrote_xD, at[f"{name}.inverse_scale"])


def _promoted(model: Model, wrote_xD, at) -> Likely:
    """The tokens to whose logits each write adds most, and how much."""
    read_xD = _through(getattr(model, "final_norm", None), wrote_xD, at, "final_norm")
    scale = model.config.output_scale or model.config.width**-0.5
    added_xV = scale * read_xD @ model.output_weights().astype(jnp.float32).T
    scores, ids = jax.lax.top_k(added_xV, PROMOTED)
    return Likely(ids, scores)


def _backward(of: Model, params, tokens_1T, place: int, target: int) -> dict:
    names = ["embedding", *(f"blocks.{i}.residual_after" for i in range(of.config.num_layers))]
    shape = (1, tokens_1T.shape[1], of.config.width)
    table = params["embedding.tokens"]

    def loss(changes, read, table):
        model = bind(of, {**params, "embedding.tokens": table})
        edits = {name: lambda x, c=c: x + c for name, c in changes.items()}
        edits["embedding.tokens"] = lambda x: x + read
        logits = trace(model, tokens_1T, names="logits", edits=edits)["logits"][0, place]
        return -jax.nn.log_softmax(logits)[target]

    zeros = {name: jnp.zeros(shape) for name in names}
    grads, read_1TD, table_VD = jax.grad(loss, (0, 1, 2))(zeros, jnp.zeros(shape), table)
    own = tokens_1T[0, place]
    scale = of.config.embedding_scale or of.config.width**0.5
    read_D = scale * jnp.sum(read_1TD[0] * (tokens_1T[0] == own)[:, None], 0)
    return {
        "back": jnp.stack([jnp.linalg.norm(grads[name][0], axis=-1) for name in names]),
        "row": jnp.linalg.norm(table_VD[own]),
        "read": jnp.linalg.norm(read_D),
        "moved": _nearest(table, -table_VD[own]),
    }


def _parts(of: Model, params, tokens_1T, place: int, target: int) -> dict[str, float]:
    def attributed(params):
        model = bind(of, params)
        return direct_logit_attribution(model, tokens_1T, jnp.array([target]), place=place)

    try:
        terms = jax.tree.map(np.asarray, jax.jit(attributed)(params))
    except ConfigError:  # of a post-norm stream no part is a term
        return {}
    split = [name for name in terms if name.startswith("embedding.")]
    found = {name.replace("embedding.", "embedding of "): terms[name] for name in split}
    found = found or {"embedding": terms["embedding"]}
    for layer in range(of.config.num_layers):
        for head, added in enumerate(terms["heads"][layer, 0]):
            found[f"head {layer}.{head}"] = added
        found[f"MLP {layer}"] = terms["mlp"][layer, 0]
    biases = terms["attention_bias"].sum() + terms["post_norm_bias"].sum()
    found["biases"] = biases + terms["norm_bias"][0] + terms["head_bias"][0]
    return {name: float(np.sum(value)) for name, value in found.items()}


def _nearest(table_VD, vector_D) -> Likely:
    sizes_V = jnp.linalg.norm(table_VD, axis=-1) * jnp.linalg.norm(vector_D)
    cosines_V = table_VD @ vector_D / jnp.where(sizes_V == 0, 1, sizes_V)
    scores, ids = jax.lax.top_k(cosines_V, min(NEIGHBOURS + 1, len(cosines_V)))
    return Likely(ids, scores)


def _cosine(a, b):
    return a @ b / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-30)


def _without(own: int, likely: Likely) -> Likely:
    kept = [(i, s) for i, s in zip(likely.ids, likely.scores) if i != own][:NEIGHBOURS]
    return Likely([i for i, _ in kept], [s for _, s in kept])


def _likely(likely: Likely, row: int | None = None) -> Likely:
    ids, scores = likely if row is None else (part[row] for part in likely)
    return Likely([int(i) for i in ids], [float(s) for s in scores])


def _number(value) -> float | None:
    return None if value is None else float(np.ravel(value)[0])


def _stream_names(of: Model) -> list[str]:
    found = ["embedding"]
    for layer in range(of.config.num_layers):
        parts = ("block",) if of.config.parallel else ("attention", "MLP")
        found += [f"{part} {layer}" for part in parts]
    return found


def _layer(seen: dict) -> Layer:
    heads = [
        Head(
            [float(w) for w in seen["pattern"][h]],
            float(seen["wrote"][h]),
            _likely(seen["promotes"], h),
        )
        for h in range(len(seen["wrote"]))
    ]
    neurons, experts = [], []
    if seen["neurons"] is not None:
        numbers, values, wrote, promotes = seen["neurons"]
        neurons = [
            Neuron(int(n), float(v), float(w), _likely(promotes, i))
            for i, (n, v, w) in enumerate(zip(numbers, values, wrote))
        ]
    if seen["experts"] is not None:
        experts = [(int(n), float(w)) for n, w in zip(*seen["experts"])]
    plain = ("before", "after", "cosine", "attention_gain", "mlp_gain", "attention_wrote",
             "mlp_wrote", "active")  # fmt: skip
    numbers = {name: _number(seen[name]) for name in plain}
    return Layer(
        **numbers, heads=heads, neurons=neurons, experts=experts, says=_likely(seen["says"])
    )

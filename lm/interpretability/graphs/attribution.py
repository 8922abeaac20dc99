"""Attribution graphs (Ameisen et al. 2025, "Circuit Tracing"): how much each node adds to another.

Nodes, in this order: active features by layer, position and number; errors by layer and position;
tokens; positions, where they are learned or sinusoidal; biases by layer, that of the output head
after the last, and position; logits. A row of the adjacency matrix is a target: what each source
adds, along all paths that no other feature stands on, to the pre-activation of a feature or to a
logit less the mean of all (before a soft cap). A row's sum is that value: positions and biases are
nodes so that nothing is missing, and `Graph.residual` shows how little is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check
from lm.interpretability.graphs.replacement import Local, Sources
from lm.models import bind
from lm.models.activations import trace

BATCH = 64  # targets whose gradients are taken together


class Node(NamedTuple):
    """One node of a graph."""

    kind: str  # feature, error, token, position, bias or logit
    layer: int  # of the model; -1: before the first, L: after the last
    position: int
    index: int  # of a feature among its layer's; a token's id; else -1


class Targets(NamedTuple):
    """What a graph explains: value = row · (what is read there) + constant."""

    read_M: np.ndarray  # index into `Local.reads`
    position_M: np.ndarray
    row_MD: np.ndarray
    constant_M: np.ndarray
    bias_M: np.ndarray  # the layer whose biases the constant is one of


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """An attribution graph of one prompt's last token.

    Attributes:
      tokens_T: the prompt.
      nodes: in the order of the adjacency matrix.
      adjacency: [n, n], targets in rows.
      values_n: a target's pre-activation or centred logit in the original model; 0 of other nodes.
      activation_n: what a feature says; 0 of other nodes.
      probability_n: of logits; 0 of other nodes.
    """

    tokens_T: np.ndarray
    nodes: tuple[Node, ...]
    adjacency: np.ndarray
    values_n: np.ndarray
    activation_n: np.ndarray
    probability_n: np.ndarray

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """[n] of the nodes' kinds."""
        return np.array([node.kind for node in self.nodes])

    @property
    def targets(self) -> np.ndarray:
        """The rows that are not empty: features and logits."""
        return np.flatnonzero((self.kinds == "feature") | (self.kinds == "logit"))

    @property
    def residual(self) -> np.ndarray:
        """[targets]: what the edges into each target leave unexplained of its value."""
        return self.values_n[self.targets] - self.adjacency[self.targets].sum(1)

    def find(self, kind: str, layer: int, position: int, index: int = -1) -> int:
        """The number of a node; raises KeyError."""
        return self._numbers[Node(kind, layer, position, index)]

    @functools.cached_property
    def _numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self.nodes)}


def attribute(local: Local, logits: Sequence[int] = (), batch: int = BATCH) -> Graph:
    """The graph of a frozen text.

    Args:
      local: see `lm.interpretability.graphs.replacement.freeze`.
      logits: ids of tokens to explain; the smallest set that reaches a probability of 0.95 unless
        given, and at most ten.
      batch: targets whose gradients are taken together.
    """
    last_V = np.asarray(local.original["logits"][-1], np.float64)
    probability_V = np.exp(last_V - last_V.max())
    probability_V /= probability_V.sum()
    check(
        all(0 <= one < len(last_V) for one in logits),
        f"logits={tuple(logits)} must be ids of tokens, 0 … {len(last_V) - 1}",
    )
    chosen = np.array(logits or likeliest(probability_V), int)
    aims = targets(local, chosen)
    nodes = (*sources_of(local), *_logit_nodes(local, chosen))
    adjacency = np.zeros((len(nodes), len(nodes)), np.asarray(local.errors_LTD).dtype)
    N = len(local.active.layer_N)
    numbers = np.r_[:N, len(nodes) - len(chosen) : len(nodes)]
    pulled = edges(local)
    for first in range(0, len(numbers), batch):
        part = slice(first, first + batch)
        padding = (0, max(0, first + batch - len(numbers)))
        read, position = (np.pad(x[part], padding) for x in aims[:2])
        rows = np.pad(aims.row_MD[part], (padding, (0, 0)))
        found = np.asarray(pulled(read, position, rows))[: len(numbers[part])]
        adjacency[numbers[part], : found.shape[1]] = found
    L, T = local.config.num_layers, len(local.tokens_T)
    first_bias = len(nodes) - len(chosen) - (L + 1) * T
    columns = first_bias + aims.bias_M * T + aims.position_M
    adjacency[numbers, columns] += aims.constant_M
    values_n, activation_n, probability_n = np.zeros((3, len(nodes)), adjacency.dtype)
    values_n[numbers] = measured(local, aims, local.original)
    activation_n[:N] = local.active.value_N
    probability_n[len(nodes) - len(chosen) :] = probability_V[chosen]
    return Graph(local.tokens_T, nodes, adjacency, values_n, activation_n, probability_n)


def likeliest(probability_V: np.ndarray, reach: float = 0.95, most: int = 10) -> np.ndarray:
    """The smallest set of tokens, likeliest first, that reaches a probability; at most so many."""
    order = np.argsort(-probability_V, kind="stable")[:most]
    return order[: np.searchsorted(np.cumsum(probability_V[order]), reach) + 1]


def sources_of(local: Local) -> Iterator[Node]:
    """The nodes that sources are."""
    L, T, active = local.config.num_layers, len(local.tokens_T), local.active
    layers = np.array(local.dictionary.layers)
    for layer, position, index in zip(*active[:3]):
        yield Node("feature", int(layers[layer]), int(position), int(index))
    yield from (Node("error", layer, position, -1) for layer in range(L) for position in range(T))
    yield from (Node("token", -1, t, int(token)) for t, token in enumerate(local.tokens_T))
    if placed(local):
        yield from (Node("position", -1, position, -1) for position in range(T))
    yield from (Node("bias", layer, t, -1) for layer in range(L + 1) for t in range(T))


def placed(local: Local) -> bool:
    """Whether positions have embeddings of their own."""
    return local.config.positions in ("learned", "sinusoidal")


def _logit_nodes(local: Local, chosen: np.ndarray) -> Iterator[Node]:
    last = len(local.tokens_T) - 1
    yield from (Node("logit", local.config.num_layers, last, int(token)) for token in chosen)


def targets(local: Local, chosen: np.ndarray) -> Targets:
    """The features that are active, and these logits."""
    dictionary, config, active = local.dictionary, local.config, local.active
    final = len(local.reads) - 1
    W_VD = np.asarray(bind(local.skeleton, local.params).output_weights())
    scale = 1.0 if config.output_scale == 1 else config.output_scale or config.width**-0.5
    bias_V = np.asarray(local.params["head_bias"]) if config.head_bias else np.zeros(len(W_VD))
    W_enc, b_enc = np.asarray(dictionary.W_enc), np.asarray(dictionary.b_enc)
    last, Y = len(local.tokens_T) - 1, len(chosen)
    return Targets(
        np.concatenate([active.layer_N, np.full(Y, final)]),
        np.concatenate([active.position_N, np.full(Y, last)]),
        np.concatenate(
            [W_enc[active.layer_N, :, active.index_N], scale * (W_VD[chosen] - W_VD.mean(0))]
        ),
        np.concatenate([b_enc[active.layer_N, active.index_N], bias_V[chosen] - bias_V.mean()]),
        np.concatenate(
            [np.array(dictionary.layers)[active.layer_N], np.full(Y, config.num_layers)]
        ),
    )


def measured(local: Local, aims: Targets, values: dict[str, jax.Array]) -> np.ndarray:
    """[M]: the targets' values where a model's are `values` (`Local.values`, `Local.original`)."""
    read_RTD = np.stack([np.asarray(values[name]) for name in local.reads])
    here_MD = read_RTD[aims.read_M, aims.position_M]
    return np.einsum("md,md->m", here_MD, aims.row_MD) + aims.constant_M


def edges(local: Local):
    """A program: targets (`read_B`, `position_B`, `row_BD`) → edges from all sources, [B, n]."""

    def pull(linear, read_B, position_B, row_BD, *arrays):
        def reads(sources):
            values = linear(sources)
            return jnp.stack([values[name] for name in local.reads])

        shape, back = jax.vjp(reads, jax.tree.map(jnp.zeros_like, local.sources))

        def of(read, position, row_D):
            return back(jnp.zeros_like(shape).at[read, position].set(row_D))[0]

        return from_sources(local, jax.vmap(of)(read_B, position_B, row_BD), *arrays)

    program, arrays = local.compiled(pull), contributions(local)
    return lambda *aims: program(*aims, *arrays)


def contributions(local: Local) -> tuple[Any, ...]:
    """What sources are made of, as arguments of a program: those of `from_sources`."""
    return local.sources, local.errors_LTD, [rows for _, rows in local.decoders], local.slots


def from_sources(local: Local, gradient: Sources, sources, errors_LTD, decoders, slots_N):
    """What each source node adds, [B, n], to B targets that have these gradients, [B, …]."""
    features, (B, _, T, _) = [], gradient.written_LTD.shape
    written_TBLD = gradient.written_LTD.transpose(2, 0, 1, 3)
    for (layers, _), rows_TnRD in zip(local.decoders, decoders):
        # one contracted axis: XLA has no fast product on processors where there are two
        written_TBW = written_TBLD[:, :, layers].reshape(T, B, -1)
        rows_TnW = rows_TnRD.reshape(*rows_TnRD.shape[:2], -1)
        found = jnp.einsum("tbw,tnw->btn", written_TBW, rows_TnW)
        features.append(found.reshape(B, -1))
    parts = [
        jnp.concatenate(features, 1)[:, slots_N],
        jnp.einsum("bltd,ltd->blt", gradient.written_LTD, errors_LTD),
        jnp.einsum("btd,td->bt", gradient.tokens_TD, sources.tokens_TD),
    ]
    if placed(local):
        parts.append(jnp.einsum("btd,td->bt", gradient.positions_TD, sources.positions_TD))
    parts.append(gradient.biases_NT)
    return jnp.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def alone(local: Local, number: int, node: Node) -> Sources:
    """The sources of which all but one node's are taken away."""
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), local.sources)
    at = (node.layer, node.position)
    if node.kind == "feature":
        layer = int(local.active.layer_N[number])
        reached, W_RFD = local.dictionary.decoder(layer)
        for row, to in enumerate(reached):
            vector_D = local.active.value_N[number] * np.asarray(W_RFD[row, node.index])
            nothing.written_LTD[local.dictionary.layers[to], node.position] = vector_D
    elif node.kind == "error":
        nothing.written_LTD[at] = np.asarray(local.errors_LTD)[at]
    elif node.kind == "bias":
        nothing.biases_NT[at] = 1
    elif node.kind == "position":
        nothing.positions_TD[at[1]] = np.asarray(local.sources.positions_TD)[at[1]]
    elif node.kind == "token":
        nothing.tokens_TD[at[1]] = np.asarray(local.sources.tokens_TD)[at[1]]
    return nothing


def intervene(local: Local, graph: Graph, number: int, factor: float = 2.0):
    """What multiplying one feature by `factor` does to every target of a graph.

    Args:
      local, graph: of one text.
      number: of the feature's node.
      factor: 2 doubles it, 0 takes it away.

    Returns:
      Two changes [targets]: with patterns, norms and all other features held, which is the edge
      times (factor - 1); and in the model as it is, where all else follows.
    """
    node = graph.nodes[number]
    check(node.kind == "feature", f"node {number} is {node}: a feature can be scaled")
    logits = [node.index for node in graph.nodes if node.kind == "logit"]
    aims = targets(local, np.array(logits, int))
    added = jax.tree.map(lambda x: (factor - 1) * x, alone(local, number, node))
    held = local.values(jax.tree.map(jnp.add, local.sources, added))
    with jax.default_matmul_precision("highest"):
        followed = _free(local)(local.params, added.written_LTD)
    before = graph.values_n[graph.targets]
    return measured(local, aims, held) - before, measured(local, aims, followed) - before


@functools.lru_cache(maxsize=1)
def _free(local: Local):
    """A program: parameters, and what is added to each MLP's output → what features read."""

    @jax.jit
    def free(params, added_LTD):
        edits = {
            f"blocks.{layer}.mlp.output": functools.partial(jnp.add, added_LTD[layer])
            for layer in range(local.config.num_layers)
        }
        model = bind(local.skeleton, params)
        found = trace(model, local.tokens_T[None], names=local.reads, edits=edits)
        return {name: value[0] for name, value in found.items()}

    return free

"""Which part of a graph matters: influence, pruning, and how much of the model features explain.

By the definitions of Ameisen et al. 2025 and of circuit-tracer: A is the adjacency matrix in
absolute values, each row divided by its sum; the influence of a node on logits of weights w, their
probabilities, is the sum of w · A^k over all lengths k of paths.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.config import check
from lm.interpretability.graphs.attribution import Graph


class Pruned(NamedTuple):
    """What is left of a graph: which nodes and edges, and how soon each node would be left out."""

    nodes_n: np.ndarray
    edges_nn: np.ndarray
    cumulative_n: np.ndarray  # share of all influence that is reached by it and by those above it


class Scores(NamedTuple):
    """How much of what reaches the logits is explained.

    Attributes:
      replacement: influence of inputs, as a share of that of inputs and errors.
      completeness: share of what enters nodes that is no error, weighted by their influence.
    """

    replacement: float
    completeness: float


def normalized(adjacency: np.ndarray) -> np.ndarray:
    """Absolute values, each row divided by its sum; rows of zeros stay so."""
    size = np.abs(adjacency)
    total = size.sum(1, keepdims=True)
    return np.divide(size, total, out=np.zeros_like(size), where=total > 0)


def influence(adjacency: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
    """[n]: of each node on the logits that `weight_n` weighs, Σ_k w · A^k."""
    A = normalized(adjacency)
    reached, total = weight_n @ A, np.zeros_like(weight_n, A.dtype)
    for _ in range(len(A)):  # a path visits no node twice
        if not reached.any():
            break
        total += reached
        reached = reached @ A
    return total


def edge_influence(adjacency: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
    """[n, n]: each edge's share of its target's influence, A · (influence of the target + w)."""
    A = normalized(adjacency)
    return A * (influence(adjacency, weight_n) + weight_n)[:, None]


def scores(adjacency, weight_n, errors_n, inputs_n) -> Scores:
    """`Scores` of a graph whose errors and inputs these masks mark."""
    reached_n = influence(adjacency, weight_n)
    inputs, errors = reached_n[inputs_n].sum(), reached_n[errors_n].sum()
    output_n = reached_n + weight_n
    explained_n = 1 - normalized(adjacency)[:, errors_n].sum(1)
    return Scores(
        float(inputs / (inputs + errors)) if inputs + errors else 1.0,
        float((explained_n * output_n).sum() / output_n.sum()),
    )


def graph_scores(graph: Graph) -> Scores:
    """Of a whole graph; inputs are tokens and positions, and biases are neither input nor error."""
    inputs_n = (graph.kinds == "token") | (graph.kinds == "position")
    return scores(graph.adjacency, graph.probability_n, graph.kinds == "error", inputs_n)


def _enough(score: np.ndarray, share: float) -> np.ndarray:
    """Which are at least as large as the last of the largest that together reach a share."""
    flat = np.sort(score, axis=None)[::-1]
    if not flat.size or not flat.any():
        return np.zeros(score.shape, bool)
    reached = np.cumsum(flat) / flat.sum()
    least = flat[min(np.searchsorted(reached, share), flat.size - 1)]
    return (score >= least) & (score > 0)


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> Pruned:
    """A graph without what hardly matters.

    Args:
      graph: see `attribute`.
      nodes: share of all influence that the nodes left have; tokens and logits always stay.
      edges: the same of the edges between these. Then features without an edge in or out go, and
        errors, positions and biases without one out, until none is left.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        check(0 <= share <= 1, f"{name}={share} must be between 0 and 1")
    weight_n, kinds = graph.probability_n, graph.kinds
    influence_n = influence(graph.adjacency, weight_n)
    stays = (kinds == "token") | (kinds == "logit")
    kept_n = _enough(influence_n, nodes) | stays
    left = np.where(kept_n[:, None] & kept_n[None], graph.adjacency, 0)
    edges_nn = _enough(edge_influence(left, weight_n), edges)
    while True:
        edges_nn &= kept_n[:, None] & kept_n[None]
        before = kept_n.copy()
        kept_n &= stays | edges_nn.any(0)
        kept_n &= (kinds != "feature") | edges_nn.any(1)
        if (kept_n == before).all():
            break
    order = np.argsort(-influence_n, kind="stable")
    cumulative_n = np.zeros_like(influence_n)
    cumulative_n[order] = np.cumsum(influence_n[order]) / max(influence_n.sum(), 1e-300)
    return Pruned(kept_n, edges_nn, cumulative_n)


def grouped(graph: Graph, groups: dict[str, list[int]]) -> np.ndarray:
    """[groups, groups]: edges between supernodes, each the sum of those between their nodes.

    Like edges they add up: of a group's members together they are what the other groups' add.
    """
    member = np.zeros((len(groups), len(graph.nodes)), graph.adjacency.dtype)
    for row, numbers in enumerate(groups.values()):
        member[row, numbers] = 1
    return member @ graph.adjacency @ member.T

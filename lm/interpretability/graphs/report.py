"""What is said of a graph beside itself: sums, tests, the heads its edges use, their scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm.interpretability.graphs import influence
from lm.interpretability.graphs.attribution import Graph, intervene
from lm.interpretability.graphs.files import node_id
from lm.interpretability.graphs.heads import looked
from lm.interpretability.graphs.replacement import Local

THROUGH, TERMS = 64, 12  # edges whose heads are shown; pairs of an attention score


def summary_of(local: Local, graph: Graph) -> dict[str, Any]:
    """How well the graph adds up, and what it explains."""
    rebuilt = local.logits(local.values(local.sources)) - local.original["logits"]
    features = graph.kinds[graph.targets] == "feature"
    logits = np.flatnonzero(graph.kinds == "logit")
    biases_nn = graph.adjacency[logits][:, graph.kinds == "bias"]
    return {
        "features": int(features.sum()),
        "replacement_error": float(np.abs(rebuilt).max()),
        "residual_features": float(np.abs(graph.residual[features]).max(initial=0)),
        "residual_logits": float(np.abs(graph.residual[~features]).max()),
        "mean_logit": float(np.abs(graph.values_n[logits]).mean()),
        "mean_bias": float(np.abs(biases_nn.sum(1)).mean()),
        "probability": float(graph.probability_n.sum()),
    }


def strongest_edges(graph: Graph, pruned: influence.Pruned) -> list[tuple[int, int]]:
    """(target, source) of the edges left that carry most of what reaches the logits."""
    share_nn = influence.edge_influence(graph.adjacency, graph.probability_n) * pruned.edges_nn
    largest = np.argsort(-share_nn, axis=None, kind="stable")[:THROUGH]
    pairs = zip(*np.unravel_index(largest, share_nn.shape))
    return [(int(target), int(source)) for target, source in pairs]


def largest_heads(heads_LH: np.ndarray, number: int = 3) -> list[list[float]]:
    """The largest of an edge's heads: layer, head and loading."""
    order = np.argsort(-np.abs(heads_LH), axis=None)[:number]
    found = zip(*np.unravel_index(order, heads_LH.shape))
    return [[int(a), int(b), float(heads_LH[a, b])] for a, b in found if heads_LH[a, b]]


def taken_apart(local, graph, pairs, heads_ELH, number: int) -> list[dict[str, Any]]:
    """Scores of the heads that carry the strongest edges between positions, as sums of pairs."""
    places: dict[tuple[int, ...], None] = {}
    for (target, source), heads_LH in zip(pairs, heads_ELH):
        query, key = graph.nodes[target].position, graph.nodes[source].position
        if query != key and heads_LH.any():
            at = np.unravel_index(np.abs(heads_LH).argmax(), heads_LH.shape)
            places[(*map(int, at), query, key)] = None
    found = []
    for place in [*places][:number]:
        score = looked(local, *place)
        largest = np.argsort(-np.abs(score.terms_nn), axis=None)[:TERMS]
        terms = [
            [node_id(graph.nodes[q]), node_id(graph.nodes[k]), float(score.terms_nn[q, k])]
            for q, k in zip(*np.unravel_index(largest, score.terms_nn.shape))
            if score.terms_nn[q, k]
        ]
        named = dict(zip(("layer", "head", "query", "key"), place))
        found.append({**named, "score": score.score, "terms": terms})
    return found


def tested(local: Local, graph: Graph, number: int) -> list[dict[str, Any]]:
    """What doubling the features with the strongest edges to the first logit does to it."""
    first = int(np.flatnonzero(graph.kinds == "logit")[0])
    row = np.where(graph.kinds == "feature", np.abs(graph.adjacency[first]), 0)
    tests = []
    for source in np.argsort(-row, kind="stable")[: min(number, np.count_nonzero(row))]:
        held, followed = intervene(local, graph, int(source))
        at = int(np.flatnonzero(graph.targets == first)[0])
        changes = {"held": float(held[at]), "followed": float(followed[at])}
        edge = float(graph.adjacency[first, source])
        tests.append({"node": node_id(graph.nodes[source]), "edge": edge, **changes})
    return tests


def lines(graph: Graph, summary: dict[str, Any], spell) -> list[str]:
    """A summary for a reader."""
    said = ", ".join(
        f"{spell(graph.nodes[n].index)!r} {graph.probability_n[n]:.1%}"
        for n in np.flatnonzero(graph.kinds == "logit")
    )
    about = (
        f"It says {said}. {summary['features']} active features; {summary['nodes']} nodes and "
        f"{summary['edges']} edges are left. Replacement {summary['replacement']:.3f}, "
        f"completeness {summary['completeness']:.3f}."
    )
    sums = (
        f"logits of the replacement are off by {summary['replacement_error']:.1e}; edges by "
        f"{summary['residual_features']:.1e} (features), {summary['residual_logits']:.1e} (logits)"
    )
    tests = [
        f"doubling {one['node']}: edge {one['edge']:+.4f}, held {one['held']:+.4f}, "
        f"in the model {one['followed']:+.4f}"
        for one in summary["tested"]
    ]
    return [about, sums, *tests]

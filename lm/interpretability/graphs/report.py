"""What is said of a graph beside itself: sums, tests, the heads its edges use, their scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm.config import check, nearest
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


def largest(values: np.ndarray, number: int) -> list[list[float]]:
    """[row, column, value] of the numbers that are furthest from zero, and not zero."""
    size = np.abs(values).ravel()
    some = np.argpartition(-size, min(number, size.size) - 1)[:number]
    some = some[np.argsort(-size[some], kind="stable")]
    places = zip(*(axis.tolist() for axis in np.unravel_index(some, values.shape)))
    return [[*place, float(values[place])] for place in places if values[place]]


def strongest_edges(graph: Graph, pruned: influence.Pruned) -> list[tuple[int, int]]:
    """(target, source) of the edges left that carry most of what reaches the logits."""
    share_nn = influence.edge_influence(graph.adjacency, graph.probability_n) * pruned.edges_nn
    return [(target, source) for target, source, _ in largest(share_nn, THROUGH)]


def between(graph: Graph, supernodes: dict[str, list[str]]) -> dict[str, float]:
    """What supernodes, of ids of nodes, add to each other: "first → second" → the sum of edges.

    Raises:
      ConfigError: a node that is not there.
    """
    numbers = {node_id(node): number for number, node in enumerate(graph.nodes)}
    for name, one in ((name, one) for name, ids in supernodes.items() for one in ids):
        close = "" if one in numbers else nearest(one, [*numbers])
        check(one in numbers, f"config.supernodes: {name!r} has {one!r}, which is no node{close}")
    names = [*supernodes]
    groups = {name: [numbers[one] for one in ids] for name, ids in supernodes.items()}
    edges = largest(influence.grouped(graph, groups), len(names) ** 2) if names else []
    return {f"{names[source]} → {names[target]}": edge for target, source, edge in edges}


def taken_apart(local, graph, pairs, heads_ELH, number: int) -> list[dict[str, Any]]:
    """Scores of the heads that carry the strongest edges between positions, as sums of pairs."""
    places: dict[tuple[int, ...], None] = {}
    for (target, source), heads_LH in zip(pairs, heads_ELH):
        query, key = graph.nodes[target].position, graph.nodes[source].position
        if query != key and heads_LH.any():
            places[(*largest(heads_LH, 1)[0][:2], query, key)] = None
    found = []
    # In the first layer a query is little but its own token; what is made of more comes first.
    for place in sorted(places, key=lambda place: place[0] == 0)[:number]:
        score = looked(local, *place)
        terms = [
            [node_id(graph.nodes[q]), node_id(graph.nodes[k]), term]
            for q, k, term in largest(score.terms_nn, TERMS)
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
    groups = [f"{name}: {edge:+.4f}" for name, edge in summary["supernodes"].items()]
    return [about, sums, *tests, *groups]

"""A graph as files: JSON that circuit-tracer's page and Neuronpedia read, and a page of our own.

Positions and biases, which they do not know, have the type "bias" there and say in `clerp` what
they are. Neuronpedia draws such nodes; the scores it computes itself count as if they were logits,
so that with them only ours, in `metadata.scores`, hold.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lm.evaluation.page import write_page
from lm.interpretability.graphs.attribution import Graph, Node
from lm.interpretability.graphs.influence import Pruned, Scores

TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "position": "bias",
    "bias": "bias",
    "logit": "logit",
}


def node_id(node: Node) -> str:
    """What a node is called, as circuit-tracer does; no two of a graph share a name."""
    kind, layer, position, index = node
    marks = {"error": -1, "bias": -2, "position": -1}
    layer = {"token": "E", "position": "P", "logit": layer + 1}.get(kind, layer)
    return f"{layer}_{marks.get(kind, index)}_{position}"


def described(graph: Graph, number: int, spell: Callable[[int], str], influence: float) -> dict:
    """A node as JSON."""
    node, length = graph.nodes[number], len(graph.tokens_T)
    kind, layer, position, index = node
    last = max(one.layer for one in graph.nodes)
    feature = {
        "feature": (layer + index) * (layer + index + 1) // 2 + index,  # Cantor's pairing
        "error": -1,
        "token": position,
        "position": length + position,
        "bias": -2,
        "logit": index,
    }[kind]
    probability = float(graph.probability_n[number])
    clerp = {"position": f"Position {position}", "bias": f"Biases of layer {layer}"}.get(kind, "")
    if kind == "bias" and layer == last:
        clerp = "Biases of the output head"
    elif kind == "logit":
        clerp = f'Output "{spell(index)}" (p={probability:.3f})'
    row = {
        "node_id": node_id(node),
        "jsNodeId": f"{layer}_{index}-0" if kind == "feature" else node_id(node),
        "feature": feature,
        "layer": {"token": "E", "position": "E", "logit": str(layer + 1)}.get(kind, str(layer)),
        "ctx_idx": position,
        "feature_type": TYPES[kind],
        "token_prob": probability,
        "is_target_logit": kind == "logit" and graph.nodes[number - 1].kind != "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": clerp,
        "influence": influence,
        "activation": float(graph.activation_n[number]) if kind == "feature" else None,
        "kind": kind,
    }
    if kind in ("feature", "logit"):
        value, explained = float(graph.values_n[number]), float(graph.adjacency[number].sum())
        row |= {"value": value, "residual": value - explained}
    return row | ({"probability": probability} if kind == "logit" else {})


def document(
    graph: Graph,
    pruned: Pruned,
    scores: Scores,
    spell: Callable[[int], str],
    metadata: Mapping[str, Any],
    *,
    supernodes: Mapping[str, Iterable[str]] | None = None,
    heads: Mapping[tuple[int, int], list] | None = None,
) -> dict[str, Any]:
    """What is left of a graph, as JSON.

    Args:
      graph, pruned, scores: see `lm.interpretability.graphs.influence`.
      spell: an id's text.
      metadata: `slug`, `scan` (which model and transcoder), `prompt`, `node_threshold`, and more.
      supernodes: name → ids of nodes that are one to the reader; of these what is left.
      heads: (target, source) → [layer, head, loading] of the heads the edge runs through.
    """
    kept = np.flatnonzero(pruned.nodes_n).tolist()
    nodes = [described(graph, n, spell, float(pruned.cumulative_n[n])) for n in kept]
    names = dict(zip(kept, (node["node_id"] for node in nodes)))
    links = [
        {"source": names[source], "target": names[target]}
        | {"weight": float(graph.adjacency[target, source])}
        | ({"heads": heads[target, source]} if (target, source) in (heads or {}) else {})
        for target, source in zip(*(numbers.tolist() for numbers in pruned.edges_nn.nonzero()))
    ]
    # Other readers know no nodes but those in the file.
    left = {*names.values()}
    groups = [[name, *(i for i in ids if i in left)] for name, ids in (supernodes or {}).items()]
    return {
        "metadata": {
            "transcoder_list": [],
            "prompt_tokens": [spell(int(token)) for token in graph.tokens_T],
            "schema_version": 1,
            "scores": scores._asdict(),
            **metadata,
        },
        "qParams": {"pinnedIds": [], "supernodes": groups, "linkType": "both", "clickedId": ""}
        | {"sg_pos": ""},
        "nodes": nodes,
        "links": links,
    }


def without_extra(found: Mapping[str, Any]) -> dict[str, Any]:
    """A document of what other readers know alone: edges of it do not add up."""
    nodes = [node for node in found["nodes"] if node["feature_type"] != "bias"]
    names = {node["node_id"] for node in nodes}
    links = [link for link in found["links"] if link["source"] in names]
    return {**found, "nodes": nodes, "links": links}


def write_viewer(path: pathlib.Path, found: Mapping[str, Any]) -> pathlib.Path:
    """Writes a page that shows a `document`, and needs no network; returns its path.

    Args:
      path: where to.
      found: with `about`, a line for a reader; and, where there are any, `examples` ("layer_index"
        of a feature → `promotes`, tokens; `texts`, each with `tokens` and `values`), `looked` (of
        attention scores: `layer`, `head`, `query`, `key`, `score`, and `terms`, each the ids of two
        nodes and what the pair adds), and `others` (nodes in `terms` that were left out, by id).
    """
    viewer = pathlib.Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    text = json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")
    title = f"Attribution graph: {found['metadata']['prompt']}"
    return write_page(path, title, [viewer.replace("DATA", text)])

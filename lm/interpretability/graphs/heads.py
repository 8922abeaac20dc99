"""What heads have to do with it: why they looked where they did, and which edges run through them.

A head's score is bilinear in what its query and its key are made of (Kamath et al. 2025, "Tracing
Attention Computation Through Feature Interactions"): with the norms held, each source adds a vector
to the query and one to the key, and the score is the sum over pairs of their products. An edge is
the sum of what runs through each head of a layer and of what passes that layer's attention by.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check
from lm.interpretability.graphs.attribution import (
    Graph,
    alone,
    contributions,
    from_sources,
    targets,
)
from lm.interpretability.graphs.replacement import Local


class Looked(NamedTuple):
    """What a score is the sum of.

    Attributes:
      query_nC, key_nC: what each source node adds to the query, scaled, and to the key.
      score: of the original, before a soft cap and what positions add to it.
    """

    query_nC: np.ndarray
    key_nC: np.ndarray
    score: float

    @property
    def terms_nn(self) -> np.ndarray:
        """[n, n]: the part of the score that a pair of nodes, query's first, is responsible for."""
        return self.query_nC @ self.key_nC.T


class Loadings(NamedTuple):
    """Where edges run, [edges, …]: through each head, and past each layer's attention."""

    heads_ELH: np.ndarray
    bypass_EL: np.ndarray


def looked(local: Local, layer: int, head: int, query: int, key: int) -> Looked:
    """Why a head of a layer, at position `query`, gave position `key` the score it did.

    Raises:
      ConfigError: no such head, or positions outside the prompt.
    """
    config, T = local.config, len(local.tokens_T)
    for name, value, end in (
        ("layer", layer, config.num_layers),
        ("head", head, config.num_heads),
        ("query", query, T),
        ("key", key, T),
    ):
        check(0 <= value < end, f"{name}={value} must be between 0 and {end - 1}")
    shared = head // (config.num_heads // config.kv_heads)
    places = (np.array([layer, query, head]), np.array([layer, key, shared]))
    query_nC, key_nC = map(np.asarray, _asked(local)(*places, *contributions(local)))
    names = (f"blocks.{layer}.attention.query", f"blocks.{layer}.attention.key")
    query_C, key_C = (
        np.asarray(local.original[name])[*place[1:]] for name, place in zip(names, places)
    )
    scale = config.score_scale
    return Looked(query_nC * scale, key_nC, float(scale * query_C @ key_C))


@functools.lru_cache(maxsize=1)
def _asked(local: Local):
    """A program: (layer, position, head) of a query and of a key → what sources add to each."""

    def pull(linear, query, key, *arrays):
        def asked(sources):
            values = linear(sources)
            return [
                jnp.stack(
                    [values[f"blocks.{n}.attention.{part}"] for n in range(local.config.num_layers)]
                )[*place]
                for part, place in (("query", query), ("key", key))
            ]

        _, back = jax.vjp(asked, jax.tree.map(jnp.zeros_like, local.sources))
        rows = jnp.eye(local.config.head_width, dtype=local.errors_LTD.dtype)
        zeros = jnp.zeros_like(rows)
        return [
            from_sources(local, jax.vmap(lambda *rows: back([*rows])[0])(*both), *arrays).T
            for both in ((rows, zeros), (zeros, rows))
        ]

    return local.compiled(pull)


def loadings(local: Local, graph: Graph, pairs: list[tuple[int, int]]) -> Loadings:
    """Which heads these edges, (target, source) by number, run through.

    Of each layer: heads and bypass add up to the edge. What enters or leaves the stream beside a
    layer's attention passes it by.
    """
    numbers = {number: row for row, number in enumerate(graph.targets)}
    aims = targets(local, np.array([n.index for n in graph.nodes if n.kind == "logit"], int))
    rows = [numbers[target] for target, _ in pairs]
    each = [alone(local, source, graph.nodes[source]) for _, source in pairs]
    sources = jax.tree.map(lambda *x: np.stack(x), *each)
    constant = [
        aims.constant_M[row]
        * (graph.nodes[source][:3] == ("bias", aims.bias_M[row], aims.position_M[row]))
        for row, (_, source) in zip(rows, pairs)
    ]
    L, H = local.config.num_layers, local.config.num_heads

    def pull(linear, sources, read_E, position_E, row_ED):
        def edge(gate_LH, sources, read, position, row_D):
            values = linear(sources, gate_LH)
            stacked_RTD = jnp.stack([values[name] for name in local.reads])
            return stacked_RTD[read, position] @ row_D

        def of(*aim):
            ones_LH = jnp.ones((L, H), row_ED.dtype)
            without = lambda layer: edge(ones_LH.at[layer].set(0), *aim)  # noqa: E731
            return jax.grad(edge)(ones_LH, *aim), jax.vmap(without)(jnp.arange(L))

        return jax.vmap(of)(sources, read_E, position_E, row_ED)

    aim = (x[rows] for x in (aims.read_M, aims.position_M, aims.row_MD))
    heads_ELH, bypass_EL = map(np.asarray, local.compiled(pull)(sources, *aim))
    return Loadings(heads_ELH, bypass_EL + np.array(constant)[:, None])

"""The random walks of trlx and of Decision Transformer: a task whose best answers are known.

A directed graph of `NODES` nodes, named by letters, has a goal, `a`. A walk is written as the
letters of its nodes, such as "fkca", and is the better the sooner it reaches the goal. A model that
has read aimless walks alone, most of which miss the goal, has to find the shortest by itself (Chen
et al. 2021, "Decision Transformer"; as `examples/randomwalks` of CarperAI's trlx measures it).
"""

from __future__ import annotations

import functools
import itertools
import random
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

NODES = 21
LENGTH = 10  # nodes of a walk at most
EDGE = 0.1  # the share of pairs of nodes with an edge from the one to the other
GOAL = "a"


class Graph(NamedTuple):
    """`edges[node]` are the nodes that follow it, `shortest[node]` nodes lead to the goal."""

    edges: dict[str, str]
    shortest: dict[str, int]


@functools.lru_cache(16)
def graph(seed: int) -> Graph:
    """The graph `seed`, drawn anew until every node reaches the goal within a walk."""
    draw = random.Random(f"random walks {seed}").random
    nodes = string.ascii_lowercase[:NODES]
    while True:
        edges = {
            node: "".join(other for other in nodes if draw() < EDGE and other != node)
            for node in nodes
        }
        shortest, length = {GOAL: 1}, 1
        while length < LENGTH - 1:
            length += 1
            reached = [n for n in nodes if n not in shortest and {*edges[n]} & shortest.keys()]
            shortest |= dict.fromkeys(reached, length)
        if len(shortest) == NODES:
            return Graph(edges, shortest)


def starts(seed: int = 0) -> list[str]:
    """Every node a walk may start from, which are the prompts: all but the goal."""
    return [node for node in graph(seed).edges if node != GOAL]


def prompt(seed: int, index: int, held_out: bool = False) -> dict[str, Any]:
    """`{"prompt": a start, "graph": seed}`: the starts over and over, in every set."""
    return {"prompt": starts(seed)[index % (NODES - 1)], "graph": seed}


def example(seed: int, index: int, held_out: bool = False) -> dict[str, str]:
    """`{"prompt": a start, "response": the rest of a walk}`, to learn aimless walking from."""
    nodes = walk(seed, 2 * index + held_out)
    return {"prompt": nodes[0], "response": nodes[1:]}


def walk(seed: int, index: int) -> str:
    """Walk number `index` in the graph `seed`: aimless, up to the goal or `LENGTH` nodes."""
    edges = graph(seed).edges
    draw = random.Random(f"random walk {seed} {index}").random
    nodes = starts(seed)[int(draw() * (NODES - 1))]
    while len(nodes) < LENGTH and nodes[-1] != GOAL:
        after = edges[nodes[-1]]
        nodes += after[int(draw() * len(after))]
    return nodes


def optimality(walk: str, seed: int = 0) -> float:
    """How near a walk is to the shortest from its start: 1 is as short, 0 no walk to the goal.

    (`LENGTH` - nodes up to the goal) / (`LENGTH` - as few as can be), and 0 where the walk takes an
    edge that is not there, or ends elsewhere. What follows the goal does not count.
    """
    edges, shortest = graph(seed)
    nodes = walk.strip()
    length = nodes.find(GOAL) + 1
    if not 1 < length <= LENGTH:
        return 0.0
    steps = itertools.pairwise(nodes[:length])
    if any(two not in edges.get(one, "") for one, two in steps):
        return 0.0
    return (LENGTH - length) / (LENGTH - shortest[nodes[0]])


def reward(
    prompts: Sequence[str], responses: Sequence[str], graph: Sequence[int], **fields: Sequence[Any]
) -> list[float]:
    """The optimality of each prompt with its response, in the graph of its line."""
    return [optimality(p + r, seed) for p, r, seed in zip(prompts, responses, graph)]

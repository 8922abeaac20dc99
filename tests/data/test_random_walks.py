import itertools
from collections import Counter

import pytest

from lm.data import random_walks as rw


def paths(edges, nodes):
    """Every way from the last of `nodes` to the goal, by brute force."""
    if nodes[-1] == rw.GOAL:
        yield nodes
    elif len(nodes) < rw.LENGTH:
        for after in edges[nodes[-1]]:
            if after not in nodes:
                yield from paths(edges, nodes + after)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_shortest_walks_are_the_shortest_there_are(seed):
    graph = rw.graph(seed)
    assert len(graph.edges) == 21
    for start in rw.starts(seed):
        best = min(paths(graph.edges, start), key=len)
        assert len(best) == graph.shortest[start] < rw.LENGTH
        assert rw.optimality(best, seed) == 1.0


def test_optimality_of_walks_written_by_hand(monkeypatch):
    edges = {"a": "", "b": "ac", "c": "d", "d": "ae", "e": "ea"}
    shortest = {"a": 1, "b": 2, "c": 3, "d": 2, "e": 2}
    monkeypatch.setattr(rw, "graph", lambda seed: rw.Graph(edges, shortest))
    assert rw.optimality("ba") == 1.0
    assert rw.optimality("bcda") == pytest.approx(6 / 8)  # (10 - 4) / (10 - 2)
    assert rw.optimality("cda") == 1.0
    assert rw.optimality("cdeea") == pytest.approx(5 / 7)
    assert rw.optimality("baxyz") == 1.0  # what follows the goal does not count
    assert rw.optimality("bda") == 0.0  # there is no such edge
    assert rw.optimality("bcd") == 0.0  # it ends elsewhere
    assert rw.optimality("d" + "e" * 8 + "a") == 0.0  # ten nodes
    assert rw.optimality("d" + "e" * 30 + "a") == 0.0
    assert rw.optimality("") == rw.optimality("a") == rw.optimality("b?a") == 0.0
    assert rw.reward(["b", "c"], ["a", "da"], graph=[0, 0], more=[1, 2]) == [1.0, 1.0]


def test_walks_are_aimless_and_keep_to_the_edges():
    edges = rw.graph(0).edges
    walks = [rw.walk(0, index) for index in range(2000)]
    for walk in walks:
        assert all(two in edges[one] for one, two in itertools.pairwise(walk))
        assert len(walk) == rw.LENGTH or walk[-1] == rw.GOAL
        assert rw.GOAL not in walk[:-1]
    assert {walk[0] for walk in walks} == {*rw.starts(0)}
    after = Counter(
        two for walk in walks for one, two in itertools.pairwise(walk) if one == walks[0][0]
    )
    assert max(after.values()) < 1.5 * min(after.values())
    mean = sum(map(rw.optimality, walks)) / len(walks)
    assert 0.02 < mean < 0.7


def test_lines_hold_starts_and_what_follows_them():
    assert {rw.prompt(4, n)["prompt"] for n in range(20)} == {*rw.starts(4)}
    one, held_out = rw.example(4, 7), rw.example(4, 7, True)
    assert one["prompt"] + one["response"] == rw.walk(4, 14)
    assert held_out["prompt"] + held_out["response"] == rw.walk(4, 15)
    assert rw.reward(["b"], ["?"], **{"graph": [4]}) == [0.0]

"""Rules between tensors and parameters that no golden file reaches."""

import types

import numpy as np
import pytest

from lm.models.huggingface.name_map import Linear, rules


@pytest.mark.parametrize(
    "rotated, order", [(4, [0, 2, 1, 3, 4]), (-4, [0, 1, 3, 2, 4]), (2, [0, 1, 2, 3, 4])]
)
@pytest.mark.parametrize("by_head", [True, False])
def test_neighbours_there_are_halves_here_and_back(rotated, order, by_head):
    specs = {
        f"blocks.attention.{part}{end}": types.SimpleNamespace(shape=(3, *inputs, heads, 5))
        for part, heads in (("query", 4), ("key", 2))
        for end, inputs in (("", (7,)), ("_bias", ()))
    }
    parts = ("blocks.attention.query", "blocks.attention.key")
    plain, turned = (
        rules({parts: Linear("h.{layer}", by_head=by_head, interleaved=count)}, specs)
        for count in (0, rotated)
    )
    for one, other in zip(plain, turned, strict=True):
        shapes = [specs[name].shape[1:] for name in one.ours]
        rows = sum(int(np.prod(shape[-2:])) for shape in shapes)
        tensor = np.random.default_rng(0).normal(size=(rows, 7) if len(shapes[0]) == 3 else rows)
        found = other.load([tensor], shapes)
        for ours, theirs in zip(found, one.load([tensor], shapes), strict=True):
            np.testing.assert_array_equal(ours, theirs[..., order])
        np.testing.assert_array_equal(other.save(found)[0], tensor)

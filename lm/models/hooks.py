"""Taps: the one way to read, replace or differentiate a value inside the model.

A tap is a function `(name, value) -> value` that the model calls on every value worth looking at.
The default returns its value and vanishes under jit. A tap that keeps what it sees reads; one that
returns something else replaces; one that adds an argument of the caller's function makes the value
differentiable. With a tap the layers are unrolled, so each name has its layer in it:
`blocks.3.attention.pattern`. `lm.models.activations` lists the names and their shapes, and has what
reads and replaces them in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

Tap = Callable[[str, jax.Array], jax.Array]


def no_tap(name: str, value: jax.Array) -> jax.Array:
    """The tap that does nothing."""
    return value


def within(tap: Tap, scope: str) -> Tap:
    """`tap`, seeing names with `scope.` in front."""
    return no_tap if tap is no_tap else lambda name, value: tap(f"{scope}.{name}", value)


def reading(into: dict[str, jax.Array], wanted: Callable[[str], bool] = lambda name: True) -> Tap:
    """A tap that stores every value whose name is `wanted` in the dict `into`.

    Under jit, create the dict inside the traced function and return it.
    """

    def tap(name, value):
        if wanted(name):
            into[name] = value
        return value

    return tap


def replacing(edits: Mapping[str, Callable[[jax.Array], jax.Array]]) -> Tap:
    """A tap that passes each value named in `edits` through its function."""
    return lambda name, value: edits[name](value) if name in edits else value

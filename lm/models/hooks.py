"""Named activations: read, replace or differentiate any value inside the model.

A tap is a function `(name, value) -> value` that the model calls on every value worth looking at.
The default returns its value and vanishes under jit. A tap that keeps what it sees reads; one that
returns something else replaces; one that adds an argument of the caller's function makes the value
differentiable. With a tap the layers are unrolled, so each name has its layer in it:

    embedding                        blocks.3.attention_norm.inverse_scale
    blocks.3.residual_before         blocks.3.attention.{query,key,value,scores,pattern,heads}
    blocks.3.residual_middle         blocks.3.attention.output
    blocks.3.mlp_norm.inverse_scale  blocks.3.mlp.{up,gate,hidden,output}
    blocks.3.residual_after          final_norm.inverse_scale, logits

Experts have blocks.3.mlp.{router,chosen,weights,output}; an encoder-decoder's decoder
blocks.3.cross_attention.* and blocks.3.residual_crossed, its encoder all of these after `encoder.`;
recurrent networks say theirs in `lm.models.recurrent`.
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

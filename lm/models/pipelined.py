"""A stack of blocks whose layers the devices share in a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from lm.models.attention.ring import HEADS
from lm.parallel.layout import current_layout
from lm.parallel.mesh import batch_ways
from lm.parallel.pipeline import AXIS, choose_microbatches, pipeline
from lm.parallel.ring import context_ways
from lm.parallel.sharding import automatic_axes

if TYPE_CHECKING:
    from lm.models.stack import Context, Stack

LAYER_INPUT = "layer_input"  # the name, to remat policies, of what a layer starts from

# What `config.remat` keeps of a layer for the backward pass besides that.
KEPT = {
    "full": (),
    "dots": ("product",),
    "qkv": ("query", "key", "value"),
    "projections": ("query", "key", "value", HEADS),
}


def remat_policy(remat: str, *inputs: str):
    """What the backward pass keeps of a layer, as `config.remat` says: a policy, or None for all.

    Under `offload` what a layer starts from goes to the memory of the device's host, and comes back
    when the backward pass reaches the layer. A CPU's memory is its host's: there nothing moves.

    Args:
      remat: `config.remat`.
      inputs: the names of what else is kept. `jax.checkpoint` keeps its own arguments anyway.
    """
    if remat == "none":
        return None
    if remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint_policies.save_only_these_names(*inputs, *KEPT[remat])


def pipeline_stages(rows: int) -> int:
    """How many stages share the layers in a call of so many rows.

    That is one, and every device gets all layers in turn, where the rows are too few for all.
    """
    mesh, names = automatic_axes()
    stages = mesh.shape[AXIS] if AXIS in names else 1
    return stages if rows % stages == 0 else 1


def through_stages(
    stack: Stack, x_BTD: jax.Array, context: Context, keys_L: jax.Array | None, reach_L: Any
) -> tuple[jax.Array, Any]:
    """What `stack.scan_blocks` returns of its `blocks`, computed in a pipeline.

    Rows travel with their text, and each stage makes its own `Context` of them; only the bias of
    attention scores, which all rows share, comes from outside: as a table of all pairs, unless a
    ring of devices shares the sequence, which never makes one. Of what happens in a layer, the
    backward pass keeps what `config.remat` says, for every micro-batch.

    Args:
      stack: the stack.
      x_BTD: the residual stream; B a multiple of the stages.
      context: made by `stack.context`.
      keys_L: of dropout in each layer, or None.
      reach_L: whether each layer is local; one answer where it is the same for all.
    """
    mesh, _ = automatic_axes()
    stages, layout = mesh.shape[AXIS], current_layout()
    ways = batch_ways(mesh) // stages
    text, memory_text = context.text, context.memory_text
    slots = tuple(None if m is None else m.slots_1T for m in (text, memory_text))
    rows = tuple(None if m is None else m._replace(slots_1T=None) for m in (text, memory_text))
    fixed, varying_L = (reach_L, None) if isinstance(reach_L, bool) else (None, reach_L)
    bias = context.bias, context.bias_BHTS if context_ways() == 1 else None

    def stage_fn(blocks, first, x_BTD, along, shared):
        (text, memory_text), memory_BSD = along
        slots, layers, bias = shared
        text = text._replace(slots_1T=slots[0])
        if memory_text is not None:
            memory_text = memory_text._replace(slots_1T=slots[1])
        count = jax.tree.leaves(blocks)[0].shape[0]
        keys_L, varying_L = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), layers
        )
        return stack.scan_blocks(
            blocks,
            x_BTD,
            stack.context(text, memory_BSD, memory_text, *bias),
            keys_L,
            fixed if varying_L is None else varying_L,
        )

    return pipeline(
        stage_fn,
        stack.blocks,
        x_BTD,
        (rows, context.memory_BSD),
        (slots, (keys_L, varying_L), bias),
        microbatches=choose_microbatches(layout.microbatches, stages, x_BTD.shape[0], ways),
        rounds=layout.rounds,
        whole_axes=layout.whole_axes,
        policy=remat_policy(stack.config.remat, LAYER_INPUT),
    )

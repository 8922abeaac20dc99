"""What the backward pass keeps of a layer, and what it computes again (`config.remat`)."""

from __future__ import annotations

from collections.abc import Callable

import jax

from lm.models.config import ModelConfig

# Names that `checkpoint_name` gives values in a layer.
LAYER_INPUT = "layer_input"  # what it starts from
HEADS = "attention_heads"  # what attention's backward pass starts from

# What is kept, besides the layer's input.
KEPT = {
    "full": (),
    "dots": ("product",),
    "qkv": ("query", "key", "value"),
    "projections": ("query", "key", "value", HEADS),
}


def remat_policy(remat: str, *inputs: str) -> Callable[..., bool] | None:
    """What `config.remat` keeps of a layer: a policy for `jax.checkpoint`, or None for all.

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


def rematerialized(body: Callable, config: ModelConfig, prevent_cse: bool = True) -> Callable:
    """`body`, recomputing in the backward pass what `config.remat` does not keep.

    `prevent_cse` stops XLA from merging the recomputation with what it is to replace.
    """
    policy = remat_policy(config.remat)
    if policy is None:
        return body
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)

"""Model and batch to loss: always *summed* loss and *summed* weight.

Division happens once, over the global batch, so packing, accumulation, data parallelism and padding
cannot change the loss.
"""

from lm.objectives.causal import ObjectiveConfig, causal

__all__ = ["ObjectiveConfig", "causal"]

"""Model and batch to loss: always *summed* loss and *summed* weight.

Division happens once, over the global batch, so packing, accumulation, data parallelism and padding
cannot change the loss.
"""

from lm.objectives.config import OBJECTIVES, ObjectiveConfig, check_objective
from lm.objectives.tokens import token_loss

__all__ = ["OBJECTIVES", "ObjectiveConfig", "check_objective", "token_loss"]

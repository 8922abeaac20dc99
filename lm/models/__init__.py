"""Ids to logits: one Transformer, declared once and run anywhere.

Names carry shapes. One letter a dimension, after the underscore:

    B  batch (sequences)            T  query length             S  key length
    D  model width (residual)       H  query heads              K  key/value heads
    G  query heads per kv head      C  head width               F  feed-forward width
    V  vocabulary                   L  layers                   E  experts

so `x_BTD` is a batch of residual streams and `w_DF` maps width to feed-forward width.
"""

from lm.models.config import ModelConfig
from lm.models.params import bind, count, init, param_specs
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer

Model = Transformer | Recurrent


def skeleton(config: ModelConfig) -> Model:
    """The model that `config` describes, without its parameters."""
    return Transformer(config) if config.cell == "attention" else Recurrent(config)


__all__ = [
    "Model",
    "ModelConfig",
    "Recurrent",
    "Transformer",
    "bind",
    "count",
    "init",
    "param_specs",
    "skeleton",
]

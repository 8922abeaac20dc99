"""A model whose parts are linear: what first order says of it is the whole truth."""

import numpy as np
import tiny_models


def linear_model():
    """One whose MLPs are linear, far in the open half of relu, and which has no norms."""
    fields = {"norm": "none", "bias": True, "activation": "relu", "mlp_width": 16}
    config = tiny_models.config(num_layers=2, width=16, num_heads=2, tie_embeddings=False, **fields)
    values = tiny_models.params(config)
    for name, value in values.items():
        if name.endswith("_bias"):
            values[name] = np.zeros_like(value) if "up" not in name else np.full_like(value, 2.0)
    down = np.einsum("lf,lfd->ld", values["blocks.mlp.up_bias"], values["blocks.mlp.down"])
    return config, {**values, "blocks.mlp.down_bias": -down}

"""Direct logit attribution: what every part of a model adds to a logit, to the last bit of it.

The residual stream is a sum, and so are the logits once the final norm's scale is held (Elhage et
al. 2021; TransformerLens's `logit_attrs`): with g the gradient of the logit by the stream at that
scale, a part that writes c adds c · g. The terms, biases among them, sum to the logit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.config import check
from lm.interpretability.lenses import readable
from lm.models import Model
from lm.models.hooks import reading
from lm.models.layers import MLP

_SITES = ("embedding", "inverse_scale", "heads", "pattern", "value", "hidden", "output")
# The parts of an attribution that together are the logit.
TERMS = ("embedding", "heads", "attention_bias", "mlp", "post_norm_bias", "norm_bias", "head_bias")


def direct_logit_attribution(
    model: Model,
    tokens_BT: jax.Array,
    right_B: jax.Array,
    wrong_B: jax.Array | None = None,
    place: int = -1,
    **fields: jax.Array,
) -> dict[str, jax.Array]:
    """What each part adds to a logit, or to the difference of two, at one place of each row.

    Sandwich norms' scales are held as the final one's is. A soft cap is not linear: what is
    attributed is the logit before it.

    Args:
      model: a bound decoder or encoder whose blocks are pre-norm or sandwich.
      right_B, wrong_B: token ids; without `wrong_B` it is the logit of `right_B` itself.
      place: whose logits, counted from the end where negative.
      **fields: as of `lm.models.Transformer.__call__`.

    Returns:
      Of each row: embedding [B], heads [L, B, H], attention_bias [L, B], mlp [L, B] (its bias
      included), post_norm_bias [L, B], norm_bias and head_bias [B], which sum to `logit` [B]. And
      finer: embedding.tokens, .positions, .types [B], where they are terms; mlp_bias [L, B] and
      neurons [L, B, F], which sum to mlp (not of experts); sources [L, B, H, S]: what a head adds
      by reading each place, which sum to heads.

    Raises:
      ConfigError: a post-norm model, or one with a nonlinear head (BERT's): nothing in them sums.
    """
    readable(model)
    config = model.config
    check(
        config.norm_position != "post" and not config.head_transform,
        f"norm_position={config.norm_position!r}, head_transform={config.head_transform}: direct "
        "logit attribution needs a stream that is summed up to the final norm, and a linear head",
    )
    found: dict[str, jax.Array] = {}
    tap = reading(found, lambda name: any(part in _SITES for part in name.split(".")))
    model.hidden(tokens_BT, tap=tap, **fields)
    at = {name: value[:, place].astype(jnp.float32) for name, value in found.items()}
    head_VD = model.output_weights().astype(jnp.float32)
    right_B = jnp.asarray(right_B)
    zeros_B = jnp.zeros(len(right_B))

    def of_tokens(table):
        return table[right_B] - (0 if wrong_B is None else table[wrong_B])

    g_BD = of_tokens(head_VD) * (config.output_scale or config.width**-0.5)
    bias = model.output_bias()
    terms = {"head_bias": zeros_B if bias is None else zeros_B + of_tokens(bias)}
    final = getattr(model, "final_norm", None)
    g_BD, terms["norm_bias"] = _through(final, at, "final_norm", g_BD)
    terms |= _of_embedding(model, at, g_BD)
    rows: dict[str, list[jax.Array]] = {}
    for index, block in enumerate(model.each_block()):
        for name, value in _of_block(block, f"blocks.{index}", found, at, place, g_BD).items():
            rows.setdefault(name, []).append(value)
    # Where the first layers have an MLP and the others experts, nothing is known by neuron.
    whole = {name: some for name, some in rows.items() if len(some) == config.num_layers}
    terms |= {name: jnp.stack(some) for name, some in whole.items()}
    return {**terms, "logit": sum(summed(terms[name]) for name in TERMS)}


def summed(term: jax.Array) -> jax.Array:
    """A part's terms of each row [B], over layers, heads and whatever else it is split by."""
    return term if term.ndim == 1 else jnp.moveaxis(term, 1, 0).reshape(term.shape[1], -1).sum(-1)


def held(norm, x_xD: jax.Array, inverse_scale: jax.Array | float = 1.0) -> jax.Array:
    """What a norm makes of a part of what it reads, its scale held: linear, and without its bias.

    Args:
      norm: a bound `lm.models.layers.Norm`.
      inverse_scale: what it divides the whole by, inverted.
    """
    if norm.kind == "layernorm":
        x_xD = x_xD - x_xD.mean(norm.over, keepdims=True)
    return x_xD * inverse_scale * (norm.scale[...] + norm.unit_offset)


def _through(norm, at, name: str, g_BD):
    """The gradient by what a norm reads, its scale held; and what its bias adds."""
    if norm is None:
        return g_BD, jnp.zeros(len(g_BD))
    bias_B = g_BD @ norm.bias[...] if hasattr(norm, "bias") else jnp.zeros(len(g_BD))
    scale_D = norm.scale[...] + 1 if norm.unit_offset else norm.scale[...]
    g_BD = g_BD * scale_D * at[f"{name}.inverse_scale"]
    return g_BD - g_BD.mean(-1, keepdims=True) * (norm.kind == "layernorm"), bias_B


def _of_embedding(model: Model, at, g_BD):
    """The embedding's terms; those of its parts only where no norm is between."""
    terms = {"embedding": jnp.sum(at["embedding"] * g_BD, -1)}
    if not model.config.embedding_norm:
        parts = [name for name in at if name.startswith("embedding.")]
        terms |= {name: jnp.sum(at[name] * g_BD, -1) for name in parts}
    return terms


def _of_block(block, name: str, found, at, place: int, g_BD):
    """The terms of one block."""
    norms = [getattr(block, f"{part}_post_norm", None) for part in ("attention", "mlp")]
    heads_g_BD, one_B = _through(norms[0], at, f"{name}.attention_post_norm", g_BD)
    mlp_g_BD, other_B = _through(norms[1], at, f"{name}.mlp_post_norm", g_BD)
    attention = block.attention
    read_BHC = jnp.einsum("hcd,bd->bhc", attention.output[...], heads_g_BD)
    value_BSKC = found[f"{name}.attention.value"].astype(jnp.float32)
    value_BSHC = jnp.repeat(value_BSKC, read_BHC.shape[1] // value_BSKC.shape[2], axis=2)
    pattern_BHS = found[f"{name}.attention.pattern"][:, :, place].astype(jnp.float32)
    zeros_B = jnp.zeros(len(g_BD))
    bias = getattr(attention, "output_bias", None)
    terms = {
        "heads": jnp.sum(at[f"{name}.attention.heads"] * read_BHC, -1),
        "sources": pattern_BHS * jnp.einsum("bshc,bhc->bhs", value_BSHC, read_BHC),
        "attention_bias": zeros_B if bias is None else heads_g_BD @ bias[...],
        "post_norm_bias": one_B + other_B,
        "mlp": zeros_B,
    }
    if f"{name}.mlp.output" in at:
        terms["mlp"] = jnp.sum(at[f"{name}.mlp.output"] * mlp_g_BD, -1)
    if isinstance(getattr(block, "mlp", None), MLP):
        bias = getattr(block.mlp, "down_bias", None)
        terms["mlp_bias"] = zeros_B if bias is None else mlp_g_BD @ bias[...]
        terms["neurons"] = at[f"{name}.mlp.hidden"] * (mlp_g_BD @ block.mlp.down[...].T)
    return terms

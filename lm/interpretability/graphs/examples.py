"""What a graph's features are, as far as texts show: where they say most, and what they promote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.interpretability.dictionaries import Dictionary
from lm.interpretability.dictionary_page import direct_logits
from lm.models import Transformer, bind
from lm.models.activations import trace

_TEXTS, _BEFORE, _AFTER, _PROMOTED, _ROWS = 4, 20, 8, 8, 8


def examples(
    model: Transformer,
    params: dict[str, jax.Array],
    dictionary: Dictionary,
    features: Sequence[tuple[int, int]],
    rows_NT: np.ndarray,
    spell: Callable[[int], str],
) -> dict[str, dict[str, Any]]:
    """Of features (layer of the model, number): "layer_number" → `texts` and `promotes`.

    Texts are stretches of `rows_NT`, ids, around the tokens at which a feature says most, one of a
    row. Promoted are the tokens whose logits its decoder vectors add most to, past all later layers
    and through the final norm's gains.
    """
    at = {layer: own for own, layer in enumerate(dictionary.layers)}
    own_N, index_N = np.array([(at[layer], index) for layer, index in features], int).T

    @jax.jit
    def said(params, dictionary, rows_BT):
        found = trace(bind(model, params), rows_BT, names=dictionary.sources)
        a_LBTF = dictionary.encode(jnp.stack([found[name] for name in dictionary.sources]))
        return jnp.moveaxis(a_LBTF, -1, 1)[own_N, index_N]

    parts = range(0, len(rows_NT) // _ROWS * _ROWS or len(rows_NT), _ROWS)
    read = [np.asarray(said(params, dictionary, rows_NT[i : i + _ROWS])) for i in parts]
    a_CNT = np.concatenate(read, 1)
    logits_CV = direct_logits(bind(model, params), dictionary, [*zip(own_N, index_N)])
    found = {}
    for (layer, index), logits_V, a_NT in zip(features, logits_CV, a_CNT):
        promoted = [spell(int(one)) for one in np.argsort(-logits_V)[:_PROMOTED]]
        texts = []
        for row in np.argsort(-a_NT.max(1), kind="stable")[:_TEXTS]:
            if a_NT[row].max() > 0:
                centre = int(a_NT[row].argmax())
                part = slice(max(0, centre - _BEFORE), centre + _AFTER)
                tokens = [spell(int(token)) for token in rows_NT[row, part]]
                values = [round(float(value), 4) for value in a_NT[row, part]]
                texts.append({"tokens": tokens, "values": values})
        found[f"{layer}_{index}"] = {"promotes": promoted, "texts": texts}
    return found

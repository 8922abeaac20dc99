"""What the layers of one call share: which keys each query sees, and what positions add."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.models.attention.paged import Paging
from lm.models.config import LayerKind, ModelConfig
from lm.models.positions import alibi_bias, alibi_slopes, relative_bias, rotary_angles
from lm.models.text import Text, visible


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["of"])
@dataclasses.dataclass(frozen=True)
class ScoreBias:
    """What is added to scores as a function of distance alone.

    `of(table, distance [1, T, S])` gives it, [1, H, T, S]; `table` has the heads last, and those of
    one device where several share them. Distance is the key's slot less the query's.
    """

    table: jax.Array
    of: Callable[[jax.Array, jax.Array], jax.Array]


def score_bias(config: ModelConfig, table: jax.Array | None, causal: bool) -> ScoreBias | None:
    """What `config.positions` adds; `table` is what relative positions have learned."""
    if config.positions == "relative":
        of = functools.partial(relative_bias, config=config, bidirectional=not causal)
        return ScoreBias(table, of)
    if config.positions == "alibi":
        return ScoreBias(jnp.asarray(alibi_slopes(config.num_heads)), alibi_bias)
    return None


class Context(NamedTuple):
    """What attention is told besides queries, keys and values."""

    mask_BTS: jax.Array | None  # which keys each query may see
    text: Text | None = None  # the queries'; None in cached decoding
    key_text: Text | None = None  # the keys'
    rotary: tuple[jax.Array, ...] | None = None
    bias: ScoreBias | None = None
    bias_BHTS: jax.Array | None = None  # the same, for every pair
    causal: bool = False  # whether later keys are hidden, unless of a prefix
    # Each query sees this many keys up to its own, and if not causal as many from it on; 0: all.
    window: jax.Array | int = 0
    local: tuple | None = None  # mask, rotary angles and window of local layers
    slot: jax.Array | int = 0  # where in the cache this call's keys go
    valid_BT: jax.Array | None = None  # which tokens are not padding
    memory_BSD: jax.Array | None = None  # the encoder's output, unless the cache has its keys
    across: Context | None = None  # of attention to the encoder's output
    paging: Paging | None = None  # where keys lie in pages; then there is no mask
    query_scale: jax.Array | float = 1.0  # multiplies queries
    sinks_H: jax.Array | None = None  # scores of the layer that join the softmax and read nothing

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        queries: Text,
        keys: Text,
        *,
        causal: bool = True,
        bias: ScoreBias | None = None,
        bias_BHTS: jax.Array | None = None,
        cached: bool = False,
        **fields,
    ) -> Context:
        """Of queries that see keys as `config` says; `fields` are taken as they are.

        Args:
          queries, keys: their slots, segments and prefix; and where queries stand in documents.
          bias, bias_BHTS: added to scores; the latter is made of the former unless given.
          cached: whether keys of a negative slot are empty places of a cache.
        """

        def reach(window: int):
            mask_BTS = visible(queries, keys, causal=causal, window=window)
            if cached:
                mask_BTS &= keys.slots_1T[:, None, :] >= 0
            if config.positions != "rotary":
                return mask_BTS, None, window
            where = queries.positions_BT, config, window > 0, queries.lengths_BT
            return mask_BTS, rotary_angles(*where), window

        if bias is not None and bias_BHTS is None:
            distance_BTS = keys.slots_1T[:, None, :] - queries.slots_1T[:, :, None]
            bias_BHTS = bias.of(bias.table, distance_BTS)
        mask_BTS, rotary, _ = reach(0)
        local = reach(config.window) if config.window else None
        known = {"bias": bias, "bias_BHTS": bias_BHTS, "causal": causal, "local": local}
        return cls(mask_BTS, rotary=rotary, **known, **fields)

    @classmethod
    def of_pages(
        cls,
        config: ModelConfig,
        paging: Paging,
        bias: ScoreBias | None,
        across: Context | None = None,
    ) -> Context:
        """Of tokens whose rows lie in pages, and that see those before them there."""
        positions_BT, lengths_B1 = jnp.maximum(paging.positions_BT, 0), paging.lengths_B1
        if lengths_B1 is None and config.angles_by_length:
            lengths_B1 = positions_BT.max(1, keepdims=True) + 1

        def reach(window: int):
            rotary = None
            if config.positions == "rotary":
                rotary = rotary_angles(positions_BT, config, window > 0, lengths_B1)
            return None, rotary, window

        local = reach(config.window) if config.window else None
        valid_BT = paging.positions_BT >= 0
        known = {"bias": bias, "local": local, "paging": paging, "across": across}
        return cls(None, rotary=reach(0)[1], valid_BT=valid_BT, **known)

    def of_pool(self, layer: jax.Array, pools: tuple, num_layers: int) -> Context:
        """Of one layer of `num_layers` whose keys and values lie in the same two pools."""
        first = layer * (pools[0].shape[0] // num_layers)
        return self._replace(paging=self.paging._replace(first=first))

    def of_layer(self, kind: LayerKind) -> Context:
        """With the mask, angles and window of a layer of this kind, and its queries' scale.

        Fields of the kind are arrays where they differ among the layers of a loop.
        """
        reach, is_local = (self.mask_BTS, self.rotary, self.window), kind.local
        if self.local is not None and is_local is not False:
            reach = self.local if is_local is True else _either(is_local, self.local, reach)
        mask_BTS, rotary, window = reach
        if rotary is not None and kind.rotated is not True:
            still = (jnp.ones_like(rotary[0]), jnp.zeros_like(rotary[1]))  # cosine and sine of 0
            rotary = None if kind.rotated is False else _either(kind.rotated, rotary, still)
        return self._replace(
            mask_BTS=mask_BTS, rotary=rotary, window=window, query_scale=kind.query_scale
        )


def _either(first: jax.Array, one: tuple, other: tuple) -> tuple:
    return jax.tree.map(lambda one, other: jnp.where(first, one, other), one, other)

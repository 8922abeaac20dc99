"""A text as models read it: which document each token is of, and where it stands there."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.parallel.ring import to_zigzag, zigzag_slots


class Text(NamedTuple):
    """Enough to tell which tokens see which without a table of all pairs.

    Tokens may stand in any order, as they do where a ring of devices shares a sequence: slots say
    which come earlier.
    """

    slots_1T: jax.Array  # each token's place in its row, the same in all rows
    positions_BT: jax.Array  # its place in its document, from 0 in each packed one
    rows_B: jax.Array  # each row's number in the whole batch
    segments_BT: jax.Array | None = None  # which document it is of; 0 is padding
    prefix_BT: jax.Array | None = None  # true for tokens that all of their document may see
    filled_BT: jax.Array | None = None  # false for padding, where segments do not say so

    @classmethod
    def of(
        cls,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        rows_B: jax.Array | None = None,
        filled_BT: jax.Array | None = None,
    ) -> Text:
        """Those of `tokens_BT`, one document a row unless said otherwise."""
        rows, length = tokens_BT.shape
        slots_1T = jnp.arange(length, dtype=jnp.int32)[None]
        return cls(
            slots_1T,
            jnp.broadcast_to(slots_1T, tokens_BT.shape) if positions_BT is None else positions_BT,
            jnp.arange(rows, dtype=jnp.int32) if rows_B is None else rows_B,
            segments_BT,
            None if prefix_BT is None else prefix_BT.astype(bool),
            filled_BT,
        )

    def to_zigzag(self) -> Text:
        """Of the same tokens in zig-zag order (`lm.parallel.ring`)."""
        whole = self._replace(slots_1T=None, rows_B=None)
        slots_1T = zigzag_slots(self.slots_1T.shape[1])
        return jax.tree.map(to_zigzag, whole)._replace(slots_1T=slots_1T, rows_B=self.rows_B)

    @property
    def valid_BT(self) -> jax.Array | None:
        """Which tokens are not padding; None: all."""
        return self.filled_BT if self.segments_BT is None else self.segments_BT > 0


def same_document(queries: Text, keys: Text) -> jax.Array:
    """Whether token t of one text is of the document of the same number as token s of another.

    Where a text has no segments, it is all document 1. A boolean [B, T, S].
    """
    segments = [
        jnp.ones_like(text.positions_BT) if text.segments_BT is None else text.segments_BT
        for text in (queries, keys)
    ]
    return segments[0][:, :, None] == segments[1][:, None, :]

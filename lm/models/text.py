"""A text as models read it: which document each token is of, where it stands, and what it sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.parallel.ring import to_zigzag, zigzag_slots


class Text(NamedTuple):
    """Rows of tokens, and enough to tell which of them see which without a table of all pairs.

    Tokens may stand in any order, as they do where a ring of devices shares a sequence: slots say
    which come earlier. `Text.of` fills in what is not given.
    """

    tokens_BT: jax.Array | None = None  # ids
    positions_BT: jax.Array | None = None  # place in its document, from 0 in each packed one
    segments_BT: jax.Array | None = None  # which document it is of; 0 is padding; None: one a row
    types_BT: jax.Array | None = None  # which part of a pair of texts (BERT's segment embedding)
    prefix_BT: jax.Array | None = None  # true for tokens that all of their document may see
    filled_BT: jax.Array | None = None  # false for padding, where segments do not say so
    rows_B: jax.Array | None = None  # each row's number in the whole batch, for dropout
    slots_1T: jax.Array | None = None  # place in its row, the same in all rows
    lengths_BT: jax.Array | None = None  # tokens of its document; None: nothing depends on it

    @classmethod
    def of(cls, tokens_BT: jax.Array, **fields: jax.Array | None) -> Text:
        """Rows of tokens in order, each row one document unless `fields` say otherwise."""
        rows, length = tokens_BT.shape
        text = cls(tokens_BT, **fields)
        slots_1T = jnp.arange(length, dtype=jnp.int32)[None]
        if text.positions_BT is None:
            text = text._replace(positions_BT=jnp.broadcast_to(slots_1T, tokens_BT.shape))
        if text.rows_B is None:
            text = text._replace(rows_B=jnp.arange(rows, dtype=jnp.int32))
        if text.prefix_BT is not None:
            text = text._replace(prefix_BT=text.prefix_BT.astype(bool))
        return text._replace(slots_1T=slots_1T)

    def measured(self) -> Text:
        """With the length of every token's document; tokens must stand in order."""
        if self.segments_BT is None:
            positions_BT = self.positions_BT
            if self.filled_BT is not None:
                positions_BT = jnp.where(self.filled_BT, positions_BT, 0)
            lengths_B1 = positions_BT.max(1, keepdims=True) + 1
            return self._replace(lengths_BT=jnp.broadcast_to(lengths_B1, positions_BT.shape))
        # A document's last token stands before the first of another, and says how long it is.
        ends_BT = jnp.diff(self.segments_BT, axis=1, append=-1) != 0
        last_BT = jnp.where(ends_BT, self.slots_1T, self.slots_1T.shape[1])
        last_BT = jax.lax.cummin(last_BT, axis=1, reverse=True)
        return self._replace(lengths_BT=jnp.take_along_axis(self.positions_BT, last_BT, 1) + 1)

    def to_zigzag(self) -> Text:
        """The same tokens in zig-zag order (`lm.parallel.ring`)."""
        ordered = jax.tree.map(to_zigzag, self._replace(slots_1T=None, rows_B=None))
        return ordered._replace(slots_1T=zigzag_slots(self.slots_1T.shape[1]), rows_B=self.rows_B)

    @property
    def valid_BT(self) -> jax.Array | None:
        """Which tokens are not padding; None: all."""
        return self.filled_BT if self.segments_BT is None else self.segments_BT > 0


def texts(
    architecture: str,
    tokens_BT: jax.Array,
    targets_BT: jax.Array | None = None,
    *,
    source_positions_BS: jax.Array | None = None,
    source_segments_BS: jax.Array | None = None,
    **fields: jax.Array | None,
) -> tuple[Text, Text | None]:
    """The text that a model's head reads, and an encoder-decoder's source, of a model's arguments.

    Raises:
      TypeError: too few or too many texts for the architecture.
    """
    if architecture != "encoder_decoder":
        if targets_BT is not None:
            raise TypeError(f"a model with architecture={architecture!r} reads one text")
        return Text.of(tokens_BT, **fields), None
    if targets_BT is None:
        raise TypeError("an encoder-decoder needs two arguments: source_BS and targets_BT")
    source = Text.of(
        tokens_BT,
        positions_BT=source_positions_BS,
        segments_BT=source_segments_BS,
        rows_B=fields.get("rows_B"),
    )
    return Text.of(targets_BT, **fields), source


def last_places(filled_BT: jax.Array) -> jax.Array:
    """True at the last place of each row that is filled, [B, T]: nowhere where none is."""
    slots_T = jnp.arange(filled_BT.shape[1])
    last_B1 = jnp.max(jnp.where(filled_BT > 0, slots_T, -1), axis=1, keepdims=True)
    return slots_T == last_B1


def both_segments(queries: Any, keys: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """The segments of two texts; where only one has any, the other is all document 1."""
    first, second = queries.segments_BT, keys.segments_BT
    if first is None and second is not None:
        first = jnp.ones((second.shape[0], queries.slots_1T.shape[1]), jnp.int32)
    if second is None and first is not None:
        second = jnp.ones((first.shape[0], keys.slots_1T.shape[1]), jnp.int32)
    return first, second


def visible(
    queries: Any, keys: Any, *, causal: bool, window: int | jax.Array | None = None
) -> jax.Array:
    """Whether query t may see key s: of the same segment and, if `causal`, not later.

    Args:
      queries, keys: each a `Text`, or what has its `slots_1T`, `segments_BT` and `prefix_BT`.
      causal: later keys are hidden, but those of a prefix.
      window: only this many keys up to the query's own are seen, and unless `causal` as many from
        it on; None or 0: all. It may be traced.

    Returns:
      A boolean [B or 1, T, S].
    """
    query, key = queries.slots_1T[:, :, None], keys.slots_1T[:, None, :]
    mask = jnp.ones((1, query.shape[1], key.shape[2]), bool)
    if causal:
        mask = key <= query
        if keys.prefix_BT is not None:
            mask |= keys.prefix_BT[:, None, :].astype(bool)
    if isinstance(window, jax.Array):
        mask &= (window == 0) | (key > query - window)
        if not causal:
            mask &= (window == 0) | (key < query + window)
    elif window:
        mask &= key > query - window
        if not causal:
            mask &= key < query + window
    query_segments, key_segments = both_segments(queries, keys)
    if query_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask

"""Batches on their way to the device while the device works."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from lm.data.batches import Batch, BatchIterator

T = TypeVar("T")


class prefetch_to_device(Iterator[T], Generic[T]):
    """`batches` with `put` applied `depth` of them ahead.

    `put` should start a transfer and return without waiting, as `jax.device_put` does. The state
    is that of the last batch handed out, not of those under way: a checkpoint taken between steps
    resumes with exactly the batches the model has not seen.
    """

    def __init__(self, batches: BatchIterator, put: Callable[[Batch], T], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self._batches = batches
        self._put = put
        self._depth = depth
        self._ahead: collections.deque[tuple[T, dict[str, Any]]] = collections.deque()
        self._state = batches.get_state()
        self._ended = False

    def __next__(self) -> T:
        # The batch about to be handed out is not ahead of the consumer any more.
        self._fill(1)
        if not self._ahead:
            raise StopIteration
        batch, self._state = self._ahead.popleft()
        self._fill(self._depth)
        return batch

    def _fill(self, depth: int) -> None:
        while len(self._ahead) < depth and not self._ended:
            try:
                batch = next(self._batches)
            except StopIteration:
                self._ended = True
                return
            self._ahead.append((self._put(batch), self._batches.get_state()))

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Drops what is under way and continues from `state`."""
        self._ahead.clear()
        self._batches.set_state(state)
        self._state = state
        self._ended = False

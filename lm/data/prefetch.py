"""Batches on their way to the device while the device works."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Stateful(Protocol):
    """An iterator whose position can be saved and set."""

    def __next__(self) -> Any:
        """The next host batch."""

    def get_state(self) -> dict[str, Any]:
        """The position."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position."""


class DevicePrefetch(Iterator[T], Generic[T]):
    """Calls `put` on batches before they are asked for.

    `put` should start a transfer and return without waiting, as `jax.device_put` does. The state
    is that of the last batch handed out, not of those under way: a checkpoint taken between steps
    resumes with exactly the batches the model has not seen.
    """

    def __init__(self, iterator: Stateful, put: Callable[[Any], T], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self._iterator = iterator
        self._put = put
        self._depth = depth
        self._ahead: collections.deque[tuple[T, dict[str, Any]]] = collections.deque()
        self._state = iterator.get_state()
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
                batch = next(self._iterator)
            except StopIteration:
                self._ended = True
                return
            self._ahead.append((self._put(batch), self._iterator.get_state()))

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Drops what is under way and continues from `state`."""
        self._ahead.clear()
        self._iterator.set_state(state)
        self._state = state
        self._ended = False


def prefetch_to_device(
    iterator: Stateful, put: Callable[[Any], T], depth: int = 2
) -> DevicePrefetch[T]:
    """`iterator` with `put` applied `depth` batches ahead; see `DevicePrefetch`."""
    return DevicePrefetch(iterator, put, depth)

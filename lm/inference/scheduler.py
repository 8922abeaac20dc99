"""Which requests are worked on, and with which pages: first come, first served.

A text waits, then reads its prompt, then draws. What is admitted first never waits for what comes
later: where pages run out, the newest text leaves its own to an older one. What its pages held is
kept by the host and put back later, bit for bit.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lm.inference.pages import Pages, names
from lm.inference.requests import Request


@dataclasses.dataclass(eq=False)
class Text:
    """A request under way: the window of ids that the model reads, and where it stands."""

    number: int  # in the order of arrival
    request: Request
    ids: list[int]  # the window: what was read and what was drawn, the last one drawn included
    source: tuple[int, ...] = ()  # what an encoder reads
    grammar: Any = None  # its own state of the request's
    drawn: int = 0  # tokens, in all
    window_drawn: int = 0  # those of them that stand in the window
    slot: int | None = None  # while it is admitted
    begun: bool = False  # whether its slot holds what it needs besides pages
    cached: int = 0  # the window's first tokens, whose keys and values are in pages
    reading: bool = True  # its window is still read; else it draws
    pages: list[int] = dataclasses.field(default_factory=list)  # 0: given up, out of sight
    names: list[bytes] = dataclasses.field(default_factory=list)  # of the window's whole chunks
    saved: Any = None  # what its pages held when others needed them
    finish: str | None = None
    submitted: float = 0.0  # seconds
    latest: float | None = None  # when it got its last token


class Scheduler:
    """The texts under way and who holds which pages.

    Args:
      pages: all there are.
      slots: how many texts may be admitted at once.
      page_size, chunk: tokens of a page, and of what is read at once.
      reach: how far back the farthest-sighted layer sees; 0: to the beginning.
      save: takes a text's pages to the host; `restore` puts what it returned into others.
    """

    def __init__(
        self,
        pages: Pages,
        slots: int,
        page_size: int,
        chunk: int,
        reach: int,
        save: Callable[[Sequence[int]], Any],
        restore: Callable[[Sequence[int], Any], None],
    ):
        self.pages, self.slots, self.page_size, self.chunk = pages, slots, page_size, chunk
        self.reach, self._save, self._restore = reach, save, restore
        self.waiting: collections.deque[Text] = collections.deque()
        self.admitted: list[Text] = []  # by arrival
        self._slots = list(range(slots))
        self.preemptions = self.found = 0  # how often; tokens of prompts that were in pages already

    def admit(self) -> None:
        """Admits who waits, while there are slots and pages for what they read or held."""
        while self.waiting and len(self.admitted) < self.slots:
            text = self.waiting[0]
            if text.saved is None:
                # One page more than it reads: what is admitted must not be in the way at once.
                wanted = len(text.ids) // self.page_size + 1
                pages = self.pages.take(wanted if self.admitted else 0)
                if pages is None:
                    return
                self.pages.release(pages)
            else:
                wanted = sum(page > 0 for page in text.pages)
                pages = self.pages.take(wanted + 1 if self.admitted else wanted)
                if pages is None:
                    return
                pages, spare = pages[:wanted], pages[wanted:]
                self.pages.release(spare)
                self._restore(pages, text.saved)
                new = iter(pages)
                text.pages = [page and next(new) for page in text.pages]
                text.saved = None
            self.waiting.popleft()
            self.admitted.append(text)
            text.slot = self._slots.pop()
            self.admitted.sort(key=lambda text: text.number)

    def find(self, text: Text) -> None:
        """Skips the chunks of a prompt that others have read; its last token is always read."""
        while text.cached % self.chunk == 0 and text.cached + self.chunk < len(text.ids):
            index = text.cached // self.chunk
            if index >= len(text.names):
                return
            pages = self.pages.find(text.names[index])
            if pages is None:
                return
            text.pages += pages
            text.cached += self.chunk
            self.found += self.chunk
            self.roll(text)

    def keep(self, text: Text) -> None:
        """Remembers the chunk that a text has just read, if it is a whole one of a prompt."""
        index, size = text.cached // self.chunk - 1, self.chunk // self.page_size
        if text.cached % self.chunk or index >= len(text.names):
            return
        pages = text.pages[index * size : (index + 1) * size]
        before = text.names[index - 1] if index else b""
        if all(pages):
            self.pages.keep(text.names[index], before, pages)

    def copy(self, text: Text, other: Text, part: bool) -> tuple[int, int] | None:
        """Has another text hold the pages that a text has read, and has it stand where this does.

        Args:
          part: whether the last page is not full, so that the other needs one of its own for it.

        Returns:
          The last page and the one to copy it to, page 0 where there is nothing to copy; None where
          no page was free, and nothing has changed.
        """
        own = self.pages.take(1) if part else []
        if own is None:
            return None
        self.drop(other)
        shared = text.pages[: len(text.pages) - 1] if part else text.pages
        self.pages.hold([page for page in shared if page])
        other.pages, other.cached = [*shared, *own], text.cached
        self.found += text.cached
        return (text.pages[-1], own[0]) if part else (0, 0)

    def name(self, text: Text, root: bytes) -> None:
        """Gives names to the chunks of a prompt, which others may have read; see `names`."""
        text.names = list(names(root, text.ids, self.chunk))

    def room(self, text: Text, length: int) -> bool:
        """Gives an admitted text pages for `length` tokens; whether it is still admitted.

        Where there are too few, the newest text leaves, which may be this one.
        """
        while True:
            wanted = -(-length // self.page_size) - len(text.pages)
            pages = self.pages.take(max(wanted, 0))
            if pages is not None:
                text.pages += pages
                return True
            newest = self.admitted[-1]
            self.preempt(newest)
            if newest is text:
                return False

    def preempt(self, text: Text) -> None:
        """Makes a text wait, before all that came later."""
        held = [page for page in text.pages if page]
        text.saved = self._save(held) if held else None
        self.pages.release(held)
        if text.saved is None:
            text.pages = []
        self._leave(text)
        self.waiting.appendleft(text)
        self.waiting = collections.deque(sorted(self.waiting, key=lambda text: text.number))
        self.preemptions += 1

    def roll(self, text: Text) -> None:
        """Gives up the pages that no layer will see again."""
        if not self.reach:
            return
        for index in range(max(text.cached - self.reach + 1, 0) // self.page_size):
            if index < len(text.pages) and text.pages[index]:
                self.pages.release([text.pages[index]])
                text.pages[index] = 0

    def restart(self, text: Text, ids: Sequence[int]) -> None:
        """Has a text read another window, or its own anew."""
        self.drop(text)
        text.ids = list(ids)
        text.window_drawn = min(text.window_drawn, len(ids))
        text.names = []

    def drop(self, text: Text) -> None:
        """Gives up all of a text's pages, or what was saved of them."""
        if text.saved is None:
            self.pages.release([page for page in text.pages if page])
        text.pages, text.saved, text.cached, text.reading = [], None, 0, True
        text.begun = False

    def remove(self, text: Text) -> None:
        """Forgets a text that has ended."""
        self.drop(text)
        if text in self.admitted:
            self._leave(text)
        else:
            self.waiting.remove(text)

    def _leave(self, text: Text) -> None:
        self.admitted.remove(text)
        self._slots.append(text.slot)
        text.slot, text.begun = None, False

"""Who holds which page of the cache: counted, shared by prefix, and taken back from who waits.

Pages that hold a whole chunk of a prompt are also kept for later prompts that start alike (Kwon et
al. 2023, §4.4), under a name that follows from all tokens up to there and from whose keys they are;
the chunk used least recently is forgotten first, and never one before those that continue it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass
class _Kept:
    """The pages of a chunk that somebody has read."""

    pages: list[int]
    before: bytes  # the name of the chunk before it
    after: int = 0  # how many kept chunks continue it


class Pages:
    """The pages 1 … `number` - 1; page 0 belongs to nobody (`lm.models.attention.paged`)."""

    def __init__(self, number: int):
        self.number = number
        self._free = list(range(number - 1, 0, -1))
        self._holders = np.zeros(number, np.int64)
        self._kept: collections.OrderedDict[bytes, _Kept] = collections.OrderedDict()

    @property
    def held(self) -> int:
        """How many pages somebody holds, prompts that are kept not counted."""
        kept = np.zeros(self.number, np.int64)
        for chunk in self._kept.values():
            kept[chunk.pages] = 1
        return int((self._holders > kept).sum())

    @property
    def used(self) -> int:
        """How many pages are not free, kept ones included."""
        return self.number - 1 - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many pages, each held once; None where there are too few, and then none is taken."""
        while len(self._free) < count:
            if not self._forget():
                return None
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] = 1
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """Adds one hold of each."""
        self._holders[list(pages)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold of each."""
        for page in pages:
            self._holders[page] -= 1
            assert self._holders[page] >= 0, "a page was released by one who did not hold it"
            if self._holders[page] == 0:
                self._free.append(page)

    def find(self, name: bytes) -> list[int] | None:
        """The pages of the chunk of that name, now held once more; None where it is not kept."""
        if name not in self._kept:
            return None
        self._kept.move_to_end(name)
        pages = self._kept[name].pages
        self.hold(pages)
        return list(pages)

    def keep(self, name: bytes, before: bytes, pages: Sequence[int]) -> None:
        """Remembers a chunk that has been read into `pages`, behind the chunk `before`.

        Unless that is forgotten: nobody would find this one.
        """
        if name in self._kept or (before and before not in self._kept):
            return
        self._kept[name] = _Kept(list(pages), before)
        self.hold(pages)
        if before:
            self._kept[before].after += 1

    def forget_all(self) -> None:
        """Forgets every prompt that was read: they are of other weights."""
        while self._forget(even_held=True):
            pass

    def _forget(self, even_held: bool = False) -> bool:
        """Forgets the chunk used least recently of those that nobody holds; whether there was."""
        for name, chunk in self._kept.items():
            if chunk.after == 0 and (even_held or (self._holders[chunk.pages] == 1).all()):
                del self._kept[name]
                if chunk.before:
                    self._kept[chunk.before].after -= 1
                self.release(chunk.pages)
                return True
        return False


def names(root: bytes, ids: Sequence[int], chunk: int) -> Iterator[bytes]:
    """A name for each whole chunk of `ids`: of it, of all before it, and of `root`."""
    name = root
    for start in range(0, len(ids) - chunk + 1, chunk):
        part = np.array(ids[start : start + chunk], np.int32).tobytes()
        name = hashlib.blake2b(name + part, digest_size=16).digest()
        yield name

"""What a corpus is, whatever holds it."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator
from typing import Any

from lm.config import ConfigError
from lm.data.config import DataConfig
from lm.data.files import CorpusReport


class Source(abc.ABC):
    """One corpus: a fixed sequence of documents, or of pairs of documents.

    Attributes:
      path: its name, which the config field `field` gives.
      config: how it is read and split.
      pairs: whether each item is a source and its target, not one document.
      has_held_out: whether it has records of its own to validate on; see `records`.
    """

    pairs = False
    has_held_out = False

    def __init__(self, path: str, config: DataConfig, field: str):
        self.path, self.config, self.field = path, config, field

    @abc.abstractmethod
    def items(self, report: CorpusReport) -> Iterator[tuple[str, ...]]:
        """Yields (document,) or (source, target), in a fixed order.

        What is left out is noted in `report`.
        """

    @property
    def files(self) -> list[str]:
        """The files whose content the fingerprint covers."""
        return []

    @property
    def notes(self) -> list[str]:
        """What is worth knowing about the whole: for each thing the rest of a line after `path`."""
        return []

    def records(self, report: CorpusReport, held_out: bool = False) -> Iterator[tuple[str, Any]]:
        """Yields what its lines hold, such as conversations, each after the place where it stands.

        With `held_out` those to validate on, of a corpus that has some of its own
        (`has_held_out`).

        Raises:
          ConfigError: a corpus of texts.
        """
        raise ConfigError(
            f"{self.field}={self.path!r} holds texts, and conversations are needed: give files of "
            "JSON Lines, or a generated corpus such as 'storyworld_instructions'"
        )

    def documents(self, report: CorpusReport) -> Iterator[str]:
        """Yields the documents, those of a pair one after the other."""
        return itertools.chain.from_iterable(self.items(report))

    @abc.abstractmethod
    def fingerprint(self, sidecar: str | None = None) -> dict[str, Any]:
        """What the documents depend on, as JSON: equal fingerprints mean equal documents.

        `sidecar` may remember file hashes between calls (see `storage.content_hashes`).
        """

    def parts(self, size: int) -> list[Source]:
        """This corpus as consecutive parts of about `size` bytes, as far as it can be cut.

        Their items, one part after the other, are those of the whole.
        """
        return [self]

"""What was read of a corpus, and what was left out and why."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from lm.config import ConfigError, printable
from lm.data.config import DataConfig

LISTED = 20  # skipped items that are named; the others are counted


class Skipped(NamedTuple):
    """A file, or a line or record of one, that was left out."""

    file: str
    reason: str
    unit: str = ""  # "line" or "record"; "" for all of the file
    number: int = 0  # of the line or record, from 1

    @property
    def name(self) -> str:
        """The file and the place in it."""
        file = printable(self.file)
        return f"{file} {self.unit} {self.number}" if self.unit else file


class RefusedError(ConfigError):
    """Something is bad that `on_bad_file` says to refuse."""

    def __init__(self, skipped: Skipped):
        super().__init__(
            f"data.on_bad_file='refuse' and {skipped.name} is bad: {skipped.reason}; "
            "remove it or set data.on_bad_file='skip'"
        )
        self.skipped = skipped

    def __reduce__(self) -> tuple[Any, ...]:
        return RefusedError, (self.skipped,)


@dataclasses.dataclass
class Tally:
    """What later spans of a file depend on in one that was read.

    Attributes:
      lines: lines in it.
      records: records in it.
      first_good: the number of the first that had its text; 0: none had.
      doubt: what is wrong with the file if none of its first records has its text.
    """

    lines: int = 0
    records: int = 0
    first_good: int = 0
    doubt: str = ""


@dataclasses.dataclass
class CorpusReport:
    """What was read and what was left out, and why.

    Attributes:
      num_documents: documents read, before any split.
      skipped: what was left out.
      notes: decisions that the config leaves to the corpus, each the rest of a line after its path.
      unlisted: how many more were left out that `skipped` does not hold.
      tally: of the span that was read last.
    """

    num_documents: int = 0
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    unlisted: int = 0
    tally: Tally = dataclasses.field(default_factory=Tally)

    @property
    def num_skipped(self) -> int:
        """How many files, lines and records were left out."""
        return len(self.skipped) + self.unlisted

    def lines(self, most: int = LISTED) -> list[str]:
        """One line per skipped item, at most `most` of them, then one line for the rest."""
        lines = [f"skipped {skipped.name}: {skipped.reason}" for skipped in self.skipped[:most]]
        if self.num_skipped > len(lines):
            more = self.num_skipped - len(lines)
            lines.append(f"skipped {more} more, {self.num_skipped} in all")
        return lines


class BadFileError(Exception):
    """A file or record that cannot be used; the message is the reason."""


def reject(
    file: str,
    reason: str,
    config: DataConfig,
    report: CorpusReport,
    unit: str = "",
    number: int = 0,
) -> None:
    """Notes in `report` what is left out (see `Skipped`), or raises if it is to be refused."""
    skipped = Skipped(file, reason, unit, number)
    if config.on_bad_file == "refuse":
        raise RefusedError(skipped)
    report.skipped.append(skipped)

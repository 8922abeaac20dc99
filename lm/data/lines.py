"""Generated conversations, preferences, prompts and short texts, by name."""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.config import ConfigError
from lm.data import algorithmic, tasks
from lm.data.config import DataConfig
from lm.data.files import CorpusReport
from lm.data.source import Source

# Name → a function (seed, number, held_out) → what a line of a file would hold. Behind a function's
# name may stand what it is given before all else.
LINES = {
    "storyworld_instructions": "lm.data.storyworld.instructions.conversation",
    "storyworld_preferences": "lm.data.storyworld.instructions.preference",
    "storyworld_prompts": "lm.data.storyworld.instructions.prompt",
    "random_walks": "lm.data.random_walks.example",
    "random_walks_prompts": "lm.data.random_walks.prompt",
    "pronouns": "lm.data.pronouns.line",
    "reversal": "lm.data.tasks.fact",
    **{name: f"lm.data.tasks.line {name}" for name in tasks.NAMES},
    **{name: f"lm.data.algorithmic.equation {name}" for name in algorithmic.ADDITIONS},
    **{name: f"lm.data.algorithmic.text {name}" for name in algorithmic.PERIODS},
}


class Lines(Source):
    """What a function of `LINES` makes of the numbers 0, 1, …"""

    def __init__(self, path: str, config: DataConfig, field: str, seed: int):
        super().__init__(path, config, field)
        self.seed = seed
        self.has_held_out = path not in algorithmic.PERIODS
        function, *given = LINES[path].split()
        module, _, name = function.rpartition(".")
        self._module = importlib.import_module(module)
        self._line = functools.partial(getattr(self._module, name), *given)

    def items(self, report: CorpusReport) -> Iterator[tuple[str, ...]]:
        """The texts, where they are some; else raises ConfigError."""
        if self.path in algorithmic.PERIODS:
            for number in range(self.config.num_documents):
                report.num_documents += 1
                yield (self._line(self.seed, number),)
            return
        raise ConfigError(
            f"{self.field}={self.path!r} holds conversations, and texts are needed: it is for "
            "objectives such as 'sft'"
        )

    def records(self, report: CorpusReport, held_out: bool = False) -> Iterator[tuple[str, Any]]:
        """See `Source.records`."""
        if self.path in algorithmic.PERIODS:
            yield from super().records(report)
        count = self.config.num_documents
        if held_out:
            count = max(1, round(count * self.config.validation_fraction))
        for number in range(count):
            report.num_documents += 1
            yield f"{self.path} number {number}", self._line(self.seed, number, held_out)

    def fingerprint(self, sidecar: str | None = None) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        file = Path(self._module.__file__)
        package = file.parent if file.parent != Path(__file__).parent else file
        sources = sorted(package.glob("*.py")) if package.is_dir() else [package]
        return {
            "corpus": self.path,
            "generator": hashlib.blake2b(b"".join(f.read_bytes() for f in sources)).hexdigest(),
            "seed": self.seed,
            "num_documents": self.config.num_documents,
        }

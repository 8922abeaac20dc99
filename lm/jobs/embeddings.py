"""The embedding space of a model, over its training: one page."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import ml_collections
import numpy as np

from lm.config import Path, Positive, Seed, check, view
from lm.evaluation.card import Section, made
from lm.evaluation.leaning import PAIRS, STORY_SETS
from lm.evaluation.page import made_by, write_report
from lm.interpretability import embeddings
from lm.runs.sources import open_source

# Every third word of the stories: more would not fit on a map.
_GROUPS = tuple(words[:6] for one in STORY_SETS for words in one[1:]) + tuple(zip(*PAIRS))


@dataclasses.dataclass(frozen=True)
class EmbeddingsJob:
    """Whose embeddings, and what is asked of them."""

    job: str = "embeddings"
    seed: Seed = 0  # of UMAP
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    every: Positive = 1  # of the kept checkpoints one in so many; the last one always
    table: Literal["input", "output"] = "input"  # token embedding, or output head
    words: tuple[str, ...] = ()  # groups, each "king queen prince"; (): words of the stories
    analogies: tuple[str, ...] = ()  # such as man:king::woman:queen; (): she : he and the like
    neighbours: Positive = 6  # of each word
    moments: Positive = 4  # of training that maps are drawn of
    shuffles: Positive = 5000  # of association tests

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        for one in self.analogies:
            embeddings.parse_analogy(one, f"{prefix}.analogies")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Section]:
    """Writes `workdir/embeddings.html` and `embeddings.json`.

    Returns:
      The page's sections by name.

    Raises:
      ConfigError: no such run, or one without a tokenizer.
    """
    job = view(EmbeddingsJob, config)
    source = open_source(job.init_from)
    tokenizer = source.tokenizer
    check(tokenizer is not None, f"config.init_from={job.init_from!r} has no tokenizer")
    own = job.table == "output" and not source.model.tie_embeddings and source.model.has_output_head
    name, size = "head" if own else "embedding.tokens", tokenizer.vocab_size
    tables = {
        step: np.asarray(source.parameters(step)[1][name], np.float32)[:size]
        for step in source.kept(job.every)
    }
    last = [*tables.values()][-1]
    groups = [group.split() for group in job.words] or _GROUPS
    asked = [embeddings.parse_analogy(one, "config.analogies") for one in job.analogies]
    near = [word for group in groups for word in (group if job.words else group[:3])]

    def words() -> embeddings.Words:
        return embeddings.Words.of(tokenizer)

    parts = {
        "neighbours": lambda: embeddings.near(words(), last, tokenizer, near, job.neighbours),
        "analogies": lambda: embeddings.analogies(
            words(), last, tokenizer, asked or embeddings.usual_analogies()
        ),
        "shape": lambda: embeddings.shapes(tables),
        "map": lambda: embeddings.drawn(tables, tokenizer, groups, job.moments, job.seed),
        "bias": lambda: embeddings.leaning(tables, tokenizer, job.shuffles),
    }
    sections, left_out = made(parts)
    facts = {
        "model": source.directory.resolve().name,
        "directory": str(source.directory),
        "table": f"{name}, {len(last):,} tokens × {last.shape[1]}",
        "checkpoints": ", ".join(f"{step:,}" for step in tables),
    }
    about = "Its embedding space: what is near what, how it is filled, and how that came about."
    path = write_report(
        pathlib.Path(workdir).expanduser() / "embeddings.html",
        f"{facts['model']}: embeddings",
        about,
        facts,
        made_by("configs/interpret/embeddings.py", job),
        [*sections.values()],
        left_out,
    )
    print(f"page: {path}")
    return sections

"""Tokenises a corpus too large for one machine, on Apache Beam, for training to find."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time

import ml_collections
import rich
from rich import box
from rich.table import Table

from lm.config import Path, Seed, to_dict, view
from lm.data import DataConfig, documents
from lm.data.parallel_tokenize import BeamConfig, Made, check_runner, prepare
from lm.files import write_json
from lm.runs.directory import Claim, check_place, saved_run
from lm.runs.inherited import Origin
from lm.tokenizers import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class CorpusJob:
    """What to tokenise, with what, and who does it. The sections are those of a training run."""

    job: str = "corpus"
    seed: Seed = 0  # of generated corpora
    init_from: Path = ""  # take the tokenizer of this run, or Hugging Face directory
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    beam: BeamConfig = dataclasses.field(default_factory=BeamConfig)


def run(config: ml_collections.ConfigDict, workdir: str) -> list[Made]:
    """Fills the token cache of a `CorpusJob`; run again, it goes on where it was.

    Writes into `workdir`: `tokenizer/`, `config.json`, and `corpus.json` with what was made.

    Raises:
      ConfigError: a field that makes no sense, a corpus that cannot be read, a failed pipeline.
    """
    job = view(CorpusJob, config)
    check_runner(job.beam)
    directory = pathlib.Path(workdir)
    wanted = to_dict(job)
    del wanted["beam"]  # another runner may go on
    check_place(directory)
    texts = functools.partial(documents, job.data, "train", job.seed)
    origin = Origin(directory, saved_run(directory), job.init_from)
    tokenizer = origin.tokenizer(job.tokenizer, texts)
    Claim(directory, wanted, to_dict(CorpusJob()), tokenizer).write()
    print(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    began = time.perf_counter()
    made = prepare(job.data, tokenizer, job.seed, job.beam, print)
    seconds = time.perf_counter() - began
    write_json(directory / "corpus.json", [dataclasses.asdict(corpus) for corpus in made])
    rich.print(_table(made))
    num_bytes = sum(split["num_bytes"] for corpus in made for split in corpus.splits.values())
    print(f"{num_bytes / 1e6:,.1f} MB in {seconds:.1f} s")
    return made


def _table(made: list[Made]) -> Table:
    table = Table(title="token cache", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("corpus")
    for name in ("split", "documents", "bytes", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for corpus in made:
        for name, split in corpus.splits.items():
            counts = (split[what] for what in ("num_documents", "num_bytes", "num_tokens"))
            table.add_row(corpus.path, name, *(f"{count:,}" for count in counts))
    return table

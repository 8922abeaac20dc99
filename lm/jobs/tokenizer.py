"""Trains several kinds of tokenizer on one corpus and compares them on held-out text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import ml_collections
import rich
from rich import box
from rich.table import Table
from rich.text import Text

from lm.config import Bytes, Seed, check, to_dict, view
from lm.data.config import DataConfig
from lm.data.corpora import documents
from lm.files import write_json
from lm.tokenizers import KINDS, Tokenizer, TokenizerConfig, as_tiktoken, train
from lm.tokenizers.compare import Row, compare, num_bytes
from lm.tokenizers.config import pattern
from lm.tokenizers.explain import explanation


@dataclasses.dataclass(frozen=True)
class TokenizerJob:
    """Which tokenizers to train, on what, and what to show."""

    job: str = "tokenizer"
    seed: Seed = 0  # for generated corpora
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    # Shared by the kinds below, but for its `kind`.
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)

    # The kinds to compare. "tiktoken" is the trained "bpe" with its merges written as ranks. Empty:
    # only `tokenizer` itself.
    kinds: tuple[Literal[tuple(k for k in KINDS if k != "huggingface")], ...] = (
        "char",
        "byte",
        "bpe",
        "tiktoken",
        "wordpiece",
        "sentencepiece_unigram",
        "sentencepiece_bpe",
    )
    heldout_bytes: Bytes = 1_000_000  # compare on at most this much validation text

    # Show how each tokenizer cuts this text, and for BPE the merges that build it, step by step.
    # Nearly all words in text follow a space, and with it are other tokens: " together".
    word: str = ""

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(
            len(set(self.kinds)) == len(self.kinds), f"{prefix}.kinds={self.kinds!r} repeats a kind"
        )


def run(config: ml_collections.ConfigDict, workdir: str) -> list[Row]:
    """Trains the tokenizers of a `TokenizerJob`, saves them, and prints how they compare.

    Writes into `workdir`: one directory per kind, `tokenizers.json` with the table, `config.json`.

    Raises:
      ConfigError: a field that makes no sense, or a corpus without text to train or compare on.
    """
    job = view(TokenizerJob, config)
    sample = list(_take(documents(job.data, "train", job.seed), job.tokenizer.train_bytes))
    heldout = list(_take(documents(job.data, "validation", job.seed), job.heldout_bytes))
    check(
        bool(heldout),
        f"config.data.path={job.data.path!r} leaves no validation text: raise "
        "config.data.validation_fraction",
    )
    directory = Path(workdir).expanduser()
    shown = [f"{len(t):,} documents, {num_bytes(t) / 1e6:.2f} MB" for t in (sample, heldout)]
    rich.print(f"training on {shown[0]}, comparing on {shown[1]} of held-out text")
    rows, tokenizers = [], []
    for tokenizer, seconds in _trained(job, sample):
        tokenizer.save(directory / tokenizer.kind)
        tokenizers.append(tokenizer)
        rows.append(compare(tokenizer, heldout, seconds))
    write_json(directory / "tokenizers.json", [dataclasses.asdict(row) for row in rows])
    write_json(directory / "config.json", to_dict(job))
    rich.print(_table(rows))
    for row in rows:
        if not row.lossless:
            rich.print(Text(f"{row.kind} does not keep every text: {row.lossy_because}"))
    for tokenizer in tokenizers if job.word else ():
        rich.print(Text(f"\n{tokenizer.kind}: {job.word!r}", style="bold"))
        rich.print(Text("\n".join(explanation(tokenizer, job.word))))
    rich.print(Text(f"saved in {directory}"))
    return rows


def _trained(job: TokenizerJob, sample: list[str]) -> Iterator[tuple[Tokenizer, float]]:
    """Each tokenizer of the job with the seconds its training took."""
    bpe: tuple[Tokenizer, float] | None = None
    for kind in job.kinds if job.kinds and not job.tokenizer.path else (job.tokenizer.kind,):
        start = time.perf_counter()
        if kind == "tiktoken" and not job.tokenizer.path:
            settings = dataclasses.replace(job.tokenizer, kind="bpe")
            tokenizer, seconds = bpe or (train(settings, sample), 0.0)
            start -= seconds
            tokenizer = as_tiktoken(
                tokenizer, pattern(settings.pattern, "config.tokenizer.pattern")
            )
        else:
            tokenizer = train(dataclasses.replace(job.tokenizer, kind=kind), sample)
        result = tokenizer, time.perf_counter() - start
        bpe = result if kind == "bpe" else bpe
        yield result


def _take(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until they hold `limit` bytes; at least one."""
    for text in texts:
        yield text
        limit -= num_bytes([text])
        if limit <= 0:
            return


def _table(rows: list[Row]) -> Table:
    table = Table(title="tokenizers on held-out text", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for name in ("vocab", "bytes/\ntoken", "train\ns", "encode\nMB/s", "round\ntrip", "lossless"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.kind,
            f"{row.vocab_size:,}",
            f"{row.bytes_per_token:.2f}",
            f"{row.train_seconds:.2f}",
            f"{row.encode_mb_per_second:.1f}",
            f"{row.round_trip_rate:.1%}",
            "yes" if row.lossless else "no",
        )
    return table

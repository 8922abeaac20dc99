"""What a run reads and how it is cut into batches."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from lm.config import (
    AboveZero,
    Bounds,
    Count,
    Path,
    Positive,
    Share,
    ShareBelowOne,
    Size,
    SizeOrZero,
    check,
)

OBJECTIVES = ("causal", "masked", "span_corruption", "seq2seq", "prefix")
# Objectives that read conversations, and which of their forms (see `lm.data.conversations`).
CONVERSATIONAL = {
    **dict.fromkeys(
        ("sft", "distillation"), ("messages", "alpaca", "prompt_response", "preference")
    ),
    **dict.fromkeys(("reward", "dpo", "orpo"), ("preference",)),
    "kto": ("labelled", "preference"),
}
OBJECTIVES += (*CONVERSATIONAL,)
# How a line writes a conversation; see `lm.data.conversations`.
FORMS = ("messages", "alpaca", "prompt_response", "preference", "labelled", "prompts")


@dataclasses.dataclass(frozen=True)
class CorruptionConfig:
    """The `data.corruption` section: what masked and span-corruption objectives hide."""

    rate: Annotated[float, Bounds(0, 1, "()")] = 0.15  # share of tokens that are hidden
    mask_share: Share = 0.8  # masked: share of the hidden ones that the mask token stands for, ...
    random_share: Share = 0.1  # ... and a random token; the rest are shown as they are
    whole_words: bool = False  # masked: hide whole words, not single tokens
    # span corruption: mean number of tokens in a hidden span
    span_length: Annotated[float, Bounds(1)] = 3.0

    def validate(self, prefix: str = "config.data.corruption") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        total = self.mask_share + self.random_share
        check(
            total <= 1 + 1e-9,
            f"{prefix}.mask_share={self.mask_share!r} and random_share={self.random_share!r} must "
            f"not be more than 1 together, and are {total:g}",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section of a config.

    A path is `storyworld` (generated stories, the default), `translation` (generated pairs of an
    English sentence and its translation into an invented language), `stdlib` (source and
    documentation of the running Python), `hf:NAME[:CONFIG]` (a Hugging Face dataset by name or
    directory), or a local file, directory or glob of text, .json, .jsonl (each also .gz, .zst, .bz2
    or .xz) or .parquet files. With two names in `text_field` their records are pairs of a source
    and a target, and so are the lines of .tsv files.
    """

    # One corpus, or several to mix: a tuple, or names with commas between them.
    path: Path | tuple[Path, ...] = "storyworld"
    weights: tuple[AboveZero, ...] = ()  # share of rows per path; empty: every row once per epoch
    # The field of JSON, Parquet and Hugging Face records that is read. Two, such as
    # ("source", "target") or "source,target", make a corpus of pairs.
    text_field: str | tuple[str, ...] = "text"
    # documents (or pairs) taken from an unlimited or streaming corpus
    num_documents: Positive = 50_000
    encoding: str = "utf-8"  # of text files
    # What stands between the documents of a plain text file, such as "<|endoftext|>"; \n and \t in
    # it are a line break and a tab. "": a file is one document.
    document_separator: str = ""
    # binary, mis-encoded or empty files: skip counts them
    on_bad_file: Literal["skip", "refuse"] = "skip"

    # "hash": a document's own text (a pair's source) decides, so equal texts never straddle the
    # splits. "position": the last part of the corpus, counted in characters, is held out; also
    # where "hash" has too few documents to choose from (fewer than 1 / validation_fraction).
    split: Literal["hash", "position"] = "hash"
    validation_fraction: ShareBelowOne = 0.05  # share held out; 0 for none
    validation_path: Path | tuple[Path, ...] = ""  # a corpus of its own to validate on, instead

    batch_size: Size = 32  # sequences in a batch, over all hosts
    even_batch: bool = False  # raise batch_size to a multiple of the devices that share it
    # Tokens in a sequence: of the encoder's in span corruption, of the decoder's in seq2seq.
    block_size: Size = 256
    source_length: SizeOrZero = 0  # seq2seq: tokens in a sequence of the encoder; 0: block_size
    # seq2seq: ids in front of each source and behind its end-of-text, and what its target begins
    # after, of which but the first are learnt, (): begin-of-text. A translator's languages.
    source_before: tuple[Count, ...] = ()
    source_after: tuple[Count, ...] = ()
    target_start: tuple[Count, ...] = ()
    # seq2seq: pairs longer than that: drop counts them
    long_pairs: Literal["refuse", "drop"] = "refuse"
    # Conversations: how lines write them (`lm.data.conversations`); "auto": as the first does.
    format: Literal["auto", *FORMS] = "auto"
    # Conversations longer than `block_size`: cut loses their ends, and those whose every word to
    # learn is lost are dropped; both are counted.
    long_conversations: Literal["cut", "drop", "refuse"] = "cut"
    corruption: CorruptionConfig = dataclasses.field(default_factory=CorruptionConfig)
    packing: Literal["concat", "best_fit", "none"] = "concat"  # none: one document a row
    end_of_text: bool = True  # documents end with end-of-text; False: one stream, no separators
    shuffle: bool = True  # visit training rows in a new random order each epoch
    random_offset: bool = True  # "concat": cut training windows at other places each epoch
    epochs: Positive | None = None  # passes over the training rows; None for no limit

    cache_dir: Path = ""  # tokenised corpora; "": $LM_CACHE_DIR, else ~/.cache/lm/tokens
    prefetch: SizeOrZero = 8  # batches prepared ahead on the host; 0 for none
    # threads that prepare them; 0 prepares in the consumer's thread
    num_threads: Annotated[int, Bounds(0, 1024)] = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return _as_tuple(self.path, _divided)

    @property
    def text_fields(self) -> tuple[str, ...]:
        """`text_field` as a tuple: one name, or those of a pair's source and target."""
        return _as_tuple(self.text_field, lambda name: name.split(","))

    @property
    def validation_paths(self) -> tuple[str, ...]:
        """`validation_path` as a tuple, empty when validation is a split of `path`."""
        return _as_tuple(self.validation_path, _divided)

    @property
    def separator(self) -> str:
        """`document_separator` with its escapes resolved."""
        return self.document_separator.replace("\\n", "\n").replace("\\t", "\t")

    def validate(self, prefix: str = "config.data") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.paths), f"{prefix}.path={self.path!r} names no corpus")
        if self.weights:
            check(
                len(self.weights) == len(self.paths),
                f"{prefix}.weights={self.weights!r} must have one number for each of the "
                f"{len(self.paths)} corpora in {prefix}.path={self.path!r}",
            )
        check(
            len(self.text_fields) in (1, 2),
            f"{prefix}.text_field={self.text_field!r} must name a field, or two for pairs",
        )
        known = False
        with contextlib.suppress(LookupError, ValueError):
            known = "a".encode(self.encoding).decode(self.encoding) == "a"
        check(known, f"{prefix}.encoding={self.encoding!r} is not an encoding Python knows")


def _as_tuple(
    given: str | tuple[str, ...], divided: Callable[[str], Sequence[str]]
) -> tuple[str, ...]:
    return tuple(name for name in (divided(given) if isinstance(given, str) else given) if name)


def _divided(path: str) -> list[str]:
    """The paths between commas, of which some may have commas in their names."""
    parts, paths = path.split(","), []
    if len(parts) == 1:
        return [path]
    while parts:
        names = [",".join(parts[:count]) for count in range(len(parts), 1, -1)]
        name = next(filter(_exists, names), parts[0])
        paths.append(name if os.path.exists(os.path.expanduser(name)) else name.strip())
        del parts[: name.count(",") + 1]
    return paths


def _exists(name: str) -> bool:
    """Whether `name` is, or as a pattern matches, a file or directory."""
    name = os.path.expanduser(name.strip())
    with contextlib.suppress(ValueError, OSError):  # names that no file can have
        return os.path.exists(name) or next(glob.iglob(name, recursive=True), None) is not None
    return False

"""What a run reads and how it is cut into batches."""

from __future__ import annotations

import codecs
import dataclasses

from lm.config import check, check_choice

PACKINGS = ("concat", "best_fit", "none")
SPLITS = ("hash", "position")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section of a config.

    A path is `storyworld` (generated stories, the default), `stdlib` (source and documentation of
    the running Python), `hf:NAME[:CONFIG]` (a Hugging Face dataset by name or directory), or a
    local file, directory or glob of text, .json, .jsonl (each also .gz or .zst) or .parquet files.
    """

    path: str | tuple[str, ...] = "storyworld"  # one corpus, or several to mix
    weights: tuple[float, ...] = ()  # share of rows per path; empty: every row once per epoch
    text_field: str = "text"  # the field of JSON, Parquet and Hugging Face records that is read
    num_documents: int = 50_000  # documents taken from an unlimited or streaming corpus
    encoding: str = "utf-8"  # of text files
    on_bad_file: str = "skip"  # binary, mis-encoded or empty files: "skip" (counted) or "refuse"

    # "hash": a document's own text decides, so equal texts never straddle the splits.
    # "position": the last part of the corpus, counted in characters, is held out.
    split: str = "hash"
    validation_fraction: float = 0.05  # share held out; 0 for none
    validation_path: str | tuple[str, ...] = ""  # a corpus of its own to validate on, instead

    batch_size: int = 32  # sequences in a batch, over all hosts
    block_size: int = 256  # tokens in a sequence
    packing: str = "concat"  # "concat", "best_fit" or "none" (one document a row)
    end_of_text: bool = True  # documents end with end-of-text; False: one stream, no separators
    shuffle: bool = True  # visit training rows in a new random order each epoch
    random_offset: bool = True  # "concat": cut training windows at other places each epoch
    epochs: int | None = None  # passes over the training rows; None for no limit

    cache_dir: str = ""  # tokenised corpora; "": $LM_CACHE_DIR, else ~/.cache/lm/tokens
    prefetch: int = 8  # batches prepared ahead on the host; 0 for none
    num_threads: int = 1  # threads that prepare them; 0 prepares in the consumer's thread

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return _as_tuple(self.path)

    @property
    def validation_paths(self) -> tuple[str, ...]:
        """`validation_path` as a tuple, empty when validation is a split of `path`."""
        return _as_tuple(self.validation_path)

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
                all(0 < weight < float("inf") for weight in self.weights),
                f"{prefix}.weights={self.weights!r} must all be positive",
            )
        check_choice(f"{prefix}.packing", self.packing, PACKINGS)
        check_choice(f"{prefix}.split", self.split, SPLITS)
        check_choice(f"{prefix}.on_bad_file", self.on_bad_file, ("skip", "refuse"))
        for name, least in (
            ("num_documents", 1),
            ("batch_size", 1),
            ("block_size", 1),
            ("prefetch", 0),
            ("num_threads", 0),
        ):
            value = getattr(self, name)
            check(value >= least, f"{prefix}.{name}={value!r} must be at least {least}")
        check(
            self.epochs is None or self.epochs >= 1,
            f"{prefix}.epochs={self.epochs!r} must be at least 1, or None for no limit",
        )
        check(
            0 <= self.validation_fraction < 1,
            f"{prefix}.validation_fraction={self.validation_fraction!r} must be in [0, 1)",
        )
        check(bool(self.text_field), f"{prefix}.text_field='' must name a field")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            check(False, f"{prefix}.encoding={self.encoding!r} is not an encoding Python knows")


def _as_tuple(path: str | tuple[str, ...]) -> tuple[str, ...]:
    paths = (path,) if isinstance(path, str) else tuple(path)
    return tuple(p for p in paths if p)

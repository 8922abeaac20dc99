"""Models that are looked into, and what they are asked: prompts, tokens, words in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

import lm
from lm.config import ConfigError, check
from lm.interpretability.heatmaps import token_names
from lm.interpretability.lenses import readable
from lm.models import skeleton
from lm.runs.run import Run


def opened(init_from: str, step: int | None) -> Run:
    """A run whose residual stream can be read, and which computes in float32: parts then sum.

    Raises:
      ConfigError: there is none, or it has no tokenizer, no head or no single residual stream.
    """
    try:
        loaded = lm.load(init_from, step)
        check(loaded.tokenizer is not None, "it has no tokenizer, and prompts are texts")
        readable(loaded.skeleton)
    except ConfigError as error:
        raise ConfigError(f"config.init_from={init_from!r}: {error}") from None
    exact = dataclasses.replace(loaded.skeleton.config, compute_dtype="float32")
    return dataclasses.replace(loaded, skeleton=skeleton(exact))


def prompt_tokens(loaded: Run, text: str, field: str) -> np.ndarray:
    """A prompt as the model reads it, [1, T]; raises `ConfigError` where it is too long."""
    ids, longest = loaded.encode(text), loaded.skeleton.config.max_length
    check(0 < len(ids) <= longest, f"{field} has {len(ids)} tokens; the model reads 1 to {longest}")
    return np.array([ids], np.int32)


def one_token(run: Run, text: str, field: str) -> int:
    """The id of a text that is one token.

    Raises:
      ConfigError: it is none, or several; it names them.
    """
    check(run.tokenizer is not None, f"{run.directory} has no tokenizer: it reads no text")
    ids = run.tokenizer.encode(text)
    names = " ".join(token_names(run.tokenizer, ids)) or "no token"
    check(len(ids) == 1, f"{field}={text!r} must be one token; the model reads it as: {names}")
    return ids[0]


def places_of(run: Run, ids: Sequence[int], words: str, field: str) -> tuple[int, int]:
    """Where words stand in a prompt: their first token, and the one behind their last."""
    texts = [run.tokenizer.token_bytes(int(i)).decode("utf-8", "replace") for i in ids]
    ends = np.cumsum([len(text) for text in texts])
    start = "".join(texts).find(words)
    check(start >= 0, f"{field}={words!r} is not in the prompt")
    first, last = np.searchsorted(ends, [start, start + len(words) - 1], side="right")
    return int(first), int(last) + 1

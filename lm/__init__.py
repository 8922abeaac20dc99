"""lm: one readable repository for the whole life of a language model."""

from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
    from lm.run import Run

__all__ = ["load"]
__version__ = "0.1.0"


def load(directory: str | os.PathLike[str], step: int | str | None = None) -> Run:
    """Opens a run directory, or a Hugging Face directory: config, tokenizer, parameters, metrics.

        run = lm.load("runs/quickstart")
        logits_BTV = run.model(tokens_BT)
        print(run.generate("The cat sat on the", max_new_tokens=20))

    Args:
      directory: what a training or convert job wrote, or config.json with safetensors.
      step: which checkpoint: a step, "best" (the lowest evaluation loss), or the latest.

    Raises:
      ConfigError: neither of them, no such checkpoint, or one that its tokenizer does not fit; a
        Hugging Face model that is not understood to the last tensor and field.
    """
    from lm.run import Run  # JAX is imported when it is needed

    return Run.load(directory, step)

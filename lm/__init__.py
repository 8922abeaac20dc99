"""lm: one readable repository for the whole life of a language model."""

from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
    from collections.abc import Sequence

    from lm.runs.run import Run

__all__ = ["load"]
__version__ = "0.1.0"


def load(
    directory: str | os.PathLike[str],
    step: int | str | None = None,
    ignore: str | Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
    compute_dtype: str | None = None,
) -> Run:
    """Opens a run directory, or a Hugging Face directory: config, tokenizer, parameters, metrics.

        run = lm.load("runs/quickstart")
        logits_BTV = run.model(tokens_BT)
        print(run.generate("The cat sat on the", max_new_tokens=20))

    Args:
      directory: what a training or convert job wrote, or config.json with safetensors.
      step: which checkpoint: a step, "best" (the lowest evaluation loss), or the latest.
      ignore: of a Hugging Face model, regular expressions of fields of config.json, and of tensors,
        that may be left out though they are not known.
      base: of adapters, which are added in, the model they stand beside; where they say unless
        given.
      compute_dtype: of products and activations: "float32", "bfloat16" or "float16"; "auto" is
        bfloat16 where the platform is fast at it. What the model's config says unless given.

    Raises:
      ConfigError: neither of them, no such checkpoint, or one that its tokenizer does not fit; a
        Hugging Face model that is not understood to the last tensor and field; adapters of another
        base.
    """
    from lm.runs.run import Run  # JAX is imported when it is needed

    return Run.load(directory, step, ignore, base, compute_dtype)

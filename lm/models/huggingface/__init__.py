"""Hugging Face weights in and out.

`family` says what a family is, `decoders`, `llama`, `bert`, `t5` and `bart` have them, `families`
lists them. `read` and `write` go from directories to parameters on devices and back.
"""

from lm.models.huggingface.family import from_tensors, to_tensors

__all__ = ["from_tensors", "to_tensors"]

"""Hugging Face weights in and out.

`family` says what a family is, one file a family says the rest, and `families` lists them.
`layout` applies a family's rules; `read` and `write` do so from disk to devices and back.
"""

from lm.models.huggingface.layout import from_tensors, to_tensors

__all__ = ["from_tensors", "to_tensors"]

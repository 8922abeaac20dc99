"""Hugging Face weights in and out.

`family` says what a family is, `decoders`, `llama`, `bert`, `t5` and `bart` have them, `families`
lists them. `read` and `write` go from directories to parameters on devices and back.

A new family is a `Family` (Mistral's takes a dozen lines, GPT-2's fifty), its sizes in
`lm.models.presets`, and a case in `tests/parity`, of which `tests/golden/make.py` makes a folder.
"""

from lm.models.huggingface.family import from_tensors, to_tensors

__all__ = ["from_tensors", "to_tensors"]

"""Models by name from the Hugging Face hub."""

from __future__ import annotations

import pathlib
import re

from lm.config import ConfigError

# What a conversion reads, and not the same weights again in the formats of others.
WANTED = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model",
    "spiece.model", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip


def is_name(text: str) -> bool:
    """Whether `text` could name a model on the hub (`gpt2`, `organisation/model`), and no path."""
    parts = text.split("/")
    named = len(parts) <= 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
    # A slash after a directory that is here means a path.
    return named and not (len(parts) == 2 and pathlib.Path(parts[0]).is_dir())


def fetch(name: str, field: str = "config.init_from") -> pathlib.Path:
    """The directory with the model called `name`, downloaded unless it was before.

    Raises:
      ConfigError: `huggingface_hub` is not installed, or no such model can be had.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            f"{field}={name!r} is no directory; to download a model of that name from the Hugging "
            "Face hub, install huggingface_hub: pip install 'lm[hub]'"
        ) from None
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # no network, no such model, no permission: each its own class
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ConfigError(
            f"{field}={name!r} is no directory, and no model of that name came from the Hugging "
            f"Face hub: {reason}"
        ) from None

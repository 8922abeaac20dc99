"""A Hugging Face directory seen as a run: its model, tokenizer, and how its texts are framed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers as rust

from lm.config import check, to_dict
from lm.files import read_json
from lm.models.huggingface.read import CONFIG, Checkpoint, open_checkpoint
from lm.tokenizers import Tokenizer
from lm.tokenizers import load as load_tokenizer
from lm.tokenizers.files import framing_of_pieces, has_tokenizer

GENERATION = "generation_config.json"
# Fields of config.json that say which ids play a role.
_TOKEN_IDS = ("bos", "eos", "pad", "sep", "decoder_start", "forced_bos", "forced_eos")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A Hugging Face directory, opened but for its numbers.

    Attributes:
      checkpoint: its model.
      tokenizer: None where it has none.
      config: the config.json of a run of it.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    config: dict[str, Any]


def open_imported(directory: str | os.PathLike[str], ignore: str | Sequence[str] = ()) -> Imported:
    """Opens a Hugging Face directory.

    Args:
      directory: config.json, safetensors, and most often a tokenizer.
      ignore: see `lm.models.huggingface.read.open_checkpoint`.

    Raises:
      ConfigError: as that does; a tokenizer that is damaged, or has more ids than the model.
    """
    path = pathlib.Path(directory).expanduser()
    checkpoint = open_checkpoint(path, ignore)
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    rows = checkpoint.config.vocab_size
    check(
        tokenizer is None or tokenizer.fits(rows),
        f"{path}: its tokenizer has {tokenizer.vocab_size if tokenizer else 0} ids and its "
        f"embedding {rows} rows: one of them is of another model",
    )
    hf, generation = _json(path / CONFIG), _json(path / GENERATION)
    hf = {name: value for name, value in hf.items() if value is not None}
    settings = {**hf, **{name: value for name, value in generation.items() if value is not None}}
    token_ids = {f"{role}_token_id": hf.get(f"{role}_token_id") for role in _TOKEN_IDS}
    config = {
        "job": "convert",
        "init_from": str(directory),
        "tokenizer": {"kind": tokenizer.kind} if tokenizer else {},
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        "model": to_dict(checkpoint.config),
        "framing": _framing(path, tokenizer, settings, checkpoint.config.architecture),
        "huggingface": {
            "model_type": checkpoint.family.model_type,
            "dtypes": checkpoint.dtypes,
            "fields": {name: id for name, id in token_ids.items() if id is not None},
            "generation": generation,
        },
    }
    return Imported(checkpoint, tokenizer, json.loads(json.dumps(config)))


def _framing(
    path: pathlib.Path,
    tokenizer: Tokenizer | None,
    settings: dict[str, Any],
    architecture: str,
) -> dict[str, Any]:
    """The run's section `framing`: see `lm.inference.Framing`."""
    framing: dict[str, Any] = {}
    if tokenizer is not None:
        framing["before"], framing["after"] = _around(path, tokenizer)
    ends = settings.get("eos_token_id")
    if ends is not None:
        framing["end_of_text"] = ends if isinstance(ends, list) else [ends]
    if architecture == "encoder_decoder":
        start = settings.get("decoder_start_token_id", settings.get("pad_token_id"))
        forced = settings.get("forced_bos_token_id")
        framing["decoder_start"] = [id for id in (start, forced) if id is not None]
    return {name: ids for name, ids in framing.items() if ids != [] or name in ("before", "after")}


def _around(path: pathlib.Path, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What its own library puts before and after the ids of a text."""
    data = tokenizer.model_files().get("tokenizer.json")
    if data is not None:
        engine = rust.Tokenizer.from_str(data.decode())
        engine.no_truncation()
        engine.no_padding()
        bare = engine.encode("a", add_special_tokens=False).ids
        whole = engine.encode("a").ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:start], whole[start + len(bare) :]
    begins, ends = framing_of_pieces(path)
    before = [tokenizer.bos_id] if begins and tokenizer.specials.bos is not None else []
    return before, [tokenizer.eos_id] if ends else []


def _json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object that may be missing."""
    return read_json(path) if path.is_file() else {}

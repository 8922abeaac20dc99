"""A model to go on with: a run directory, or a Hugging Face directory, which is as good."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tokenizers as rust

from lm import tokenizers
from lm.config import ConfigError, check, nearest, to_dict, view
from lm.files import read_json
from lm.models import ModelConfig, param_specs, skeleton
from lm.models.huggingface.read import Checkpoint, is_checkpoint, open_checkpoint
from lm.runs.directory import CHECKPOINTS, CONFIG, TOKENIZER
from lm.tokenizers import Tokenizer
from lm.tokenizers.kinds import framing_of_pieces, has_tokenizer
from lm.training.checkpoints import restore_parameters, saved_paths

GENERATION = "generation_config.json"  # of a Hugging Face directory
# Fields of its config.json that say which ids play a role.
_TOKEN_IDS = ("bos", "eos", "pad", "sep", "decoder_start", "forced_bos", "forced_eos")


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory with a model in it, opened but for its parameters."""

    directory: pathlib.Path
    config: dict[str, Any]  # the run's config.json; of Hugging Face's, what a run's would be
    model: ModelConfig
    tokenizer: Tokenizer | None  # None where a Hugging Face directory has none
    checkpoint: Checkpoint | None = None  # the Hugging Face directory, if it is one

    def parameters(
        self,
        step: int | str | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        lazily: bool = False,
    ) -> tuple[int, Mapping[str, jax.Array]]:
        """The step and the parameters, float32, of a checkpoint.

        Args:
          step: see `lm.training.checkpoints.restore_parameters` for this and `lazily`; a Hugging
            Face directory has only step 0, and is read at once.
          shardings: where each goes, and only those that are named; None: all to the first device.

        Raises:
          ConfigError: no such checkpoint, or a damaged one.
        """
        self.check_parameters()
        if self.checkpoint is not None:
            check(
                step in (None, "latest", 0),
                f"step={step!r}: {self.directory} is a Hugging Face model, of a single step 0",
            )
            return 0, self.checkpoint.parameters(shardings)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(
                spec.shape, "float32", sharding=device if shardings is None else shardings[name]
            )
            for name, spec in param_specs(skeleton(self.model)).items()
            if shardings is None or name in shardings
        }
        return restore_parameters(self.directory / CHECKPOINTS, step, abstract, lazily)

    def check_parameters(self) -> None:
        """Raises ConfigError where there are none: a run that has not saved any yet."""
        check(
            self.checkpoint is not None or bool(saved_paths(self.directory / CHECKPOINTS)),
            f"{self.directory} has no checkpoint yet: the run saves one every "
            "config.checkpoint.every steps and at its end; train it further, or wait",
        )


def open_source(directory: str | os.PathLike[str], ignore: str | Sequence[str] = ()) -> Source:
    """Opens a run directory or a Hugging Face directory.

    Args:
      directory: where it is.
      ignore: of a Hugging Face directory; see `lm.models.huggingface.read.open_checkpoint`.

    Raises:
      ConfigError: neither of them, or one that is damaged, or does not fit its tokenizer.
    """
    path = pathlib.Path(directory).expanduser()
    return _open_huggingface(path, ignore) if is_checkpoint(path) else _open_run(path)


def _open_run(path: pathlib.Path) -> Source:
    if not path.exists():
        siblings = []
        if path.parent.is_dir():
            siblings = [p.name for p in path.parent.iterdir() if (p / CONFIG).is_file()]
        raise ConfigError(f"{path} does not exist{nearest(path.name, siblings)}")
    check(path.is_dir(), f"{path} is a file, not a run directory")
    missing = [name for name in (CONFIG, TOKENIZER) if not (path / name).exists()]
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    # Converted from a Hugging Face directory that had no tokenizer.
    textless = TOKENIZER in missing and "huggingface" in config
    textless &= config.get("tokenizer_fingerprint") is None
    if CONFIG not in missing and "model" not in config:
        missing.append(f"the section 'model' in {CONFIG}")
    check(
        "model" in config and (textless or not missing),
        f"{path} is not the directory of a training run: no {', no '.join(missing)}",
    )
    where = path / CONFIG
    check(isinstance(config["model"], dict), f"{where} must be an object with sections of fields")
    model = view(ModelConfig, config["model"], f"{where}: model")
    tokenizer = None if textless else tokenizers.load(path / TOKENIZER)
    if tokenizer is not None:
        trained = config.get("tokenizer_fingerprint")
        check(
            trained in (None, tokenizer.fingerprint),
            f"{path / TOKENIZER} is not the tokenizer the model was trained with: its fingerprint "
            f"is {tokenizer.fingerprint}, the run's {trained}; put the original back",
        )
        check(
            tokenizer.fits(model.vocab_size),
            f"{path / TOKENIZER} has {tokenizer.vocab_size} tokens but the model only "
            f"{model.vocab_size}: put the tokenizer back that the model was trained with",
        )
    return Source(path, config, model, tokenizer)


def _open_huggingface(path: pathlib.Path, ignore: str | Sequence[str]) -> Source:
    """Its config is what the config.json of a run of it would be."""
    checkpoint = open_checkpoint(path, ignore)
    model = checkpoint.config
    tokenizer = tokenizers.load(path) if has_tokenizer(path) else None
    check(
        tokenizer is None or tokenizer.fits(model.vocab_size),
        f"{path}: its tokenizer has {tokenizer.vocab_size if tokenizer else 0} ids and its "
        f"embedding {model.vocab_size} rows: one of them is of another model",
    )
    generation = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    hf = {name: value for name, value in read_json(path / CONFIG).items() if value is not None}
    settings = {**hf, **{name: value for name, value in generation.items() if value is not None}}
    framing: dict[str, Any] = {}  # see `lm.inference.Framing`
    if tokenizer is not None:
        framing["before"], framing["after"] = _around(path, tokenizer)
    ends = settings.get("eos_token_id", [])
    if ends != []:
        framing["end_of_text"] = ends if isinstance(ends, list) else [ends]
    if model.architecture == "encoder_decoder":
        start = settings.get("decoder_start_token_id", settings.get("pad_token_id"))
        ids = [id for id in (start, settings.get("forced_bos_token_id")) if id is not None]
        framing |= {"decoder_start": ids} if ids else {}
    roles = [f"{role}_token_id" for role in _TOKEN_IDS]
    config = {
        "job": "convert",
        "init_from": str(path),
        "tokenizer": {"kind": tokenizer.kind} if tokenizer else {},
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        "model": to_dict(model),
        "framing": framing,
        "huggingface": {
            "model_type": checkpoint.family.model_type,
            "dtypes": checkpoint.dtypes,
            "fields": {name: hf[name] for name in roles if name in hf},
            "generation": generation,
        },
    }
    return Source(path, json.loads(json.dumps(config)), model, tokenizer, checkpoint)


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

"""A model to go on with: a run directory, or a Hugging Face directory, which is as good."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lm.config import ConfigError, check, nearest, view
from lm.files import read_json
from lm.models import ModelConfig, param_specs, skeleton
from lm.models.huggingface.read import Checkpoint, is_checkpoint
from lm.runs.imported import open_imported
from lm.tokenizers import Tokenizer
from lm.tokenizers import load as load_tokenizer
from lm.training.restore import SavedParameters, restore_parameters, saved_paths

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer", "checkpoints"


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory with a model in it, opened but for its parameters.

    Attributes:
      directory: where it is.
      config: the run's whole config, or what stands for it where the directory is Hugging Face's.
      model: what the model is.
      tokenizer: None where a Hugging Face directory has none.
      checkpoint: the Hugging Face directory, if it is one.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    model: ModelConfig
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint | None = None

    def parameters(
        self,
        step: int | str | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    ) -> tuple[int, dict[str, jax.Array]]:
        """The step and the parameters, float32, of a checkpoint.

        Args:
          step: see `lm.training.restore.restore_parameters`; a Hugging Face directory has only
            step 0.
          shardings: where each goes; None: all to the first device.

        Raises:
          ConfigError: no such checkpoint, or a damaged one.
        """
        if self.checkpoint is not None:
            check(
                step in (None, "latest", 0),
                f"step={step!r}: {self.directory} is a Hugging Face model, of a single step 0",
            )
            return 0, self.checkpoint.parameters(shardings)
        return restore_parameters(self._checkpoints(), step, self._abstract(shardings))

    def saved_parameters(
        self, step: int | str | None, shardings: Mapping[str, jax.sharding.Sharding]
    ) -> SavedParameters:
        """`parameters` of a run, each read when it is asked for."""
        return SavedParameters(self._checkpoints(), step, self._abstract(shardings))

    def check_parameters(self) -> None:
        """Raises ConfigError where there are none: a run that has not saved any yet."""
        if self.checkpoint is None:
            self._checkpoints()

    def _checkpoints(self) -> pathlib.Path:
        checkpoints = self.directory / CHECKPOINTS
        check(
            bool(saved_paths(checkpoints)),
            f"{self.directory} has no checkpoint yet: the run saves one every "
            "config.checkpoint.every steps and at its end; train it further, or wait",
        )
        return checkpoints

    def _abstract(self, shardings) -> dict[str, jax.ShapeDtypeStruct]:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {
            name: jax.ShapeDtypeStruct(
                spec.shape, "float32", sharding=device if shardings is None else shardings[name]
            )
            for name, spec in param_specs(skeleton(self.model)).items()
        }


def open_source(directory: str | os.PathLike[str], ignore: str | Sequence[str] = ()) -> Source:
    """Opens a run directory or a Hugging Face directory; again at no cost if nothing changed there.

    Args:
      directory: where it is.
      ignore: of a Hugging Face directory; see `lm.models.huggingface.read.open_checkpoint`.

    Raises:
      ConfigError: neither of them, or one that is damaged, or does not fit its tokenizer.
    """
    path = pathlib.Path(directory).expanduser()
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    source = _open(path, ignore, _stamps(path) | _stamps(path / TOKENIZER))
    return dataclasses.replace(source, config=copy.deepcopy(source.config))


def _stamps(folder: pathlib.Path) -> frozenset[tuple[str, int, int]]:
    """What changes when a file in `folder` does."""
    stats = []
    if folder.is_dir():
        with os.scandir(folder) as files:
            for file in files:
                with contextlib.suppress(OSError):  # a link to itself is no file
                    if file.is_file():
                        stats.append((file.path, file.stat().st_size, file.stat().st_mtime_ns))
    return frozenset(stats)


@functools.lru_cache(maxsize=1)  # a job opens its source for the tokenizer, then for the parameters
def _open(
    path: pathlib.Path, ignore: tuple[str, ...], stamps: frozenset[tuple[str, int, int]]
) -> Source:
    del stamps
    if is_checkpoint(path):
        imported = open_imported(path, ignore)
        checkpoint = imported.checkpoint
        return Source(path, imported.config, checkpoint.config, imported.tokenizer, checkpoint)
    _check_is_run(path)
    config = _read_config(path)
    model = view(ModelConfig, config["model"], f"{path / CONFIG}: model")
    tokenizer = None
    if not _textless(path, config):
        tokenizer = load_tokenizer(path / TOKENIZER)
        _check_tokenizer(path, config, tokenizer, model)
    return Source(path, config, model, tokenizer)


def _check_is_run(path: pathlib.Path) -> None:
    if not path.exists():
        siblings = []
        if path.parent.is_dir():
            siblings = [p.name for p in path.parent.iterdir() if (p / CONFIG).is_file()]
        raise ConfigError(f"{path} does not exist{nearest(path.name, siblings)}")
    check(path.is_dir(), f"{path} is a file, not a run directory")
    missing = [name for name in (CONFIG, TOKENIZER) if not (path / name).exists()]
    if (path / CONFIG).is_file():
        config = _read_config(path, sections=())
        if "model" not in config:
            missing.append(f"the section 'model' in {CONFIG}")
        elif _textless(path, config):
            missing.clear()
    check(not missing, f"{path} is not the directory of a training run: no {', no '.join(missing)}")


def _textless(path: pathlib.Path, config: dict[str, Any]) -> bool:
    """Whether it was converted from a Hugging Face directory that had no tokenizer."""
    has_none = "huggingface" in config and config.get("tokenizer_fingerprint") is None
    return has_none and not (path / TOKENIZER).exists()


def _read_config(path: pathlib.Path, sections: tuple[str, ...] = ("model",)) -> dict[str, Any]:
    config = read_json(path / CONFIG)
    check(
        all(isinstance(config.get(section), dict) for section in sections),
        f"{path / CONFIG} must be an object with sections of fields",
    )
    return config


def _check_tokenizer(
    path: pathlib.Path, config: dict[str, Any], tokenizer: Tokenizer, model: ModelConfig
) -> None:
    trained = config.get("tokenizer_fingerprint")
    check(
        trained in (None, tokenizer.fingerprint),
        f"{path / TOKENIZER} is not the tokenizer the model was trained with: its fingerprint is "
        f"{tokenizer.fingerprint}, the run's {trained}; put the original back",
    )
    check(
        tokenizer.fits(model.vocab_size),
        f"{path / TOKENIZER} has {tokenizer.vocab_size} tokens but the model only "
        f"{model.vocab_size}: put the tokenizer back that the model was trained with",
    )

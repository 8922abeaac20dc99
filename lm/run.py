"""A run, opened: what its directory holds, ready to be asked."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lm.config import ConfigError, check, nearest, view
from lm.inference import Generator, SamplingConfig, TextGenerator
from lm.models import ModelConfig, Transformer, bind, param_specs
from lm.tokenizers import Tokenizer
from lm.tokenizers import load as load_tokenizer
from lm.training.checkpoints import restore_parameters
from lm.training.metrics import read_metrics

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer", "checkpoints"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained model with all that belongs to it; `lm.load` makes one.

    Attributes:
      directory: where it was read from.
      config: the whole configuration of the run, as nested dicts.
      tokenizer: text ⇄ ids.
      skeleton: the model without its parameters: what `lm.models.bind` and `param_specs` take.
      params: dotted name → array, float32.
      step: the optimizer step of the checkpoint.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    tokenizer: Tokenizer
    skeleton: Transformer
    params: dict[str, jax.Array]
    step: int

    @classmethod
    def load(cls, directory: str | os.PathLike[str], step: int | str | None = None) -> Run:
        """See `lm.load`."""
        path = pathlib.Path(directory).expanduser()
        _check_is_run(path)
        config = _read_config(path)
        tokenizer = load_tokenizer(path / TOKENIZER)
        skeleton = Transformer(view(ModelConfig, config["model"], f"{path / CONFIG}: model"))
        _check_tokenizer(path, config, tokenizer, skeleton.config)
        checkpoints = path / CHECKPOINTS
        check(
            checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir()),
            f"{path} has no checkpoint yet: the run saves one every config.checkpoint.every steps "
            "and at its end; train it further, or wait",
        )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(spec.shape, "float32", sharding=device)
            for name, spec in param_specs(skeleton).items()
        }
        step, params = restore_parameters(checkpoints, step, abstract)
        return cls(path, config, tokenizer, skeleton, params, step)

    def model(self, tokens_BT: Any, **arguments: Any) -> jax.Array:
        """Logits [B, T, V], float32, of the token after each position.

        Compiled for each shape; with a `tap` it runs operation by operation, so that the tap may
        keep what it sees.

        Args:
          tokens_BT: token ids, as an array or lists of equal length; see `encode`.
          **arguments: as of `lm.models.Transformer.__call__`.

        Raises:
          ConfigError: rows of unequal length, too long, or with ids the model does not have.
        """
        tokens_BT = self._checked(tokens_BT)
        if "tap" in arguments:
            return self.transformer(tokens_BT, **arguments)
        return self._forward(self.params, tokens_BT, **arguments)

    def encode(self, text: str) -> list[int]:
        """The tokens the model reads for `text`: after begin-of-text, if it was trained so."""
        return self.text_generator.encode(text)

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_samples: int = 1,
        seed: int = 0,
    ) -> str | list[str]:
        """The prompt followed by its continuation, up to end-of-text.

        The prompt is returned as it was given; the rest is what the tokens decode to. The same
        arguments give the same text.

        Args:
          prompt: one text or several, which are continued together.
          max_new_tokens: the most tokens to add; fewer where the model's context is full.
          temperature: 0 is greedy; see `lm.inference.SamplingConfig` for this and the next two.
          top_k: draw from the k likeliest tokens only.
          top_p: draw from the fewest tokens that hold this share of the probability.
          num_samples: continuations of each prompt.
          seed: of the random draws.

        Returns:
          A string; for several prompts or samples a list, the samples of a prompt side by side.

        Raises:
          ConfigError: a prompt longer than the model's context, or a setting out of range.
        """
        sampling = SamplingConfig(temperature, top_k, top_p, max_new_tokens, num_samples)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        stream = self.text_generator.generate(prompts, sampling, seed)
        texts = [text for text in prompts for _ in range(num_samples)]
        for row, text in stream:
            texts[row] += text
        for notice in stream.notices:
            warnings.warn(notice, stacklevel=2)
        return texts[0] if isinstance(prompt, str) and num_samples == 1 else texts

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, as they are now."""
        return read_metrics(self.directory)

    @functools.cached_property
    def transformer(self) -> Transformer:
        """The model with its parameters bound, for all that `model` does not do."""
        return bind(self.skeleton, self.params)

    @functools.cached_property
    def text_generator(self) -> TextGenerator:
        """The model as a writer; `generate` returns what this streams."""
        generator = Generator(
            self.skeleton,
            self.params,
            end_of_text=self.tokenizer.eos_id,
            vocab_size=self.tokenizer.vocab_size,
        )
        begins = self.config.get("data", {}).get("end_of_text", True)
        return TextGenerator(generator, self.tokenizer, begins)

    @functools.cached_property
    def _forward(self):
        skeleton = self.skeleton
        return jax.jit(lambda params, tokens_BT, **a: bind(skeleton, params)(tokens_BT, **a))

    def _checked(self, tokens_BT: Any) -> np.ndarray:
        config = self.skeleton.config
        try:
            tokens_BT = np.asarray(tokens_BT)
        except ValueError:
            raise ConfigError(
                "tokens_BT has rows of different lengths: pad or split them"
            ) from None
        shape = tokens_BT.shape
        check(
            tokens_BT.ndim == 2 and np.issubdtype(tokens_BT.dtype, np.integer),
            f"tokens_BT of shape {shape} and type {tokens_BT.dtype} must be rows of token ids, "
            "such as [run.encode(text)]",
        )
        check(
            shape[1] <= config.max_length,
            f"tokens_BT has {shape[1]} tokens a row, but the model's context is "
            f"{config.max_length}",
        )
        check(
            tokens_BT.size == 0 or (tokens_BT.min() >= 0 and tokens_BT.max() < config.vocab_size),
            f"tokens_BT has ids outside 0 … {config.vocab_size - 1}",
        )
        return tokens_BT.astype(np.int32)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, step={self.step})"


def _check_is_run(path: pathlib.Path) -> None:
    if not path.exists():
        siblings = []
        if path.parent.is_dir():
            siblings = [p.name for p in path.parent.iterdir() if (p / CONFIG).is_file()]
        raise ConfigError(f"{path} does not exist{nearest(path.name, siblings)}")
    check(path.is_dir(), f"{path} is a file, not a run directory")
    missing = [name for name in (CONFIG, TOKENIZER) if not (path / name).exists()]
    if (path / CONFIG).is_file() and "model" not in _read_config(path, sections=()):
        if "model_type" in _read_config(path, sections=()):
            raise ConfigError(
                f"{path} is a Hugging Face model, which lm.load does not open yet: give it the "
                "directory of a training run"
            )
        missing.append(f"the section 'model' in {CONFIG}")
    check(not missing, f"{path} is not the directory of a training run: no {', no '.join(missing)}")


def _read_config(path: pathlib.Path, sections: tuple[str, ...] = ("model",)) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / CONFIG} cannot be read: {error}") from None
    check(
        isinstance(config, dict) and all(isinstance(config.get(s), dict) for s in sections),
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
        tokenizer.vocab_size <= model.vocab_size,
        f"{path / TOKENIZER} has {tokenizer.vocab_size} tokens but the model only "
        f"{model.vocab_size}: put the tokenizer back that the model was trained with",
    )

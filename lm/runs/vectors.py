"""What sentence-transformers puts after a model: pooling, dense layers, a length of one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.config import check, check_choice
from lm.files import read_bytes, read_json
from lm.inference import embed
from lm.models import ModelConfig
from lm.models.huggingface import safetensors
from lm.models.layers import NONLINEARITIES

MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_TEXTS = "sentence_bert_config.json"
# Of a mode of pooling, in either version's words → ours.
_POOLINGS = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "cls": "first",
    "mean": "mean",
    "lasttoken": "last",
}
_ACTIVATIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": NONLINEARITIES["relu"],
    "GELU": NONLINEARITIES["gelu"],
    "SiLU": NONLINEARITIES["silu"],
}


@dataclasses.dataclass(frozen=True)
class Vectors:
    """How a directory says that vectors are made of texts.

    Attributes:
      pooling: as of `lm.inference.embed`.
      steps: what the pooled vectors [N, D] go through, one after the other.
      width: numbers of a vector; None: as many as of the residual stream.
    """

    pooling: str = "mean"
    steps: tuple[Callable[[np.ndarray], Any], ...] = ()
    width: int | None = None

    def of(
        self, config: ModelConfig, params: Mapping[str, jax.Array], texts: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """The vectors of texts in tokens, float32 [N, width]; errors as of `lm.inference.embed`."""
        vectors_ND = embed(config, params, texts, self.pooling)
        for step in self.steps:
            vectors_ND = np.asarray(step(vectors_ND), np.float32)
        return vectors_ND


def read_vectors(directory: pathlib.Path) -> Vectors:
    """What the `modules.json` of a directory says; the mean alone where there is none.

    Raises:
      ConfigError: a module, or a field of one, that would make other vectors than ours.
    """
    if not (directory / MODULES).is_file():
        return Vectors()
    pooling, steps, width = None, [], None
    for folder, kind in _modules(directory):
        where = directory / folder
        if kind == "Pooling":
            check(pooling is None, f"{directory / MODULES}: more than one Pooling")
            pooling = _pooling(where / "config.json")
        elif kind == "Dense":
            weight_ED, step = _dense(where)
            steps.append(step)
            width = len(weight_ED)
        elif kind == "Normalize":
            steps.append(_normalized)
        else:
            known = ("Transformer", "Pooling", "Dense", "Normalize")
            check_choice(f"{directory / MODULES}: type", kind, known)
    check(pooling is not None, f"{directory / MODULES} has no Pooling")
    _check_texts(directory)
    return Vectors(pooling, tuple(steps), width)


def module_files(directory: pathlib.Path) -> dict[str, bytes]:
    """The files that `read_vectors` reads, name → content: what a copy of the model takes along."""
    if not (directory / MODULES).is_file():
        return {}
    folders = [directory / folder for folder, kind in _modules(directory) if kind != "Transformer"]
    files = [directory / name for name in (MODULES, _SETTINGS, _TEXTS)]
    files += [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    return {
        file.relative_to(directory).as_posix(): read_bytes(file) for file in files if file.is_file()
    }


def _modules(directory: pathlib.Path) -> list[tuple[str, str]]:
    """Folder and kind of each."""
    modules = json.loads(read_bytes(directory / MODULES))
    return [(module["path"], module["type"].rpartition(".")[2]) for module in modules]


def _pooling(file: pathlib.Path) -> str:
    said = read_json(file)
    modes = said.get("pooling_mode") or [
        name for name, value in said.items() if name.startswith("pooling_mode_") and value
    ]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    check(len(modes) == 1, f"{file}: several modes of pooling, {', '.join(modes)}, not one")
    check_choice(f"{file}: pooling_mode", modes[0], _POOLINGS)
    prompts = said.get("include_prompt", True)
    check(prompts, f"{file}: include_prompt={prompts!r} is not supported, only True")
    return _POOLINGS[modes[0]]


def _dense(folder: pathlib.Path) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
    """Its weight, and what it does."""
    said = read_json(folder / "config.json")
    name = said.get("activation_function", "Tanh").rpartition(".")[2]
    check_choice(f"{folder / 'config.json'}: activation_function", name, _ACTIVATIONS)
    residual = said.get("use_residual", False)
    check(not residual, f"{folder / 'config.json'}: use_residual=True is not supported")
    tensors = safetensors.find(folder)
    weight_ED = np.asarray(tensors["linear.weight"].read(), np.float32)
    bias = tensors.get("linear.bias")
    bias_E = 0 if bias is None else np.asarray(bias.read(), np.float32)
    return weight_ED, lambda x_ND: _ACTIVATIONS[name](x_ND @ weight_ED.T + bias_E)


def _normalized(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)


def _check_texts(directory: pathlib.Path) -> None:
    """Refuses what would be done to texts before the tokenizer sees them."""
    for name, field in ((_TEXTS, "do_lower_case"), (_SETTINGS, "default_prompt_name")):
        found = read_json(directory / name).get(field) if (directory / name).is_file() else None
        check(not found, f"{directory / name}: {field}={found!r} is not supported: name a pooling")

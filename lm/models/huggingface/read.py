"""A Hugging Face directory, or a model's name on the hub, to parameters on devices."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.config import ConfigError, check, check_choice, view
from lm.files import read_json
from lm.models import count
from lm.models.config import ModelConfig
from lm.models.huggingface import safetensors
from lm.models.huggingface.families import family_of
from lm.models.huggingface.family import Family, NameMap
from lm.models.huggingface.fp8 import Scaled, scaled
from lm.models.huggingface.mxfp4 import Packed, unpacked
from lm.models.huggingface.name_map import Rule, copy_into
from lm.models.huggingface.safetensors import DTYPES, Stored

CONFIG = "config.json"
Held = Stored | Packed | Scaled  # a tensor in a file, or in two
PARAMETER_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}
# What a conversion reads, and not the same weights again in the formats of others.
WANTED = (
    CONFIG, "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "vocab.json", "merges.txt", "vocab.txt", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "[0-9]_*/config.json", "[0-9]_*/model.safetensors",
)  # fmt: skip
# Fields of config.json that count layers or experts, and that are dimensions of tensors.
_EXPERTS, _MOST_LAYERS = ("num_local_experts", "num_experts"), 10_000
_LAYERS = rf"^n_layer$|(?<!window)_layers$|^({'|'.join(_EXPERTS)})$"
_WIDTHS = r"_size$|_heads$|_dim$|_inner$|^n_head$|^n_emb|^d_|buckets$"
_SLACK = 1 << 24  # parameters that may be missing before their names are not looked at any more
_SHOWN = 3  # how many of several wrong tensors an error names


def is_hub_name(text: str) -> bool:
    """Whether `text` could name a model on the hub (`gpt2`, `organisation/model`), and no path."""
    parts = text.split("/")
    named = len(parts) <= 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
    # A slash after a directory that is here means a path.
    return named and not (len(parts) == 2 and pathlib.Path(parts[0]).is_dir())


def download(name: str, field: str = "config.init_from") -> pathlib.Path:
    """The directory with the hub's model called `name`, downloaded unless it was before.

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


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` looks like a Hugging Face model: a config.json with a `model_type`."""
    try:
        config = read_json(pathlib.Path(directory) / CONFIG)
    except ConfigError:
        return False
    return "model_type" in config and "model" not in config


# ---- All but the numbers ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory, found to be whole: all that is to be known before reading numbers.

    Attributes:
      directory: where it is.
      names: its family and config, and which of its tensors are which of our parameters.
      stored: every tensor of the family, under the family's name for it.
      copies: tensors that should equal another: their name → both places.
      ignored: names of tensors that hold no parameters, or that the reader asked to leave out.
    """

    directory: pathlib.Path
    names: NameMap
    stored: dict[str, Held]
    copies: dict[str, tuple[Held, Held]]
    ignored: tuple[str, ...]

    @property
    def family(self) -> Family:
        """The family it is of."""
        return self.names.family

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.names.config

    @property
    def dtypes(self) -> dict[str, int]:
        """How many numbers there are of each dtype."""
        counts: dict[str, int] = {}
        for stored in self.stored.values():
            dtype = DTYPES[stored.dtype]
            counts[dtype.name] = counts.get(dtype.name, 0) + stored.size // dtype.itemsize
        return counts

    def parameters(
        self,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        dtype: str = "float32",
    ) -> dict[str, jax.Array]:
        """The parameters, in place on their devices.

        One tensor is read at a time, and of it no more than this process's devices hold.

        Args:
          shardings: where each parameter goes, and only those that are named; None: all to the
            first device.
          dtype: float32, bfloat16 or float16, whatever the files have.

        Raises:
          ConfigError: a tensor that should be a copy of another and differs, a file that cannot be
            read, or numbers too large for the dtype.
        """
        check_choice("dtype", dtype, PARAMETER_DTYPES)
        made: dict[str, jax.Array] = {}
        with safetensors.readable(str(self.directory)):
            for name, (stored, other) in self.copies.items():
                check(
                    np.array_equal(stored.read(), other.read(), equal_nan=True),
                    f"{self.directory}: {name} should be a copy of the tensor it is tied to, and "
                    "has other numbers",
                )
            for rule in self.names.rules:
                if shardings is not None and rule.ours[0] not in shardings:
                    continue
                made |= self._load(rule, shardings, PARAMETER_DTYPES[dtype])
        return {name: made[name] for name in self.names.specs if name in made}

    def _load(self, rule: Rule, shardings, dtype: np.dtype) -> dict[str, jax.Array]:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        buffers = {}
        for name in rule.ours:
            sharding = first if shardings is None else shardings[name]
            buffers[name] = _Buffers(self.names.specs[name].shape, sharding, dtype)
        for layer in range(self.names.times(rule)):
            index = layer if rule.layered else None
            if not any(buffer.wants(index) for buffer in buffers.values()):
                continue
            arrays = self.names.load(rule, layer, lambda name: self.stored[name].read())
            for name, array in arrays.items():
                buffers[name].put(array, index, name)
        return {name: buffers.pop(name).placed() for name in rule.ours}


def open_checkpoint(
    directory: str | os.PathLike[str], ignore: str | Sequence[str] = ()
) -> Checkpoint:
    """Looks at everything in a Hugging Face directory but the numbers.

    Args:
      directory: config.json and model.safetensors, or shards with their index.
      ignore: a regular expression (`re.search`) or several, of tensors to leave out though the
        family does not know them, such as a head of another task's, and of such fields of
        config.json.

    Raises:
      ConfigError: no such directory; an unknown `model_type`, or a field of config.json that cannot
        be honoured; files that are missing, truncated or damaged; tensors that are unknown,
        missing, or of another shape or dtype than config.json says. What is wrong is named.
    """
    path = pathlib.Path(directory).expanduser()
    ignore = (ignore,) if isinstance(ignore, str) else ignore
    with safetensors.readable(str(path)):
        found = safetensors.find(path)
        names = _read_config(path, ignore, found)
    there = sum(math.prod(stored.shape) for stored in found.values())
    check(
        count(names.specs) <= 4 * there + _SLACK,
        f"{path}: its {CONFIG} describes {count(names.specs):,} parameters, and its tensors hold "
        f"{there:,} numbers",
    )
    return _matched(path, names, _renamed(found, names.family), ignore)


def _read_config(
    directory: pathlib.Path, ignore: Sequence[str], found: Mapping[str, Stored]
) -> NameMap:
    """The family and the model that config.json and the tensors' names describe."""
    hf = read_json(directory / CONFIG)
    hf = {name: value for name, value in hf.items() if not _matches(ignore, name)}
    try:
        _check_sizes(hf, found)
        family = family_of(hf)
        config = family.read_config(hf)
        config = family.settle(config, _Tensors(_renamed(found, family), family.base_prefix))
        view(type(config), config, "its model")
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{directory / CONFIG} has a value of no use: {error!r}") from None
    return NameMap(family, config)


def _check_sizes(hf: Mapping[str, Any], found: Mapping[str, Stored]) -> None:
    """Refuses sizes that no model with these tensors has, before anything is built of them."""
    numbers = sum(math.prod(stored.shape) for stored in found.values())
    whole = {name: value for name, value in hf.items() if type(value) is int}
    fused = not any(re.search(r"experts\.\d", name) for name in found)  # all experts in a tensor
    for name, value in whole.items():
        check(abs(value) < 1 << 31, f"config.json: {name}={value} is more than 32 bits hold")
        if re.search(_LAYERS, name) and not (fused and name in _EXPERTS):
            experts = max(whole.get(name, 1) for name in _EXPERTS)
            each = 1 if fused or name in _EXPERTS else max(experts, 1)
            most = min(_MOST_LAYERS, len(found) // each)
            check(
                value <= max(most, 1),
                f"config.json: {name}={value} is more than its {len(found)} tensors can be of",
            )
        elif name in _EXPERTS or re.search(_WIDTHS, name):
            check(
                value <= max(numbers, 1),
                f"config.json: {name}={value} is more than the {numbers} numbers in its tensors",
            )


class _Tensors(Mapping[str, np.ndarray]):
    """What is in the files, read when it is asked for, with or without the family's prefix."""

    def __init__(self, found: Mapping[str, Held], prefix: str):
        self._found, self._prefix = found, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        form = next((form for form in _forms(name, self._prefix) if form in self._found), name)
        return self._found[form].read()

    def __contains__(self, name: object) -> bool:
        return any(form in self._found for form in _forms(str(name), self._prefix))

    def __iter__(self):
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _forms(name: str, prefix: str) -> tuple[str, str, str]:
    """A tensor's name as it is, with the family's prefix, and without."""
    return name, prefix + name, name.removeprefix(prefix)


def _renamed(found: Mapping[str, Stored], family: Family) -> dict[str, Held]:
    """The tensors under the names that the family has for them now, those of few bits one."""
    result, found = {}, scaled(unpacked(found))
    for name, stored in found.items():
        new = name
        for pattern, replacement in family.old_tensors:
            new = re.sub(pattern, replacement, new)
        result[name if new in found else new] = stored  # under both: the old one is unknown
    return result


def _matched(
    path: pathlib.Path, names: NameMap, found: dict[str, Held], ignore: Sequence[str]
) -> Checkpoint:
    """The checkpoint with these tensors in its files."""
    family, shapes = names.family, names.shapes
    there: dict[str, Held] = {}
    ignored, unknown = [], []
    for name, stored in found.items():
        forms = _forms(name, family.base_prefix)
        known = next((form for form in forms if form in shapes or form in names.copies), None)
        if known is not None:
            there[known] = stored
        elif any(_matches((*family.ignored, *ignore), form) for form in forms):
            ignored.append(name)
        else:
            unknown.append(name)
    copies = {}
    for copy, original in names.copies.items():
        if copy in there:
            stored = there.pop(copy)
            if original in there:
                copies[copy] = (stored, there[original])
            else:
                there[original] = stored
    kind = f"{path}: its weights are not those of the {family.model_type!r} of its config.json"
    missing = [name for name in shapes if name not in there]
    check(not unknown, f"{kind}: {_some(unknown)} unknown; config.ignore may leave such out")
    check(not missing, f"{kind}: {_some(missing)} missing")
    wrong = [name for name, shape in shapes.items() if there[name].shape != shape]
    for name in wrong:
        raise ConfigError(
            f"{kind}: {name} is {list(there[name].shape)}, and the config says "
            f"{list(shapes[name])}" + (f" ({len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )
    for name, stored in {**there, **{n: pair[0] for n, pair in copies.items()}}.items():
        check(
            stored.dtype in DTYPES,
            f"{path}: {name} has dtype {stored.dtype}, not one of {', '.join(DTYPES)}: quantized "
            "or double-precision weights must be converted first",
        )
        shape = shapes[names.copies.get(name, name)]
        check(
            stored.shape == shape,
            f"{kind}: {name} is {list(stored.shape)}, not {list(shape)} as what it copies",
        )
    return Checkpoint(path, names, there, copies, tuple(ignored))


def _matches(patterns: Sequence[str], name: str) -> bool:
    for pattern in patterns:
        try:
            if re.search(pattern, name):
                return True
        except re.error as error:
            raise ConfigError(
                f"config.ignore={pattern!r} is not a regular expression: {error}"
            ) from None
    return False


def _some(names: list[str]) -> str:
    """`a, b and c (and 7 more) are`."""
    shown = ", ".join(names[:_SHOWN])
    more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


# ---- The numbers -----------------------------------------------------------------------------


class _Buffers:
    """A parameter on its way to this process's devices: a buffer for each part of it they hold."""

    def __init__(self, shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: np.dtype):
        self.shape, self.sharding, self.dtype = shape, sharding, dtype
        self.buffers: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for index in sharding.addressable_devices_indices_map(shape).values():
            bounds = self._bounds(index)
            if bounds not in self.buffers:
                size = tuple(stop - start for start, stop in bounds)
                self.buffers[bounds] = _aligned(size, dtype)

    def _bounds(self, index: Sequence[slice]) -> tuple[tuple[int, int], ...]:
        return tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))

    def wants(self, layer: int | None) -> bool:
        """Whether a device here holds any of this layer."""
        return layer is None or any(b[0][0] <= layer < b[0][1] for b in self.buffers)

    def put(self, array: np.ndarray, layer: int | None, name: str) -> None:
        """Copies what devices here hold of one layer, or of the whole parameter."""
        for bounds, buffer in self.buffers.items():
            target = buffer
            if layer is not None:
                (start, stop), *bounds = bounds
                if not start <= layer < stop:
                    continue
                target = buffer[layer - start]
            part = array[tuple(slice(*b) for b in bounds)]
            if self.dtype == np.float16:  # the one dtype that not every number fits
                part = safetensors.converted(part, self.dtype, name)
            copy_into(target, part)

    def placed(self) -> jax.Array:
        """The parameter on its devices."""
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.buffers[self._bounds(index)]
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array where XLA's CPU backend can use it as it is, without a copy of its own."""
    size, line = dtype.itemsize * math.prod(shape), 64
    raw = np.empty(size + line, np.uint8)
    start = -raw.ctypes.data % line
    return raw[start : start + size].view(dtype).reshape(shape)

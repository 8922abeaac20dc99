"""A model to go on with: a run directory, or a Hugging Face directory, which is as good."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers as rust

from lm import tokenizers
from lm.config import ConfigError, check, nearest, to_dict, view
from lm.files import read_json
from lm.inference import Framing
from lm.models import ModelConfig, param_specs, skeleton
from lm.models.adapters import AdapterConfig, adapter_specs, freeze, merged
from lm.models.huggingface.families import family_for
from lm.models.huggingface.family import NameMap
from lm.models.huggingface.peft import Peft, is_peft
from lm.models.huggingface.read import Checkpoint, is_checkpoint, open_checkpoint
from lm.parallel.sharding import ParamSpec, parameter_shardings
from lm.runs.directory import CHECKPOINTS, CONFIG, TOKENIZER
from lm.tokenizers import Tokenizer
from lm.tokenizers.kinds import framing_of_pieces, has_tokenizer, languages_of
from lm.training.checkpoint_files import fingerprint
from lm.training.checkpoints import restore_parameters, saved_paths, some_steps

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
    base: Base | None = None  # what it adapts, if all that it has is adapters
    own: Mapping[str, np.ndarray] | None = None  # the adapters of a directory that PEFT wrote

    def parameters(
        self,
        step: int | str | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        lazily: bool = False,
    ) -> tuple[int, Mapping[str, jax.Array]]:
        """The step and the parameters, float32, of a checkpoint; with adapters added in.

        Args:
          step: see `lm.training.checkpoints.restore_parameters` for this and `lazily`; a Hugging
            Face directory has only step 0, and is read at once.
          shardings: where each goes, and only those that are named; None: all to the first device.

        Raises:
          ConfigError: no such checkpoint, or a damaged one.
        """
        self.check_parameters()
        if self.base is not None:
            return self._merged(step, shardings)
        if self.checkpoint is not None:
            check(
                step in (None, "latest", 0),
                f"step={step!r}: {self.directory} is a Hugging Face model, of a single step 0",
            )
            return 0, self.checkpoint.parameters(shardings)
        abstract = _abstract(param_specs(skeleton(self.model)), shardings)
        return restore_parameters(self.directory / CHECKPOINTS, step, abstract, lazily)

    def kept(self, every: int = 1) -> list[int]:
        """The steps that `parameters` can be had of, one in `every` and the last; at least one."""
        return ([] if self.checkpoint else some_steps(self.directory / CHECKPOINTS, every)) or [0]

    def adapters(
        self,
        step: int | str | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    ) -> tuple[int, dict[str, jax.Array]]:
        """The step and the adapters of a checkpoint of one that has a `base`; as `parameters`."""
        specs = adapter_specs(self.base.adapter, param_specs(skeleton(self.model)))
        abstract = _abstract(specs, shardings)
        if self.own is not None:
            check(
                step in (None, "latest", 0),
                f"step={step!r}: {self.directory} has adapters of a single step 0",
            )
            return 0, {n: jax.device_put(self.own[n], x.sharding) for n, x in abstract.items()}
        return restore_parameters(self.directory / CHECKPOINTS, step, abstract)

    def _merged(self, step, shardings) -> tuple[int, dict[str, jax.Array]]:
        specs, adapter = param_specs(skeleton(self.model)), self.base.adapter
        mesh = next(iter(shardings.values())).mesh if shardings else None
        own = parameter_shardings(adapter_specs(adapter, specs), mesh) if mesh else None
        step, adapters = self.adapters(step, own)

        def whole(params, adapters):
            params = merged(adapters, freeze(adapter, specs, params, jax.numpy.float32))
            return {name: params[name] for name in shardings or params}

        params, _ = self.base.read(specs, mesh)
        return step, jax.jit(whole, out_shardings=shardings)(params, adapters)

    @property
    def names(self) -> NameMap:
        """What its tensors are called by Hugging Face.

        Raises:
          ConfigError: no family computes what the model does.
        """
        if self.checkpoint is not None:
            return self.checkpoint.names
        preferred = self.config.get("huggingface", {}).get("model_type")
        return NameMap(family_for(self.model, preferred), self.model)

    @property
    def tokenizer_place(self) -> str:
        """What its tokenizer is loaded from."""
        if self.own is not None and not has_tokenizer(self.directory):
            return self.base.source.tokenizer_place
        alone = self.checkpoint is not None or self.own is not None
        return str(self.directory if alone else self.directory / TOKENIZER)

    def check_parameters(self) -> None:
        """Raises ConfigError where there are none: a run that has not saved any yet."""
        check(
            self.checkpoint is not None
            or self.own is not None
            or bool(saved_paths(self.directory / CHECKPOINTS)),
            f"{self.directory} has no checkpoint yet: the run saves one every "
            "config.checkpoint.every steps and at its end; train it further, or wait",
        )


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that adapters stand beside."""

    source: Source
    adapter: AdapterConfig
    step: int | None = None  # of its checkpoint; None: the latest
    fingerprint: str = ""  # of its parameters; "": nothing is said of them

    def read(
        self, specs: Mapping[str, ParamSpec], mesh: jax.sharding.Mesh | None = None
    ) -> tuple[dict[str, jax.Array], Base]:
        """Its parameters, and this base with step and fingerprint filled in.

        Of a model with `specs`, of which it may have not all, such as a new head. Of a table of
        learned positions the first rows, where the model needs no more.

        Args:
          mesh: whose devices share them; None: all on the first device.

        Raises:
          ConfigError: they are not those that the adapters were trained beside.
        """
        own = param_specs(skeleton(self.source.model))
        shardings = parameter_shardings(own, mesh) if mesh else None
        step, params = self.source.parameters(self.step, shardings)
        found = fingerprint(params)
        check(
            self.fingerprint in ("", found),
            f"{self.source.directory} is not the base that these adapters were trained beside: "
            f"its parameters' fingerprint is {found}, and that of the base {self.fingerprint}",
        )
        params = {
            n: x[: specs[n].shape[0]] if n.endswith("embedding.positions") else x
            for n, x in params.items()
            if n in specs
        }
        return params, dataclasses.replace(self, step=step, fingerprint=found)

    def facts(self, directory: pathlib.Path) -> dict[str, Any]:
        """What the config.json of a run in `directory` says of its base."""
        there = self.source.directory.absolute()
        return {
            "directory": str(there),
            "relative": os.path.relpath(there, directory.absolute()),
            "step": self.step,
            "fingerprint": self.fingerprint,
        }


def run_base(
    directory: pathlib.Path,
    config: Mapping[str, Any],
    given: str | os.PathLike[str] | None = None,
    ignore: str | Sequence[str] = (),
) -> Base | None:
    """The base of the run in `directory`, if it has adapters; in `given`, or where it says.

    It is looked for where it stood beside the run, which both may have moved, and where it was.
    """
    where = f"{directory / CONFIG}"
    adapter = view(AdapterConfig, config.get("adapter", {}), f"{where}: adapter")
    if adapter.kind == "none":
        check(given is None, f"{directory} has no adapters, and so no base={str(given)!r}")
        return None
    said = config.get("base")
    check(
        isinstance(said, dict) and {"directory", "step", "fingerprint"} <= said.keys(),
        f"{where} says adapter.kind={adapter.kind!r}, and not what its base is",
    )
    places = [given] if given else [directory / said.get("relative", "."), said["directory"]]
    places = [pathlib.Path(os.path.normpath(place)) for place in places]
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    check(
        found is not None,
        f"{directory} holds adapters of the model in {places[-1]}, which is not there: put it back,"
        f" write in {where} where its 'base' is, or say lm.load(…, base=DIR)",
    )
    source = open_source(found, ignore)
    return Base(source, adapter, said["step"], said["fingerprint"])


def _abstract(specs, shardings) -> dict[str, jax.ShapeDtypeStruct]:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(
            spec.shape, "float32", sharding=device if shardings is None else shardings[name]
        )
        for name, spec in specs.items()
        if shardings is None or name in shardings
    }


def open_source(
    directory: str | os.PathLike[str],
    ignore: str | Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens a run directory, a Hugging Face directory, or one with adapters that PEFT wrote.

    Args:
      directory: where it is.
      ignore: of a Hugging Face directory; see `lm.models.huggingface.read.open_checkpoint`.
      base: of adapters, the directory of the model they stand beside, if it is not where they say.

    Raises:
      ConfigError: neither of them, or one that is damaged, or does not fit its tokenizer; or
        adapters whose base is not there.
    """
    path = pathlib.Path(directory).expanduser()
    if is_peft(path):
        return _open_peft(path, ignore, base)
    if not is_checkpoint(path):
        return _open_run(path, ignore, base)
    check(base is None, f"{path} has no adapters, and so no base={str(base)!r}")
    return _open_huggingface(path, ignore)


def _open_run(path: pathlib.Path, ignore: str | Sequence[str], base) -> Source:
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
    return Source(path, config, model, tokenizer, base=run_base(path, config, base, ignore))


def _open_peft(path: pathlib.Path, ignore: str | Sequence[str], base) -> Source:
    """Its config is what the config.json of a run of the whole model would be."""
    peft = Peft.open(path)
    said = os.fspath(base or peft.base)
    places = [pathlib.Path(said).expanduser(), path / said]
    found = next((place for place in places if said and (place / CONFIG).is_file()), None)
    check(
        found is not None,
        f"{path} holds adapters of the model {said!r}, which is no directory here: write in "
        "adapter_config.json where it is (base_model_name_or_path), or say lm.load(…, base=DIR)",
    )
    source = open_source(found, ignore)
    model, names = source.model, source.names
    if peft.labels and model.architecture == "decoder" and model.classifier == "none":
        model = dataclasses.replace(model, classifier="sequence", num_labels=peft.labels)
        names = NameMap(names.family, model)
    adapter, own = peft.read(names)
    tokenizer = tokenizers.load(path) if has_tokenizer(path) else source.tokenizer
    check(
        tokenizer is None or tokenizer.fits(source.model.vocab_size),
        f"{path}: its tokenizer has more ids than the embedding of its base {found}",
    )
    known = {"init_from": str(path)}
    if tokenizer is not None:
        known |= {
            "tokenizer": {"kind": tokenizer.kind}, "tokenizer_fingerprint": tokenizer.fingerprint
        }  # fmt: skip
    config = {n: x for n, x in source.config.items() if n not in ("adapter", "base")} | known
    config["model"] = to_dict(model)
    return Source(path, config, model, tokenizer, base=Base(source, adapter), own=own)


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
        banned = [ids[0] for ids in settings.get("bad_words_ids", []) if len(ids) == 1]
        framing |= {"never": banned} if banned else {}
    if tokenizer is not None and model.architecture == "encoder_decoder" and tokenizer.languages:
        framing = _of_languages(path, tokenizer, framing, settings)
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


def _of_languages(
    path: pathlib.Path, tokenizer: Tokenizer, framing: Mapping[str, Any], settings: Mapping
) -> dict[str, Any]:
    """A translator's framing, between the languages that its files name."""
    source, target, behind = languages_of(path)
    source, target = (code if code in tokenizer.languages else "" for code in (source, target))
    stated = "forced_bos_token_id" in settings or (behind and "decoder_start_token_id" in settings)
    if source and not {*framing["before"], *framing["after"]} & {*tokenizer.languages.values()}:
        own = tokenizer.languages[source]
        place = "after" if behind else "before"
        framing = {**framing, place: [*framing[place], own]}
    between = Framing(**{name: tuple(ids) for name, ids in framing.items()}).between(
        tokenizer, source, "" if stated else target
    )
    return {name: list(ids) for name, ids in dataclasses.asdict(between).items() if ids is not None}


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

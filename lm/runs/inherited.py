"""What a run takes over from the model it starts from (`init_from`): all of it.

The model is the source's: architecture, positions, norms, constants, tokenizer, framing. A field of
the config's sections `model` and `tokenizer` counts where somebody set it, and it may be set to the
source's own value, or where it changes nothing of the function that the parameters compute. A
decoder's classifier may be a new one: a reward model's or a policy's value head begins at random.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections

from lm import tokenizers
from lm.config import ConfigError, check, fields_set, to_dict
from lm.inference import Framing
from lm.models import ModelConfig
from lm.models.adapters import AdapterConfig
from lm.models.huggingface.config_fields import essence
from lm.parallel import hosts
from lm.runs.directory import CONFIG, TOKENIZER, saved_run
from lm.runs.sources import Base, Source, open_source, run_base
from lm.tokenizers import Tokenizer, TokenizerConfig

# Sections of a run's config.json that say how texts are framed and where the model is from.
CARRIED = ("framing", "huggingface")
_OF_PAIRS = ("source_before", "source_after", "target_start")  # of the section `data`
_CHOSEN = ("vocab_size", "max_length")  # 0 chooses
# Choices of training and of how to compute.
MAY_CHANGE = (
    "dropout", "compute_dtype", "quantization", "attention", "remat", "scan_layers",
    "capacity_factor", "initializer", "initializer_std",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the run in a directory starts from: itself if it has begun, a model, or nothing."""

    directory: pathlib.Path
    saved: dict[str, Any] | None  # its config.json if it has begun: see `saved_run`
    init_from: str = ""  # a run directory, or a Hugging Face directory
    ignore: str | Sequence[str] = ()  # of the latter; see `open_source`

    @functools.cached_property
    def source(self) -> Source:
        """The model that `init_from` names.

        Raises:
          ConfigError: there is none, or it has no tokenizer.
        """
        field = f"config.init_from={self.init_from!r}"
        try:
            source = open_source(self.init_from, self.ignore)
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None
        check(source.tokenizer is not None, f"{field} is a Hugging Face model without a tokenizer")
        return source

    def carried(self, separated: bool) -> dict[str, Any]:
        """Its sections `CARRIED`; the end of documents, if `separated`, is an end there, too."""
        if not self.init_from:
            return {}
        theirs = self.source.config if self.saved is None else self.saved
        carried = copy.deepcopy({name: theirs[name] for name in CARRIED if name in theirs})
        ends = carried.get("framing", {}).get("end_of_text")
        if self.saved is None and ends and separated and self.source.tokenizer.eos_id not in ends:
            ends.append(self.source.tokenizer.eos_id)
            if "huggingface" in carried:
                carried["huggingface"].setdefault("generation", {})["eos_token_id"] = ends
        return carried

    @property
    def base(self) -> Base:
        """What the run's adapters stand beside: what they have from the start, or the source's."""
        if self.saved is not None:
            return run_base(self.directory, self.saved, ignore=self.ignore)
        return self.source.base or Base(self.source, AdapterConfig())

    def parameters(self, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array] | None:
        """The source's, where `abstract` says; None where there is no source.

        Of a table of learned positions the first rows, where the run needs no more. Not those of a
        head that only one of both has.
        """
        if not self.init_from:
            return None
        shardings = {name: leaf.sharding for name, leaf in abstract.items()}
        params = self.source.parameters(shardings=shardings)[1]
        tables = [name for name in params if name.endswith("embedding.positions")]
        return {**params, **{name: params[name][: abstract[name].shape[0]] for name in tables}}

    def tokenizer(self, config: TokenizerConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """The run's own if it has one, else the source's, else one trained on `texts`.

        Process 0 trains it, as two that differ in a bit would be two runs, and the others get it
        through the directory, which all must share.
        """
        own, scratch = self.directory / TOKENIZER, self.directory / ".tokenizer.shared"
        failed = self.saved is None and (self.directory / CONFIG).exists()  # a start that left it
        if own.exists() and not failed:
            return tokenizers.load(own)
        if self.init_from:
            return self.source.tokenizer
        if hosts.index() == 0:
            tokenizer = tokenizers.train(config, texts())
        if hosts.count() == 1:
            return tokenizer
        if hosts.index() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            tokenizer.save(scratch)
        hosts.barrier()
        if hosts.index() != 0:
            tokenizer = tokenizers.load(scratch)
        hosts.barrier()
        if hosts.index() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        return tokenizer


def inherit(
    config: ml_collections.ConfigDict, directory: pathlib.Path
) -> tuple[dict[str, Any], Origin]:
    """`config` with the sections `model` and `tokenizer` of its source, and that source.

    A run that goes on in `directory` has the model already, and its source may be gone.

    Raises:
      ConfigError: `init_from` is no model to start from; or fields that are set and may not be, all
        of them named at once.
    """
    fields, saved = config.to_dict(), saved_run(directory)
    origin = Origin(directory, saved, fields.get("init_from", ""), fields.get("ignore", ()))
    if not origin.init_from:
        return fields, origin
    model, tokenizer = (
        fields_set(section, config, name)
        for name, section in (("model", ModelConfig), ("tokenizer", TokenizerConfig))
    )
    adapter = fields_set(AdapterConfig, config, "adapter")
    if saved is not None:
        fields["adapter"] = {**saved.get("adapter", {}), **adapter}
        fields["model"] = {**saved["model"], **model}
        fields["tokenizer"] = {**saved["tokenizer"], **tokenizer}
        kept = {n: tuple(saved["data"][n]) for n in _OF_PAIRS if saved.get("data", {}).get(n)}
        fields["data"] = {**fields.get("data", {}), **kept}
        return fields, origin

    source, theirs = origin.source, origin.source.model
    source.check_parameters()
    where = source.tokenizer_place
    trained = {**to_dict(TokenizerConfig()), **source.config.get("tokenizer", {})}
    trained["special_tokens"] = tuple(trained["special_tokens"])
    found = {"kind": source.tokenizer.kind, "vocab_size": source.tokenizer.vocab_size}
    found = {**trained, **found, "path": where}
    wrong = [
        (f"model.{name}", getattr(theirs, name), value)
        for name, value in model.items()
        if not _may_have(theirs, name, value)
    ] + [
        (f"tokenizer.{name}", found[name], value)
        for name, value in tokenizer.items()
        if value not in (trained[name], found[name])
    ]
    if wrong:
        has = ", ".join(f"{name}={own!r}" for name, own, _ in wrong)
        says = ", ".join(repr(value) for *_, value in wrong)
        raise ConfigError(
            f"config.init_from={origin.init_from!r} has {has}, and this config says {says}: model "
            "and tokenizer are those of the source, so leave these fields out (as "
            "configs/finetune.py does) or set them to what it has; of a model only "
            f"{', '.join(MAY_CHANGE)} may differ, a decoder's classifier where it has none, and "
            "max_length where positions are not learned"
        )
    if source.base is not None and adapter.get("kind") != "none":
        fields["adapter"] = _adapter(origin, adapter)
    kept = {name: value for name, value in model.items() if value or name not in _CHOSEN}
    fields["model"] = to_dict(dataclasses.replace(theirs, **kept))
    fields["tokenizer"] = {**tokenizer, "kind": source.tokenizer.kind, "path": where}
    languages = [fields.get(f"{side}_language", "") for side in ("source", "target")]
    if any(languages) or (source.tokenizer.languages and theirs.architecture == "encoder_decoder"):
        fields["data"] = {**fields.get("data", {}), **_translating(source, *languages)}
    return fields, origin


def _translating(source: Source, *languages: str) -> dict[str, tuple[int, ...]]:
    """What stands around the pairs of a translator; its framing becomes that of its languages."""
    framing = Framing.of_run(source.config, source.model, source.tokenizer, "framing")
    framing = framing.between(source.tokenizer, *languages)
    source.config["framing"] = to_dict(framing)
    after = framing.after[1:] if framing.after[:1] == (source.tokenizer.eos_id,) else framing.after
    return dict(zip(_OF_PAIRS, (framing.before, after, framing.decoder_start), strict=True))


def _may_have(theirs: ModelConfig, name: str, value: Any) -> bool:
    """Whether a field may have `value` though the model is `theirs`."""
    if name in MAY_CHANGE or value in (getattr(theirs, name), essence(theirs).get(name)):
        return True
    if name == "max_length":
        table = theirs.positions == "learned" and theirs.cell == "attention"
        return value <= theirs.max_length or not table
    if name in ("classifier", "num_labels"):
        return theirs.architecture == "decoder" and theirs.classifier == "none"
    return name in _CHOSEN and value == 0


def _adapter(origin: Origin, ours: dict[str, Any]) -> dict[str, Any]:
    """The section `adapter` of a run that goes on with its source's adapters."""
    theirs = to_dict(origin.source.base.adapter)
    wrong = [name for name in ours if ours[name] != theirs[name] and name != "base"]
    if wrong:
        has = ", ".join(f"adapter.{name}={theirs[name]!r}" for name in wrong)
        says = ", ".join(repr(ours[name]) for name in wrong)
        raise ConfigError(
            f"config.init_from={origin.init_from!r} has {has}, and this config says {says}: its "
            "adapters go on as they are, so leave these fields out, or say "
            "--config.adapter.kind=none to train all of the model that they and their base make"
        )
    return {**theirs, **ours}

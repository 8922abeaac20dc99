"""The command line: words → a config, the run directory, and the fields that the words set.

--config=NAME                  configs/NAME.py here, else the one that comes with lm; or a path
--workdir=DIR                  the run directory; alone, it goes on with the run that it holds
--config.FIELD=VALUE           by the type of the field: text is text, to the letter
--config.FIELD=A --config.FIELD=B    several texts, where a field takes several
--config.FIELD, --noconfig.FIELD     True and False
--help, --version              with --config=NAME, help shows its fields
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import io
import os
import pathlib
import re
import sys
import textwrap
import tokenize
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from lm.config import (
    ConfigError,
    check,
    check_choice,
    check_path,
    coerce,
    from_texts,
    hints,
    limits,
    mark_given,
    nearest,
)
from lm.files import read_json

PACKAGED = pathlib.Path(__file__).parent / "configs"  # in a clone, a link to its configs/
FLAGS = ("config", "workdir")
# What a run's config.json says beside the fields of its config.
FACTS = (
    "tokenizer_fingerprint",
    "corpus_fingerprint",
    "framing",
    "huggingface",
    "base",
    "reference",
)


class Command(NamedTuple):
    """What to do, and where."""

    config: ml_collections.ConfigDict  # its `job` names what to do; `given` fields are marked
    section: type  # the job's dataclass
    workdir: str


def read(words: Sequence[str], jobs: Mapping[str, str]) -> Command:
    """What the words after the program's name ask for; `jobs` are their dataclasses' dotted names.

    Raises:
      ConfigError: a flag, a file or a field that does not exist.
    """
    flags, fields = _split([_decoded(word) for word in words])
    workdir = flags.get("workdir", "")
    check_path("--workdir", workdir)
    workdir = os.path.expanduser(workdir)
    saved = pathlib.Path(workdir, "config.json")
    if "config" not in flags and workdir and saved.is_file():
        config = _of_run(saved)
    else:
        path = find_config(flags.get("config", "quickstart"))
        config, workdir = load_config(path), workdir or f"runs/{path.stem}"
    values = config.to_dict()
    values["job"] = fields.get("job", [values.get("job", "")])[-1]
    check_choice("config.job", values["job"], jobs)
    module, _, name = jobs[values["job"]].rpartition(".")
    section = getattr(importlib.import_module(module), name)
    for flag in flags.keys() - FLAGS:
        meant = _meant(flag.removeprefix("no"), section)
        close = nearest(flag, FLAGS) or (f" (did you mean --config.{meant}?)" if meant else "")
        raise ConfigError(f"--{flag} is not a flag{close}")
    for field, texts in fields.items():
        _put(values, section, field, texts)
    config = ml_collections.ConfigDict(values)
    mark_given(config, fields)
    return Command(config.lock(), section, workdir)


def _decoded(word: str) -> str:
    """A word in which bytes were no UTF-8, as Latin-1, which old terminals and files use."""
    surrogates = any("\udc80" <= character <= "\udcff" for character in word)
    return os.fsencode(word).decode("latin-1") if surrogates else word


def _split(words: Sequence[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The flags, and the words given for each field."""
    flags: dict[str, str] = {}
    fields: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        found = re.fullmatch(r"--?(\w[\w.-]*)(?:=(.*))?", word, re.DOTALL)
        check(bool(found), f"argument {word!r} is not a flag: write --config.FIELD=VALUE")
        name, value = found.groups()
        if name.startswith("noconfig.") and value is None:
            name, value = name.removeprefix("no"), "False"
        if value is None:
            follows = bool(rest) and not rest[0].startswith("--")
            check(follows or name not in FLAGS, f"--{name} needs a value: write --{name}=VALUE")
            value = rest.pop(0) if follows else "True"
        if name.startswith("config."):
            fields.setdefault(name.removeprefix("config."), []).append(value)
        else:
            flags[name] = value
    return flags, fields


def find_config(name: str) -> pathlib.Path:
    """The file that --config names: a path, or a name in configs/ here or in the package.

    Raises:
      ConfigError: there is none.
    """
    asked = pathlib.Path(name).expanduser()
    bare = not asked.is_absolute() and (PACKAGED / asked.parent).is_dir() and asked.suffix != ".py"
    here = pathlib.Path("configs")
    tried = [here / f"{name}.py", PACKAGED / f"{name}.py"] if bare else [asked]
    if asked.is_relative_to(here):  # of a clone, asked for from elsewhere
        tried.append(PACKAGED / asked.relative_to(here))
    for path in tried:
        if path.is_file():
            return path
    if bare:
        there = [*_configs()]
    else:
        there = [str(asked.parent / p.name) for t in tried for p in t.parent.glob("*.py")]
    raise ConfigError(f"--config={name} does not exist{nearest(name, there)}")


def _configs() -> dict[str, pathlib.Path]:
    """The configs that a bare name finds, such as quickstart or align/sft."""
    found = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in (PACKAGED, pathlib.Path("configs"))
        for path in (*folder.glob("*.py"), *folder.glob("*/*.py"))
    }
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))


def load_config(path: pathlib.Path) -> ml_collections.ConfigDict:
    """What `get_config()` of a file returns.

    Raises:
      ConfigError: the file cannot be run, or has no such function.
    """
    spec = importlib.util.spec_from_file_location("_config", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_config"] = module  # where dataclasses of the file look themselves up
    try:
        spec.loader.exec_module(module)
        check(hasattr(module, "get_config"), f"--config={path} has no function get_config()")
        return module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        what = " ".join(str(error).split()) or "failed"
        raise ConfigError(
            f"--config={path}{f', line {line}' if line else ''}: {type(error).__name__}: {what}"
        ) from error


def _of_run(path: pathlib.Path) -> ml_collections.ConfigDict:
    """The config that a run directory was written with."""
    try:
        values = read_json(path)
        check("job" in values, f"{path} does not hold the config of a run")
    except ConfigError as error:
        raise ConfigError(
            f"--workdir={path.parent}: {error}: name a --config, or choose another directory"
        ) from None
    for fact in FACTS:
        values.pop(fact, None)
    return ml_collections.ConfigDict(values)


def _put(values: dict[str, Any], section: type, field: str, texts: Sequence[str]) -> None:
    """Sets a dotted field to what the words mean to it.

    Raises:
      ConfigError: there is no such field, or it is a section.
    """
    leaves = _leaves(section)
    if field not in leaves:
        meant = _meant(field, section)
        close = f" (did you mean config.{meant}?)" if meant else ""
        inside = any(leaf.startswith(f"{field}.") for leaf in leaves)
        check(inside, f"config.{field} is not a known field{close}")
        raise ConfigError(
            f"config.{field} is a section: set its fields, as in --config.{field}.NAME=VALUE"
        )
    *outer, last = field.split(".")
    for name in outer:
        values = values.setdefault(name, {})
    values[last] = coerce(from_texts(texts, leaves[field]), leaves[field], f"config.{field}")


def _leaves(section: type, prefix: str = "") -> dict[str, Any]:
    """The annotation of every field, by its dotted name."""
    found = {}
    for field in dataclasses.fields(section):
        hint = hints(section)[field.name]
        path = f"{prefix}{field.name}"
        found |= _leaves(hint, f"{path}.") if dataclasses.is_dataclass(hint) else {path: hint}
    return found


def _meant(field: str, section: type) -> str:
    """The field that somebody probably means by `field`, or ""."""
    known, name = list(_leaves(section)), field.rpartition(".")[2]
    if ALIASES.get(name) in known:
        return ALIASES[name]
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    if elsewhere:
        return difflib.get_close_matches(field, elsewhere, n=1, cutoff=0)[0]
    beside = [path for path in known if path.rpartition(".")[0] == field.rpartition(".")[0]]
    close = difflib.get_close_matches(field, beside, n=1, cutoff=0.7)
    return (close or difflib.get_close_matches(field, known, n=1, cutoff=0.6) or [""])[0]


# What other codebases call our fields.
_ELSEWHERE = {
    "optimizer.learning_rate": "lr max_lr peak_lr",
    "optimizer.weight_decay": "wd adam_weight_decay",
    "optimizer.clip_norm": "grad_clip max_grad_norm gradient_clip",
    "optimizer.b1": "beta1 adam_b1",
    "optimizer.b2": "beta2 adam_b2",
    "optimizer.warmup_steps": "warmup warmup_iters num_warmup_steps",
    "optimizer.schedule": "lr_scheduler_type lr_schedule",
    "optimizer.name": "optim opt",
    "model.width": "d_model n_embd hidden_size emb_dim embed_dim dim",
    "model.num_layers": "n_layer n_layers depth num_hidden_layers",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads",
    "model.mlp_width": "d_ff intermediate_size mlp_dim ffn_dim",
    "model.rotary_base": "rope_theta rope_base",
    "model.max_length": "n_positions max_position_embeddings",
    "model.compute_dtype": "dtype precision torch_dtype",
    "model.remat": "gradient_checkpointing checkpointing",
    "data.block_size": "seq_len seq_length context_length sequence_length",
    "data.batch_size": "per_device_train_batch_size bs train_batch_size",
    "data.path": "dataset data_path data_dir dataset_path",
    "train.steps": "max_steps max_iters num_steps train_steps",
    "train.accumulation": "grad_accum gradient_accumulation_steps",
    "train.log_every": "log_interval logging_steps",
    "train.eval_every": "eval_interval eval_steps",
    "checkpoint.every": "save_every save_steps save_interval",
    "mesh.data": "dp data_parallel",
    "mesh.tensor": "tp tensor_parallel tensor_parallel_size",
    "mesh.stage": "pp pipeline_parallel",
    "mesh.expert": "ep expert_parallel",
    "mesh.context": "cp context_parallel sequence_parallel",
    "data.epochs": "epoch num_epochs num_train_epochs",
    "max_new_tokens": "num_tokens max_tokens n_tokens",
    "init_from": "model_name_or_path checkpoint_path load_from model",
    "num_samples": "n_samples num_return_sequences",
    "beam_sampling": "do_sample",
    "prompt_lookup": "prompt_lookup_num_tokens",
    "draft": "assistant_model draft_model",
    "draft_tokens": "num_assistant_tokens num_speculative_tokens",
}
ALIASES = {name: field for field, names in _ELSEWHERE.items() for name in names.split()}


def help_text(words: Sequence[str], jobs: Mapping[str, str], program: str) -> str:
    """How to call `program` and the configs there are; with --config=NAME, its fields instead."""
    flags, _ = _split(words)
    if "config" in flags or "workdir" in flags:
        command = read(words, jobs)
        path = find_config(flags["config"]) if "config" in flags else None
        lines = [_docstring(path)] if path else []
        _show_fields(command.config, command.section, "config", lines)
        return "\n".join(lines)
    configs = _configs()
    width = max(map(len, configs), default=0)
    listed = [
        f"  {name:{width}}  {_docstring(path).partition(chr(10))[0]}"
        for name, path in configs.items()
    ]
    usage = f"usage: {program} [--config=NAME] [--workdir=DIR] [--config.FIELD=VALUE ...]"
    flags = __doc__.partition("\n\n")[2].rstrip()
    return "\n".join([usage, "", flags, "", "configs:", *listed])


def _docstring(path: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _show_fields(config: Any, section: type, prefix: str, lines: list[str]) -> None:
    """Every field as it is set, with the comment beside it in the source and what it may be."""
    told, nested = comments(section), []
    lines += ["", f"{prefix}: {(section.__doc__ or '').strip().partition(chr(10))[0]}"]
    for field in dataclasses.fields(section):
        hint = hints(section)[field.name]
        if dataclasses.is_dataclass(hint):
            nested.append((field.name, hint))
            continue
        value = config.get(field.name, field.default)
        left = f"  {field.name}={value if isinstance(value, str) else repr(value)}"
        about = " ".join(filter(None, (told.get(field.name, ""), limits(hint))))
        right = textwrap.wrap(about, 60) or [""]
        if len(left) > 36:
            lines.append(left)
            left = ""
        lines.append(f"{left:36}  {right[0]}".rstrip())
        lines += [f"{'':38}{more}" for more in right[1:]]
    for name, hint in nested:
        _show_fields(config.get(name, {}), hint, f"{prefix}.{name}", lines)


def comments(section: type) -> dict[str, str]:
    """The comment of each field in the source of its dataclass: beside it, else above it."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):
            continue
        notes = {
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                beside = [
                    notes[n][0] for n in range(node.lineno, node.end_lineno + 1) if n in notes
                ]
                above = []
                while notes.get(node.lineno - len(above) - 1, ("", False))[1]:
                    above.insert(0, notes[node.lineno - len(above) - 1][0])
                found[node.target.id] = " ".join(beside or above)
    return found

"""Directories that a stranger might have made, and what opening each of them comes to.

As a program, `hostile.py DIR` opens all that are in DIR, in little memory, and prints the outcomes:
{name: what is said by lm.load, by `main.py --config=generate` and, of those in `RESUMED`, by
`main.py --workdir=` and `main.py --config=finetune`}.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
from collections.abc import Callable

import lm
from lm.__main__ import main as command
from lm.config import ConfigError

GIBIBYTE = 1 << 30
DEEP = "[" * 200_000
HUGE = 10**9


def edited(name: str, edit: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    """What `edit` makes of a file of JSON."""

    def change(path: pathlib.Path) -> None:
        content = json.loads((path / name).read_text())
        edit(content)
        (path / name).write_text(json.dumps(content))

    return change


def changed(**fields) -> Callable[[pathlib.Path], None]:
    """Other fields of config.json; of the section `model` where there is one."""
    return edited("config.json", lambda config: config.get("model", config).update(fields))


def family(name: str, **fields) -> Callable[[pathlib.Path], None]:
    """A config.json of another family, beside these tensors."""
    return lambda path: (path / "config.json").write_text(
        json.dumps({"model_type": name, **fields})
    )


def lost(name: str) -> Callable[[pathlib.Path], None]:
    return lambda path: (path / name).unlink(missing_ok=True)


def written(name: str, text: str | bytes) -> Callable[[pathlib.Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return both(lost(name), lambda path: (path / name).write_bytes(data))


def header(text: str, body: int = 0) -> Callable[[pathlib.Path], None]:
    """A safetensors file with this header and so many bytes behind it."""
    data = text.encode()
    return written("model.safetensors", len(data).to_bytes(8, "little") + data + b"\0" * body)


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def tensor(**fields: str) -> Callable[[pathlib.Path], None]:
    return header(f'{{"a":{entry(**fields)}}}', 8)


def long_header(path: pathlib.Path) -> None:
    with (path / "model.safetensors").open("wb") as file:
        file.write((3 * GIBIBYTE).to_bytes(8, "little"))
        file.truncate(4 * GIBIBYTE)


def sparse(name: str) -> Callable[[pathlib.Path], None]:
    """64 GiB, and nothing of it on the disk."""

    def write(path: pathlib.Path) -> None:
        with (path / name).open("wb") as file:
            file.truncate(64 * GIBIBYTE)

    return both(lost(name), write)


def index(file: str, tensor: str = "a") -> Callable[[pathlib.Path], None]:
    def write(path: pathlib.Path) -> None:
        (path / "model.safetensors").rename(path.parent / "outside.safetensors")
        text = json.dumps({"weight_map": {tensor: file}})
        (path / "model.safetensors.index.json").write_text(text)

    return write


def loop(name: str) -> Callable[[pathlib.Path], None]:
    """A symbolic link to itself."""

    def link(path: pathlib.Path) -> None:
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
        (path / name).symlink_to(name)

    return link


def pipe(name: str) -> Callable[[pathlib.Path], None]:
    return both(lost(name), lambda path: os.mkfifo(path / name))


def tokenizer(**fields) -> Callable[[pathlib.Path], None]:
    """Other fields of tokenizer.json."""

    def edit(described: dict) -> None:
        for name, value in fields.items():
            part = described["model"] if name in ("vocab", "merges") else described
            part[name] = value

    return edited("tokenizer.json", edit)


def description(**fields) -> Callable[[pathlib.Path], None]:
    """Other fields of a saved tokenizer's description."""
    return edited("tokenizer/lm_tokenizer.json", lambda described: described.update(fields))


def manifest(files: str) -> Callable[[pathlib.Path], None]:
    """A manifest of the checkpoint at step 2, with these files."""
    text = f'{{"step":2,"metrics":{{}},"arrays":{{}},"files":{files}}}'
    return written("checkpoints/00000002/manifest.json", text)


def both(*changes: Callable[[pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    return lambda path: [change(path) for change in changes] and None


LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 261,
    "intermediate_size": 128,
}  # fmt: skip
# What is done to a GPT-2, and a word of what is said.
FOREIGN: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "layers": (changed(n_layer=HUGE), "n_layer=1000000000 is more than"),
    "negative layers": (changed(n_layer=-HUGE), "num_layers"),
    "width": (changed(n_embd=10**6 + 3, n_head=1), "n_embd"),
    "width and heads": (changed(n_embd=2**31 - 1, n_head=2**31 - 2), "n_"),
    "no heads": (changed(n_head=0), "n_head=0"),
    "vocabulary": (changed(vocab_size=2**31 - 1), "vocab_size"),
    "positions": (changed(n_positions=2**31 - 1), "parameters"),
    "beyond 64 bits": (changed(n_positions=10**40), "32 bits"),
    "inner": (changed(n_inner=10**8), "n_inner"),
    "experts": (family("mixtral", **LLAMA, num_local_experts=HUGE), "experts=1000000000 is more"),
    "local layers": (family("gemma2", **LLAMA | {"num_hidden_layers": HUGE}), "num_hidden_layers"),
    "no scale": (family("gemma2", **LLAMA, query_pre_attn_scalar=0), "ZeroDivisionError"),
    "heads of llama": (family("llama", **LLAMA | {"num_attention_heads": 0}), "_heads=0"),
    "rope of text": (
        family("llama", **LLAMA, rope_scaling={"type": "yarn", "factor": "4"}),
        "config.json",
    ),
    "rope of nothing": (
        family(
            "llama", **LLAMA,
            rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 0},
        ),
        "rotary_original_length",
    ),
    "distance": (family("t5", d_model=32, relative_attention_max_distance=2**31 - 1), "distance"),
    "a list of types": (changed(model_type=["gpt2"]), "model_type"),
    "architectures of numbers": (changed(architectures=[1, {}]), "architectures"),
    "architectures, a number": (changed(architectures=7), "config.json"),
    "a name of megabytes": (changed(**{"a" * 10**7: 1}), "… "),
    "names with escapes": (changed(**{"a\x1b[2J\nb": 1}), "a\\x1b[2J\\nb"),
    "deep config": (written("config.json", '{"model_type":' + DEEP), "nested too deeply"),
    "infinity": (written("config.json", '{"model_type":"gpt2","n_embd":Infinity}'), "config.json"),
    "overflow": (written("config.json", '{"model_type":"gpt2","n_embd":1e999}'), "config.json"),
    "twice": (written("config.json", '{"model_type":"gpt2","n_embd":1,"n_embd":2}'), "config.json"),
    "a long config": (sparse("config.json"), "config.json"),
    "a loop of configs": (loop("config.json"), "no config.json"),
    "a pipe of configs": (pipe("config.json"), "not the directory"),
    "a loop of weights": (loop("model.safetensors"), "no weights"),
    "a pipe of weights": (pipe("model.safetensors"), "no weights"),
    "a pickle": (
        both(written("pytorch_model.bin", b"\x80\x04"), lost("model.safetensors")),
        "pytorch_model.bin, not in model.safetensors",
    ),
    "a long header": (long_header, "header of 3,221,225,472 bytes"),
    "a header beyond the file": (written("model.safetensors", b"\xff" * 64), "truncated"),
    "a deep header": (header(DEEP), "nested too deeply"),
    "a header of infinity": (tensor(shape="[Infinity]"), "no finite number"),
    "a header of NaN": (tensor(offsets="[NaN,8]"), "no finite number"),
    "a header, a list": (header("[]"), "damaged header"),
    "a header of text": (tensor(shape='["2"]'), "damaged header"),
    "a header of fractions": (tensor(shape="[2.0]"), "damaged header"),
    "a negative shape": (tensor(shape="[-2]"), "damaged header"),
    "negative offsets": (tensor(offsets="[-8,0]"), "damaged header"),
    "offsets backwards": (tensor(offsets="[8,0]"), "damaged header"),
    "offsets beyond": (tensor(offsets="[0,80]", shape="[20]"), "truncated"),
    "offsets of 128 bits": (tensor(offsets="[0,1e38]"), "damaged header"),
    "a shape that overflows": (tensor(shape="[4294967296,4294967296]"), "damaged header"),
    "overlaps": (header(f'{{"a":{entry()},"b":{entry()}}}', 16), "damaged header"),
    "a tensor twice": (header(f'{{"a":{entry()},"a":{entry()}}}', 8), "'a' twice"),
    "a name with escapes": (
        header(f'{{"\\u001b[31m\\n":{entry(shape="[9]")}}}', 8),
        "\\x1b[31m\\n",
    ),
    "an index outside": (index("../outside.safetensors"), "no file's name"),
    "an absolute index": (index("/etc/passwd"), "no file's name"),
    "an index to its parent": (index(".."), "no file's name"),
    "an index with a NUL": (index("a\0b"), "no file's name"),
    "an index to nothing": (index("none.safetensors"), "is not there"),
    "a deep index": (
        both(index("a"), written("model.safetensors.index.json", DEEP)),
        "nested too deeply",
    ),
    "an index of lists": (
        both(index("a"), written("model.safetensors.index.json", '{"weight_map":{"a":[]}}')),
        "weight_map",
    ),
    "a deep tokenizer": (written("tokenizer.json", DEEP), "tokenizer"),
    "a tokenizer, a list": (written("tokenizer.json", "[]"), "tokenizer"),
    "a long tokenizer": (sparse("tokenizer.json"), "tokenizer"),
    "ids beyond": (tokenizer(vocab={"a": 2**32 - 2}), "tokenizer"),
    "a vocabulary of text": (tokenizer(vocab="abc"), "tokenizer"),
    "no vocabulary": (tokenizer(vocab=None), "tokenizer"),
    "added tokens of numbers": (tokenizer(added_tokens=[1, 2]), "tokenizer"),
    "a bad pattern": (
        tokenizer(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False
            }
        ),
        "tokenizer",
    ),
    "an unknown piece": (
        tokenizer(model={"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0], ["b", -1.0]]}),
        "tokenizer",
    ),
    "no unknown word": (
        tokenizer(
            model={
                "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": {"a": 0},
            }
        ),
        "tokenizer",
    ),
    "merges of nothing": (tokenizer(merges=[["zz", "yy"]]), "tokenizer"),
    "settings of a list": (written("tokenizer_config.json", "[1]"), "tokenizer_config.json"),
    "deep settings": (written("tokenizer_config.json", DEEP), "tokenizer_config.json"),
    "generation of a list": (written("generation_config.json", "[1]"), "generation_config.json"),
    "ends of text": (written("generation_config.json", '{"eos_token_id":"x"}'), "end_of_text"),
    "ends beyond": (changed(eos_token_id=[{"a": 1}]), "end_of_text"),
}  # fmt: skip
# What is done to a run directory.
RUNS: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "layers of a run": (changed(num_layers=HUGE), "num_layers="),
    "width of a run": (changed(width=2**31 - 4), "width="),
    "vocabulary of a run": (changed(vocab_size=2**31 - 1), "vocab_size="),
    "experts of a run": (changed(num_experts=HUGE, activation="swiglu"), "num_experts="),
    "layers beyond a run": (changed(num_layers=5000), "checkpoint"),
    "a wider run": (changed(width=1 << 20), "checkpoint"),
    "positions of a run": (changed(positions="learned", max_length=2**31 - 1), "checkpoint"),
    "a deep run": (written("config.json", '{"model":' + DEEP), "nested too deeply"),
    "a run of lists": (written("config.json", '{"model":[]}'), "sections of fields"),
    "a loop of runs": (loop("config.json"), "config.json"),
    "a loop of tokenizers": (loop("tokenizer"), "tokenizer"),
    "a deep manifest": (manifest(DEEP), "manifest.json is not readable"),
    "a manifest of a device": (manifest('{"/dev/zero":[0,1]}'), "'/dev/zero', which is not in it"),
    "a manifest outside": (manifest('{"../../../p":[0,1]}'), "which is not in it"),
    "a manifest of a pipe": (both(manifest('{"p":[0,1]}'), pipe("checkpoints/00000002/p")), "p is"),
    "a loop of checkpoints": (loop("checkpoints"), "checkpoint"),
    "a description outside": (description(model_files=["../../config.json"]), "no file's name"),
    "a description of numbers": (description(model_files=7), "names no model_files"),
    "a deep description": (written("tokenizer/lm_tokenizer.json", DEEP), "nested too deeply"),
    "a kind of list": (description(kind=["byte"]), "kind"),
}

RESUMED = ("a deep run", "layers", "a deep header")


def build(root: pathlib.Path, model: pathlib.Path, run: pathlib.Path) -> None:
    """Every directory of the tables, under `root`, from an innocent model and an innocent run."""
    for source, table in ((model, FOREIGN), (run, RUNS)):
        for name, (change, _) in table.items():
            shutil.copytree(source, root / name / "x")
            change(root / name / "x")


def said(open_it: Callable[[], object]) -> str:
    """What stands on standard error, or the exception that no user should see."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            signal.alarm(30)
            open_it()
            return "nothing"
        except SystemExit:
            return err.getvalue()
        except ConfigError as error:
            return str(error)
        except BaseException as error:
            return f"{type(error).__name__}, a traceback: {error}"
        finally:
            signal.alarm(0)


def main(root: str) -> None:
    """Opens every directory in `root`."""

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    lm.load(pathlib.Path(root) / "innocent run" / "x")  # what JAX takes, it takes now
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIBIBYTE, taken + GIBIBYTE))
    outcomes = {}
    for path in sorted(pathlib.Path(root).iterdir()):
        words = (f"init_from={path / 'x'}", "max_new_tokens=1")
        outcomes[path.name] = [said(functools.partial(lm.load, path / "x"))]
        doors = [["--config=generate", *(f"--config.{word}" for word in words)]]
        if path.name in RESUMED:
            doors.append([f"--workdir={path / 'x'}"])
            doors.append(["--config=finetune", f"--config.{words[0]}", f"--workdir={path / 'new'}"])
        for sys.argv[1:] in doors:
            outcomes[path.name].append(said(command))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])

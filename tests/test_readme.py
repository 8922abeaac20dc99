"""The README's commands work, one after the other, and what it counts is so many."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import quick

from lm import command
from lm.models.huggingface.families import FAMILIES
from lm.models.presets import PRESETS

CLONE = pathlib.Path(__file__).parent.parent
README = (CLONE / "README.md").read_text(encoding="utf-8")
PRINTED = ("step 1800/1800",)  # how blocks begin that show output

TRAIN = (
    " --config.train.steps=8 --config.train.log_every=4 --config.train.eval_every=0"
    " --config.checkpoint.every=8 --config.data.num_documents=400"
    " --config.data.validation_fraction=0.1 --config.data.block_size=64"
    " --config.sample.max_new_tokens=4"
)
SMALL = TRAIN + " --config.model.num_layers=1"
WRITE = " --config.max_new_tokens=4"
LEARN = (
    " --config.train.steps=2 --config.train.eval_every=0 --config.data.num_documents=200"
    " --config.data.validation_fraction=0.05 --config.data.batch_size=8"
)
PLAN = (
    " --config.topology=cpu:8 --config.preset=gpt2_small --config.model.num_layers=2"
    " --config.model.width=64 --config.model.num_heads=4 --config.model.vocab_size=512"
    " --config.data.block_size=128"
)
# A server is asked until it answers, and told to end.
SERVE = (
    " --config.serve.port=8377 --config.warm_up=False & server=$!;"
    " for i in $(seq 200); do (echo > /dev/tcp/127.0.0.1/8377) 2>/dev/null && break; sleep 1; done;"
    " kill $server; wait $server"
)
# What is run: of each command of the README its beginning, and what is put behind it, to be short.
SHORTER = {
    "python main.py --config=configs/plan.py --workdir=runs/search": (
        PLAN + " --config.search.meshes=1"
    ),
    "python main.py --config=configs/generate.py": WRITE,
    "python main.py --config=configs/serve.py": SERVE,
    "python main.py --config=configs/describe.py": "",
    "cat > configs/gemma.py": "",
    "cp configs/quickstart.py configs/mine.py": "",
    "python main.py --config=configs/gemma.py": SMALL,
    "python main.py --config=configs/mine.py": SMALL,
    "python main.py --config=configs/convert.py": "",
    "python main.py --config=configs/compare_runs.py": "",
    "python main.py --config=configs/plan.py": PLAN,
    "python main.py --config=configs/evaluate.py": (
        " --config.suites=language --config.language.documents=20"
    ),
    "python main.py --config=configs/emergence/curves.py": " --config.items=8 --config.every=2",
    "python main.py --config=configs/emergence/": (
        " --config.train.steps=10 --config.data.num_documents=400 --config.model.num_layers=1"
    ),
    "python main.py --config=configs/interpret/": "",
    "python main.py --config=configs/finetune.py": TRAIN,
    "python main.py --config=configs/align/story_base.py": SMALL.replace("=64", "=256"),
    "python main.py --config=configs/align/story_ppo.py": LEARN + " --config.rollout.prompts=8",
    "python main.py --config=configs/align/": LEARN,
    "python launch/local.py": SMALL,
    "python main.py --workdir=": SMALL,
    "python benchmarks/accelerator.py": " --tiny --only=peak",
}
# Commands that install, or take the tests; and what is run in their place.
INSTEAD = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && python main.py": (
        "python main.py" + SMALL
    ),
    "pip install -e '.[test]' && pytest": "",
    "pip install -e '.[tpu]'": "",
    "launch/align.sh HF_DIR chats.jsonl pairs.jsonl prompts.jsonl OUT": (
        "launch/align.sh --dry-run HF_DIR chats.jsonl pairs.jsonl prompts.jsonl OUT"
    ),
    "pip install -e '.[serve]'": "",
}

# What runs commands one after the other, and those that need a process of their own.
TOGETHER = """
import shlex, sys
from lm.__main__ import guarded, run
for command in sys.argv[1:]:
    print("$", command, flush=True)
    if code := guarded(run, shlex.split(command)[2:]):
        sys.exit(code)
"""
ALONE = ("configs/plan.py", "configs/convert.py")


def blocks():
    """The indented blocks of code, in order."""
    found, block = [], []
    for line in [*README.splitlines(), "."]:
        if line.startswith("    ") or (block and not line):
            block.append(line[4:])
        elif block:
            found.append("\n".join(block).strip("\n"))
            block = []
    return [block for block in found if not block.startswith(PRINTED)]


def commands(block):
    """A block's commands, without comments; a program in Python is one."""
    if block.startswith("import "):
        return [block]
    found, lines = [], iter(block.splitlines())
    for line in lines:
        line = re.sub(r"(^|\s+)#.*", "", line)
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        if end := re.search(r"<<'(\w+)'$", line):
            while not line.endswith("\n" + end[1]):
                line += "\n" + next(lines)
        found += [line] if line else []
    return found


ALL = [command for block in blocks() for command in commands(block)]


def shortened(command):
    """What is run for a command of the README; None where nobody said how."""
    if command in INSTEAD:
        return INSTEAD[command]
    for beginning, more in SHORTER.items():
        if command.startswith(beginning):
            return command + more
    return None


def test_every_command_of_the_readme_is_run():
    assert len(ALL) > 20
    unknown = [c for c in ALL if not c.startswith("import ") and shortened(c) is None]
    assert not unknown, f"say in tests/test_readme.py how these are run in a moment: {unknown}"
    unused = [start for start in [*SHORTER, *INSTEAD] if not any(c.startswith(start) for c in ALL)]
    assert not unused


@pytest.mark.parametrize("words", [c for c in ALL if c.startswith("python main.py --workdir=")])
def test_fields_tried_in_the_readme_are_not_the_defaults(words):
    config = command.load_config(CLONE / "configs" / "quickstart.py")
    for name, tried in re.findall(r"--config\.([\w.]+)='?([^ ']+)", words):
        value = config
        for part in name.split("."):
            value = value[part]
        assert str(value) != tried, f"{name}={value} already"


def test_the_readme_counts_right_and_its_links_lead_somewhere():
    assert int(re.search(r"(\d+) published models", README)[1]) == len(PRESETS)
    assert int(re.search(r"(\d+)\s+model types", README)[1]) == len(FAMILIES)
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (CLONE / link).exists(), link
    assert {path.stem for path in CLONE.glob("configs/*.py")} - {"plan_scaling"} == set(
        re.findall(r"^\| `(\w+)` \|", README.split("## Commands")[1].split("## Models")[0], re.M)
    )


@pytest.mark.slow
def test_commands_of_the_readme_work_one_after_the_other(tmp_path):
    clone, home = tmp_path / "lm", tmp_path / "home"
    for name in ("lm", "configs", "launch", "benchmarks", "main.py"):
        copy = shutil.copytree if (CLONE / name).is_dir() else shutil.copy
        (clone / name).parent.mkdir(exist_ok=True)
        copy(CLONE / name, clone / name)
    texts = home / "texts"
    texts.mkdir(parents=True)
    for number in range(12):
        (texts / f"{number}.txt").write_text("A cat sat on a mat and saw a dog. " * 100)
    environment = {
        **{k: v for k, v in os.environ.items() if k != "LM_CACHE_DIR"},
        "PYTHONPATH": str(clone),  # in place of `pip install -e .`
        "HOME": str(home),
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": quick.FLAGS,
    }

    def run(*words):
        done = subprocess.run(
            words, cwd=clone, env=environment, capture_output=True, text=True, timeout=900
        )
        said = f"{words[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.returncode == 0, said

    together = []  # commands that one process runs: most of the time they take is its start

    def run_together():
        if together:
            run(sys.executable, "-c", TOGETHER, *together)
            together.clear()

    for words in ALL:
        alone = "DIR_OR_HUB_NAME" in words or any(name in words for name in ALONE)
        if words.startswith("python main.py ") and not alone and "&" not in shortened(words):
            together.append(shortened(words))
            continue
        run_together()
        if words.startswith("import "):
            run(sys.executable, "-c", words)
        elif "DIR_OR_HUB_NAME" in words:  # a Hugging Face directory, from what was just trained
            start = words.split(" --config.init_from")[0]
            run(
                "bash",
                "-c",
                f"{start} --config.init_from=runs/quickstart --config.to=hf --workdir=HF",
            )
            run("bash", "-c", shortened(words).replace("DIR_OR_HUB_NAME", "HF"))
        elif shortened(words):
            run("bash", "-c", shortened(words))
    run_together()
    assert (clone / "OUT" / "model.safetensors").exists()
    assert {path.name for path in (clone / "runs").iterdir()} >= {"gemma", "texts", "hosts"}

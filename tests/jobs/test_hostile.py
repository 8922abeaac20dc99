"""Whatever a stranger's directory holds, opening it ends in one line, in little time and memory."""

import json
import subprocess
import sys

import hostile
import pytest
import tiny_huggingface
import tiny_jobs
from hostile import FOREIGN, RUNS

INNOCENT = ("innocent model", "innocent run")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name → what lm.load and the generate job said of it, in a process with little memory."""
    root, sources = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("sources")
    model = tiny_huggingface.write_directory(sources / "model")
    run = tiny_jobs.run(sources, "run", train__steps=2, checkpoint__every=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FOREIGN, INNOCENT[0], (lambda path: None, ""))
        patch.setitem(RUNS, INNOCENT[1], (lambda path: None, ""))
        hostile.build(root, model, run)
    done = subprocess.run(
        [sys.executable, hostile.__file__, str(root)],
        cwd=tiny_jobs.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*FOREIGN, *RUNS])
def test_a_hostile_directory_ends_in_one_line(name, outcomes):
    _, words = {**FOREIGN, **RUNS}[name]
    loaded, generated, *others = outcomes[name]
    assert words in generated
    for said in (generated, *others):
        assert said.startswith("error: ") and len(said) < 5000
        assert said.removesuffix("\n").isprintable()
    assert loaded in (generated.removeprefix("error: ").removesuffix("\n"), "nothing")


@pytest.mark.parametrize("name", INNOCENT)
def test_an_innocent_directory_opens(name, outcomes):
    assert outcomes[name][0] == "nothing" and "at step" in outcomes[name][1]

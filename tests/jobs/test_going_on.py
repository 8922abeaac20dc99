"""What a run that goes on may have otherwise than it began, and what it says of that."""

import dataclasses
import json
import shutil

import pytest
import tiny_jobs

from lm.alignment.config import AlignJob
from lm.config import ConfigError
from lm.jobs.train import TrainJob
from lm.runs.directory import FREE, NOTED, REFUSED, classified

SHORT = {"train__steps": 4, "train__log_every": 2, "checkpoint__every": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("going_on")


@pytest.fixture(scope="module")
def begun(place):
    (place / "corpus.txt").write_text("The cat sat on the mat. " * 40)
    return tiny_jobs.run(place, "begun", data__path=str(place / "corpus.txt"), **SHORT)


@pytest.fixture
def again(begun, place, request):
    """Goes on with a copy of the run, some fields changed; its directory."""
    directory = place / request.node.name.replace("/", "_")
    shutil.copytree(begun, directory)

    def go_on(num_devices=1, **fields):
        fields = {"data__path": str(place / "corpus.txt"), **SHORT, **fields}
        return tiny_jobs.run(place, directory.name, num_devices, **fields)

    go_on.directory = directory
    return go_on


def leaves(section, prefix=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_field_of_a_run_is_free_noted_or_refused():
    fields = [*leaves(TrainJob()), *leaves(AlignJob())]
    assert [f for f in fields if not classified(f)] == [], "say in lm/runs/directory.py"
    listed = [*FREE, *NOTED, *REFUSED]
    assert len({*listed}) == len(listed)
    sections = {f.rpartition(".")[0] for f in fields} | {f.split(".")[0] for f in fields}
    assert {*listed} <= {*fields, *sections}


def test_what_changes_no_result_is_free(again, capsys):
    free = {"data__prefetch": 3, "data__num_threads": 0, "model__remat": "full"}
    again(**free, model__attention="xla", checkpoint__keep=5, train__eval_every=4)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert all("will not convert to Hugging Face" in note for note in notes)


def test_more_steps_are_noted_with_the_jump_and_the_way_to_warm_up_anew(again, capsys):
    again(train__steps=8)
    lines = capsys.readouterr().out.splitlines()
    assert "note: config.train.steps was 4, is 8 from here on" in lines
    assert "resuming at step 4 of 8" in lines
    (jump,) = [line for line in lines if "learning rate goes from" in line]
    # A cosine to a tenth of 1e-2: at its end, and half-way.
    assert "goes from 0.001 to 0.0055" in jump
    assert f"--config.init_from={again.directory}" in jump


@pytest.mark.parametrize("field, value", [("seed", 3), ("optimizer__b2", 0.9)])
def test_what_makes_another_run_is_refused_with_the_way_on(again, field, value):
    name = field.replace("__", ".")
    with pytest.raises(ConfigError, match=rf"config.{name}=.*says {value}.*--config.init_from="):
        again(**{field: value})


def test_a_field_that_an_older_version_did_not_write_had_its_default(again):
    path = again.directory / "config.json"
    config = json.loads(path.read_text())
    del config["optimizer"]["b2"], config["objective"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config.optimizer.b2=0.95, and this config says 0.9"):
        again(optimizer__b2=0.9)
    with pytest.raises(ConfigError, match=r"objective.z_loss=0.0, and this config says 0.1"):
        again(objective__z_loss=0.1)
    again()


def test_a_corpus_may_move_but_not_change(again, place, tmp_path, capsys):
    moved = tmp_path / "moved.txt"
    shutil.copy(place / "corpus.txt", moved)
    again(data__path=str(moved))
    assert f"'{moved}' holds the same" in capsys.readouterr().out.replace("\n", "")
    (tmp_path / "other.txt").write_text("Another text. " * 90)
    with pytest.raises(ConfigError, match=r"config\.data\.path=.*choose another --workdir"):
        again(data__path=str(tmp_path / "other.txt"))


def test_an_even_batch_is_shared_evenly_and_stays_as_the_run_began_on_fewer_devices(place, capsys):
    fields = {**SHORT, "data__batch_size": 3, "data__even_batch": True}
    directory = tiny_jobs.run(place, "even", 4, **{**fields, "train__steps": 2})
    assert json.loads((directory / "config.json").read_text())["data"]["batch_size"] == 4
    tiny_jobs.run(place, "even", 2, **fields)
    assert "config.data.batch_size=3 is 4 here, as the run began" in capsys.readouterr().out
    assert tiny_jobs.checkpoint_steps(directory)[-1] == 4
    with pytest.raises(ConfigError, match="batch_size=4 must be a multiple of 3"):
        tiny_jobs.run(place, "even", 3, **fields)


def test_a_start_that_trained_nothing_leaves_its_directory_to_the_next(place, monkeypatch):
    def no_memory(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("lm.training.setup.Training.create_state", no_memory)
        with pytest.raises(MemoryError):
            tiny_jobs.run(place, "failed", **SHORT)
    assert (place / "failed" / "config.json").exists()
    smaller = {"model__width": 8, "tokenizer__kind": "char", "seed": 1}
    directory = tiny_jobs.run(place, "failed", **SHORT, **smaller)
    config = json.loads((directory / "config.json").read_text())
    assert (config["model"]["width"], config["tokenizer"]["kind"]) == (8, "char")
    with pytest.raises(ConfigError, match=r"holds a run with config.model.width=8"):
        tiny_jobs.run(place, "failed", **SHORT, **{**smaller, "model__width": 16})

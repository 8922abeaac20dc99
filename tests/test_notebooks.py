"""Every notebook runs from its first cell to its last."""

import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What a notebook says, and what is run in its place, to be short.
SHORTER = {"train.steps = 400": "train.steps = 150", "documents = 20_000": "documents = 4_000"}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, and code that runs fast
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name in ("main.py", "configs", "lm"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    notebook = nbformat.read(path, as_version=4)
    for said, shorter in SHORTER.items():
        (cell,) = (cell for cell in notebook.cells if said in cell.source)
        cell.source = cell.source.replace(said, shorter)
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "mat" in "".join(output.get("text", "") for output in outputs)

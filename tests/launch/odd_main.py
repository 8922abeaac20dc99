"""main.py as one process of several, with accidents and witnesses that the environment asks for.

DIE=PROCESS:CALL:SIGNAL   strikes a process before one of its dispatches; signal 0: an exception
EXPECT=FILE.npz           parameters that a restored checkpoint must have, to the last bit
ROWS=DIRECTORY            where each process notes the rows it reads of each batch
"""

import json
import os
import pathlib
import runpy
import signal
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import numpy as np  # noqa: E402

from lm.data.batches import BatchIterator  # noqa: E402
from lm.parallel import hosts  # noqa: E402
from lm.training.checkpoints import Checkpointer  # noqa: E402


def strike(process: int, call: int, number: int) -> None:
    """Strikes `process` at the `call`-th `hosts.agree`, which every dispatch begins with."""
    agree, calls = hosts.agree, iter(range(1, 1_000_000))

    def struck(flag: bool) -> bool:
        if next(calls) == call and hosts.index() == process:
            if not number:
                raise RuntimeError("the roof fell in")
            os.kill(os.getpid(), signal.Signals(number))
        return agree(flag)

    hosts.agree = struck


def expect(path: str) -> None:
    """Compares every shard that this process restores with the parameters in `path`."""
    restore = Checkpointer.restore_latest

    def checked(self, abstract):
        found, wanted = restore(self, abstract), np.load(path)
        params = found.state["params"]
        assert params.keys() == set(wanted.files)
        for name, array in params.items():
            for shard in array.addressable_shards:
                part = np.ascontiguousarray(wanted[name][shard.index])
                assert np.asarray(shard.data).tobytes() == part.tobytes(), name
        print(f"process {hosts.index()} restored step {found.step} to the bit", flush=True)
        return found

    Checkpointer.restore_latest = checked


def note_rows(directory: str) -> None:
    """Writes the inputs of every batch and the rows they stand for."""
    original = BatchIterator.__next__

    def noting(self):
        position, batch = self._next, original(self)
        record = {"batch": position, "rows": self.local_rows.tolist()}
        with (pathlib.Path(directory) / f"{hosts.index()}.jsonl").open("a") as file:
            file.write(json.dumps({**record, "inputs": batch["inputs"].tolist()}) + "\n")
        return batch

    BatchIterator.__next__ = noting


if os.environ.get("DIE"):
    strike(*map(int, os.environ["DIE"].split(":")))
if os.environ.get("EXPECT"):
    expect(os.environ["EXPECT"])
if os.environ.get("ROWS"):
    note_rows(os.environ["ROWS"])
runpy.run_path(str(REPOSITORY / "main.py"), run_name="__main__")

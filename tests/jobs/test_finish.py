"""What a run shows at its end, of parameters that no device holds whole."""

import gc
from collections import Counter

import jax
import pytest
import tiny_jobs

from lm.jobs import finish
from lm.jobs.finish import samples

FEW = {
    "train__steps": 2,
    "train__log_every": 2,
    "checkpoint__every": 0,
    "prompt": ("The cat", "A dog"),
    "sample__max_new_tokens": 12,
    "sample__temperature": 0.0,
    "model__num_layers": 2,
    "model__width": 128,  # wide enough that a page of the cache is little beside the parameters
    "model__mlp_width": 512,
}


@pytest.mark.parametrize(
    "mesh",
    [
        {"strategy": "zero3"},
        pytest.param({"mesh__tensor": 2, "mesh__stage": 2}, marks=pytest.mark.slow),
    ],
    ids=["zero3", "pipeline"],
)
def test_no_device_holds_all_parameters_when_samples_are_drawn(tmp_path, monkeypatch, mesh):
    seen, before = [], jax.live_arrays()  # others' may die late
    # What a generator takes for its cache, whatever is asked of it, is far more than these take.
    monkeypatch.setattr("lm.inference.generate.LITTLE", 0)

    def looked_at(run, *arguments):
        text = samples(run, *arguments)
        gc.collect()
        held = Counter()
        kept = [*jax.tree.leaves(run.generator.params), *run.params.values()]
        own = [array for array in jax.live_arrays() if id(array) not in map(id, before)]
        arrays = {id(array): array for array in [*kept, *own]}.values()
        for array in arrays:
            if array.dtype == "float32" and not array.is_deleted():
                for shard in array.addressable_shards:
                    held[shard.device] += shard.data.nbytes
        seen.append((max(held.values()), sum(p.nbytes for p in run.params.values())))
        return text

    one = tiny_jobs.run(tmp_path, "one", **FEW)
    monkeypatch.setattr(finish, "samples", looked_at)
    many = tiny_jobs.run(tmp_path, "many", 8, **FEW, **mesh)
    ((most, whole),) = seen
    assert most < 0.75 * whole, "of eight devices none needs more than twice an eighth and a cache"
    assert (one / "samples.txt").read_text() == (many / "samples.txt").read_text()

"""The optimizer's state on the host: the same updates, and checkpoints that either kind reads."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError
from lm.models import init
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import ParamSpec
from lm.training.checkpoints import CheckpointConfig, Checkpointer
from lm.training.config import TrainConfig
from lm.training.offload import streamed_update
from lm.training.optimizer import OptimizerConfig, global_norm, make_optimizer
from lm.training.setup import abstract_state, set_up
from lm.training.step import initial_state, whole_update
from lm.training.workload import HOST, Workload, check_offload

STEPS = 3
ADAMW = OptimizerConfig(learning_rate=1e-2, clip_norm=0.5, warmup_steps=1, decay="no_embeddings")
NORMAL = jax.nn.initializers.normal(0.1)
SPECS = {
    "embedding.tokens": ParamSpec((8, 4), ("vocab", "embed"), NORMAL),
    "blocks.norm.scale": ParamSpec((4, 4), ("layers", "embed"), NORMAL),
    "blocks.up": ParamSpec((4, 4, 8), ("layers", "embed", "mlp"), NORMAL),
    "blocks.down": ParamSpec((4, 8, 4), ("layers", "mlp", "embed"), NORMAL),
    "dense_blocks.up": ParamSpec((2, 4, 8), ("layers", "embed", "mlp"), NORMAL),
    "final_norm.scale": ParamSpec((4,), ("embed",), NORMAL),
}


def state_on(mesh, config, memory=None, zero=3):
    """A state of `SPECS`, what it is abstractly, and its optimizer."""
    optimizer = make_optimizer(config, STEPS, SPECS)
    with jax.set_mesh(mesh):
        abstract = abstract_state(SPECS, optimizer, mesh, zero, memory)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        first = jax.jit(
            lambda key: initial_state(init(SPECS, key), optimizer), out_shardings=shardings
        )
        return first(jax.random.key(0)), abstract, optimizer


def after(state, abstract, update, mesh, skip=()):
    """Parameters and optimizer state after some updates with gradients that say nothing."""

    def step(params, kept, key, skip):
        gradients = init(SPECS, key)
        norm = global_norm(gradients) / 2
        rate = jnp.float32(1e-2)
        return update(gradients, jnp.float32(2), norm, kept, params, skip, rate)

    params, kept = state["params"], state["optimizer"]
    places = (abstract["params"], abstract["optimizer"])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, places)
    step = tiny_models.compiled(step, donate_argnums=(0, 1), out_shardings=shardings)
    with jax.set_mesh(mesh):
        for index in range(STEPS):
            params, kept = step(params, kept, jax.random.key(index), jnp.bool_(index in skip))
    return params, kept


def kinds_of_memory(kept) -> set[str]:
    """Of what the optimizer keeps of parameters."""
    paths = jax.tree_util.tree_leaves_with_path(kept)
    own = [leaf for path, leaf in paths if getattr(path[-1], "key", None) in SPECS]
    assert own
    return {leaf.sharding.memory_kind for leaf in own}


def assert_same(state, other, **tolerance):
    flat, others = (jax.tree_util.tree_leaves_with_path(s) for s in (state, other))
    for (path, a), (_, b) in zip(flat, others, strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-7, **tolerance}, err_msg=where)


@pytest.mark.parametrize(
    "name, clip_norm",
    [
        ("adamw", 0.5),
        ("muon", 0.0),
        pytest.param("lion", 0.5, marks=pytest.mark.slow),
        pytest.param("sgd", 0.0, marks=pytest.mark.slow),
    ],
)
def test_streamed_updates_are_those_of_the_state_on_the_device(name, clip_norm):
    """Of two stacks of layers and what is outside them, one step being left out."""
    config = dataclasses.replace(ADAMW, name=name, clip_norm=clip_norm)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    here, abstract, optimizer = state_on(mesh, config)
    expected = after(here, abstract, whole_update(optimizer), mesh, skip=(1,))
    there, abstract, _ = state_on(mesh, config, HOST)
    found = after(there, abstract, streamed_update(config, STEPS, SPECS), mesh, skip=(1,))
    assert_same(found, expected)
    assert kinds_of_memory(found[1]) == {HOST}
    assert kinds_of_memory(expected[1]) == {"device"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found[0])} == {"device"}


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_device_streams_its_own_share(zero):
    mesh = make_mesh(MeshConfig(data=1, stage=2, fsdp=2, tensor=2))
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    here, abstract, optimizer = state_on(one, ADAMW)
    expected = after(here, abstract, whole_update(optimizer), one)
    there, abstract, _ = state_on(mesh, ADAMW, HOST, zero)
    found = after(there, abstract, streamed_update(ADAMW, STEPS, SPECS), mesh)
    assert_same(found, expected)
    assert kinds_of_memory(found[1]) == {HOST}
    up = found[1][1].mu["blocks.up"]
    assert {shard.data.size * 8 for shard in up.addressable_shards} == {up.size}


@pytest.mark.parametrize("saved, restored", [(HOST, None), (None, HOST)])
def test_a_checkpoint_restores_into_either_memory(tmp_path, saved, restored):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    state, _, _ = state_on(mesh, ADAMW, saved)
    _, abstract, _ = state_on(mesh, ADAMW, restored)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, wait=True)
        found = checkpointer.restore_latest(abstract).state
    assert_same(found, state, rtol=0, atol=0)
    assert kinds_of_memory(found["optimizer"]) == {restored or "device"}


@pytest.mark.slow
def test_training_steps_in_one_dispatch_are_those_without():
    tokens_NBT = np.random.default_rng(0).integers(0, 40, (STEPS, 4, 9), np.int32)
    batches = {"inputs": tokens_NBT[..., :-1], "targets": tokens_NBT[..., 1:]}
    batches["weights"] = np.ones((STEPS, 4, 8), np.float32)
    layout = lay_out("", MeshConfig(), -1, jax.devices()[:1])

    def trained(offload):
        model, train = tiny_models.config(num_layers=1), TrainConfig(STEPS, 1, offload)
        training = set_up(Workload(model, 8, 4, optimizer=ADAMW, train=train, layout=layout))
        with layout.active():
            return training.step(training.create_state(), batches)

    assert_same(trained(True), trained(False), atol=1e-6)


def test_what_cannot_be_offloaded_is_said():
    def check(optimizer, device):
        train = TrainConfig(offload_optimizer=True)
        layout = SimpleNamespace(mesh=SimpleNamespace(local_devices=[device]))
        model = tiny_models.config()
        check_offload(Workload(model, 8, 8, optimizer=optimizer, train=train, layout=layout))

    (device, *_) = jax.devices()
    with pytest.raises(ConfigError, match=r"offload_optimizer=True .*optimizer.name='adafactor'"):
        check(OptimizerConfig(name="adafactor"), device)
    memory = SimpleNamespace(kind="device")
    chip = SimpleNamespace(addressable_memories=lambda: [memory], device_kind="chip")
    with pytest.raises(ConfigError, match="pinned_host memory, and chip has only device"):
        check(ADAMW, chip)
    check(ADAMW, device)

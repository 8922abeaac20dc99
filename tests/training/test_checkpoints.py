import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.config import ConfigError
from lm.training import checkpoint_files, checkpoints
from lm.training.checkpoints import CheckpointConfig, Checkpointer, restore_parameters


def make_state(seed=0, optimizer=None, width=8):
    """A training state with every kind of leaf: NaN, -0.0, bfloat16, integers, key data."""
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (16, width)),
        "layers.attention.query": jax.random.normal(jax.random.fold_in(key, 1), (2, width, 2, 4)),
        "layers.norm.gain": jnp.array([[0.0, -0.0, jnp.nan, 1e-40] * (width // 4)] * 2),
        "half": jax.random.normal(jax.random.fold_in(key, 2), (4,), jnp.bfloat16),
    }
    optimizer = optimizer or optax.adamw(1e-3)
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(key),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def parameters(directory, step=None, like=None, lazily=False):
    """`restore_parameters` of a state that `make_state` made."""
    like = abstract((like or make_state())["params"])
    return restore_parameters(directory, step, like, lazily)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


OPTIMIZERS = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "masked": optax.contrib.muon(1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_is_saved_to_the_bit(tmp_path, name):
    state = make_state(optimizer=OPTIMIZERS[name])
    extra = {"data": {"next_index": 17, "epochs": [0, 1]}, "note": "é"}
    with Checkpointer(tmp_path, CheckpointConfig(checksums=name != "masked")) as checkpointer:
        checkpointer.save(3, state, extra, wait=True)
        step, restored, got = checkpointer.restore_latest(abstract(state))
    assert step == 3 and got == extra
    assert_same_bits(restored, state)


def test_restores_onto_other_shardings(tmp_path):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = jnp.arange(64.0).reshape(8, 8)
    saved = {"w": jax.device_put(values, NamedSharding(mesh, PartitionSpec("a", "b")))}
    layouts = [PartitionSpec(), PartitionSpec("b", None), PartitionSpec(None, ("a", "b"))]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved, wait=True)
        for layout in layouts:
            sharding = NamedSharding(mesh, layout)
            target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
            _, state, _ = checkpointer.restore_latest(target)
            assert state["w"].sharding == sharding
            np.testing.assert_array_equal(state["w"], values)


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((512, 512))}}
    with Checkpointer(tmp_path, CheckpointConfig(keep=9)) as checkpointer:
        for step in range(5):
            checkpointer.save(step, state)
            for _ in range(3):
                state = advance(state)
    for step in range(5):
        _, restored = parameters(tmp_path, step, state)
        np.testing.assert_array_equal(restored["w"], 3.0 * step)


def test_keeps_the_last_and_the_best(tmp_path):
    state = make_state()
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 2.5}
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, state, metrics={"eval_loss": loss}, wait=True)
        assert checkpoints.saved_steps(tmp_path) == [20, 40, 50]
        assert checkpoints.best_step(tmp_path) == 20
        checkpointer.discard_after(40)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000020", "00000040", "lock"]


def test_saving_a_step_again_replaces_it(tmp_path):
    old, new = make_state(1), make_state(2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, old, {"n": 1})
        checkpointer.save(5, new, {"n": 2}, wait=True)
        restored = checkpointer.restore_latest(abstract(new))
        assert restored.extra == {"n": 2} and checkpoints.saved_steps(tmp_path) == [5]
        assert_same_bits(restored.state, new)


def truncate(checkpoint):
    os.truncate(largest_file(checkpoint), 100)


def flip_one_bit(checkpoint):
    content = bytearray(largest_file(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    largest_file(checkpoint).write_bytes(content)


def take_the_place_of_another(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("00000001"), checkpoint)


HARMS = {
    "truncated": truncate,
    "one bit": flip_one_bit,
    "a file is lost": lambda checkpoint: largest_file(checkpoint).unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"step": 2, "fi'),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "another step": take_the_place_of_another,
}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_newest_is_named_and_the_one_before_used(tmp_path, caplog, harm):
    first, second = make_state(1), make_state(2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, first)
        checkpointer.save(2, second, wait=True)
        HARMS[harm](tmp_path / "00000002")
        restored = checkpointer.restore_latest(abstract(first))
        assert restored.step == 1
        assert_same_bits(restored.state, first)
        (warning,) = warnings_of(caplog)
        assert "00000002 is damaged" in warning and "\n" not in warning
        with pytest.raises(ConfigError, match="00000002 is damaged"):
            parameters(tmp_path, 2)
        assert parameters(tmp_path)[0] == 1
        checkpointer.save(2, second, wait=True)  # the run comes by again and mends it
        assert checkpointer.restore_latest(abstract(second)).step == 2


def test_if_all_are_damaged_each_is_named_and_none_is_overwritten(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, wait=True)
        truncate(tmp_path / "00000001")
        take_the_place_of_another(tmp_path / "00000002")
        (tmp_path / "3").mkdir()
        faults = [
            r"holds no intact checkpoint: 3 is damaged \(manifest.json is missing\), "
            r"00000002 is damaged \(it is that of step 1, renamed\), "
            r"00000001 is damaged \(state/.* has 100 bytes instead of \d+\)",
            "another --workdir or remove",
        ]
        for read in (
            lambda: checkpointer.restore_latest(abstract(state)),
            lambda: parameters(tmp_path),
            lambda: parameters(tmp_path, lazily=True),
        ):
            for words in faults:
                with pytest.raises(ConfigError, match=words) as error:
                    read()
                assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"00000001", "00000002", "3", "lock"}


def test_a_flipped_bit_in_any_file_is_found_before_its_value_is_used(tmp_path):
    state = make_state(1, width=64)
    found, harmless = set(), 0
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {"note": 17}, wait=True)
        files = [p for p in (tmp_path / "00000001").rglob("*") if p.is_file() and p.stat().st_size]
        assert len(files) <= 10
        for file in files:
            whole = file.read_bytes()
            for place in np.linspace(0, len(whole) - 1, 16).astype(int):
                flipped = bytearray(whole)
                flipped[place] ^= 1 << place % 8
                file.write_bytes(flipped)
                try:
                    restored = checkpointer.restore_latest(abstract(state))
                    assert_same_bits(restored.state, state)
                    assert restored.extra == {"note": 17}
                    harmless += 1
                except ConfigError as error:
                    found.add(file)
                    assert "00000001 is damaged" in str(error)
            file.write_bytes(whole)
        assert found == set(files)
        # The last few hundred bytes of a file of values are an index of which Orbax made another.
        assert harmless <= 2
        assert checkpointer.restore_latest(abstract(state)).step == 1


def test_checksums_of_arrays_are_those_of_their_bits_however_sharded():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = jax.random.normal(jax.random.key(0), (8, 16))
    layouts = [PartitionSpec(), PartitionSpec("a", "b"), PartitionSpec(None, ("a", "b"))]
    placed = [jax.device_put(values, NamedSharding(mesh, layout)) for layout in layouts]
    sums = {int(checkpoint_files.checksums(x)[""]) for x in (values, *placed)}
    assert len(sums) == 1
    others = {
        "one sign": values.at[3, 5].multiply(-1),
        "two signs": values.at[3, 5:7].multiply(-1),
        "two places": values.at[3, 5].set(values[3, 6]).at[3, 6].set(values[3, 5]),
        "two shards": jnp.concatenate([values[4:], values[:4]]),
        "shape": values.reshape(-1)[:-1],
    }
    assert len(sums | {int(checkpoint_files.checksums(x)[""]) for x in others.values()}) == 6
    zeros = jnp.array([0.0, -0.0, jnp.nan], jnp.bfloat16)
    assert len({int(checkpoint_files.checksums(zeros[i : i + 1])[""]) for i in range(3)}) == 3


def test_a_manifest_of_an_earlier_version_is_read_and_verified(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {"n": 1}, {"eval_loss": 2.0}, wait=True)
        path = tmp_path / "00000001" / "manifest.json"
        files = {}
        for file in sorted(path.parent.rglob("*")):
            if file.is_file() and file != path:
                content = file.read_bytes()
                name = file.relative_to(path.parent).as_posix()
                files[name] = (len(content), zlib.crc32(content))
        path.write_text(json.dumps({"step": 1, "metrics": {"eval_loss": 2.0}, "files": files}))
        step, restored, extra = checkpointer.restore_latest(abstract(state))
        assert (step, extra, checkpoints.best_step(tmp_path)) == (1, {"n": 1}, 1)
        assert_same_bits(restored, state)
        flip_one_bit(tmp_path / "00000001")
        with pytest.raises(ConfigError, match="does not match its checksum"):
            checkpointer.restore_latest(abstract(state))


@pytest.mark.parametrize(
    "name",
    ["lr[1e-3]", "a\\b", "50%", "a b", "#x?y=1", "naïve", "a*", "gs:", "new\nline", "\udcff"],
)
def test_a_directory_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    state = make_state()
    with Checkpointer(tmp_path / name) as checkpointer:
        checkpointer.save(1, state, wait=True)
        assert_same_bits(checkpointer.restore_latest(abstract(state)).state, state)
    assert_same_bits(parameters(tmp_path / name)[1], state["params"])


def test_names_that_are_no_step_are_none(tmp_path):
    state = make_state()
    for name in ("²", "٣", "9" * 250, "-1", "00000001.saving", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "00000007").write_text("a file")
    assert checkpoints.saved_steps(tmp_path) == []
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(abstract(state)) is None
        checkpointer.save(7, state, wait=True)
        assert checkpointer.restore_latest(abstract(state)).step == 7
    assert parameters(tmp_path)[0] == 7


def test_one_run_at_a_time_writes_and_any_may_read(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, wait=True)
        holder = rf"{tmp_path} is in use by process {os.getpid()} on .+: let it end, or choose"
        for claim in (Checkpointer, checkpoints.check_free):
            with pytest.raises(ConfigError, match=holder):
                claim(tmp_path)
        assert parameters(tmp_path)[0] == 1
    checkpoints.check_free(tmp_path)
    (tmp_path / "lock").write_text("process 1 on a host that died\n")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, wait=True)


def test_nothing_saved_is_none(tmp_path):
    with Checkpointer(tmp_path / "a" / "b") as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state())) is None
        assert checkpoints.best_step(tmp_path / "a" / "b") is None
    for asked, words in {
        7: "no checkpoint of step 7",
        "best": "with an eval",
        None: "no ch",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parameters(tmp_path / "a" / "b", asked)


def test_parameters_alone(tmp_path):
    states = {1: make_state(1), 2: make_state(2), 3: make_state(3)}
    with Checkpointer(tmp_path, CheckpointConfig(keep=3)) as checkpointer:
        for step, loss in {1: 2.0, 2: 1.0, 3: 1.5}.items():
            checkpointer.save(step, states[step], metrics={"eval_loss": loss})
    for asked, step in {None: 3, "latest": 3, "best": 2, 1: 1}.items():
        for lazily in (False, True):
            got, params = parameters(tmp_path, asked, lazily=lazily)
            assert got == step
            assert_same_bits(dict(params), states[step]["params"])
    target = {"half": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=states[1]["step"].sharding)}
    _, some = restore_parameters(tmp_path, 1, target)
    assert some["half"].dtype == jnp.float32 and list(some) == ["half"]
    np.testing.assert_array_equal(some["half"], states[1]["params"]["half"].astype(jnp.float32))
    for asked, message in {"newest": "'latest' or 'best'", 9: "no checkpoint of step 9"}.items():
        with pytest.raises(ConfigError, match=message):
            parameters(tmp_path, asked)


def test_another_configuration_is_refused_by_name(tmp_path):
    state = make_state()
    cases = {
        r"params/embed is float32\[16, 8\] there and float32\[16, 12\] here": make_state(width=12),
        "optimizer/0/count is only in the checkpoint": make_state(optimizer=optax.sgd(1e-3)),
        "params/half is bfloat16": {
            **state,
            "params": {**state["params"], "half": jnp.zeros((4,))},
        },
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, wait=True)
        for message, other in cases.items():
            with pytest.raises(ConfigError, match=message) as error:
                checkpointer.restore_latest(abstract(other))
            assert "\n" not in str(error.value)
    wider = {"embed": jax.ShapeDtypeStruct((16, 12), jnp.float32)}
    with pytest.raises(ConfigError, match="another configuration"):
        restore_parameters(tmp_path, None, wider)


def test_a_directory_that_cannot_be_or_is_lost_during_the_run_is_reported(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path}/a: checkpoints cannot be .*--workdir"):
        Checkpointer(tmp_path / "a")
    checkpointer = Checkpointer(tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").write_text("in the way")
    with pytest.raises(ConfigError, match="step 1 could not be saved"):
        checkpointer.save(1, make_state(), wait=True)
    checkpointer.close()


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small disk needs root on Linux")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], check=False
    )
    if mount.returncode:
        pytest.skip("this machine does not allow mounts")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_full_disk_is_an_error_and_harms_nothing(small_disk):
    small, large = {"w": jnp.arange(1000.0)}, {"w": jnp.ones((1024, 1024))}
    checkpointer = Checkpointer(small_disk / "run")
    checkpointer.save(1, small)
    checkpointer.save(2, large)  # fails on the writing thread
    with pytest.raises(ConfigError, match="no space left on the disk") as error:
        checkpointer.save(3, small)
    message = str(error.value)
    assert str(small_disk / "run") in message and "\n" not in message
    assert "step 2" in message and "the checkpoint of step 1 is untouched" in message
    restored = checkpointer.restore_latest(abstract(small))
    assert restored.step == 1
    assert_same_bits(restored.state, small)
    assert sorted(p.name for p in (small_disk / "run").iterdir()) == ["00000001", "lock"]
    checkpointer.save(4, small, wait=True)  # nothing of the failed save is in the way
    checkpointer.close()


def test_full_disk_at_the_manifest(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    state = make_state()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, wait=True)
    monkeypatch.setattr(checkpoints, "write_manifest", full)
    checkpointer.save(2, state)
    with pytest.raises(ConfigError, match="no space left"):
        checkpointer.wait()
    checkpointer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "lock"]


KILLED = """
    import sys, jax.numpy as jnp
    from lm.training.checkpoints import Checkpointer
    checkpointer = Checkpointer(sys.argv[1])
    step = 0
    while True:
        step += 1
        checkpointer.save(step, {"w": jnp.full((256, 1024), float(step))}, {"step": step})
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_save_never_looks_complete(tmp_path, caplog):
    target = {"w": jnp.zeros((256, 1024))}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    root = pathlib.Path(checkpoints.__file__).parents[2]
    for steps in (3, 4):  # killed right after a save returned, so in the middle of its writing
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        while int(process.stdout.readline()) < steps:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Checkpointer(tmp_path) as checkpointer:
            for step in checkpoints.saved_steps(tmp_path):
                assert checkpoint_files.damage(tmp_path / f"{step:08d}") is None
            restored = checkpointer.restore_latest(abstract(target))
            assert restored.extra == {"step": restored.step} and restored.step >= steps - 2
            np.testing.assert_array_equal(restored.state["w"], float(restored.step))
        assert all(path.name.isdigit() or path.name == "lock" for path in tmp_path.iterdir())
    assert not warnings_of(caplog)


def test_a_fingerprint_knows_every_number_and_its_place():
    params = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3)}
    known = checkpoint_files.fingerprint(params)
    assert checkpoint_files.fingerprint(dict(reversed(params.items()))) == known
    assert checkpoint_files.fingerprint({**params, "b": params["b"].at[1].add(1e-7)}) != known
    assert checkpoint_files.fingerprint({**params, "a": params["a"][::-1]}) != known
    assert checkpoint_files.fingerprint({**params, "a": params["a"].reshape(4, 3)}) != known

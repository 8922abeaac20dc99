"""TPU kernels compile for each kind of chip, on a machine that has libtpu and no TPU."""

import json
import os
import subprocess
import sys

import pytest
from tpu_compiler import needs_libtpu

# In a process of its own: libtpu reads its environment once, and holds a lock while it is loaded.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from lm.models.attention.context import Context
from lm.models.attention.ring import ring_attention
from lm.models.attention.splash import splash
from lm.models.config import ModelConfig
from lm.models.text import Text
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.platform import compiling_for
from lm.planning.topology import open_topology

topology = open_topology(sys.argv[1])
B, H, K, C, T = 2, 8, 2, 128, 2048

def compiled(attention, sizes, window=0, softcap=0.0):
    config = ModelConfig(head_dim=C, attention_softcap=softcap, window=window)
    mesh = make_mesh(MeshConfig(data=1, **sizes), topology.devices)
    def array(*shape, dtype=jnp.bfloat16, spec=P(None, "context", "tensor")):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    def gradients(query, key, value, segments):
        text = Text.of(segments, segments_BT=segments)
        context = Context(None, text, text, causal=True, window=window)
        def loss(*arrays):
            heads = attention(config, *arrays, context)
            return jnp.sum(heads.astype(jnp.float32) ** 2)
        return jax.grad(loss, (0, 1, 2))(query, key, value)
    keys = array(B, T, K, C)
    arguments = array(B, T, H, C), keys, keys
    segments = array(B, T, dtype=jnp.int32, spec=P(None, "context"))
    with jax.set_mesh(mesh), compiling_for("tpu"):
        program = jax.jit(gradients).lower(*arguments, segments).compile()
    text = program.as_text()
    return [text.count("tpu_custom_call"), text.count("all-gather")]

everything = dict(window=700, softcap=50.0)
print(json.dumps({
    "splash": compiled(splash, dict(tensor=2, fsdp=2)),
    "splash, local, capped": compiled(splash, dict(tensor=2, fsdp=2), **everything),
    "ring": compiled(ring_attention, dict(context=4)),
    "ring, local, capped": compiled(ring_attention, dict(context=2, tensor=2), **everything),
}))
"""


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile(topology):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (kernels, gathers) in json.loads(done.stdout.splitlines()[-1]).items():
        # Forward, by queries and by keys; a ring's last turn stands outside its loop.
        assert kernels == (6 if name.startswith("ring") else 3), name
        assert gathers == 0, name

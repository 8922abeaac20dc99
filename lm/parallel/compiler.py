"""What the compiler for TPUs is asked for beyond its defaults.

By default a TPU's TensorCore speaks to other chips itself: nothing is multiplied meanwhile, and an
all-gather over all three dimensions of a torus is an all-reduce of shares among zeros, of twice the
bytes. The compiler can leave collectives to the SparseCores instead, which a chip has beside it,
and start them early. It can also give one operation more of the chip's own memory (VMEM) than its
16 MiB: with larger tiles a product reads its operands less often. (Beyond 32 MiB it finds tiles
that are 1 % faster, in several times the time.)

The options have not been run on a TPU: `config.train.compiler='tuned'` asks for them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.config import ConfigError
from lm.parallel.chips import Chip, chip_of
from lm.parallel.mesh import replicated

_SPARSE_CORES = ("v5p", "v6e", "tpu7x")  # by `Chip.name`: chips that have them

_OPTIONS = {
    "xla_tpu_scoped_vmem_limit_kib": "32768",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    # Gathers in pieces between products, which the SparseCores replace.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    # Products in as many pieces as devices, each with a share on its way: too small to be fast, and
    # not needed where gathers run beside.
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}


def options(device_kind: str) -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for programs that train on devices of this `device_kind`.

    None for those whose compiler is left as it is.
    """
    chip = chip_of(device_kind)
    return dict(_OPTIONS) if chip is not None and has_sparse_cores(chip) else None


def check_options(device: jax.Device, prefix: str = "config.train") -> None:
    """Raises ConfigError unless this device's compiler takes its `options`."""
    asked = options(device.device_kind)
    if asked is None:
        return
    alone = Mesh(np.array([device]), ("device",))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(alone))
    try:
        with jax.set_mesh(alone):  # whatever mesh is set around it
            jax.jit(lambda x: x + 1, compiler_options=asked).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"{prefix}.compiler='tuned' asks the compiler of {device.device_kind} for more than "
            f"it knows ({reason}): install a newer libtpu, or set it to 'default'"
        ) from error


def has_sparse_cores(chip: Chip) -> bool:
    """Whether collectives run on a chip's SparseCores, beside its TensorCore."""
    return chip.name in _SPARSE_CORES

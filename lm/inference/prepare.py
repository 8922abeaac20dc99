"""Before the first token: a model set up for reading all its weights, on one device or a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import check
from lm.models import Model, bind, param_specs, skeleton
from lm.models.matmul import compute_dtype
from lm.models.params import Layers
from lm.models.reading import Weight, kept
from lm.parallel.mesh import AXES
from lm.parallel.platform import platform
from lm.parallel.sharding import ACTIVATION_RULES, ParamSpec, parameter_shardings, partition

Weights = Literal["compute", "int8"]  # matrices in the compute dtype, or in eight bits
CacheKind = Literal["compute", "int8"]  # the same of the engine's keys and values

UNROLLED_LAYERS = 24  # up to here the time to compile them one by one is bearable

# What the model looks up, adds or multiplies in float32 though it has the axes of a matrix.
_FLOAT32 = ("positions", "types", "router", "scale")
# Whose products can be taken of weights kept for reading (`lm.models.reading`), by their last name.
_KEPT = (
    "query", "key", "value", "output", "query_latent", "latent", "up", "gate", "down",
    "projection", "head", "tokens",
)  # fmt: skip
# Of the letters that name a cache's dimensions.
_CACHE_AXES = {"B": "batch", "K": "kv_heads", "J": "kv_heads"}


def for_decoding(model: Model, mesh: Mesh | None = None) -> Model:
    """The same skeleton, set up for reading all its weights for every token.

    Where `tensor` splits a mesh further than there are key/value heads, these are repeated, so
    that each device keeps the one that its queries ask, and not all of them.

    On the CPU that means float32 unless the config names a dtype: a product with few rows spends
    its time reading weights, and widening bfloat16 ones takes longer than reading twice the bytes.
    Layers are unrolled, unless they are many: a loop over stacked layers would copy the weights of
    each before using them. Experts take all tokens that choose them: with a capacity, a token's
    output would depend on how many tokens are read at once.
    """
    config = model.config
    dtype = config.compute_dtype
    if dtype == "auto" and platform() == "cpu":
        dtype = "float32"
    many = max(config.num_layers, config.encoder_layers) > UNROLLED_LAYERS
    fields = {"compute_dtype": dtype, "scan_layers": many, "capacity_factor": 0.0}
    ways, kv_heads = mesh.shape["tensor"] if mesh else 1, config.kv_heads
    if ways > kv_heads and ways % kv_heads == 0 and config.num_heads % ways == 0:
        fields["num_kv_heads"] = ways
    return skeleton(dataclasses.replace(config, **fields))


def for_reading(
    model: Model,
    params: Mapping[str, jax.Array],
    weights: Weights = "compute",
) -> dict:
    """`params` in the compute dtype and, where layers are not scanned, apart: see `bound`.

    Matrices are kept for reading (`lm.models.reading`) on a CPU by itself, on TPUs, and wherever
    they are to be of eight bits (`weights`): they are then a quarter of float32's size, and outputs
    differ by the rounding. What a mesh shares stays split as it is; scales are, as their outputs.

    Raises:
      ConfigError: for eight bits of a model whose products know no such weights.
    """
    specs = param_specs(model)
    eight_bits, keeps = weights == "int8", keepable(model)
    check(
        not eight_bits or keeps,
        "weights='int8' is for transformers that are not trained with eight-bit products: use "
        "weights='compute'",
    )
    # What is traced here (`abstract_params`) is to lie on a mesh.
    alone = not any(isinstance(params[n], jax.core.Tracer) or mesh_of(params[n]) for n in specs)
    turned = keeps and (eight_bits or platform() == "tpu" or (alone and platform() == "cpu"))
    read = {}
    for name, x in in_compute_dtype(model, params, alone).items():
        axes = specs[name].axes
        apart = "layers" in axes and not model.config.scan_layers
        inputs = _inputs(name, axes, model.config.tie_embeddings) if turned else ()
        if apart and inputs:
            inputs = tuple(axis - 1 for axis in inputs)
            read[name] = tuple(_kept(layer, inputs, eight_bits) for layer in _layers(x))
        elif inputs:
            read[name] = _kept(x, inputs, eight_bits, "layers" in axes)
        else:
            read[name] = _layers(x) if apart else x
    return read


def keepable(model: Model) -> bool:
    """Whether the model's products can be taken of weights kept for reading."""
    config = model.config
    return config.cell == "attention" and config.quantization == "none"


def _inputs(name: str, axes: tuple[str | None, ...], tied: bool) -> tuple[int, ...]:
    """The axes that products of a matrix sum over; none of what is not kept for reading."""
    own = name.rpartition(".")[2]
    if own not in _KEPT or "expert" in axes or (own == "tokens" and not tied):
        return ()
    every = tuple(axis for axis, axis_name in enumerate(axes) if axis_name != "layers")
    if "vocab" in axes:  # (vocab, embed), out before in as it is
        return every[1:]
    return every[:-1] if axes[-1] == "embed" else every[:1]


def _layers(x: jax.Array) -> tuple[jax.Array, ...]:
    """One array a layer, split as all of them together."""
    return tuple(x) if mesh_of(x) is None else _layers_split(x, _of_layer(x.sharding))


@functools.partial(jax.jit, static_argnums=1)
def _layers_split(x: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.with_sharding_constraint(layer, sharding) for layer in x)


def _kept(w: jax.Array, inputs: tuple, eight_bits: bool, stacked: bool = False) -> Weight:
    """As `lm.models.reading.kept`; of an array that a mesh shares, split as it is."""
    if mesh_of(w) is None:
        return kept(w, inputs, eight_bits, stacked)
    return _kept_split(
        w, inputs, eight_bits, stacked, _of_kept(w.sharding, w.ndim, inputs, stacked)
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _kept_split(w, inputs, eight_bits, stacked, shardings) -> Weight:
    return _with(jax.lax.with_sharding_constraint, kept(w, inputs, eight_bits, stacked), shardings)


def _with(function, weight: Weight, shardings: tuple[NamedSharding, NamedSharding]) -> Weight:
    """`weight` with `function` of each of its arrays and of that array's sharding."""
    values, scale = weight.values, weight.scale
    scale = None if scale is None else function(scale, shardings[1])
    return dataclasses.replace(weight, values=function(values, shardings[0]), scale=scale)


def _of_kept(
    sharding: NamedSharding, ndim: int, inputs: tuple, stacked: bool
) -> tuple[NamedSharding, NamedSharding]:
    """How a `Weight`'s values and scale are split, where what it is made of is split like this.

    Of axes that become one only the first is ever split: heads, not their width.
    """
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    first = next(axis for axis in range(stacked, ndim) if axis not in inputs)
    out = *spec[:stacked], spec[first]
    specs = PartitionSpec(*out, spec[inputs[0]]), PartitionSpec(*out)
    return tuple(NamedSharding(sharding.mesh, spec) for spec in specs)


def _of_layer(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def bound(model: Model, params: Mapping[str, jax.Array | tuple[jax.Array, ...]]) -> Model:
    """The callable model, of what `for_reading` returned."""
    layers = {name: Layers(x) if isinstance(x, tuple) else x for name, x in params.items()}
    return bind(model, layers)


def in_compute_dtype(
    model: Model, params: Mapping[str, jax.Array], alone: bool = True
) -> dict[str, jax.Array]:
    """`params` with every matrix that is multiplied in the compute dtype, once for all tokens.

    The model casts them anyway, but inside the loop. What it uses in float32 stays: gains, biases,
    the router of a mixture of experts, and embeddings but for tokens: where these are also the
    output head, and where they are not `alone` on one device, which sends others what it finds.
    """
    dtype = compute_dtype(model.config.compute_dtype)

    def multiplied(name: str, spec: ParamSpec) -> bool:
        if name == "embedding.tokens":
            return model.config.tie_embeddings or not alone
        own = name.rpartition(".")[2]
        stays = own in _FLOAT32 or own.endswith("bias")
        return not stays and len(set(spec.axes) - {"layers"}) >= 2

    return {
        name: _repeated(jnp.asarray(params[name], dtype if multiplied(name, spec) else None), spec)
        for name, spec in param_specs(model).items()
    }


def _repeated(x: jax.Array, spec: ParamSpec) -> jax.Array:
    """With as many key/value heads as the model has, split over `tensor`: see `for_decoding`."""
    if x.shape == spec.shape:
        return x
    axis = spec.axes.index("kv_heads")
    entries = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
    entries[axis] = "tensor"
    times = spec.shape[axis] // x.shape[axis]
    return _repeated_split(x, times, axis, NamedSharding(x.sharding.mesh, PartitionSpec(*entries)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _repeated_split(x: jax.Array, times: int, axis: int, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.repeat(x, times, axis), sharding)


# ---- On a mesh -------------------------------------------------------------------------------


def mesh_of(x: jax.Array) -> Mesh | None:
    """The mesh of an array that several devices share; None of any other."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    shared = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding.mesh if shared else None


def spread(
    model: Model, params: dict[str, jax.Array], mesh: Mesh
) -> tuple[Mesh, dict[str, jax.Array]]:
    """The same devices and parameters, split for texts that are too few to share.

    Every axis but `tensor` splits the parameters' width, as `fsdp` does, so that no device need
    have room for all of them. `params` is emptied: its arrays are donated.
    """
    sizes = {**dict.fromkeys(AXES, 1), "tensor": mesh.shape["tensor"]}
    sizes["fsdp"] = mesh.size // sizes["tensor"]
    kinds = (AxisType.Auto,) * len(AXES)
    mesh = Mesh(mesh.devices.reshape(*sizes.values()), AXES, axis_types=kinds)
    shardings = parameter_shardings(param_specs(model), mesh)
    # One at a time: on its way to other devices an array may be whole on each.
    names = list(params)
    return mesh, {n: jax.device_put(params.pop(n), shardings[n], donate=True) for n in names}


def abstract_params(
    model: Model, shardings: Mapping[str, NamedSharding], weights: Weights = "compute"
) -> dict[str, Any]:
    """What `for_reading` makes of parameters so split, as shapes with shardings."""
    specs = param_specs(model)
    whole = {name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for name, s in specs.items()}
    read = jax.eval_shape(lambda params: for_reading(model, params, weights), whole)

    def shape(x, sharding: NamedSharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def placed(x, sharding: NamedSharding, axes: tuple[str | None, ...], name: str):
        if isinstance(x, tuple):
            return tuple(placed(layer, _of_layer(sharding), axes[1:], name) for layer in x)
        if not isinstance(x, Weight):
            return shape(x, sharding)
        inputs = _inputs(name, axes, model.config.tie_embeddings)
        return _with(shape, x, _of_kept(sharding, len(axes), inputs, "layers" in axes))

    return {n: placed(x, shardings[n], specs[n].axes, n) for n, x in read.items()}


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """How a mesh shares a cache, leaf by leaf: rows as a batch's, heads over `tensor`.

    Names carry shapes: the letters of the innermost field say what the dimensions of its leaves
    are; one array a layer lacks the first.
    """

    def place(path, leaf) -> NamedSharding:
        field = [key.name for key in path if hasattr(key, "name")][-1]
        letters = field.rpartition("_")[2][-leaf.ndim :] if leaf.ndim else ""
        axes = [_CACHE_AXES.get(letter) for letter in letters]
        # Of J, a key and a value of each head, both are on one device.
        shape = [size // 2 if letter == "J" else size for letter, size in zip(letters, leaf.shape)]
        return NamedSharding(mesh, partition(axes, shape, mesh, ACTIVATION_RULES))

    return jax.tree_util.tree_map_with_path(place, cache)

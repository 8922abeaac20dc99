"""Training, set up from a workload: for a run, and for a plan of that run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.data.batches import BatchIterator, EvaluationBatches
from lm.models import Model, init, param_specs, skeleton
from lm.models.adapters import base_shardings, begun, freeze, merged, whole_names
from lm.models.matmul import compute_dtype
from lm.parallel import compiler
from lm.parallel.mesh import assemble, batch_sharding, replicated
from lm.parallel.sharding import ParamSpec, parameter_shardings, zero_rules
from lm.training.offload import streamed_update
from lm.training.optimizer import Optimizer, make_optimizer
from lm.training.step import Batch, Frozen, State, initial_state, make_train_step, whole_update
from lm.training.workload import HOST, Workload


class Training(NamedTuple):
    """What trains a workload. Nothing of it is allocated."""

    workload: Workload
    model: Model
    specs: dict[str, ParamSpec]  # of what is trained: the model's parameters, or adapters
    optimizer: Optimizer
    abstract: State  # shapes and shardings of the state
    frozen: Frozen  # and of what steps read beside it
    # (state, batches [N, B, T], frozen) → (state after N steps, metrics [N]): jitted, donates the
    # state; to be called or lowered within `layout.active()`. See `lm.training.step.Frozen`.
    step: Callable[..., tuple[State, dict[str, jax.Array]]]

    def create_state(self, params: Mapping[str, Any] | None = None) -> State:
        """The state before the first step, created in place on its devices.

        Args:
          params: start from these; those that are missing, such as a new head, are random.
        """
        given = dict(params or {})
        new = {name: spec for name, spec in self.specs.items() if name not in given}

        def begin(params, key):
            return initial_state({**params, **init(new, key)}, self.optimizer)

        begun = jax.jit(begin, out_shardings=_shardings(self.abstract))
        return begun(given, jax.random.key(self.workload.seed))

    def adapt(self, params: dict[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Of a model's parameters: the base of adapters, and these before the first step.

        What is trained whole may be missing in `params`, and is then left to `create_state`.
        """
        adapter, specs = self.workload.adapter, param_specs(self.model)
        dtype = compute_dtype(self.workload.model.compute_dtype)

        def divided(params, key):
            base = freeze(adapter, specs, params, dtype)
            return base, begun(adapter, specs, params, base, key)

        trained = self.abstract["params"].items()
        new = set(whole_names(adapter, specs)) - params.keys()
        begin = {name: leaf for name, leaf in trained if name not in new}
        shardings = _shardings((self.frozen["base"], begin))
        key = jax.random.key(self.workload.seed)
        return jax.jit(divided, out_shardings=shardings)(params, key)

    def whole(self, params: dict[str, jax.Array], frozen: Frozen) -> dict[str, jax.Array]:
        """All of the model's parameters, of those that are trained: with adapters added in."""
        if "base" not in frozen:
            return params
        mesh, zero = self.workload.layout.mesh, self.workload.layout.zero
        specs = param_specs(self.model)
        shardings = parameter_shardings(specs, mesh, zero_rules(zero, "parameters"))
        return jax.jit(merged, out_shardings=shardings)(params, frozen["base"])

    def put(
        self, batch: Mapping[str, np.ndarray], batches: BatchIterator | EvaluationBatches, leading=0
    ) -> Batch:
        """Global arrays on their devices, from this host's rows of one of `batches`.

        The transfers are started, not waited for. `leading` dimensions stand before the rows.
        """
        mesh = self.workload.layout.mesh
        return assemble(self._read(batch), mesh, batches.local_rows, batches.batch_size, leading)

    def shapes(self, batch: Mapping[str, jax.ShapeDtypeStruct], leading=0) -> Batch:
        """What `put` returns of arrays of these shapes, all hosts' rows, as shapes."""
        mesh = self.workload.layout.mesh

        def shape(x):
            sharding = batch_sharding(mesh, leading, x.ndim - leading)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(shape, jax.eval_shape(self._read, dict(batch)))

    def _read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Of a batch, what steps read."""
        if self.workload.packed:
            return dict(batch)
        # Attention needs no mask of documents, experts need one of padding.
        read = {k: v for k, v in batch.items() if k not in ("segment_ids", "positions")}
        return {**read, "filled": batch["segment_ids"] > 0}


def set_up(workload: Workload) -> Training:
    """The training of a workload that has a layout.

    Raises:
      ConfigError: the optimizer does not fit the steps, or the devices' compiler is too old for
        `train.compiler`.
    """
    train, layout = workload.train, workload.layout
    model, specs = skeleton(workload.model), workload.trained
    optimizer = make_optimizer(workload.optimizer, train.steps, specs)
    memory, update = None, whole_update(optimizer)
    if train.offload_optimizer:
        memory, update = HOST, streamed_update(workload.optimizer, train.steps, specs)
    abstract = abstract_state(specs, optimizer, layout.mesh, layout.zero, memory)
    gradients = parameter_shardings(specs, layout.mesh, zero_rules(layout.zero, "gradients"))
    step = make_train_step(workload, model, optimizer, update, gradients)
    options = None
    if train.compiler == "tuned":
        device = next(iter(layout.mesh.local_devices), layout.mesh.devices.flat[0])
        compiler.check_options(device)
        options = compiler.options(device.device_kind)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(_shardings(abstract), replicated(layout.mesh)),
        compiler_options=options,
    )
    return Training(workload, model, specs, optimizer, abstract, abstract_frozen(workload), jitted)


def abstract_frozen(workload: Workload) -> Frozen:
    """The base of adapters, and the reference, as `jax.ShapeDtypeStruct`s with shardings.

    Nothing where there are none. They are split as parameters are; a whole reference always.
    """
    frozen, adapts = {}, workload.adapter.kind != "none"
    if workload.objective.has_reference:
        whole = workload.teacher is not None or not adapts
        model = skeleton(workload.teacher or workload.model)
        trained = param_specs(model) if whole else workload.trained
        rules = zero_rules(3 if whole else workload.layout.zero, "parameters")
        split = parameter_shardings(trained, workload.layout.mesh, rules)
        frozen["reference"] = {
            name: jax.ShapeDtypeStruct(spec.shape, "float32", sharding=split[name])
            for name, spec in trained.items()
        }
    if not adapts:
        return frozen
    specs = param_specs(skeleton(workload.model))
    dtype = compute_dtype(workload.model.compute_dtype)
    shapes = {n: jax.ShapeDtypeStruct(spec.shape, "float32") for n, spec in specs.items()}
    base = jax.eval_shape(lambda params: freeze(workload.adapter, specs, params, dtype), shapes)
    rules = zero_rules(workload.layout.zero, "parameters")
    shardings = base_shardings(base, specs, workload.layout.mesh, rules)
    frozen["base"] = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        base,
        shardings,
    )
    return frozen


def abstract_state(
    specs: Mapping[str, ParamSpec],
    optimizer: Optimizer,
    mesh: jax.sharding.Mesh,
    zero: int = 3,
    optimizer_memory: str | None = None,
) -> State:
    """The state as `jax.ShapeDtypeStruct`s with shardings, without allocating any of it.

    Parameters, and what the optimizer keeps of each under its name and in its shape, are sharded as
    ZeRO stage `zero` says; the rest is replicated. What the optimizer keeps of parameters is in
    `optimizer_memory`; on the device unless given.
    """
    shardings = {
        what: parameter_shardings(specs, mesh, zero_rules(zero, rules))
        for what, rules in (("params", "parameters"), ("optimizer", "optimizer"))
    }
    shapes = jax.eval_shape(lambda: initial_state(init(specs, jax.random.key(0)), optimizer))

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = names[-1] if names else None
        matches = name in specs and leaf.shape == specs[name].shape
        sharding = shardings[names[0]][name] if matches else replicated(mesh)
        if optimizer_memory and matches and names[0] == "optimizer":
            sharding = sharding.with_memory_kind(optimizer_memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _shardings(abstract: State):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)

"""Training a sparse dictionary on the activations of a frozen model, as they are computed.

Every step runs the model on a batch of its own kind of data and takes some tokens of every row, so
that a step's tokens are from as many places of as many documents as the batch has; nothing is
stored. Model and dictionary are split over the mesh as the house's other parameters are, the
tokens over its batch axes. The state is that of `lm.training.step` and, beside it,

    silent       [L, F] int32: tokens, over all devices, since each feature fired
    cut          [L] batch_topk's running mean of the lowest activation that was kept
    read_scale, write_scale  [L] measured once, before the first step
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.config import check, check_choice
from lm.interpretability.dictionaries import Dictionary, Kind
from lm.interpretability.dictionary_evaluation import text_fields
from lm.interpretability.dictionary_loss import DictionaryConfig, Trainable, folded, loss
from lm.models import Model, ModelConfig, bind, count, init, param_specs, skeleton
from lm.models.activations import sites, trace
from lm.models.costs import forward_flops_per_token
from lm.parallel.mesh import replicated
from lm.parallel.sharding import constrain, parameter_shardings, zero_rules
from lm.training.optimizer import global_norm, make_optimizer
from lm.training.setup import Training, abstract_state
from lm.training.step import Batch, Frozen, State, gradients, initial_state, whole_update
from lm.training.workload import Workload

_CUT_MEMORY = 0.99  # the running mean of `cut` forgets 1 % a step
_LONG = 2**30  # tokens; `silent` counts no further


@dataclasses.dataclass(frozen=True)
class DictionaryWorkload(Workload):
    """A dictionary's training; `model` is the frozen one whose activations it learns."""

    dictionary: DictionaryConfig = dataclasses.field(default_factory=DictionaryConfig)
    tokens_per_row: int = 0  # of each sequence that are learned from; 0: all

    @property
    def trained(self) -> dict[str, Any]:
        """The dictionary's parameters."""
        return param_specs(Trainable(self.dictionary, len(self.layers), self.model.width))

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that are read."""
        return self.dictionary.layers or tuple(range(self.model.num_layers))

    @property
    def taken(self) -> int:
        """Tokens of a row that are learned from."""
        return min(self.tokens_per_row or self.block_size, self.block_size)

    @property
    def tokens(self) -> int:
        """Tokens a step that are learned from."""
        return self.batch_size * self.taken

    @property
    def flops_per_token(self) -> float:
        """Of one that is learned from: its share of the model's, and the dictionary's products."""
        read = forward_flops_per_token(self.model, self.block_size, None, 0)
        return read * self.block_size / self.taken + 6 * count(self.trained)


class Reading(NamedTuple):
    """Where activations are read, and of which tokens of a batch."""

    model: Model  # a skeleton
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    taken: int  # tokens of a row
    seed: int

    def __call__(
        self, base: Mapping[str, jax.Array], batch: Batch, step: jax.Array, rows_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Activations [L, N, D] at the sources and targets, float32, and weights [N].

        Which tokens of a row are taken depends on the seed, the step and the row's number.
        """
        fields, valid_BT = text_fields(batch)
        names = dict.fromkeys((*self.sources, *self.targets))
        found = trace(bind(self.model, base), batch["inputs"], names=list(names), **fields)
        B, T = batch["inputs"].shape
        places_BM = jnp.broadcast_to(jnp.arange(T), (B, T))
        if self.taken < T:
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)
            order_BT = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(keys_B)
            places_BM = jax.lax.top_k(jnp.where(valid_BT, order_BT, -1), self.taken)[1]
        weights_BM = jnp.take_along_axis(valid_BT, places_BM, axis=1).astype(jnp.float32)

        def stacked(names):
            values = [
                jnp.take_along_axis(found[name], places_BM[..., None], axis=1) for name in names
            ]
            x_LND = (
                jnp.stack(values).astype(jnp.float32).reshape(len(names), -1, values[0].shape[-1])
            )
            return constrain(x_LND, None, "batch", None)

        return stacked(self.sources), stacked(self.targets), weights_BM.reshape(-1)


def read_and_written(kind: Kind, site: str, config: ModelConfig) -> tuple[str, str]:
    """The sites of a block that a dictionary of this kind reads and rebuilds.

    Raises:
      ConfigError: a model without MLPs that read a residual stream.
    """
    if kind == "sae":
        return site, site
    check(
        config.cell == "attention",
        f"config.dictionary.kind={kind!r} needs a Transformer's MLPs, not cell={config.cell!r}",
    )
    if not config.norms_read:
        return "residual_before" if config.parallel else "residual_middle", "mlp.output"
    return "attention_norm.output" if config.shared_norm else "mlp_norm.output", "mlp.output"


def reading_of(workload: DictionaryWorkload) -> Reading:
    """Where a workload's dictionary reads and writes.

    Raises:
      ConfigError: a layer or site that the model does not have.
    """
    dictionary, model = workload.dictionary, skeleton(workload.model)
    check(
        max(workload.layers) < workload.model.num_layers,
        f"config.dictionary.layers={dictionary.layers} must be layers of the model, which are "
        f"0 … {workload.model.num_layers - 1}",
    )
    pair, known = read_and_written(dictionary.kind, dictionary.site, workload.model), sites(model)
    first = f"blocks.{workload.layers[0]}."
    there = [name.removeprefix(first) for name in known if name.startswith(first)]
    for site in pair:
        check_choice(
            "config.dictionary.site", site, [n for n in there if known[first + n] == "BTD"]
        )
    names = [tuple(f"blocks.{layer}.{site}" for layer in workload.layers) for site in pair]
    return Reading(model, *names, workload.taken, workload.seed)


def set_up(workload: DictionaryWorkload, reading: Callable[..., Any]) -> Training:
    """The training of a workload that has a layout.

    Args:
      reading: a `Reading`, or what takes the same arguments and gives the like.
    """
    config, mesh, zero = workload.dictionary, workload.layout.mesh, workload.layout.zero
    L, F, specs = len(workload.layers), workload.dictionary.features, workload.trained
    trainable = Trainable(config, L, workload.model.width)
    optimizer = make_optimizer(workload.optimizer, workload.train.steps, specs)
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
    abstract = abstract_state(specs, optimizer, mesh, zero)
    abstract |= {name: whole((L,), "float32") for name in ("cut", "read_scale", "write_scale")}
    abstract["silent"] = whole((L, F), "int32")
    split = parameter_shardings(specs, mesh, zero_rules(zero, "gradients"))
    step = make_step(workload, trainable, reading, optimizer, split)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    return Training(workload, trainable, specs, optimizer, abstract, {}, jitted)


def base_shardings(workload: DictionaryWorkload) -> dict[str, jax.sharding.NamedSharding]:
    """Where the frozen model's parameters lie."""
    rules = zero_rules(workload.layout.zero, "parameters")
    return parameter_shardings(param_specs(skeleton(workload.model)), workload.layout.mesh, rules)


def make_step(workload: DictionaryWorkload, model: Trainable, reading: Reading, optimizer, split):
    """A function (state, batches [N, B, T], frozen) → (state after N steps, metrics [N]).

    As `lm.training.step.make_train_step`, and what is measured beside the loss: `fvu`, the error
    over the batch's variance, mean over layers; `l0`, features that fire at a token; `dead`, the
    share of features that have not fired for `dead_after` tokens.
    """
    config, train = workload.dictionary, workload.train
    update = whole_update(optimizer)
    rising = max(1.0, config.sparsity_warmup * train.steps)

    def one_step(state: State, batch: Batch, frozen: Frozen):
        dead_LF = state["silent"] >= config.dead_after
        sparsity = config.sparsity * jnp.minimum(1.0, (state["step"] + 1) / rising)

        def loss_fn(params, batch, rows_B):
            x_LND, y_LND, weights_N = reading(frozen["base"], batch, state["step"], rows_B)
            x_LND *= state["read_scale"][:, None, None]
            y_LND *= state["write_scale"][:, None, None]
            return loss(bind(model, params), x_LND, y_LND, weights_N, dead_LF, sparsity)

        summed, sums = gradients(loss_fn, state["params"], batch, train.accumulation, split)
        weight = jnp.maximum(sums["weight"], 1.0)
        nats, norm = sums["nats"] / weight, global_norm(summed) / weight
        bad = ~(jnp.isfinite(nats) & jnp.isfinite(norm))
        if train.spike_nats:
            bad |= nats > state["loss_mean"] + train.spike_nats
        rate = optimizer.schedule(state["step"])
        params, kept = update(summed, weight, norm, state["optimizer"], state["params"], bad, rate)
        quiet = jnp.minimum(state["silent"] + weight.astype(jnp.int32), _LONG)
        silent = jnp.where(sums["fired"] > 0, 0, quiet)
        cut, before = sums["cut"] / sums["parts"], state["cut"]
        cut = jnp.where(before > 0, _CUT_MEMORY * before + (1 - _CUT_MEMORY) * cut, cut)
        seen = {"silent": silent, "cut": cut, "loss_mean": nats}
        new_state = {**state, "params": params, "optimizer": kept, "step": state["step"] + 1}
        new_state |= {name: jnp.where(bad, state[name], new) for name, new in seen.items()}
        variance = sums["squares"] - jnp.sum(jnp.square(sums["sums"]), -1) / weight
        fvu = jnp.mean(sums["error"] / jnp.maximum(variance, 1e-20))
        dead = jnp.mean(silent >= config.dead_after)
        metrics = {name: sums[name] for name in ("nats", "weight", "tokens", "l0")}
        metrics |= {"fvu": fvu * weight, "dead": dead * weight}
        measured = {"grad_norm": norm, "skipped": bad.astype(jnp.int32), "learning_rate": rate}
        return new_state, metrics | measured

    def steps(state: State, batches: Batch, frozen: Frozen):
        return jax.lax.scan(lambda state, batch: one_step(state, batch, frozen), state, batches)

    return steps


def create_state(
    training: Training,
    reading: Callable[..., Any],
    base: Mapping[str, jax.Array],
    batches: Iterable[Batch],
) -> State:
    """The state before the first step: random, but for what `batches` say of scales and means.

    b_dec starts at the targets' mean, and the encoder of an autoencoder at its decoder's transpose.

    Args:
      batches: on their devices.
    """
    config = training.workload.dictionary

    @jax.jit
    def measure(base, batch, number):
        rows_B = jnp.arange(batch["inputs"].shape[0], dtype=jnp.int32)
        x_LND, y_LND, weights_N = reading(base, batch, number, rows_B)
        w_N1 = weights_N[:, None]
        sums = (jnp.square(x_LND) * w_N1, jnp.square(y_LND) * w_N1)
        return *(jnp.sum(s, (1, 2)) for s in sums), jnp.sum(y_LND * w_N1, 1), jnp.sum(weights_N)

    found = [measure(base, batch, number) for number, batch in enumerate(batches)]
    sums = jax.tree.map(lambda *each: sum(each), *found)

    def begin(key, sums):
        read_L, written_L, mean_LD, weight = sums
        params, D = init(training.specs, key), mean_LD.shape[-1]
        mean_LD /= weight
        centred_L = written_L / weight - jnp.sum(jnp.square(mean_LD), -1)
        scales = [jnp.sqrt(D / jnp.maximum(x, 1e-12)) for x in (read_L / weight, centred_L)]
        params["b_dec"] = mean_LD * scales[1][:, None]
        if config.kind == "sae":
            norms_LF1 = jnp.linalg.norm(params["W_dec"], axis=-1, keepdims=True)
            params["W_enc"] = jnp.swapaxes(params["W_dec"] / norms_LF1, 1, 2)
        return {
            **initial_state(params, training.optimizer),
            "silent": jnp.zeros_like(params["b_enc"], jnp.int32),
            "cut": jnp.zeros_like(scales[0]),
            "read_scale": scales[0],
            "write_scale": scales[1],
        }

    shardings = jax.tree.map(lambda leaf: leaf.sharding, training.abstract)
    key = jax.random.key(training.workload.seed)
    return jax.jit(begin, out_shardings=shardings)(key, sums)


def dictionary_of(training: Training, state: State) -> Dictionary:
    """What a state has learned so far, as it is saved: it reads raw activations."""
    workload = training.workload
    pair = read_and_written(workload.dictionary.kind, workload.dictionary.site, workload.model)
    scales = state["cut"], state["read_scale"], state["write_scale"]
    return folded(workload.dictionary, state["params"], *scales, workload.layers, pair)

"""What a model takes, said fact by fact: parameters, FLOPs of a token, cache, optimizers' state."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from lm.models import ModelConfig, costs
from lm.parallel.sharding import ParamSpec
from lm.training.config import OPTIMIZERS, OptimizerConfig
from lm.training.optimizer import make_optimizer
from lm.training.report import binary, si


def model_facts(
    model: ModelConfig, specs: dict[str, ParamSpec], context: int, source: int
) -> Iterator[tuple[str, str]]:
    """Name and fact, counted at `context` tokens and, of an encoder-decoder, `source` more."""
    yield from _sizes(model, specs)
    yield from _flops(model, context, source)
    yield from _cache(model, context, source)
    yield "optimizer", _optimizers(specs)


def _sizes(model: ModelConfig, specs: dict[str, ParamSpec]) -> Iterator[tuple[str, str]]:
    parameters = costs.parameters(model, specs)
    yield "total", f"{parameters.total:,} parameters"
    untied = not model.tie_embeddings and model.has_output_head
    head = " and the untied head" if untied else ""
    yield "embedding", f"{parameters.embedding:,} in tables of tokens, positions and types{head}"
    yield "non-embedding", f"{parameters.non_embedding:,}"
    if model.num_experts:
        yield "active", f"{parameters.active:,} of the total for each token"
    sizes = {"float32": 32, "bfloat16": 16, "int8": 8}
    takes = (f"{binary(costs.checkpoint_bytes(specs, bits))} in {n}" for n, bits in sizes.items())
    yield "checkpoint", ", ".join(takes)


def _optimizers(specs: dict[str, ParamSpec]) -> str:
    abstract = {n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in specs.items()}
    memory = []
    for name in OPTIMIZERS:
        optimizer = make_optimizer(OptimizerConfig(name=name), 1, specs)
        leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, abstract))
        memory.append(f"{name} {binary(sum(x.size * x.dtype.itemsize for x in leaves))}")
    return f"{', '.join(memory)}: its state, float32"


def _flops(model: ModelConfig, context: int, source: int) -> Iterator[tuple[str, str]]:
    """Of a token: training, and inference in the architecture's own stages."""
    of_token = "FLOPs a token"
    training = f"{si(costs.training_flops_per_token(model, context, source))}{of_token}"
    here = f" at {context:,} tokens"
    read = costs.prefill_flops_per_token(model, source or context)
    read = f"{si(read)}{of_token}"
    if model.architecture == "encoder":
        yield "training", f"{training}{here}"
        yield "inference", f"{read}{here}"
        return
    share = f" of the target, {source:,} source tokens included" if source else ""
    yield "training", f"{training}{share}{here}"
    if source:
        yield "encode", f"{read} of {source:,} in the source"
    else:
        yield "prefill", f"{read} of {context:,}, with logits of the last alone"
    after = f", which sees {source:,} source tokens and" if source else ", which sees"
    after = f"{after} {context:,} tokens" if model.cell == "attention" else ""
    yield "decode", f"{si(costs.decode_flops_per_token(model, context, source))}{of_token}{after}"


def _cache(model: ModelConfig, context: int, source: int) -> Iterator[tuple[str, str]]:
    """Keys and values; nothing of an encoder."""
    if model.architecture == "encoder":
        return

    def both(tokens: int, source: int = 0) -> str:
        full, half = (costs.cache_bytes(model, tokens, d, source) for d in ("float32", "bfloat16"))
        return f"{binary(full)} in float32, {binary(half)} in bfloat16"

    if model.cell != "attention":
        yield "state", both(context, source)
        return
    yield "KV cache", f"a token: {both(1)}"
    if model.window and context > model.window:
        later = costs.cache_bytes(model, model.window + 1) - costs.cache_bytes(model, model.window)
        yield "", f"a token after {model.window:,}: {binary(later)} in float32"
    of_source = f" and {source:,} of the source" if source else ""
    yield "", f"{context:,} tokens{of_source}: {both(context, source)}"

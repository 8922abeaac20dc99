"""The three measurements: where gradients arrive, what a bottleneck lets through, and speed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check
from lm.experiments.why_attention.config import TRANSLATORS, WhyAttentionJob
from lm.experiments.why_attention.tasks import TEST, Batch, Task, copying, repeated, translation
from lm.models import ModelConfig, bind, count, init, param_specs, skeleton
from lm.models.hooks import reading, replacing
from lm.objectives import ObjectiveConfig, token_loss
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.training.config import TrainConfig
from lm.training.setup import set_up
from lm.training.workload import Workload

LANGUAGE_MODELS = {"RNN": "rnn", "GRU": "gru", "LSTM": "lstm", "Transformer": "attention"}
_STRIDE = 10  # most steps a dispatch

Log = Callable[[str], None]


def fit(
    job: WhyAttentionJob,
    model: ModelConfig,
    objective: str,
    steps: int,
    batch_of: Callable[[int], Batch],
) -> tuple[dict[str, jax.Array], float]:
    """The parameters that training on the batch of each step gives, on one device, and the seconds
    that took without compiling."""
    rows, length = batch_of(0)["inputs"].shape
    layout = lay_out("", MeshConfig(), -1, jax.devices()[:1])
    training = set_up(
        Workload(
            model,
            block_size=length,
            batch_size=rows,
            objective=ObjectiveConfig(name=objective),
            optimizer=job.optimizer,
            train=TrainConfig(steps=steps),
            seed=job.seed,
            layout=layout,
        )
    )
    stride = max(n for n in range(1, _STRIDE + 1) if steps % n == 0)

    def stacked(first: int) -> Batch:
        batches = [batch_of(number) for number in range(first, first + stride)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)

    with layout.active():
        state = training.create_state()
        step = training.step.lower(state, stacked(0)).compile()
        began = time.perf_counter()
        for first in range(0, steps, stride):
            state, _ = step(state, stacked(first))
        jax.block_until_ready(state)
    return state["params"], time.perf_counter() - began


def measure_gradients(job: WhyAttentionJob, log: Log) -> dict[str, Any]:
    """For every distance, the share of the last loss's gradient that arrives at a token there."""
    settings, models = job.gradients, {}
    length = 2 * settings.length + 1
    sized = dataclasses.replace(settings.model, vocab_size=2 + job.alphabet, max_length=length)

    def batch(number: int) -> Batch:
        return repeated(job.seed, number, settings.batch_size, settings.length, job.alphabet)

    for name, cell in LANGUAGE_MODELS.items():
        model = dataclasses.replace(sized, cell=cell)
        specs = param_specs(skeleton(model))
        params, seconds = init(specs, jax.random.key(job.seed)), 0.0
        measure = jax.jit(lambda params, batch, model=model: reach(model, params, batch))
        before, _ = measure(params, batch(TEST))
        if settings.steps:
            params, seconds = fit(job, model, "causal", settings.steps, batch)
        after, right = measure(params, batch(TEST))
        models[name] = {
            "parameters": count(specs),
            "at_start": np.asarray(before).tolist(),
            "trained": np.asarray(after).tolist(),
            "accuracy": float(right),
        }
        log(f"gradients: {name}, {settings.steps} steps in {seconds:.0f} s")
    return {"length": settings.length, "steps": settings.steps, "models": models}


def reach(
    config: ModelConfig, params: Mapping[str, jax.Array], batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Where the gradient of a row's last loss arrives, and the share of targets that are right.

    The gradient is that of -log p of the last target by each token's embedding, and its norms are
    divided by their sum in each row. It is taken of the log-odds of p, which the loss's is a
    multiple of, but which does not vanish where p is one.

    Returns:
      The mean share at each distance [T], the last token's own first; a scalar.
    """
    model = bind(skeleton(config), params)
    B, T = batch["inputs"].shape

    def log_odds(nudge_BTD):
        tap = replacing({"embedding": lambda x: x + nudge_BTD.astype(x.dtype)})
        logits_BTV = model(batch["inputs"], tap=tap)
        target_BV = jax.nn.one_hot(batch["targets"][:, -1], config.vocab_size)
        last_BV = logits_BTV[:, -1]
        others_B = jax.nn.logsumexp(jnp.where(target_BV > 0, -jnp.inf, last_BV), -1)
        return jnp.sum(jnp.sum(target_BV * last_BV, -1) - others_B), logits_BTV

    nudge_BTD = jnp.zeros((B, T, config.width), jnp.float32)
    gradient, logits_BTV = jax.grad(log_odds, has_aux=True)(nudge_BTD)
    norms_BT = jnp.linalg.norm(gradient, axis=-1)
    shares_BT = norms_BT / norms_BT.sum(-1, keepdims=True)
    hits_BT = (logits_BTV.argmax(-1) == batch["targets"]) * batch["weights"]
    return shares_BT.mean(0)[::-1], hits_BT.sum() / jnp.sum(batch["weights"])


def measure_bottleneck(job: WhyAttentionJob, log: Log) -> dict[str, Any]:
    """What each encoder-decoder gets right of both tasks, by length."""
    settings, results = job.bottleneck, {}
    rows, length, test = settings.batch_size, settings.row_length, settings.test_pairs
    tasks = (
        copying(job.seed, job.alphabet, settings.symbols, test),
        translation(job.seed, settings.words, settings.pairs, settings.tokenizer, test),
    )
    longest = max(task.length for task in tasks)
    check(
        longest <= length,
        f"config.bottleneck.row_length={length} is too short for the longest text, of {longest} "
        "tokens: raise it, or lower words",
    )
    for task in tasks:
        found = results[task.name] = {"lengths": list(task.test), "models": {}}
        for section, (name, _) in TRANSLATORS.items():
            sizes = {"vocab_size": task.vocab_size, "max_length": length}
            model = dataclasses.replace(getattr(settings, section), **sizes)

            def batch(number: int, task=task) -> Batch:
                return task.packed(number, rows, length)

            params, seconds = fit(job, model, "seq2seq", settings.steps, batch)
            found["models"][name] = {
                "parameters": count(param_specs(skeleton(model))),
                "seconds": round(seconds, 1),
                **accuracy(model, params, task),
            }
            if section == "attending":
                found["pattern"] = pattern(model, params, task)
            log(f"{task.name}: {name}, {settings.steps} steps in {seconds:.0f} s")
    return results


def accuracy(config: ModelConfig, params: Any, task: Task) -> dict[str, list[float]]:
    """The share of whole texts, and of tokens, that a model gets right, at each length.

    The model is given the right beginning. If it then finds every token of a text most likely, it
    writes that very text by greedy decoding, and if not, another: the share of whole texts is that
    of greedy decoding, from one forward pass.
    """
    batch = task.batch([[pair] for pairs in task.test.values() for pair in pairs])

    @jax.jit
    def hits(params, batch):
        logits_BTV = bind(skeleton(config), params)(
            batch["source"],
            batch["inputs"],
            segments_BT=batch["segment_ids"],
            source_segments_BS=batch["source_segment_ids"],
        )
        return logits_BTV.argmax(-1) == batch["targets"]

    hits_BT, counts_BT = np.asarray(hits(params, batch)), batch["weights"] > 0
    rows = np.cumsum([len(pairs) for pairs in task.test.values()])[:-1]
    parts = list(zip(np.split(hits_BT, rows), np.split(counts_BT, rows), strict=True))
    return {
        "exact": [float((hits | ~counts).all(1).mean()) for hits, counts in parts],
        "tokens": [float(hits[counts].mean()) for hits, counts in parts],
    }


def pattern(config: ModelConfig, params: Any, task: Task) -> dict[str, Any]:
    """Where Bahdanau's attention looks, in a test pair of middling length."""
    source, target = list(task.test.values())[len(task.test) // 2 - 1][0]
    batch = task.batch([[(source, target)]])
    into: dict[str, jax.Array] = {}
    bind(skeleton(config), params)(
        batch["source"],
        batch["inputs"],
        source_segments_BS=batch["source_segment_ids"],
        tap=reading(into),
    )
    pattern_TS = into["blocks.0.attention.pattern"][0].astype(jnp.float32)
    return {
        "source": [*map(task.show, source.tolist()), "(end)"],
        "target": [*map(task.show, target.tolist()), "(end)"],
        "weights": np.asarray(pattern_TS)[: len(target) + 1, : len(source) + 1].tolist(),
    }


def measure_speed(job: WhyAttentionJob, log: Log) -> dict[str, Any]:
    """Tokens a second, forward and backward, by the length of a text.

    What the optimizer adds does not depend on the length, and is left out.
    """
    settings, models, vocab_size = job.speed, {}, 256
    for name in ("LSTM", "Transformer"):
        rates = []
        for length in settings.lengths:
            model = skeleton(
                dataclasses.replace(
                    settings.model,
                    cell=LANGUAGE_MODELS[name],
                    vocab_size=vocab_size,
                    max_length=length,
                )
            )
            specs = param_specs(model)
            params = init(specs, jax.random.key(job.seed))
            shape = (settings.rows, length)
            text = np.random.default_rng(job.seed).integers(0, vocab_size, shape, np.int32)
            batch = {"inputs": text, "targets": text, "weights": np.ones(shape, np.float32)}

            def loss(params, batch, model=model):
                return token_loss(bind(model, params), batch, ObjectiveConfig())

            step, times = jax.jit(jax.grad(loss, has_aux=True)), []
            for _ in range(settings.repeats + 1):
                began = time.perf_counter()
                jax.block_until_ready(step(params, batch))
                times.append(time.perf_counter() - began)
            # The first one compiles.
            rates.append(round(settings.rows * length / statistics.median(times[1:])))
        models[name] = {"tokens_per_second": rates, "parameters": count(specs)}
        log(f"speed: {name}")
    return {"lengths": list(settings.lengths), "rows": settings.rows, "models": models}

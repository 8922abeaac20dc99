"""Why attention: what recurrent networks could not do, measured, in one report.

Three parts of one story. A gradient on its way back through time shrinks at every token of a
recurrent network, and does not through attention (Hochreiter 1991; Bengio et al. 1994). An encoder
that must put any source into one vector fails on long ones, and attention over all its states mends
that (Bahdanau et al. 2015). And a state that waits for the one before leaves a machine idle that
could work on all tokens at once (Vaswani et al. 2017).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console

from lm.config import Bounds, ConfigError, Count, Positive, Seed, Size, check, to_dict, view
from lm.experiments.why_attention.report import plot, report, tables
from lm.experiments.why_attention.tasks import TEST, Batch, Task, copying, repeated, translation
from lm.models import ModelConfig, bind, count, init, param_specs, skeleton
from lm.models.hooks import reading, replacing
from lm.objectives import ObjectiveConfig, token_loss
from lm.parallel.platform import keep_buffers
from lm.tokenizers import TokenizerConfig
from lm.training.config import TrainConfig
from lm.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from lm.training.step import gradients, initial_state, make_train_step

LANGUAGE_MODELS = {"RNN": "rnn", "GRU": "gru", "LSTM": "lstm", "Transformer": "attention"}
TRANSLATORS = {
    "LSTM, one vector": "fixed",
    "LSTM with attention": "attending",
    "Transformer": "transformer",
}
_CELLS = {"fixed": "lstm", "attending": "lstm", "transformer": "attention"}
_STRIDE = 10  # most steps a dispatch
PIPED_WIDTH = 120  # columns where standard output is no terminal


@dataclasses.dataclass(frozen=True)
class GradientsConfig:
    """How far back the loss of one token reaches, in language models that repeat a text."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)  # its `cell` is all in turn
    length: Annotated[int, Bounds(2, 2**20)] = 24  # symbols in the text to be repeated
    steps: Count = 200  # of training; 0: only as initialised
    batch_size: Size = 64  # sequences a step, and over which norms are averaged

    def validate(self, prefix: str = "config.gradients") -> None:
        """Raises ConfigError on the first impossible field."""
        _check_sizes(self.model, f"{prefix}.model", "decoder")


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Encoder-decoders that copy and that translate, by length; LSTMs and a Transformer."""

    fixed: ModelConfig = dataclasses.field(default_factory=ModelConfig)  # one vector between
    attending: ModelConfig = dataclasses.field(default_factory=ModelConfig)  # Bahdanau's attention
    transformer: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    steps: Positive = 500  # of every model on either task
    batch_size: Size = 24  # rows a step, each with as many pairs as fit
    row_length: Size = 64  # places in a row, on either side
    symbols: Annotated[int, Bounds(6, 2**20)] = 24  # most symbols to copy
    words: Annotated[int, Bounds(4, 2**20)] = 14  # most words to translate
    pairs: Annotated[int, Bounds(1, 2**30)] = 40_000  # sentences to train on
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)  # theirs
    test_pairs: Size = 64  # at every length

    def validate(self, prefix: str = "config.bottleneck") -> None:
        """Raises ConfigError on the first impossible field."""
        check(
            self.row_length > self.symbols,
            f"{prefix}.row_length={self.row_length} must be more than symbols={self.symbols}",
        )
        for name, cell in _CELLS.items():
            model = getattr(self, name)
            _check_sizes(model, f"{prefix}.{name}", "encoder_decoder")
            check(
                model.cell == cell,
                f"{prefix}.{name}.cell={model.cell!r} must be {cell!r}",
            )
            check(
                model.cross_attention == (name != "fixed"),
                f"{prefix}.{name}.cross_attention={model.cross_attention} must be "
                f"{name != 'fixed'}",
            )


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """Forward and backward passes over few texts, at several lengths."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)  # `cell`: lstm, attention
    lengths: tuple[Size, ...] = (16, 64, 256, 1024)
    rows: Size = 1  # texts at a time
    repeats: Size = 3  # the median of so many counts

    def validate(self, prefix: str = "config.speed") -> None:
        """Raises ConfigError on the first impossible field."""
        check(
            len(self.lengths) >= 1,
            f"{prefix}.lengths={self.lengths} must be at least one length of at least 1",
        )
        _check_sizes(self.model, f"{prefix}.model", "decoder")


@dataclasses.dataclass(frozen=True)
class WhyAttentionJob:
    """What to measure, and with which models."""

    job: str = "why_attention"
    seed: Seed = 0  # of parameters and data
    # symbols that texts to repeat or copy are made of
    alphabet: Annotated[int, Bounds(2, 2**20)] = 26
    gradients: GradientsConfig = dataclasses.field(default_factory=GradientsConfig)
    bottleneck: BottleneckConfig = dataclasses.field(default_factory=BottleneckConfig)
    speed: SpeedConfig = dataclasses.field(default_factory=SpeedConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def validate(self, prefix: str = "config") -> None:
        """Raises ConfigError on the first impossible field."""
        for steps in (self.gradients.steps, self.bottleneck.steps):
            make_schedule(self.optimizer, steps or self.bottleneck.steps)  # for its errors


def _check_sizes(model: ModelConfig, prefix: str, architecture: str) -> None:
    check(
        model.architecture == architecture,
        f"{prefix}.architecture={model.architecture!r} must be {architecture!r}",
    )
    for name in ("vocab_size", "max_length"):
        value = getattr(model, name)
        check(value == 0, f"{prefix}.{name}={value} must be 0: the task decides it")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Measures what a `WhyAttentionJob` asks for, and prints it.

    Writes `report.md`, `why_attention.png`, `results.json` and `config.json` into `workdir`.

    Returns:
      What `results.json` holds.

    Raises:
      ConfigError: a field that makes no sense, or a directory that cannot be written.
    """
    job = view(WhyAttentionJob, config)
    if jax.default_backend() == "cpu":
        keep_buffers()
    directory = pathlib.Path(workdir).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(
            json.dumps(to_dict(job), indent=2) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise ConfigError(f"workdir={workdir!r} cannot be written: {error.strerror}") from None
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    began = time.perf_counter()
    results = {
        "gradients": measure_gradients(job, console.print),
        "bottleneck": measure_bottleneck(job, console.print),
        "speed": measure_speed(job, console.print),
    }
    results["seconds"] = round(time.perf_counter() - began, 1)
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for table in tables(results):
        console.print(table)
    plot(results, directory / "why_attention.png")
    (directory / "report.md").write_text(report(results, to_dict(job)), encoding="utf-8")
    console.print(f"{directory}/report.md · {directory}/why_attention.png", soft_wrap=True)
    return results


def fit(
    job: WhyAttentionJob,
    config: ModelConfig,
    objective: str,
    steps: int,
    batch_of: Callable[[int], Batch],
) -> tuple[dict[str, jax.Array], float]:
    """Trained parameters, and the seconds that took without compiling.

    Args:
      job: the optimizer and the seed.
      config: the model.
      objective: its name.
      steps: optimizer steps; 0 gives the initial parameters.
      batch_of: the batch of each step.
    """
    model = skeleton(config)
    specs = param_specs(model)
    start = jax.jit(lambda key: init(specs, key))(jax.random.key(job.seed))
    if steps == 0:
        return start, 0.0
    optimizer = make_optimizer(job.optimizer, steps, specs)
    state = jax.jit(lambda params: initial_state(params, optimizer))(start)
    step = make_train_step(
        model, ObjectiveConfig(name=objective), optimizer, TrainConfig(), job.seed
    )
    stride = max(n for n in range(1, _STRIDE + 1) if steps % n == 0)

    def stacked(first: int) -> Batch:
        batches = [batch_of(number) for number in range(first, first + stride)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)

    compiled = jax.jit(step, donate_argnums=0).lower(state, stacked(0)).compile()
    began = time.perf_counter()
    for first in range(0, steps, stride):
        state, _ = compiled(state, stacked(first))
    jax.block_until_ready(state)
    return state["params"], time.perf_counter() - began


def measure_gradients(job: WhyAttentionJob, log: Callable[[str], None]) -> dict[str, Any]:
    """For every distance, the share of the last loss's gradient that arrives at a token there."""
    settings, models = job.gradients, {}

    def batch(number: int) -> Batch:
        return repeated(job.seed, number, settings.batch_size, settings.length, job.alphabet)

    for name, cell in LANGUAGE_MODELS.items():
        config = dataclasses.replace(
            settings.model,
            cell=cell,
            vocab_size=2 + job.alphabet,
            max_length=2 * settings.length + 1,
        )
        specs = param_specs(skeleton(config))
        start = init(specs, jax.random.key(job.seed))
        measure = jax.jit(lambda params, batch, config=config: reach(config, params, batch))
        before, _ = measure(start, batch(TEST))
        params, seconds = fit(job, config, "causal", settings.steps, batch)
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


def measure_bottleneck(job: WhyAttentionJob, log: Callable[[str], None]) -> dict[str, Any]:
    """What each encoder-decoder gets right of both tasks, by length."""
    settings, results = job.bottleneck, {}
    sizes = (settings.pairs, settings.tokenizer, settings.test_pairs)
    tasks = (
        copying(job.seed, job.alphabet, settings.symbols, settings.test_pairs),
        translation(job.seed, settings.words, *sizes),
    )
    longest = max(task.length for task in tasks)
    check(
        longest <= settings.row_length,
        f"config.bottleneck.row_length={settings.row_length} is too short for the longest text, "
        f"of {longest} tokens: raise it, or lower words",
    )
    for task in tasks:
        results[task.name] = {"lengths": list(task.test), "models": {}}
        for name, section in TRANSLATORS.items():
            config = dataclasses.replace(
                getattr(settings, section),
                vocab_size=task.vocab_size,
                max_length=settings.row_length,
            )
            params, seconds = fit(
                job,
                config,
                "seq2seq",
                settings.steps,
                lambda number, task=task: task.packed(
                    number, settings.batch_size, settings.row_length
                ),
            )
            results[task.name]["models"][name] = {
                "parameters": count(param_specs(skeleton(config))),
                "seconds": round(seconds, 1),
                **accuracy(config, params, task),
            }
            if section == "attending":
                results[task.name]["pattern"] = pattern(config, params, task)
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
    pairs = list(task.test.values())[len(task.test) // 2 - 1]
    source, target = pairs[0]
    batch = task.batch([[pairs[0]]])
    into: dict[str, jax.Array] = {}
    model = bind(skeleton(config), params)
    model(
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


def measure_speed(job: WhyAttentionJob, log: Callable[[str], None]) -> dict[str, Any]:
    """Tokens a second, forward and backward, by the length of a text.

    What the optimizer adds does not depend on the length, and is left out.
    """
    settings, models, vocab_size = job.speed, {}, 256
    for name in ("LSTM", "Transformer"):
        models[name] = {"tokens_per_second": []}
        for length in settings.lengths:
            config = dataclasses.replace(
                settings.model,
                cell=LANGUAGE_MODELS[name],
                vocab_size=vocab_size,
                max_length=length,
            )
            specs = param_specs(skeleton(config))
            params = init(specs, jax.random.key(job.seed))
            shape = (settings.rows, length)
            text = np.random.default_rng(job.seed).integers(0, vocab_size, shape, np.int32)
            batch = {"inputs": text, "targets": text, "weights": np.ones(shape, np.float32)}

            def loss(params, batch, rows_B, config=config):
                return token_loss(bind(skeleton(config), params), batch, ObjectiveConfig())

            step = jax.jit(functools.partial(gradients, loss, accumulation=1))
            times = []
            for _ in range(settings.repeats + 1):
                began = time.perf_counter()
                jax.block_until_ready(step(params, batch=batch))
                times.append(time.perf_counter() - began)
            seconds = statistics.median(times[1:])  # the first one compiles
            models[name]["tokens_per_second"].append(round(settings.rows * length / seconds))
        models[name]["parameters"] = count(specs)
        log(f"speed: {name}")
    return {"lengths": list(settings.lengths), "rows": settings.rows, "models": models}

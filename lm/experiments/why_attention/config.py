"""What `why_attention` measures, and with which models."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from lm.config import Bounds, Count, Positive, Seed, Size, check
from lm.models import ModelConfig
from lm.tokenizers import TokenizerConfig
from lm.training.config import OptimizerConfig
from lm.training.schedules import make_schedule

# Of the bottleneck's models: the section, the name in the report, what its cells must be.
TRANSLATORS = {
    "fixed": ("LSTM, one vector", "lstm"),
    "attending": ("LSTM with attention", "lstm"),
    "transformer": ("Transformer", "attention"),
}


@dataclasses.dataclass(frozen=True)
class GradientsConfig:
    """How far back the loss of one token reaches, in language models that repeat a text."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)  # its `cell` is all in turn
    length: Annotated[int, Bounds(2, 2**20)] = 24  # symbols in the text to be repeated
    steps: Count = 200  # of training; 0: only as initialised
    batch_size: Size = 64  # sequences a step, and over which norms are averaged

    def validate(self, prefix: str = "config.gradients") -> None:
        """Raises ConfigError on the first impossible field."""
        _check_model(self.model, f"{prefix}.model", architecture="decoder")


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
        for section, (_, cell) in TRANSLATORS.items():
            _check_model(
                getattr(self, section),
                f"{prefix}.{section}",
                architecture="encoder_decoder",
                cell=cell,
                cross_attention=section != "fixed",
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
        _check_model(self.model, f"{prefix}.model", architecture="decoder")


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


def _check_model(model: ModelConfig, prefix: str, **wanted: str | bool) -> None:
    for name, value in wanted.items():
        found = getattr(model, name)
        check(found == value, f"{prefix}.{name}={found!r} must be {value!r}")
    for name in ("vocab_size", "max_length"):
        value = getattr(model, name)
        check(value == 0, f"{prefix}.{name}={value} must be 0: the task decides it")

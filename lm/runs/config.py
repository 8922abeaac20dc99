"""The config of a training run, as config.json in its directory holds it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from lm.config import Bounds, Count, Path, Seed, check
from lm.data import CONVERSATIONAL, BatchIterator, DataConfig
from lm.inference.sampling import SamplingConfig
from lm.models import ModelConfig
from lm.models.adapters import AdapterConfig
from lm.objectives import ObjectiveConfig, check_objective
from lm.parallel.cluster import HostsConfig
from lm.parallel.layout import Layout
from lm.parallel.mesh import MeshConfig, batch_ways
from lm.tokenizers import Tokenizer, TokenizerConfig
from lm.training.checkpoints import CheckpointConfig
from lm.training.config import OptimizerConfig, TrainConfig, check_dispatch
from lm.training.schedules import make_schedule
from lm.training.workload import Workload


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """Everything about one training run."""

    job: str = "train"
    seed: Seed = 0  # of the parameters, the data order, dropout and the samples
    # Start from this run or Hugging Face directory: its parameters, tokenizer and whole `model`, of
    # which only what changes nothing of that may be set here; see `lm.runs.inherited`.
    init_from: Path = ""
    # Of a Hugging Face directory: regular expressions of fields of config.json and of tensors that
    # may be left out though they are not known.
    ignore: str | tuple[str, ...] = ()
    # Of a translator of many languages that it starts from: those of the pairs, by their codes
    # ("en_XX"); "": its own. See `lm.inference.Framing.between`.
    source_language: str = ""
    target_language: str = ""
    # How conversations are written: "chatml", "llama3", "gemma", "plain", one of several that the
    # tokenizer has, or a file of Jinja text; "": the tokenizer's own.
    chat_template: Path = ""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    strategy: str = ""  # a name of lm.parallel.layout: sets zero, and mesh axes left alone
    # What data parallelism over fsdp, expert and context splits besides the batch: 0 nothing, 1 the
    # optimizer's state, 2 gradients too, 3 parameters too; -1: what the strategy says, 3 without.
    zero: Annotated[int, Bounds(-1, 3)] = -1
    # When training ends, samples.txt gets continuations of these; or of an encoder's hidden words
    # the likeliest; or of an encoder-decoder's sources the targets. Where conversations are learnt,
    # replies to them; to some that are held out if there are none, "" for no samples.
    prompt: str | tuple[str, ...] = ()
    sample: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    # seq2seq: validation pairs whose targets are then compared word for word; sft: conversations
    # whose last replies are
    exact_match: Count = 0

    def validate(self, prefix: str = "config") -> None:
        """Raises ConfigError where sections contradict each other."""
        longest = self.model.max_length
        for name in ("block_size", "source_length"):
            length = getattr(self.data, name)
            check(
                not longest or length <= longest,
                f"{prefix}.data.{name}={length} is longer than {prefix}.model.max_length="
                f"{longest}: set it to {longest}",
            )
        check_objective(self.objective, self.model, prefix)
        kind = self.adapter.kind
        check(
            kind == "none" or bool(self.init_from),
            f"{prefix}.adapter.kind={kind!r} needs {prefix}.init_from: a model to adapt",
        )
        check(
            not self.exact_match or self.objective.name in ("seq2seq", "sft"),
            f"{prefix}.exact_match={self.exact_match} needs {prefix}.objective.name='seq2seq' or "
            f"'sft', not {self.objective.name!r}: other objectives have no right answer",
        )
        check(
            not self.chat_template or self.converses,
            f"{prefix}.chat_template={self.chat_template!r} is for objectives that read "
            f"conversations, not {prefix}.objective.name={self.objective.name!r}: leave it out, or "
            "set tokenizer.chat_template",
        )
        taught = self.objective.name == "distillation"
        source = ("objective.distillation.teacher", self.objective.distillation.teacher)
        name, value = source if taught else ("init_from", self.init_from)
        check(
            not self.objective.has_reference or bool(value),
            f"{prefix}.{name}='' must name the model that {prefix}.objective.name="
            f"{self.objective.name!r} compares with: a run or a Hugging Face directory",
        )
        make_schedule(self.optimizer, self.train.steps)  # for its errors, before any work
        train, every = self.train, self.checkpoint.every
        cadences = (train.steps, train.log_every, train.eval_every, every)
        check_dispatch(train.steps_per_dispatch, cadences)

    @property
    def converses(self) -> bool:
        """Whether it learns from conversations."""
        return self.objective.name in CONVERSATIONAL

    @property
    def prompts(self) -> tuple[str, ...]:
        """All of `prompt`; an empty text is the command line's way to ask for none."""
        return (self.prompt,) if isinstance(self.prompt, str) and self.prompt else (*self.prompt,)

    def with_even_batch(self, layout: Layout, saved: dict[str, Any] | None) -> tuple[TrainJob, str]:
        """With the batch that `data.even_batch` makes, and what to say where it is another.

        Of a run that has begun, `saved`, it is the one that it has.
        """
        asked, shares = self.data.batch_size, batch_ways(layout.mesh) * self.train.accumulation
        rows, why = (
            -(-asked // shares) * shares,
            f"a multiple of the {shares} shares of the devices",
        )
        began = (saved or {}).get("data", {}).get("batch_size", 0)
        if began >= asked:
            rows, why = began, "as the run began"
        if rows == asked or not self.data.even_batch:
            return self, ""
        data = dataclasses.replace(self.data, batch_size=rows)
        note = f"config.data.batch_size={asked} is {rows} here, {why}"
        return dataclasses.replace(self, data=data), note

    def with_model_for(self, tokenizer: Tokenizer) -> TrainJob:
        """With `vocab_size` and `max_length` of the model filled in.

        Raises:
          ConfigError: the vocabulary is smaller than the tokenizer's.
        """
        vocab_size = self.model.vocab_size or tokenizer.vocab_size
        check(
            tokenizer.fits(vocab_size),
            f"config.model.vocab_size={vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}: raise it, or set it to 0",
        )
        length = self.model.max_length or max(self.data.block_size, self.data.source_length)
        model = dataclasses.replace(self.model, vocab_size=vocab_size, max_length=length)
        return dataclasses.replace(self, model=model)

    def workload(
        self,
        layout: Layout,
        batches: BatchIterator | None = None,
        teacher: ModelConfig | None = None,
    ) -> Workload:
        """What is trained; without batches, as far as the config alone says it.

        Raises:
          ConfigError: there are fewer batches than steps.
        """
        sizes = dict(
            block_size=self.data.block_size,
            batch_size=self.data.batch_size,
            source_length=self.data.source_length,
        )
        if batches is not None:
            check(
                batches.num_batches is None or batches.num_batches >= self.train.steps,
                f"config.train.steps={self.train.steps} is more than the {batches.num_batches} "
                f"batches of config.data.epochs={self.data.epochs}: lower it, or raise the other",
            )
            sizes |= dict(
                block_size=batches.block_size,
                source_length=batches.source_length,
                packed=not batches.single_segment,
                max_targets=batches.max_targets_per_row,
            )
        return Workload(
            self.model,
            **sizes,
            objective=self.objective,
            adapter=self.adapter,
            optimizer=self.optimizer,
            train=self.train,
            seed=self.seed,
            layout=layout,
            teacher=teacher,
        )

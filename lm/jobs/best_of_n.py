"""Best of n: a model replies to each prompt several times, and the best is kept to learn from.

Lines of JSON, for `objective.name=sft` (rejection sampling; Touvron et al. 2023, §3.2.3) or, as
pairs of the best and the worst, for preferences. A reply that was cut off is never kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import ml_collections
import numpy as np

from lm.alignment.best_of_n import NUMBER, begin, best, best_and_worst, kl_bound
from lm.alignment.prompts import Prompt, fields_of, read_prompts
from lm.alignment.rewards import Rewards, RewardsConfig
from lm.alignment.rollouts import RolloutConfig, Sampler
from lm.config import Path, Seed, Size, check, view
from lm.data import DataConfig
from lm.parallel.platform import keep_programs
from lm.runs.run import Run


@dataclasses.dataclass(frozen=True)
class BestOfNJob:
    """Who replies to what, what replies are worth, and which are kept."""

    job: str = "best_of_n"
    seed: Seed = 0  # of the draws
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    ignore: str | tuple[str, ...] = ()  # see `lm.runs.config.TrainJob`
    # Prompts, each a line; `block_size` tokens hold one and its reply.
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    chat_template: str = ""  # how messages are written; "": the model's own way
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)  # n is its `samples`
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    keep: Size = 1  # replies to a prompt, the best first
    at_least: float | None = None  # and of them only those that are worth as much
    # replies: a line each, for sft. pairs: the best and the worst, where they differ in worth
    form: Literal["replies", "pairs"] = "replies"
    output_file: Path = ""  # what it has already is not done again
    compilation_cache: Path = "~/.cache/lm/xla"  # compiled programs, kept across runs; "" for none

    def validate(self, prefix: str = "config") -> None:
        """Raises ConfigError on the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        check(bool(self.output_file), f"{prefix}.output_file='' must name the file to write")
        check(
            self.keep <= self.rollout.samples,
            f"{prefix}.keep={self.keep} is more than {prefix}.rollout.samples="
            f"{self.rollout.samples}",
        )
        check(
            self.form == "replies" or self.rollout.samples > 1,
            f"{prefix}.rollout.samples=1 makes no pairs: raise it",
        )
        check(
            self.rollout.max_new_tokens <= self.data.block_size,
            f"{prefix}.rollout.max_new_tokens={self.rollout.max_new_tokens} leaves no room for a "
            f"prompt in {prefix}.data.block_size={self.data.block_size}",
        )


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Writes `output_file`, and says how much better what is kept is than what was drawn.

    Returns:
      `reward` of all replies of this call, `kept_reward`, `kept`: lines, and `prompts`.
    """
    del workdir
    job = view(BestOfNJob, config)
    if job.compilation_cache:
        keep_programs(job.compilation_cache)
    source = Run.load(job.init_from, ignore=job.ignore)
    context = source.skeleton.config.max_length
    check(
        job.data.block_size <= context,
        f"config.data.block_size={job.data.block_size} is longer than the context of "
        f"config.init_from={job.init_from!r}: set it to {context}",
    )
    longest = job.data.block_size + 1 - job.rollout.max_new_tokens
    template, framing = source.chat_template(job.chat_template), source.framing
    ends = (*(framing.end_of_text or ()), *template.ends[0])
    framing = dataclasses.replace(framing, end_of_text=ends)
    every = dataclasses.replace(job.data, validation_fraction=0.0)
    prompts = read_prompts(every, job.seed, template, longest, print)[0]
    rewards = Rewards(job.rewards, length=job.data.block_size + 1)
    rewards.try_out([prompt.text for prompt in prompts[:2]], **fields_of(prompts[:2]))
    path = pathlib.Path(job.output_file).expanduser()
    start = begin(path)
    parts = source.skeleton, source.params, framing, source.tokenizer
    sampler = Sampler(*parts, job.rollout, job.data.block_size)
    n, each = job.rollout.samples, job.rollout.prompts
    drawn, kept = [], []
    with path.open("a", encoding="utf-8") as file:
        for first in range(start, len(prompts), each):
            some = prompts[first : first + each]
            samples = sampler(source.params, [p.ids for p in some], job.seed)
            texts = [source.tokenizer.decode(s.ids[: len(s.ids) - s.ended]) for s in samples]
            asked = [some[sample.prompt] for sample in samples]
            ended = [sample.ended for sample in samples]
            own = {"response_ids": [sample.ids for sample in samples], "finished": ended}
            worth = rewards([p.text for p in asked], texts, **{**fields_of(asked), **own})
            drawn += worth.total_N.tolist()
            for number, prompt in enumerate(some):
                at = slice(number * n, (number + 1) * n)
                for line in _lines(job, prompt, texts[at], worth.total_N[at], ended[at]):
                    kept.append(line.get("reward", line.get("chosen_reward")))
                    line = {**line, NUMBER: first + number}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{first + len(some)} of {len(prompts)} prompts", flush=True)
    mean, better = (float(np.mean(x)) if x else math.nan for x in (drawn, kept))
    print(
        f"{path}: {len(kept)} lines of mean reward {better:.3g}, where all {len(drawn)} replies "
        f"have {mean:.3g}; the best of {n} is at most {kl_bound(n):.2f} nats from the model"
    )
    return {"reward": mean, "kept_reward": better, "kept": len(kept), "prompts": len(prompts)}


def _lines(
    job: BestOfNJob, prompt: Prompt, texts: Sequence[str], worth_N: np.ndarray, ended: list[bool]
) -> Iterator[dict[str, Any]]:
    """What is kept of the replies to one prompt."""
    given = {**prompt.fields, "prompt": prompt.text}
    if job.form == "replies":
        for i in best(texts, worth_N, ended, job.keep, job.at_least):
            yield {**given, "response": texts[i], "reward": float(worth_N[i])}
    elif both := best_and_worst(worth_N, ended, job.at_least):
        for name, i in zip(("chosen", "rejected"), both):
            given |= {name: texts[i], f"{name}_reward": float(worth_N[i])}
        yield given

"""What a run shows when training ends: a picture of its losses, samples, right answers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from lm.alignment.held_out import accuracy, calibration_error, held_out_rewards
from lm.alignment.replies import replies, transcript
from lm.config import ConfigError, check, to_dict
from lm.data import Example, pairs
from lm.data.batches import EvaluationBatches
from lm.data.conversations import held_out
from lm.inference import Framing
from lm.inference.fill import mask_ids, sentinel_ids
from lm.inference.prepare import spread
from lm.inference.prompts import check_ids
from lm.models import skeleton
from lm.parallel import hosts
from lm.runs.config import TrainJob
from lm.runs.reward import FILE as REWARD
from lm.runs.reward import Scale
from lm.runs.run import Run
from lm.runs.sources import open_source
from lm.tokenizers import Tokenizer, chat_template
from lm.training.metrics import MetricsWriter
from lm.training.plots import plot_losses
from lm.training.setup import Training

AT_ONCE = 128  # sources translated together
SHOWN = 4  # conversations held out whose replies are samples


def finish(
    job: TrainJob,
    directory: pathlib.Path,
    console: Console,
    params: dict[str, Any],
    training: Training,
    validation: EvaluationBatches | None = None,
) -> dict[str, float]:
    """Draws loss.png, writes and prints samples.txt, and counts exact matches.

    Of a reward model, how it ranks the pairs of `validation`, and reward.json.

    All processes of the run take part, and process 0 writes: no device may have room for all of the
    parameters. `params` lie on all devices of `training`, and are not to be used afterwards.

    Returns:
      `exact_match`, a share, where the job asks for it; `eval_calibration_error` of a reward model.
    """
    first = hosts.index() == 0
    with contextlib.suppress(ConfigError):  # a run too short to have logged a loss
        if first:
            console.print(f"loss curve: {plot_losses(directory)}")
    if job.objective.name == "reward" and validation is not None:
        return _judged(job, directory, console, params, training, validation)
    shows = job.prompts or (job.converses and job.prompt == () and job.model.has_output_head)
    if not shows and not job.exact_match:
        return {}
    source, model = open_source(directory), skeleton(job.model)
    mesh, params = spread(model, params, training.workload.layout.mesh)
    run = Run(directory, source.config, source.tokenizer, model, params, job.train.steps)
    with jax.set_mesh(mesh):
        if shows:
            text = samples(run, job)
            if first:
                (directory / "samples.txt").write_text(text, encoding="utf-8")
            console.print("samples:")
            console.print(text, markup=False, soft_wrap=True)
        if not job.exact_match:
            return {}
        right, wrong = exact_matches(run, job)
    total = right + len(wrong)
    what = "conversations" if job.converses else "pairs"
    console.print(f"exact match: {right} of {total} validation {what}, {right / total:.1%}")
    results = {"exact_match": right / total}
    if first:
        (directory / "mistakes.txt").write_text("\n".join(wrong), encoding="utf-8")
        with MetricsWriter(directory, job.train.steps) as writer:
            writer.write(job.train.steps, results)
    return results


def _judged(
    job: TrainJob,
    directory: pathlib.Path,
    console: Console,
    params: dict[str, Any],
    training: Training,
    validation: EvaluationBatches,
) -> dict[str, float]:
    """Ranks the held-out pairs, and writes the scale of their replies' rewards."""
    with training.workload.layout.active():
        reward_N2 = held_out_rewards(training, params, validation)
    right, results = accuracy(reward_N2), {"eval_calibration_error": calibration_error(reward_N2)}
    scale = Scale.of(reward_N2)
    console.print(
        f"held-out pairs: {right:.1%} of {len(reward_N2):,} ranked right, expected calibration "
        f"error {results['eval_calibration_error']:.3f}\n"
        f"rewards: mean {scale.mean:.3g}, spread {scale.std:.3g} of their replies, which "
        f"{REWARD} makes 0 and 1",
        markup=False,
        soft_wrap=True,
    )
    if hosts.index() == 0:
        scale.write(directory)
        with MetricsWriter(directory, job.train.steps) as writer:
            writer.write(job.train.steps, results)
    return results


def check_prompts(job: TrainJob, tokenizer: Tokenizer, carried: Mapping[str, Any]) -> None:
    """Raises ConfigError where `finish` could not ask a prompt of the trained model.

    `job` has the whole model; `carried` is what the run's config.json says beside the job.
    """
    config = {"data": {"end_of_text": job.data.end_of_text}, **carried}
    framing = Framing.of_run(config, job.model, tokenizer, "framing")
    check(
        job.model.has_output_head or not job.prompts,
        f"config.prompt={job.prompts!r}: without an output head it writes nothing: leave it out",
    )
    template = chat_template(tokenizer, begin=framing.before or ()) if job.converses else None
    for prompt in job.prompts:
        try:
            if job.objective.name == "masked":
                ids = mask_ids(tokenizer, prompt)
            elif job.objective.name == "span_corruption":
                ids = sentinel_ids(tokenizer, prompt)[1]
            elif template is not None:
                ids = template.encode([{"role": "user", "content": prompt}])
            else:
                ids = framing.encode(tokenizer, prompt)
            if job.model.architecture != "decoder" or not job.sample.truncate_prompt:
                check_ids("prompt", ids, job.model)
        except ConfigError as error:
            raise ConfigError(f"config.prompt={prompt!r} cannot be asked: {error}") from None


def samples(run: Run, job: TrainJob) -> str:
    """What the model makes of each prompt, as its objective would have it."""
    if job.converses:
        asked = [Example(({"role": "user", "content": prompt},)) for prompt in job.prompts]
        asked = asked or held_out(job.data, job.seed, job.objective.name)[:SHOWN]
        said = replies(run, asked, job.sample, job.seed)
        return "\n\n".join(map(transcript, asked, said)) + "\n"
    paragraphs = []
    for prompt in job.prompts:
        if job.objective.name == "masked":
            masks = [
                ", ".join(f"{each.text.strip()} {each.probability:.0%}" for each in mask)
                for mask in run.fill(prompt)
            ]
            paragraphs.append("\n→ ".join([prompt, *masks]))
        elif job.objective.name == "span_corruption":
            spans = run.fill_spans(prompt, job.sample.max_new_tokens)
            paragraphs.append("\n→ ".join([prompt, *spans]))
        else:
            both = f"{prompt}\n→ " if job.model.architecture == "encoder_decoder" else ""
            texts = run.generate([prompt], seed=job.seed, **to_dict(job.sample))
            paragraphs += [f"{both}{text}".strip() for text in texts]
    return "\n\n".join(paragraphs) + "\n"


def exact_matches(run: Run, job: TrainJob) -> tuple[int, list[str]]:
    """How many of `job.exact_match` validation targets greedy decoding gets right to the letter.

    Returns:
      That number, and of those it gets wrong source, target and what came instead.
    """
    if job.converses:
        return _exact_replies(run, job)
    chosen = list(itertools.islice(pairs(job.data, "validation", job.seed), job.exact_match))
    chosen.sort(key=lambda pair: len(pair[0]))  # sources of like length share a batch
    wrong = []
    for first in range(0, len(chosen), AT_ONCE):
        part = chosen[first : first + AT_ONCE]
        sources, most = [source for source, _ in part], run.skeleton.config.max_length
        outputs = run.generate(sources, max_new_tokens=most, temperature=0)
        for (source, target), output in zip(part, outputs):
            if output.strip() != target.strip():
                wrong.append(f"{source}\n= {target}\n→ {output}\n")
    return len(chosen) - len(wrong), wrong


def _exact_replies(run: Run, job: TrainJob) -> tuple[int, list[str]]:
    """`exact_matches` of the last replies of conversations."""
    asked = held_out(job.data, job.seed, job.objective.name)[: job.exact_match]
    said = replies(run, asked, dataclasses.replace(job.sample, temperature=0.0))
    wrong = [
        f"{transcript(one, reply)}\n= {one.answer}\n"
        for one, reply in zip(asked, said)
        if reply.strip() != one.answer.strip()
    ]
    return len(asked) - len(wrong), wrong

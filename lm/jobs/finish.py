"""What a run shows when training ends: its losses as a picture, samples, right answers."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from lm.config import ConfigError, to_dict
from lm.data import pairs
from lm.inference import Framing
from lm.inference.fill import mask_ids, sentinel_ids
from lm.inference.prepare import spread
from lm.inference.prompts import check_ids
from lm.models import skeleton
from lm.parallel import hosts
from lm.runs.config import TrainJob
from lm.runs.run import Run
from lm.runs.sources import open_source
from lm.tokenizers import Tokenizer
from lm.training.metrics import MetricsWriter
from lm.training.plots import plot_losses

AT_ONCE = 128  # sources translated together


def finish(
    job: TrainJob, directory: pathlib.Path, console: Console, params: dict[str, Any], mesh: Mesh
) -> dict[str, float]:
    """Draws loss.png, writes and prints samples.txt, and counts exact matches.

    All processes of the run take part, and process 0 writes: no device may have room for all of the
    parameters. `params` lie on all devices of the run's `mesh`, and are not to be used afterwards.

    Returns:
      `exact_match`, a share, where the job asks for it.
    """
    first = hosts.index() == 0
    with contextlib.suppress(ConfigError):  # a run too short to have logged a loss
        if first:
            console.print(f"loss curve: {plot_losses(directory)}")
    if not job.prompts and not job.exact_match:
        return {}
    source, model = open_source(directory), skeleton(job.model)
    mesh, params = spread(model, params, mesh)
    run = Run(directory, source.config, source.tokenizer, model, params, job.train.steps)
    with jax.set_mesh(mesh):
        if job.prompts:
            text = samples(run, job)
            if first:
                (directory / "samples.txt").write_text(text, encoding="utf-8")
            console.print("samples:")
            console.print(text, markup=False, soft_wrap=True)
        if not job.exact_match:
            return {}
        right, wrong = exact_matches(run, job)
    total = right + len(wrong)
    console.print(f"exact match: {right} of {total} validation pairs, {right / total:.1%}")
    results = {"exact_match": right / total}
    if first:
        (directory / "mistakes.txt").write_text("\n".join(wrong), encoding="utf-8")
        with MetricsWriter(directory, job.train.steps) as writer:
            writer.write(job.train.steps, results)
    return results


def check_prompts(job: TrainJob, tokenizer: Tokenizer, carried: Mapping[str, Any]) -> None:
    """Raises ConfigError where `finish` could not ask a prompt of the trained model.

    `job` has the whole model; `carried` is what the run's config.json says beside the job.
    """
    config = {"data": {"end_of_text": job.data.end_of_text}, **carried}
    framing = Framing.of_run(config, job.model, tokenizer, "framing")
    for prompt in job.prompts:
        try:
            if job.objective.name == "masked":
                ids = mask_ids(tokenizer, prompt)
            elif job.objective.name == "span_corruption":
                ids = sentinel_ids(tokenizer, prompt)[1]
            else:
                ids = framing.encode(tokenizer, prompt)
            if job.model.architecture != "decoder" or not job.sample.truncate_prompt:
                check_ids("prompt", ids, job.model)
        except ConfigError as error:
            raise ConfigError(f"config.prompt={prompt!r} cannot be asked: {error}") from None


def samples(run: Run, job: TrainJob) -> str:
    """What the model makes of each prompt, as its objective would have it."""
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

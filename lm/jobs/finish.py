"""What a run shows when training ends: its losses as a picture, samples, right answers."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from lm.config import ConfigError
from lm.data import pairs
from lm.training.metrics import MetricsWriter
from lm.training.plots import plot_losses

if TYPE_CHECKING:
    from lm.jobs.train import TrainJob
    from lm.run import Run

AT_ONCE = 128  # sources translated together


def finish(job: TrainJob, directory: pathlib.Path, console: Console) -> dict[str, float]:
    """Draws loss.png, writes and prints samples.txt, and counts exact matches.

    Returns:
      `exact_match`, a share, where the job asks for it.
    """
    import lm

    with contextlib.suppress(ConfigError):  # a run too short to have logged a loss
        console.print(f"loss curve: {plot_losses(directory)}")
    # An empty text is the command line's way to ask for none.
    prompts = (job.prompt,) if isinstance(job.prompt, str) and job.prompt else tuple(job.prompt)
    if not prompts and not job.exact_match:
        return {}
    run = lm.load(str(directory))
    if prompts:
        text = samples(run, job, prompts)
        (directory / "samples.txt").write_text(text, encoding="utf-8")
        console.print("samples:")
        console.print(text, markup=False, soft_wrap=True)
    if not job.exact_match:
        return {}
    right, total = exact_matches(run, job, directory / "mistakes.txt")
    console.print(f"exact match: {right} of {total} validation pairs, {right / total:.1%}")
    results = {"exact_match": right / total}
    with MetricsWriter(directory, job.train.steps) as writer:
        writer.write(job.train.steps, results)
    return results


def samples(run: Run, job: TrainJob, prompts: Sequence[str]) -> str:
    """What the model makes of each prompt, as its objective would have it."""
    lines = []
    if job.objective.name == "masked":
        for prompt in prompts:
            guesses = [
                ", ".join(f"{each.text.strip()} {each.probability:.0%}" for each in mask)
                for mask in run.fill(prompt)
            ]
            lines.append("\n".join([prompt, *(f"→ {guess}" for guess in guesses)]))
        return "\n\n".join(lines) + "\n"
    if job.objective.name == "span_corruption":
        for prompt in prompts:
            spans = run.fill_spans(prompt, job.sample.max_new_tokens)
            lines.append("\n".join([prompt, *(f"→ {span}" for span in spans)]))
        return "\n\n".join(lines) + "\n"
    for prompt in prompts:
        texts = run.generate(
            prompt,
            max_new_tokens=job.sample.max_new_tokens,
            temperature=job.sample.temperature,
            top_k=job.sample.top_k,
            top_p=job.sample.top_p,
            num_samples=job.sample.num_samples,
            seed=job.seed,
        )
        texts = [texts] if isinstance(texts, str) else texts
        if job.model.architecture == "encoder_decoder":
            texts = [f"{prompt}\n→ {text}" for text in texts]
        lines += [text.strip() for text in texts]
    return "\n\n".join(lines) + "\n"


def exact_matches(run: Run, job: TrainJob, mistakes: pathlib.Path) -> tuple[int, int]:
    """How many validation targets greedy decoding gets right to the letter, and of how many.

    Args:
      run: the trained model.
      job: names the data, and how many pairs.
      mistakes: a file for those it gets wrong: source, target and what came instead.
    """
    chosen = list(itertools.islice(pairs(job.data, "validation", job.seed), job.exact_match))
    chosen.sort(key=lambda pair: len(pair[0]))  # sources of like length share a batch
    wrong = []
    for first in range(0, len(chosen), AT_ONCE):
        part = chosen[first : first + AT_ONCE]
        outputs = run.generate(
            [source for source, _ in part],
            max_new_tokens=run.skeleton.config.max_length,
            temperature=0,
        )
        for (source, target), output in zip(part, outputs):
            if output.strip() != target.strip():
                wrong.append(f"{source}\n= {target}\n→ {output}\n")
    mistakes.write_text("\n".join(wrong), encoding="utf-8")
    return len(chosen) - len(wrong), len(chosen)

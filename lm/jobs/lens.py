"""What a model would say after each of its blocks, and which of its parts say it: one page."""

from __future__ import annotations

import dataclasses
import pathlib

import ml_collections
import numpy as np
from rich.console import Console

from lm.config import AboveZero, ConfigError, Count, Path, Positive, Seed, check, view
from lm.evaluation.card import NotApplicable, Section, made
from lm.evaluation.documents import documents_of
from lm.evaluation.page import made_by, write_report
from lm.interpretability.lens_report import attributed, mapped, said
from lm.interpretability.lenses import Lens, jacobian, rows_of, train_tuned
from lm.interpretability.prompts import one_token, opened, prompt_tokens
from lm.jobs.evaluate import facts
from lm.parallel.platform import keep_programs
from lm.runs.run import Run


@dataclasses.dataclass(frozen=True)
class LensJob:
    """Whose lenses, of which prompt, and how they are trained."""

    job: str = "lens"
    seed: Seed = 0  # of the batches and places that are drawn
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    step: int | None = None  # of the checkpoint; None: the last one
    prompt: str = ""  # what is looked at
    right: str = ""  # the token whose logit is attributed; "": the likeliest after the prompt
    wrong: str = ""  # the token that it is compared with; "": none
    # Texts that lenses are trained and compared on, as data.path; "": those the run held out.
    path: Path = ""
    documents: Positive = 400  # of them, at most
    length: Positive = 64  # tokens of a row of them; at most the context
    tuned_steps: Count = 300  # of the tuned lens's training; 0: no tuned lens
    tuned: Path = ""  # a lens saved before, WORKDIR/tuned_lens of that job, in place of training
    batch_size: Positive = 8  # rows of a training step
    learning_rate: AboveZero = 1e-3  # at the start of the training
    jacobian_rows: Count = 16  # texts that the Jacobian lens is the mean of; 0: no such lens

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        check(bool(self.prompt), f"{prefix}.prompt='' must be a text to look at")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Section]:
    """Writes `workdir/lens.html`, `lens.json` and, once trained, `tuned_lens/`.

    Returns:
      The page's sections by name.

    Raises:
      ConfigError: no such run, one without a single residual stream or without texts, a prompt that
        is too long, or a `right` or `wrong` that is not one token.
    """
    job = view(LensJob, config)
    keep_programs()
    loaded = opened(job.init_from, job.step)
    tokens_1T = prompt_tokens(loaded, job.prompt, "config.prompt")
    right = one_token(loaded, job.right, "config.right") if job.right else None
    wrong = one_token(loaded, job.wrong, "config.wrong") if job.wrong else None
    if right is None:
        right = int(np.argmax(loaded.model(tokens_1T)[0, -1]))
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)

    def lenses() -> Section:
        return said(loaded, tokens_1T, *_lenses(job, loaded, directory, Console(highlight=False)))

    parts = {
        "lens": lenses,
        "attribution": lambda: attributed(loaded, tokens_1T, right, wrong),
        "stream": lambda: mapped(loaded, tokens_1T),
    }
    sections, left_out = made(parts)
    about = {**facts(loaded), "prompt": job.prompt}
    title = f"{about['model']}: through lenses"
    words = "What it would say after each block, which parts say it, and along which stream."
    again, found = made_by("configs/interpret/lens.py", job), [*sections.values()]
    path = write_report(directory / "lens.html", title, words, about, again, found, left_out)
    print(f"page: {path}")
    return sections


def _lenses(job: LensJob, loaded: Run, directory: pathlib.Path, console: Console):
    """The lenses by name, and rows of text that none was trained on, or None."""
    lenses = {"logit lens": Lens()}
    if job.tuned:
        saved = pathlib.Path(job.tuned).expanduser()
        lenses["tuned lens"] = Lens.load(saved, loaded.skeleton)
    training = job.tuned_steps and not job.tuned
    if not (training or job.jacobian_rows or job.path):
        return lenses, None
    rows_NT = _rows(job, loaded)
    held_NT, rows_NT = np.split(rows_NT, [max(1, len(rows_NT) // 10)])
    check(len(rows_NT) > 0, f"config.path={job.path!r} has only one row of {job.length} tokens")
    if training:
        settings = job.tuned_steps, job.batch_size, job.learning_rate, job.seed
        lens, losses = train_tuned(loaded.skeleton, loaded.params, rows_NT, *settings)
        lens.save(directory / "tuned_lens", {"of": str(loaded.directory), "step": loaded.step})
        console.print(f"tuned lens: KL {losses[0]:.4f} → {np.mean(losses[-10:]):.4f} nats a token")
        lenses["tuned lens"] = lens
    if job.jacobian_rows:
        some_NT = rows_NT[: job.jacobian_rows]
        lenses["Jacobian lens"] = jacobian(loaded.skeleton, loaded.params, some_NT, job.seed)
    return lenses, held_NT[:64]


def _rows(job: LensJob, loaded: Run) -> np.ndarray:
    length, tokenizer = min(job.length, loaded.skeleton.config.max_length), loaded.tokenizer
    limits = job.documents, job.documents * 10_000
    try:
        reading = documents_of(loaded, job.path, *limits, job.seed)
        return rows_of([one.ids for one in reading.documents], length, tokenizer.eos_id)
    except (NotApplicable, ConfigError) as why:
        text = f"{why}; or config.tuned_steps=0 with config.jacobian_rows=0"
        raise ConfigError(text) from None

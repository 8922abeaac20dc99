"""What causes a model's answer: activations, paths and subspaces patched; one page."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import ml_collections
import numpy as np

from lm.config import Count, Path, Positive, Seed, check, view
from lm.evaluation.card import Section, made
from lm.evaluation.page import made_by, write_report
from lm.evaluation.subject import Subject
from lm.files import parse_object, read_bytes
from lm.interpretability.causes_report import aligned, circuit, patched, probed, traced
from lm.interpretability.patching import Contrast, logit_difference
from lm.interpretability.prompts import one_token, opened, places_of, prompt_tokens
from lm.interpretability.subspaces import InterchangeSettings, Pairs, align, probe
from lm.jobs.evaluate import facts
from lm.parallel.platform import keep_programs
from lm.runs.run import Run


@dataclasses.dataclass(frozen=True)
class CausesJob:
    """Which two prompts are compared, of which model, and in what answer."""

    job: str = "causes"
    seed: Seed = 0  # of noise, searches and folds
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    step: int | None = None  # of the checkpoint; None: the last one
    clean: str = ""  # a prompt
    corrupt: str = ""  # as many tokens, alike but for what matters
    right: str = ""  # the token that follows the clean prompt
    wrong: str = ""  # the token that follows the corrupt one
    points: Positive = 5  # of integrated gradients
    subject: str = ""  # words of the clean prompt that a fact is about, for tracing; "": none
    samples: Positive = 10  # of noise
    window: Positive = 10  # layers of attention or MLP that are restored together
    interchange: InterchangeSettings = dataclasses.field(default_factory=InterchangeSettings)
    probe: Path = ""  # lines of {"text": …, "label": true or false, "group": …}; "": no probes
    probed: Count = 2000  # of them, at most

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        for name in ("init_from", "clean", "corrupt", "right", "wrong"):
            check(bool(getattr(self, name)), f"{prefix}.{name}='' must be given")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Section]:
    """Writes `workdir/causes.html` and `causes.json`.

    Returns:
      The page's sections by name.

    Raises:
      ConfigError: no such run, prompts of different lengths, answers that are not one token, a
        subject that is not in the prompt, or files that cannot be read.
    """
    job = view(CausesJob, config)
    keep_programs()
    loaded = opened(job.init_from, job.step)
    both = [prompt_tokens(loaded, getattr(job, n), f"config.{n}") for n in ("clean", "corrupt")]
    lengths = [tokens.shape[1] for tokens in both]
    check(
        lengths[0] == lengths[1],
        f"config.clean has {lengths[0]} tokens and config.corrupt {lengths[1]}: they must have as "
        "many, for each place to be patched",
    )
    right, wrong = (one_token(loaded, getattr(job, n), f"config.{n}") for n in ("right", "wrong"))
    metric = logit_difference(np.array([right]), np.array([wrong]))
    contrast = Contrast(loaded.skeleton, loaded.params, *both, metric)
    parts: dict[str, Any] = {
        "patching": lambda: patched(loaded, contrast),
        "edges": lambda: circuit(loaded, contrast, job.points),
    }
    if job.subject:
        ids, place = both[0][0], places_of(loaded, both[0][0], job.subject, "config.subject")
        settings = {"samples": job.samples, "window": job.window, "seed": job.seed}
        parts["tracing"] = lambda: traced(loaded, ids, place, right, **settings)
    if job.interchange.path:
        pairs = _pairs(loaded, job.interchange.path)
        parts["interchange"] = lambda: _interchange(job, loaded, pairs)
    if job.probe:
        lines = _lines(job.probe, "config.probe", {"text": str, "label": bool, "group": str | int})
        texts = [prompt_tokens(loaded, one["text"], "config.probe")[0].tolist() for one in lines]
        asked = ([one[name] for one in lines] for name in ("label", "group"))
        parts["probe"] = lambda: probed(probe(Subject(loaded), texts, *asked, job.seed))
    sections, left_out = made(parts)
    about = {**facts(loaded), "clean": job.clean, "corrupt": job.corrupt}
    about["answer"] = f"{job.right!r} rather than {job.wrong!r}"
    path = write_report(
        pathlib.Path(workdir).expanduser() / "causes.html",
        f"{about['model']}: what causes an answer",
        "Which activations, which paths between parts and which subspaces carry an answer.",
        about,
        made_by("configs/interpret/causes.py", job),
        [*sections.values()],
        left_out,
    )
    print(f"page: {path}")
    return sections


def _lines(path: str, field: str, kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, each with the fields `kinds`."""
    found = []
    for number, text in enumerate(read_bytes(pathlib.Path(path).expanduser()).split(b"\n"), 1):
        if text.strip():
            one = parse_object(text, f"{field}={path!r}, line {number}")
            good = all(isinstance(one.get(name), kind) for name, kind in kinds.items())
            wanted = ", ".join(kinds)
            check(good, f"{field}={path!r}, line {number}: it must have {wanted} of their kinds")
            found.append(one)
    return found


def _pairs(loaded: Run, path: str) -> Pairs:
    """Texts to interchange, which have as many tokens each."""
    field = "config.interchange.path"
    lines = _lines(path, field, {"base": str, "source": str, "label": str})
    texts = {
        n: [prompt_tokens(loaded, one[n], field)[0] for one in lines] for n in ("base", "source")
    }
    lengths = sorted({len(ids) for some in texts.values() for ids in some})
    check(
        len(lengths) == 1, f"{field}={path!r} has texts of {lengths} tokens: one length is needed"
    )
    labels = [one_token(loaded, one["label"], field) for one in lines]
    return Pairs(np.stack(texts["base"]), np.stack(texts["source"]), np.array(labels))


def _interchange(job: CausesJob, loaded: Run, pairs: Pairs) -> Section:
    asked = job.interchange
    site = asked.site or f"blocks.{loaded.skeleton.config.num_layers // 2}.residual_after"
    settings = {"place": asked.place, "steps": asked.steps, "seed": job.seed}
    found = align(loaded.skeleton, loaded.params, pairs, site, asked.size, **settings)
    return aligned(found, site, asked.size, asked.place)

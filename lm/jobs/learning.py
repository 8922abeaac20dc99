"""Learning, seen from inside: one page of a run's checkpoints, and of small models beside it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal, get_args

import ml_collections

import lm
from lm.config import ConfigError, Path, Positive, Seed, check, view
from lm.evaluation.card import NotApplicable, Section, made
from lm.evaluation.documents import documents_of
from lm.evaluation.page import made_by, write_report
from lm.interpretability import learning_page as page
from lm.interpretability.learning import Rows, adam_history
from lm.parallel.platform import keep_programs
from lm.runs.run import Run
from lm.runs.sources import open_source
from lm.training.plots import save

Part = Literal["gradients", "updates", "scale", "adam", "depth", "dropout", "landscape"]


@dataclasses.dataclass(frozen=True)
class LearningJob:
    """Which run is looked into, and how far."""

    job: str = "learning"
    seed: Seed = 0  # of what is drawn, and of the small models
    init_from: Path = ""  # the directory of a run
    every: Positive = 1  # of the kept checkpoints one in so many; the last one always
    parts: tuple[Part, ...] = get_args(Part)
    # What is read: a file or a corpus by name, as data.path; "": what the run held out.
    path: Path = ""
    documents: Positive = 200  # at most
    length: Positive = 64  # tokens of each that are read
    depth: page.DepthSettings = dataclasses.field(default_factory=page.DepthSettings)
    dropout: page.DropoutSettings = dataclasses.field(default_factory=page.DropoutSettings)
    landscape: page.LandscapeSettings = dataclasses.field(default_factory=page.LandscapeSettings)

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        check(bool(self.parts), f"{prefix}.parts=() must name a part")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Section]:
    """Writes `workdir/learning.html` and `learning.json`, and `depth.png`.

    Returns:
      The page's sections by name.

    Raises:
      ConfigError: no such run, one that is no decoder, or no documents to read.
    """
    job = view(LearningJob, config)
    keep_programs()
    source, loaded = open_source(job.init_from), lm.load(job.init_from)
    model, directory = loaded.skeleton, pathlib.Path(workdir).expanduser()
    kind = (model.config.architecture, model.config.cell, model.config.has_output_head)
    check(
        kind == ("decoder", "attention", True),
        f"config.init_from={job.init_from!r} must be a decoder with an output head",
    )
    directory.mkdir(parents=True, exist_ok=True)
    rows = _rows(job, loaded)
    some = Rows(*(x[:16] for x in rows))  # of the run itself, for a pass at each checkpoint
    checkpoints = {step: source.parameters(step)[1] for step in source.kept(job.every)}
    moments = page.watch(model, some, checkpoints)
    steps, rates, why = {}, {}, ""
    if {"adam", "landscape"} & {*job.parts}:
        steps, rates, why = adam_history(source, [*checkpoints])
    small = model.config, rows

    def several() -> None:
        if len(checkpoints) < 2:
            raise NotApplicable("one checkpoint alone: set checkpoint.keep when training")

    def adam() -> Section:
        if not steps:
            raise NotApplicable(why)
        return page.adam(steps, rates)

    def depth() -> Section:
        section, figure = page.depth(*small, job.depth, job.seed)
        save(figure, directory / "depth.png")
        return section

    last = steps.get([*checkpoints][-1])
    makers = {
        "gradients": lambda: page.gradients(moments),
        "updates": lambda: several() or page.updates(model, checkpoints, moments),
        "scale": lambda: page.scale(model, moments),
        "adam": adam,
        "depth": depth,
        "dropout": lambda: page.dropout(*small, job.dropout, job.seed),
        "landscape": lambda: page.landscape(
            model, some, checkpoints, last, job.landscape, job.seed
        ),
    }

    def told(section: Section) -> None:
        print(f"{section.title}: {section.seconds:.0f} s", flush=True)

    found, left_out = made({part: makers[part] for part in job.parts}, told)
    facts = {
        "model": loaded.directory.resolve().name,
        "directory": str(loaded.directory),
        "checkpoints": ", ".join(f"{step:,}" for step in checkpoints),
        "read": f"{len(rows.tokens_BT)} documents, the first {rows.tokens_BT.shape[1]} tokens each",
    }
    about = "Its learning, seen from inside: gradients, steps, scales, and the loss around it."
    title, again = f"{facts['model']}: learning", made_by("configs/interpret/learning.py", job)
    file = directory / "learning.html"
    print(f"page: {write_report(file, title, about, facts, again, [*found.values()], left_out)}")
    return found


def _rows(job: LearningJob, loaded: Run) -> Rows:
    """The documents, as the model reads them."""
    check(loaded.tokenizer is not None, f"config.init_from={job.init_from!r} has no tokenizer")
    try:
        many = job.documents, job.documents * 10**5
        read = documents_of(loaded, job.path, *many, job.seed)
    except (NotApplicable, ConfigError) as error:
        raise ConfigError(f"config.path={job.path!r}: {error}") from None
    before = loaded.framing.before or ()
    texts = [[*before, *document.ids] for document in read.documents]
    return Rows.of(texts, min(job.length, loaded.skeleton.config.max_length))

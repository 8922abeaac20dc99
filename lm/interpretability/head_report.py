"""What was found of heads, as sections of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lm.evaluation.card import Section, Table, picture
from lm.evaluation.subject import Subject
from lm.interpretability import head_history, heads
from lm.interpretability.head_tests import Bar, Task, Tested, run_task
from lm.models import init, param_specs

Verdicts = Mapping[tuple[int, int], str]


def tested(
    subject: Subject, bar: Bar, task: Task, found: Tested, verdicts: Verdicts, seed: int
) -> Section:
    """Every head's part in a task, and the same where nothing is to be found."""
    config = subject.run.skeleton.config
    head = ("head", "attention", "to distractor", "accuracy at zero", "at its mean", "patched")
    rows = [
        (f"{layer}.{number}", *(float(x[layer, number]) for x in found[3:]),
         verdicts.get((layer, number), ""))
        for layer, number in np.ndindex(found.attention_LH.shape)
    ]  # fmt: skip
    rows.sort(key=lambda row: (row[-1] != "specialised", -row[5]))
    best = np.unravel_index(
        np.argmax(found.attention_LH - found.distractor_LH), found.attention_LH.shape
    )
    shuffled = run_task(config, subject.run.params, task.relabelled(seed), [best])
    done = found.preference >= bar.preference
    # As the trainer starts: of weights that were never trained.
    fresh = init(param_specs(subject.run.skeleton), jax.random.key(seed))
    random = run_task(config, fresh, task, [])
    controls = [
        ("as it is", found, float(found.attention_LH[best])),
        ("labels at random", shuffled, float(shuffled.attention_LH[best])),
        ("random initialisation", random, float(random.attention_LH.max())),
    ]
    return Section(
        task.name.replace(" ", "-").replace(",", ""),
        f"Heads for {task.name}",
        f"{len(task.place_B)} texts in minimal pairs. The model gives the right answer to "
        f"{found.accuracy:.0%} (a guess to {found.chance:.0%}), and finds it likelier than the "
        f"wrong one in {found.preference:.0%}. A head is specialised if at least "
        f"{bar.attention:.0%} of its attention is on the target, and twice as much as on the "
        f"distractor; if {bar.ablation:.0%} of the accuracy above chance is lost without it, "
        f"whether its output is zero or its mean; and if it brings {bar.patching:.0%} of the "
        "difference of logits along where it is put into the other text of a pair (1: all of it).",
        tables=[
            *(_shown((*head, "verdict"), rows) if done else []),
            Table(
                "The head that attends best, and controls",
                ("what", "attention", "accuracy", "preference", "verdict"),
                [(what, paid, one.accuracy, one.preference, _verdict(bar, one, best))
                 for what, one, paid in controls],
            ),
        ],
    )  # fmt: skip


def _shown(head: Sequence[str], rows: list[tuple]) -> list[Table]:
    """A table of all heads, and before a long one those with a verdict."""
    every = Table("Heads", head, rows)
    some = [row for row in rows if row[-1]]
    return [Table("Heads that stand out", head, some), every] if len(rows) > 15 else [every]


def _verdict(bar: Bar, found: Tested, at: tuple[int, int]) -> str:
    return bar.verdict(found, *at) or "none"


def scored(subject: Subject, texts: Sequence[head_history.Texts]) -> Section:
    """Every score of every head, and which heads read which."""
    config, params = subject.run.skeleton.config, subject.run.params
    scores = head_history.attention_scores(config, params, texts)
    scores["copying"] = heads.copying_scores(config, params)
    even = head_history.uniform(texts)
    shape = scores["copying"].shape
    rows = [(f"{layer}.{head}", *(float(x[layer, head]) for x in scores.values()))
            for layer, head in np.ndindex(shape)]  # fmt: skip
    alike = ("uniform", *(even.get(name, 0.0) for name in scores))
    chance, spread = heads.random_composition(config.width, config.head_width)
    pairs = []
    for kind, each in zip("QKV", heads.composition_scores(config, params)):
        for at in np.argsort(each, None)[::-1][:5]:
            a, b, c, d = np.unravel_index(at, each.shape)
            if each[a, b, c, d] > 0:
                value = float(each[a, b, c, d])
                pairs.append((kind, f"{a}.{b}", f"{c}.{d}", value, (value - chance) / spread))
    return Section(
        "scores",
        "What heads attend to and copy",
        "Attention is a mean over the tokens that have something of the kind before them; a head "
        "that looks at all alike has the row “uniform”. Repeats have periods that are drawn at "
        f"random; “{head_history.CONTROL}” is the control: who scores there alone counts tokens "
        "and matches nothing. Copying is Σ Re λ / Σ |λ| of W_E W_OV W_U. These scores say what a "
        "head may do, and not that anything depends on it.",
        tables=[
            Table("Scores", ("head", *scores), [alike, *rows]),
            Table(
                f"Largest composition of queries, keys and values (of noise {chance:.3f})",
                ("kind", "writes", "reads", "‖AB‖ / ‖A‖‖B‖", "deviations above noise"),
                pairs,
            ),
        ],
    )


def trained(history: head_history.History, lines: Sequence[Sequence[str]], figure) -> Section:
    """The picture of all checkpoints, and where each number changes most."""
    rows = [(name, *history.phase_change(name)) for some in lines for name in some]
    return Section(
        "training",
        "How they came to do it",
        "Every kept checkpoint. Of each number it is given in which window, of a tenth of the "
        "checkpoints, it changes most. A head comes to its work in a phase change of the model "
        "where that window is also that of the in-context-learning score, which is the loss late "
        "in a text less that early in it (Olsson et al. 2022); the first head's window is shaded.",
        tables=[Table("Largest changes", ("number", "from step", "to step", "change"), rows)],
        pictures=[picture("Through training", figure)],
    )

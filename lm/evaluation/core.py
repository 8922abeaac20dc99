"""DCLM's CORE: how far above chance a model is, over 22 tasks (Li et al. 2024, §3.5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lm.evaluation.statistics import NORMAL, Estimate

_BIG, _WRITTEN = "bigbench_", "_generate_until"


class CoreTask(NamedTuple):
    """One of the 22.

    Attributes:
      name: as DCLM calls it; a task file of this name is taken for DCLM's own data.
      harness: what lm-evaluation-harness calls its version of it; "" where it has none.
      shots: examples before each question.
      metric: the harness's that is nearest to DCLM's accuracy.
      chance: what guessing scores on the harness's data, as the paper has it.
      own_chance: on DCLM's own data, as corrected in September 2025 (mlfoundations/dclm #115); the
        same unless given.
    """

    name: str
    harness: str
    shots: int
    metric: str
    chance: float
    own_chance: float | None = None


TASKS = (
    CoreTask("hellaswag_zeroshot", "hellaswag", 0, "acc_norm", 0.25),
    CoreTask("jeopardy", "", 10, "exact_match", 0.0),
    CoreTask(f"{_BIG}qa_wikidata", f"{_BIG}qa_wikidata{_WRITTEN}", 10, "exact_match", 0.0),
    CoreTask("arc_easy", "arc_easy", 10, "acc_norm", 0.25),
    CoreTask("arc_challenge", "arc_challenge", 10, "acc_norm", 0.25),
    CoreTask("copa", "copa", 0, "acc", 0.5),
    # Five choices; DCLM's own data have four, and one of them is right more often than others.
    CoreTask("commonsense_qa", "commonsense_qa", 10, "acc", 0.2, 0.403),
    CoreTask("piqa", "piqa", 10, "acc_norm", 0.5),
    CoreTask("openbook_qa", "openbookqa", 0, "acc_norm", 0.25),
    CoreTask("lambada_openai", "lambada_openai", 0, "acc", 0.0),
    CoreTask("hellaswag", "hellaswag", 10, "acc_norm", 0.25),
    CoreTask("winograd", "wsc273", 0, "acc", 0.5),
    CoreTask("winogrande", "winogrande", 0, "acc", 0.5),
    CoreTask(f"{_BIG}dyck_languages", f"{_BIG}dyck_languages{_WRITTEN}", 10, "exact_match", 0.0),
    CoreTask("agi_eval_lsat_ar", "agieval_lsat_ar", 3, "acc_norm", 0.2, 0.25),
    CoreTask(f"{_BIG}cs_algorithms", f"{_BIG}cs_algorithms{_WRITTEN}", 10, "exact_match", 0.0),
    CoreTask(f"{_BIG}operators", f"{_BIG}operators{_WRITTEN}", 10, "exact_match", 0.0),
    CoreTask(f"{_BIG}repeat_copy_logic", f"{_BIG}repeat_copy_logic{_WRITTEN}", 10,
        "exact_match", 0.0),
    CoreTask("squad", "squad_completion", 10, "contains", 0.0),
    CoreTask("coqa", "coqa", 0, "em", 0.0),
    CoreTask("boolq", "boolq", 10, "acc", 0.62),  # always "yes"
    # Eleven choices; DCLM's own data have four.
    CoreTask(f"{_BIG}language_identification", f"{_BIG}language_identification_multiple_choice", 10,
        "acc", 1 / 11, 0.25),
)  # fmt: skip
_TWICE = {"hellaswag_zeroshot", "hellaswag"}  # the same documents, with and without examples


def centred(accuracy: float, chance: float) -> float:
    """0 for a guess, 1 for all that is right: (accuracy − chance) / (1 − chance)."""
    return (accuracy - chance) / (1 - chance)


def core(found: Mapping[str, tuple[Estimate, float]]) -> Estimate:
    """CORE: the mean of the tasks' centred accuracies.

    Its standard error takes tasks for independent, but for the two of the same documents, which
    are taken to err together.

    Args:
      found: accuracy and chance, by the name of each of `TASKS`.

    Raises:
      KeyError: a task is missing.
    """
    scores, variance, twice = [], 0.0, 0.0
    for task in TASKS:
        estimate, chance = found[task.name]
        scores.append(centred(estimate.value, chance))
        error = estimate.error / (1 - chance)
        if task.name in _TWICE:
            twice += error
        else:
            variance += error**2
    value, error = sum(scores) / len(TASKS), math.sqrt(variance + twice**2) / len(TASKS)
    items = sum(estimate.items for estimate, _ in found.values())
    half = NORMAL * error
    return Estimate(value, error, value - half, value + half, items, items)

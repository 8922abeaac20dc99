"""What a run replies to conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lm.data import Example
from lm.data.conversations import content_text
from lm.inference import SamplingConfig
from lm.runs.run import Run

AT_ONCE = 128  # conversations replied to together


def replies(
    run: Run, asked: Sequence[Example], sampling: SamplingConfig, seed: int = 0
) -> list[str]:
    """A reply to the question of each example, up to the end of the turn.

    The oldest tokens of a question that the context does not hold are left out.

    Raises:
      ConfigError: a run without a chat template, or messages that it cannot write.
    """
    template = run.chat_template()
    ids, texts = template.ends
    if sampling.stop_at_end_of_text:
        ends = {"stop": (*sampling.stop, *texts), "stop_ids": (*sampling.stop_ids, *ids)}
        sampling = dataclasses.replace(sampling, **ends)
    questions = [template.encode(one.question, one.tools) for one in asked]
    said = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: len(questions[i]))  # alike in length together
    for first in range(0, len(order), AT_ONCE):
        part = order[first : first + AT_ONCE]
        generation = run.generator.generate([questions[i] for i in part], sampling, seed)
        for row, text in generation.texts():
            said[part[row]] += text
    return said


def transcript(one: Example, reply: str) -> str:
    """A conversation as a reader sees it, with the reply at its end."""
    lines = [f"{m['role']}: {content_text(m.get('content'))}" for m in one.question]
    return "\n".join([*lines, f"→ {reply.strip()}"])

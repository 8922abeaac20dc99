"""What a run replies to conversations, as readers see it."""

from __future__ import annotations

from collections.abc import Sequence

from lm.config import to_dict
from lm.data import Example
from lm.data.conversations import content_text
from lm.inference import SamplingConfig
from lm.runs.run import Run


def replies(
    run: Run, asked: Sequence[Example], sampling: SamplingConfig, seed: int = 0
) -> list[str]:
    """A reply to the question of each example; see `Run.reply`."""
    questions, tools = [one.question for one in asked], [one.tools for one in asked]
    return run.reply(questions, tools, seed=seed, **to_dict(sampling))


def transcript(one: Example, reply: str) -> str:
    """A conversation as a reader sees it, with the reply at its end."""
    lines = [f"{m['role']}: {content_text(m.get('content'))}" for m in one.question]
    return "\n".join([*lines, f"→ {reply.strip()}"])

"""How the conversations that a run learns are written, which its directory keeps."""

from __future__ import annotations

from typing import Any

from lm.config import check
from lm.inference import Framing
from lm.runs.config import TrainJob
from lm.runs.inherited import Origin
from lm.tokenizers import ChatTemplate, Tokenizer, chat_template
from lm.tokenizers.chat_built_in import BUILT_IN
from lm.tokenizers.settings import TEMPLATE_FILE


def converse(
    job: TrainJob, tokenizer: Tokenizer, origin: Origin
) -> tuple[Tokenizer, ChatTemplate | None, dict[str, Any], list[str]]:
    """How a run that learns conversations writes them; of any other run only what it has.

    Args:
      job: with the whole model.
      tokenizer: the run's.
      origin: what the run starts from.

    Returns:
      The tokenizer, with the template beside it, and the template; what config.json is to say
      beside the job (`Origin.carried`), in which what ends a reply is an end of text, too; and what
      there is to know, one line each.

    Raises:
      ConfigError: no such template, or a model that does not talk.
    """
    carried = origin.carried(job.data.end_of_text)
    if not job.converses:
        return tokenizer, None, carried, []
    check(
        job.model.architecture == "decoder",
        f"config.objective.name={job.objective.name!r} needs config.model.architecture='decoder', "
        f"not {job.model.architecture!r}",
    )
    config = {"data": {"end_of_text": job.data.end_of_text}, **carried}
    framing = Framing.of_run(config, job.model, tokenizer, "framing")
    chosen = job.chat_template if origin.saved is None else ""  # what has begun has its own
    template = chat_template(tokenizer, chosen, framing.before or ())
    if chosen:
        tokenizer = tokenizer.with_extra({TEMPLATE_FILE: template.texts["default"].encode()})
        template = chat_template(tokenizer, begin=framing.before or ())
    notes = []
    names = BUILT_IN[chosen].specials if chosen in BUILT_IN else ()
    if missing := [name for name in names if name not in tokenizer.special_ids]:
        notes.append(
            f"the tokenizer has no token {' or '.join(missing)}, so the model reads and learns the "
            f"letters of these names; a tokenizer trained with tokenizer.chat_template={chosen} "
            "has them"
        )
    ends = list(dict.fromkeys([*(framing.end_of_text or ()), *template.ends[0]]))
    if ends != list(framing.end_of_text or ()):
        carried.setdefault("framing", {})["end_of_text"] = ends
        if "huggingface" in carried:
            carried["huggingface"].setdefault("generation", {})["eos_token_id"] = ends
    return tokenizer, template, carried, notes

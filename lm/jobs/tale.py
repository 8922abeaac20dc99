"""One token's tale: from text to the next token, and back, on a page."""

from __future__ import annotations

import dataclasses
import pathlib

import ml_collections

from lm.config import ConfigError, Path, check, nearest, view
from lm.evaluation.card import plain
from lm.evaluation.page import made_by
from lm.files import write_json
from lm.interpretability.heatmaps import token_names
from lm.interpretability.prompts import opened, prompt_tokens
from lm.interpretability.tale import Tale, tell
from lm.interpretability.tale_page import write_tale
from lm.jobs.evaluate import facts
from lm.parallel.platform import keep_programs


@dataclasses.dataclass(frozen=True)
class TaleJob:
    """Whose token, and which."""

    job: str = "tale"
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    step: int | None = None  # of the checkpoint; None: the last one
    prompt: str = ""  # the text it stands in
    token: str = ""  # one of the prompt's tokens, to the letter (its last place); "": the last one

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        check(bool(self.prompt), f"{prefix}.prompt='' must be the text that the token stands in")


def run(config: ml_collections.ConfigDict, workdir: str) -> Tale:
    """Writes `workdir/tale.html` and `tale.json`, and says in a line what came of the token.

    Raises:
      ConfigError: no such run, one that is no decoder, a prompt that is too long, or a token that
        is not in it.
    """
    job = view(TaleJob, config)
    keep_programs()
    loaded = opened(job.init_from, job.step)
    ids = prompt_tokens(loaded, job.prompt, "config.prompt")[0].tolist()
    place = _place(job.token, loaded.tokenizer, ids)
    try:
        tale = tell(loaded.skeleton, loaded.params, ids, place)
    except ConfigError as error:
        raise ConfigError(f"config.init_from={job.init_from!r}: {error}") from None
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {"streams": tale.streams.tolist(), "back": tale.back.tolist()}
    write_json(directory / "tale.json", plain({**vars(tale), **arrays}))
    name, made = facts(loaded)["model"], made_by("configs/interpret/tale.py", job)
    settings = loaded.skeleton.config, loaded.tokenizer
    page = write_tale(directory / "tale.html", tale, *settings, name, made)
    token, *likely = token_names(loaded.tokenizer, [ids[place], *tale.logits.ids[:3]])
    shares = (f"{t} ({p:.0%})" for t, p in zip(likely, tale.logits.scores))
    print(f"after {token}: {', '.join(shares)}\npage: {page}")
    return tale


def _place(token: str, tokenizer, ids: list[int]) -> int:
    """Where in the prompt the token stands, at last."""
    if not token:
        return len(ids) - 1
    data = token.encode()
    found = [i for i, one in enumerate(ids) if tokenizer.token_bytes(one) == data]
    spelt = [tokenizer.token_bytes(one).decode("utf-8", "replace") for one in ids]
    names = " ".join(token_names(tokenizer, ids))
    check(
        bool(found),
        f"config.token={token!r} is not one of the prompt's tokens{nearest(token, spelt)}: {names}",
    )
    return found[-1]

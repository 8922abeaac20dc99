"""lm-evaluation-harness asks, the model answers: any of its tasks, by name or from a local file.

Its `LM` interface on our engine. Where rows are shared by devices, that is inside: to the harness
there is one process, and it needs no torch. What does not fit the context loses its beginning, a
begin-of-text included, as in the harness's own backends; `HarnessModel.truncated` counts it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from lm.config import ConfigError, check
from lm.evaluation.scoring import Scorer, windows
from lm.files import take_off_torn_line
from lm.inference import SamplingConfig
from lm.runs.run import Run
from lm.tokenizers import ChatTemplate

AT_ONCE = 512  # requests between two writes of the cache
ROWS = 64  # texts that are written together
MAX_NEW_TOKENS = 256  # where a task does not say, as the harness's own backends have it

# What became of a request: its answer, and whether its text lost a part to the context.
Answer = tuple[Any, bool]


class HarnessModel(LM):
    """A run, as the harness knows models.

    Args:
      run: a decoder with a tokenizer.
      scorer: of its parameters; on one device unless given.
      cache: a file of JSON Lines with answers to come back to after an interruption; "" for none.
      weights: what tells the parameters from others in the cache, such as their fingerprint.
      chat_template: as of `Run.chat_template`.

    Attributes:
      truncated: of each task, how many requests lost the beginning of their text to the context.
    """

    def __init__(
        self,
        run: Run,
        scorer: Scorer | None = None,
        cache: str = "",
        weights: str = "",
        chat_template: str = "",
    ):
        super().__init__()
        self.run = run
        self.scorer = scorer or Scorer(run.skeleton, run.params)
        self.max_length = run.skeleton.config.max_length
        self.truncated: Counter[str] = Counter()
        self._chosen, self._rendered = chat_template, {}
        self._weights = weights or f"{run.directory} {run.step}"
        self._file = pathlib.Path(cache) if cache else None
        self._known = _read(self._file) if self._file else {}

    # ---- What the harness asks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False):
        """(log p(continuation | context), whether it is what greedy decoding writes) of each."""
        return self._answers("loglikelihood", requests, self._scored)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False):
        """log p of each whole text, in windows of the context that overlap as little as can be."""
        return self._answers("loglikelihood_rolling", requests, self._rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False):
        """What the model writes after each context, up to the first of `until`."""
        return self._answers("generate_until", requests, self._written)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; what follows its last message, unless the reply is to begin."""
        if add_generation_prompt:
            said, begun = chat_history, ""
        else:
            *said, last = chat_history
            begun = last["content"]
        text, ids = self._template.render(said), self._template.encode(said)
        self._rendered[text + begun] = ids + (self._plain(begun) if begun else [])
        return text + begun

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, for the report."""
        return self._template.texts["default"] if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer, and how it writes conversations, from others."""
        return f"{self.run.tokenizer.kind} {self.run.tokenizer.fingerprint} {self._chosen}"

    # ---- Tokens

    @property
    def prefix(self) -> int:
        """What stands before a text that has nothing before it: begin-of-text, else end-of-text."""
        before = self.run.framing.before
        return before[-1] if before else self.run.tokenizer.bos_id

    def pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The ids of both together, and where the continuation begins.

        Space at the context's end belongs to the continuation, as tokens begin with it. A token
        that spans the join is of the continuation, which so has one at least unless it is empty.
        """
        if context in self._rendered:
            ids = self._rendered[context]
            return ids + self._plain(continuation), len(ids)
        if not context:
            return [self.prefix, *self._plain(continuation)], 1
        bare = context.rstrip()
        if bare:
            context, continuation = bare, context[len(bare) :] + continuation
        before, whole = self._text(context), self._text(context + continuation)
        start = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(before))
        start = min(start, len(whole) - bool(continuation))
        return (whole, start) if start else ([self.prefix, *whole], 1)

    def _plain(self, text: str) -> list[int]:
        return self.run.tokenizer.encode(text)

    def _text(self, text: str) -> list[int]:
        """A text's ids, what stands before texts once in front of them."""
        if text in self._rendered:
            return self._rendered[text]
        return [*(self.run.framing.before or ()), *self._plain(text)]

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return self.run.chat_template(self._chosen)

    # ---- Answers

    def _scored(self, asked: Sequence[tuple], repeats: Sequence[int]) -> list[Answer]:
        pairs = [self.pair(*each) for each in asked]
        found: list[Answer] = [((0.0, True), False)] * len(pairs)  # of an empty continuation
        texts, starts, of = [], [], []
        for number, (ids, start) in enumerate(pairs):
            if start == len(ids):
                continue
            cut = max(0, len(ids) - 1 - self.max_length)
            if cut < start:
                pieces = [(ids[cut:], start - cut)]
            else:  # the continuation alone is longer than the context
                pieces = windows(ids[start:], ids[start - 1], self.max_length)
            for piece, begin in pieces:
                texts.append(piece)
                starts.append(begin)
                of.append((number, cut > 0))
        for scored, (number, cut) in zip(self.scorer(texts, starts), of):
            (total, greedy), _ = found[number]
            found[number] = (total + scored.total, greedy and scored.greedy), cut
        return found

    def _rolling(self, asked: Sequence[tuple], repeats: Sequence[int]) -> list[Answer]:
        pieces = [
            (number, *piece)
            for number, (text,) in enumerate(asked)
            for piece in windows(self._plain(text), self.prefix, self.max_length)
        ]
        totals = [0.0] * len(asked)
        scores = self.scorer([ids for _, ids, _ in pieces], [start for *_, start in pieces])
        for scored, (number, *_) in zip(scores, pieces):
            totals[number] += scored.total
        return [(total, False) for total in totals]

    def _written(self, asked: Sequence[tuple], repeats: Sequence[int]) -> list[Answer]:
        found: list[Answer] = [("", False)] * len(asked)
        alike: dict[tuple[SamplingConfig, int], list[tuple[int, list[int]]]] = {}
        for number, (context, settings) in enumerate(asked):
            sampling = _sampling(settings)
            seed = 0 if sampling.greedy else repeats[number]
            room = self.max_length - sampling.max_new_tokens
            check(
                room > 0,
                f"max_gen_toks={sampling.max_new_tokens} leaves no room for a prompt in the "
                f"model's context of {self.max_length} tokens: lower it",
            )
            ids = self._text(context) or [self.prefix]
            found[number] = "", len(ids) > room
            alike.setdefault((sampling, seed), []).append((number, ids[-room:]))
        for (sampling, seed), texts in alike.items():
            texts.sort(key=lambda one: len(one[1]))
            for first in range(0, len(texts), ROWS):
                part = texts[first : first + ROWS]
                written = self.run.generator.generate([ids for _, ids in part], sampling, seed)
                for row, text in written.texts():
                    number = part[row][0]
                    found[number] = found[number][0] + text, found[number][1]
        return found

    def _answers(
        self,
        method: str,
        requests: Sequence[Instance],
        ask: Callable[[Sequence[tuple], Sequence[int]], list[Answer]],
    ) -> list[Any]:
        """Answers to all requests, of which those that are known are not asked again."""
        asked_before: Counter[str] = Counter()
        keys, repeats = [], []
        for request in requests:
            said = json.dumps([self._weights, self.tokenizer_name, method, request.args])
            repeats.append(asked_before[said])
            asked_before[said] += 1
            keys.append(hashlib.sha256(f"{said} {repeats[-1]}".encode()).hexdigest())
        todo = [i for i, key in enumerate(keys) if key not in self._known]
        for first in range(0, len(todo), AT_ONCE):
            part = todo[first : first + AT_ONCE]
            found = ask([requests[i].args for i in part], [repeats[i] for i in part])
            self._known |= {keys[i]: answer for i, answer in zip(part, found)}
            if self._file:
                with self._file.open("a", encoding="utf-8") as file:
                    for i in part:
                        file.write(json.dumps([keys[i], *self._known[keys[i]]]) + "\n")
        for request, key in zip(requests, keys):
            self.truncated[request.task_name or ""] += self._known[key][1]
        answers = [self._known[key][0] for key in keys]
        return [tuple(a) if method == "loglikelihood" else a for a in answers]


def _sampling(settings: dict[str, Any]) -> SamplingConfig:
    """The harness's `gen_kwargs` in our terms."""
    settings = dict(settings)
    until = settings.pop("until", None) or ()
    limit = settings.pop("max_gen_toks", settings.pop("max_new_tokens", MAX_NEW_TOKENS))
    draws = settings.pop("do_sample", bool(settings.get("temperature", 0)))
    known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: settings.pop(name) for name in known if name in settings}
    check(not settings, f"generation_kwargs has {', '.join(settings)}, which is not known here")
    if not draws:
        given["temperature"] = 0.0
    stops = (until,) if isinstance(until, str) else tuple(until)
    return SamplingConfig(max_new_tokens=limit, stop=tuple(s for s in stops if s), **given)


def _read(path: pathlib.Path) -> dict[str, Answer]:
    """The answers that a cache has; a last line that was cut off leaves it."""
    if not path.exists():
        return {}
    known, data = {}, path.read_bytes()
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            key, answer, cut = json.loads(line)
        except ValueError:
            raise ConfigError(f"{path} line {number} is no answer: delete the file") from None
        known[key] = answer, cut
    take_off_torn_line(path, data)
    return known

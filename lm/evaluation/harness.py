"""lm-evaluation-harness asks, the model answers: any of its tasks, by name or from a local file.

Its `LM` interface on our engine. Where rows are shared by devices, that is inside: to the harness
there is one process, and it needs no torch. What does not fit the context loses its beginning, a
begin-of-text included, as in the harness's own backends; `HarnessModel.cut` says of what.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from lm.config import ConfigError, check
from lm.evaluation.subject import Subject
from lm.files import take_off_torn_line
from lm.inference import SamplingConfig

AT_ONCE = 512  # requests between two writes of the cache
MAX_NEW_TOKENS = 256  # where a task does not say, as the harness's own backends have it

# What became of a request: its answer, and whether its text lost a part to the context.
Answer = tuple[Any, bool]


class HarnessModel(LM):
    """A run, as the harness knows models.

    Args:
      subject: the model.
      cache: a file of JSON Lines with answers to come back to after an interruption; "" for none.
      weights: what tells the parameters from others in the cache, such as their fingerprint.
      seed: of what is drawn.

    Attributes:
      cut: of each task, the documents of which a text lost its beginning to the context.
    """

    def __init__(self, subject: Subject, cache: str = "", weights: str = "", seed: int = 0):
        super().__init__()
        self.subject, self.seed = subject, seed
        self.cut: defaultdict[str, set[int | None]] = defaultdict(set)
        self._rendered: dict[str, list[int]] = {}
        self._weights = weights or f"{subject.run.directory} {subject.run.step}"
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
        ids, text = self.subject.question(said), self.subject.template.render(said)
        self._rendered[text + begun] = ids + self.subject.tokenizer.encode(begun)
        return text + begun

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, for the report."""
        template = self.subject.template if chat_template else None
        return template and template.texts["default"]

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer, and how it writes conversations, from others."""
        subject = self.subject
        template = hashlib.sha256((self.chat_template(True) or "").encode()).hexdigest()[:16]
        return f"{subject.tokenizer.kind} {subject.tokenizer.fingerprint} {template}"

    # ---- Answers

    def _scored(self, asked: Sequence[tuple], repeats: Sequence[int]) -> list[Answer]:
        found = self.subject.likely_ids([self._pair(*each) for each in asked])
        return [((one.scored.total, one.scored.greedy), one.truncated) for one in found]

    def _rolling(self, asked: Sequence[tuple], repeats: Sequence[int]) -> list[Answer]:
        prefix, encode = self.subject.prefix, self.subject.tokenizer.encode
        found = self.subject.likely_ids([([prefix, *encode(text)], 1) for (text,) in asked])
        return [(one.scored.total, False) for one in found]

    def _written(self, asked: Sequence[tuple], repeats: Sequence[int]) -> list[Answer]:
        found: list[Answer] = [("", False)] * len(asked)
        alike: dict[tuple[SamplingConfig, int], list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            sampling = sampling_of(settings)
            seed = 0 if sampling.greedy else self.seed + repeats[number]
            alike.setdefault((sampling, seed), []).append(number)
        for (sampling, seed), numbers in alike.items():
            prompts = [self._rendered.get(asked[i][0], asked[i][0]) for i in numbers]
            for number, (one,) in zip(numbers, self.subject.write(prompts, sampling, seed)):
                found[number] = one.text, one.truncated
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        if context not in self._rendered:
            return self.subject.pair(context, continuation)
        ids = self._rendered[context]
        return ids + self.subject.tokenizer.encode(continuation), len(ids)

    def _answers(
        self,
        method: str,
        requests: Sequence[Instance],
        ask: Callable[[Sequence[tuple], Sequence[int]], list[Answer]],
    ) -> list[Any]:
        """Answers to all requests, of which those that are known are not asked again."""
        asked_before: Counter[str] = Counter()
        keys, repeats, name = [], [], self.tokenizer_name
        for request in requests:
            said = json.dumps([self._weights, name, self.seed, method, request.args])
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
            if self._known[key][1]:
                self.cut[request.task_name or ""].add(request.doc_id)
        answers = [self._known[key][0] for key in keys]
        return [tuple(a) if method == "loglikelihood" else a for a in answers]


def sampling_of(settings: dict[str, Any]) -> SamplingConfig:
    """The harness's `generation_kwargs` in our terms.

    Raises:
      ConfigError: one that is not known here.
    """
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

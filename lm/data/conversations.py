"""Conversations, preferences and prompts, from lines of JSON in the forms that others write.

    messages         {"messages": [{"role": …, "content": …}, …]}
    alpaca           {"instruction": …, "input": …, "output": …}
    prompt_response  {"prompt": …, "response" or "completion": …}
    preference       {"prompt": …, "chosen": …, "rejected": …}, with a "margin" if need be
    labelled         {"prompt": …, "response" or "completion": …, "label": true or false}
    prompts          {"prompt": …}, and whatever a reward of the answer asks for

A prompt is the text of a user or a list of messages, and a reply the text of an assistant or the
messages that follow; `chosen` and `rejected` may be whole conversations, without a prompt or with
it in them. Any line may have "tools", the JSON schemas of functions, and a line whose prompt is a
text "system". Assistants' messages may have "tool_calls", and a "weight" of 0 where they are not to
be learnt.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from lm.config import ConfigError, check, nearest
from lm.data import corpora
from lm.data.config import CONVERSATIONAL, DataConfig
from lm.data.files import CorpusReport

Message = dict[str, Any]

# The fields by which a line is known to be of a form: all of these, and one of those.
_KNOWN_BY = {
    "preference": (("chosen", "rejected"), ()),
    "labelled": (("prompt", "label"), ("response", "completion")),
    "messages": (("messages",), ()),
    "alpaca": (("instruction", "output"), ()),
    "prompt_response": (("prompt",), ("response", "completion")),
    "prompts": (("prompt",), ()),
}
_READ = {"messages", "tools", "prompt", "chosen", "rejected", "system"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One line.

    Attributes:
      prompt: the messages that are given, of which nothing is learnt; () where the line is one
        whole conversation.
      replies: what follows: one, two of which the first is preferred, or none.
      tools: JSON schemas of functions, or None.
      label: whether the only reply is desirable.
      margin: by how much the first of two replies is better; 0 where nobody says.
      fields: what else the line has, for rewards.
      place: where it stands, for messages.
    """

    prompt: tuple[Message, ...]
    replies: tuple[tuple[Message, ...], ...] = ()
    tools: list[Any] | None = None
    label: bool = True
    margin: float = 0.0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = ""

    @property
    def question(self) -> tuple[Message, ...]:
        """What the last reply of the (preferred) assistant replies to."""
        messages = (*self.prompt, *self.replies[0]) if self.replies else self.prompt
        while self.replies and messages and messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        return messages[:-1] if self.replies else messages

    @property
    def answer(self) -> str:
        """That reply's text."""
        last = [m for m in self.replies[0] if m["role"] == "assistant"][-1:] if self.replies else []
        return content_text(last[0].get("content")) if last else ""


def content_text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    return "".join(part["text"] for part in parts)


def form_of(line: Any) -> str:
    """The form of a line, by its fields.

    Raises:
      ConfigError: it is of none.
    """
    check(isinstance(line, dict), f"it must be an object, not {type(line).__name__}")
    for form, (every, either) in _KNOWN_BY.items():
        if all(name in line for name in every) and (
            not either or any(name in line for name in either)
        ):
            return form
    known = {name for every, either in _KNOWN_BY.values() for name in (*every, *either)}
    close = next((nearest(n, known) for n in map(str, line) if nearest(n, known)), "")
    raise ConfigError(
        f"its fields, {', '.join(map(repr, line))}, are of no form of conversation{close}: "
        "'messages', or 'prompt' with 'response', 'chosen' and 'rejected', or nothing, or "
        "'instruction' and 'output'"
    )


def example(line: Any, form: str) -> Example:
    """The example in a line of a form.

    Raises:
      ConfigError: naming the field that is missing or of the wrong kind.
    """
    check(isinstance(line, dict), f"it must be an object, not {type(line).__name__}")
    tools = line.get("tools") or None
    if isinstance(tools, str):  # as some data sets keep them
        tools = _json(tools, "tools")
    check(tools is None or isinstance(tools, list), "tools must be a list")
    if form == "preference":
        return dataclasses.replace(_preference(line), tools=tools)
    if form == "messages":
        return Example((), (_messages(line, "messages"),), tools)
    if form == "alpaca":
        more = _text(line, "input", "")
        asked = _text(line, "instruction") + (f"\n\n{more}" if more else "")
        return Example(_asked(line, asked), (_said(_text(line, "output")),), tools)
    prompt = _prompt(line)
    if form == "prompts":
        return Example(prompt, (), tools)
    reply = "response" if "response" in line else "completion"
    if form == "labelled":
        label = line.get("label")
        check(label in (True, False), f"label={label!r} must be true or false")
        return Example(prompt, (_reply(line, reply),), tools, label=bool(label))
    return Example(prompt, (_reply(line, reply),), tools)


def _preference(line: dict[str, Any]) -> Example:
    margin = line.get("margin") or 0.0
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    check(number, f"margin={margin!r} must be a number")
    chosen, rejected = (_reply(line, name) for name in ("chosen", "rejected"))
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return Example(_prompt(line), (chosen, rejected), margin=float(margin))
    # Whole conversations: what both begin with is the prompt.
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        check(
            same > 0 and messages[same]["role"] == "assistant",
            f"{name}[{same}] must be the assistant's: replies to the same messages are compared",
        )
    return Example(chosen[:same], (chosen[same:], rejected[same:]), margin=float(margin))


def _prompt(line: dict[str, Any]) -> tuple[Message, ...]:
    """The prompt of a line, whose last message is not the assistant's."""
    if not isinstance(line.get("prompt"), list):
        return _asked(line, _text(line, "prompt"))
    messages = _messages(line, "prompt")
    check(messages[-1]["role"] != "assistant", "prompt must not end with a reply")
    return messages


def _asked(line: dict[str, Any], text: str) -> tuple[Message, ...]:
    system = _text(line, "system", "")
    told = ({"role": "system", "content": system},) if system else ()
    return (*told, {"role": "user", "content": text})


def _said(text: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": text},)


def _reply(line: dict[str, Any], name: str) -> tuple[Message, ...]:
    several = isinstance(line.get(name), list)
    return _messages(line, name) if several else _said(_text(line, name))


def _text(line: dict[str, Any], name: str, default: str | None = None) -> str:
    value = line.get(name)
    if value is None and default is not None:
        return default
    check(name in line, f"{name} is missing")
    check(isinstance(value, str), f"{name} must be text, not {type(value).__name__}")
    return value


def _messages(line: dict[str, Any], name: str) -> tuple[Message, ...]:
    """A line's list of messages, as templates expect them."""
    check(name in line, f"{name} is missing")
    messages = line[name]
    check(isinstance(messages, list) and len(messages) > 0, f"{name} must be a list of messages")
    return tuple(_message(m, f"{name}[{i}]") for i, m in enumerate(messages))


def _message(message: Any, where: str) -> Message:
    check(isinstance(message, dict), f"{where} must be an object with a 'role'")
    told = {name: value for name, value in message.items() if value is not None}
    check(isinstance(told.get("role"), str), f"{where}.role must be text, such as 'user'")
    content = told.get("content")
    if isinstance(content, list):
        texts = all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content)
        check(texts, f"{where}.content must be text, or a list of parts with 'text'")
    elif content is not None or not told.get("tool_calls"):
        check(isinstance(content, str), f"{where}.content must be text")
    if "tool_calls" in told:
        calls = told["tool_calls"]
        check(isinstance(calls, list), f"{where}.tool_calls must be a list")
        told["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
    return told


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call whose arguments are an object, not the text of one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    check(named, f"{where} must name its function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}.function.arguments")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where} must be JSON") from None


def read(
    source: corpora.Source,
    report: CorpusReport,
    forms: Sequence[str],
    purpose: str,
    held_out: bool = False,
) -> Iterator[Example]:
    """The examples of a corpus.

    Args:
      source: whose `config` says how lines are written, or leaves that to the first.
      report: gets a note of each line that is left out, with its place and the field.
      forms: those that are of use.
      purpose: what for, in errors.
      held_out: see `Source.records`.

    Raises:
      ConfigError: a line that is bad, where bad files are to be refused, or it is the first; or of
        a form that is of no use.
    """
    form = source.config.format
    first = True
    for place, line in source.records(report, held_out):
        try:
            if form == "auto":
                form = form_of(line)
            check(isinstance(line, dict), f"it must be an object, not {type(line).__name__}")
            check(
                form in forms,
                f"it is of the form {form!r}, and {purpose} needs {' or '.join(map(repr, forms))}"
                + (" (data.format)" if source.config.format != "auto" else ""),
            )
            others = {name: value for name, value in line.items() if name not in _READ}
            found = dataclasses.replace(example(line, form), fields=others, place=place)
        except ConfigError as error:
            if first or source.config.on_bad_file == "refuse":
                raise ConfigError(f"{source.field}: {place}: {error}") from None
            report.num_documents -= 1
            report.skip(place, str(error))
            continue
        first = False
        yield found
    if first:
        raise corpora.no_documents(source, report)


def examples(
    config: DataConfig,
    seed: int,
    objective: str = "",
    notify: Callable[[str], None] = logging.info,
) -> tuple[list[list[Example]], list[list[Example]]]:
    """The examples of every corpus, to train on and to validate on.

    A question's text decides where it belongs, so equal questions never straddle the splits; where
    that leaves one of them empty, or with `split="position"`, the last examples are held out.

    Args:
      objective: what they are for; "" for prompts, which any form has.
      notify: receives one line for each thing worth knowing, such as lines left out.

    Raises:
      ConfigError: see `read`.
    """
    training, apart = corpora.sources(config, seed)
    both = [split(source, objective, notify) for source in training]
    validation = [split(source, objective, notify)[0] for source in apart]
    if not apart and config.validation_fraction:
        validation = [held_out for _, held_out in both]
    return [found for found, _ in both], validation


def split(
    source: corpora.Source,
    objective: str = "",
    notify: Callable[[str], None] = logging.info,
    train: bool = True,
) -> tuple[list[Example], list[Example]]:
    """The examples of one corpus, to train on and to validate on: see `examples`.

    With `train` False the first may be left out.
    """
    forms = CONVERSATIONAL.get(objective, tuple(_KNOWN_BY))
    purpose = f"objective {objective!r}" if objective else "a prompt"
    fraction = source.config.validation_fraction

    def all_of(held_out: bool = False) -> list[Example]:
        report = CorpusReport()
        found = list(read(source, report, forms, purpose, held_out))
        for line in report.lines():
            notify(line)
        return found

    if fraction and source.has_held_out:
        return all_of() if train else [], all_of(True)
    return _divided(all_of(), source.config) if fraction else (all_of(), [])


def held_out(config: DataConfig, seed: int, objective: str = "") -> list[Example]:
    """The examples of all corpora to validate on, or, where there are none, those to train on."""
    training, apart = corpora.sources(config, seed)
    quiet = [objective, lambda line: None]
    found = [split(source, *quiet)[0] for source in apart]
    found = found or [split(source, *quiet, train=False)[1] for source in training]
    if not any(found):
        found = [split(source, *quiet)[0] for source in training]
    return [one for corpus in found for one in corpus]


def _divided(found: list[Example], config: DataConfig) -> tuple[list[Example], list[Example]]:
    """Those to train on, and those that are held out."""
    sides: dict[str, list[Example]] = {"train": [], "validation": []}
    for one in found:
        opening = one.prompt or tuple(
            itertools.takewhile(lambda message: message["role"] != "assistant", one.replies[0])
        )
        text = json.dumps(opening)
        sides[corpora.split_of(text, config.validation_fraction)].append(one)
    if config.split == "hash" and all(sides.values()):
        return sides["train"], sides["validation"]
    count = min(max(1, round(len(found) * config.validation_fraction)), len(found) - 1)
    return found[: len(found) - count], found[len(found) - count :]


def texts(config: DataConfig, seed: int) -> Iterator[str]:
    """What everybody says, to train a tokenizer on."""
    train, _ = examples(config, seed)
    for one in (one for corpus in train for one in corpus):
        for message in (*one.prompt, *(m for reply in one.replies for m in reply)):
            yield content_text(message.get("content"))

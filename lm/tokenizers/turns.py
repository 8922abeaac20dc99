"""Which tokens of a conversation a model is to learn: the assistant's, and what ends its turns.

What the assistant says is found by rendering alone, never by looking for text, which a user could
have typed. A template may say itself what is to be learnt, by `{% generation %}`. Of any other the
conversation is written a second time, in which a reply is a character that occurs nowhere: what
stands before it and behind it in both is the template's and the others'.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.config import ConfigError, check
from lm.tokenizers.base import Tokenizer, well_formed
from lm.tokenizers.chat import GENERATION, ChatTemplate, Message, private_characters

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
Items = list[str | int]  # a text's characters, and ids of special tokens between them


def learned(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    given: int = 0,
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, and of each whether the model is to learn to write it.

    It learns all that it would have to write after the opening of its reply, calls of tools
    included, and what ends its turn: the special token behind it, or, where there is none, the line
    that opens the next turn. Where nothing ends the last turn, what `template.ends` says is put
    there (end-of-text where it says nothing), and else the ids are those of `template.encode`.

    Args:
      template: how a conversation is written.
      messages: of which none of an assistant with a "weight" of 0 is learnt.
      tools, documents, **variables: as of `ChatTemplate.render`.
      given: of the messages so many are a prompt, whose tokens are exactly those that a model reads
        before it replies, whatever comes next; nothing of them is learnt.

    Raises:
      ConfigError: messages that the template cannot write, or a template of which it cannot be
        found out what the assistant says.
    """
    writer = _Writer(template, messages, (tools, documents), variables)
    items, spans = writer.spans(given)
    learn = np.zeros(len(items), bool)
    for start, stop in spans.values():
        learn[start:stop] = True
    ids, flags = _encoded(template.tokenizer, items, learn)
    if given:
        prompt = template.encode(messages[:given], tools, documents, **variables)
        if ids[: len(prompt)] != prompt:  # a token goes across the border, or the past is rewritten
            check(given in spans, f"messages[{given}] must be the assistant's")
            first = spans[given][0]
            ids, flags = _encoded(template.tokenizer, items[first:], learn[first:])
            ids, flags = prompt + ids, [False] * len(prompt) + flags
        flags[: len(prompt)] = [False] * len(prompt)
    return ids, flags


class _Writer:
    """A conversation and what is rendered of it."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        context: tuple[Any, Any],
        variables: dict[str, Any],
    ):
        self._template, self._messages = template, list(messages)
        self._context, self._variables = context, variables
        self._marks = private_characters([self._messages, context, variables], 3)
        self._whole = self._items(self._messages)

    def spans(self, given: int) -> tuple[Items, dict[int, tuple[int, int]]]:
        """The whole, and of each message to be learnt where it starts and its turn has ended.

        Of messages from number `given` on.
        """
        replies = [i for i, m in enumerate(self._messages) if m["role"] == "assistant"]
        own = self._marked_by_template()
        found = dict(zip(replies, own)) if own is not None and len(own) == len(replies) else {}
        found = found or self._at_once(replies)
        items, spans = [*self._whole], {}
        ids, texts = self._template.ends
        for number in replies:
            if number < given or not self._messages[number].get("weight", 1):
                continue
            start, stop, ended = found.get(number) or self._found(number)
            said = "".join(x for x in self._whole[start:stop] if isinstance(x, str))
            for call in self._messages[number].get("tool_calls") or []:
                name = str((call.get("function") or call).get("name"))
                check(
                    name in said,
                    f"messages[{number}].tool_calls: the chat template does not write them: choose "
                    "one that does, such as chatml",
                )
            if not ended and all(map(_blank, items[stop:])):
                end = ids or texts[:1] or (self._template.tokenizer.eos_id,)
                items[stop:] = [x for e in end for x in ([e] if isinstance(e, int) else e)]
                stop = len(items)
            elif not ended:
                last = number + 1 == len(self._messages)
                opened = len(items) if last else _common(self._whole, self._without(number + 1))
                line = "".join(x if isinstance(x, str) else "\n" for x in items[stop:opened])
                usual = next((text for text in texts if line.startswith(text)), None)
                opening = usual or re.match(r"\s*\S[^\n]*|", line).group().rstrip()
                stop += len(opening)
            spans[number] = (start, stop)
        return items, spans

    def _items(self, messages: Sequence[Message], opened: bool = False, **more: Any) -> Items:
        parts = self._template.parts(
            messages, *self._context, add_generation_prompt=opened, **self._variables, **more
        )
        return [x for p in parts for x in (well_formed(p) if isinstance(p, str) else [p])]

    def _without(self, number: int) -> Items:
        """The whole, in which all that one message says is a character that occurs nowhere."""
        message, said = self._messages[number], self._marks[0]
        parts = isinstance(message.get("content"), list | tuple)
        content = [{"type": "text", "text": said}] if parts else said
        kept = {} if message["role"] == "assistant" else message  # a call is all gone
        said = {**kept, "role": message["role"], "content": content}
        return self._items([said if i == number else m for i, m in enumerate(self._messages)])

    def _marked_by_template(self) -> list[tuple[int, int, bool]] | None:
        """As `_found`, of what `{% generation %}` is around, if the template has that."""
        if not any(map(_GENERATION.search, self._template.texts.values())):
            return None
        opens, closes = self._marks[1:]
        marked = self._items(self._messages, **{GENERATION: [opens, closes]})
        if [x for x in marked if x not in (opens, closes)] != self._whole:
            return None  # it does something to what it has written
        before = np.cumsum([x in (opens, closes) for x in marked])
        starts, stops = ([i for i, x in enumerate(marked) if x == end] for end in (opens, closes))
        spans = [(a + 1 - int(before[a]), b + 1 - int(before[b])) for a, b in zip(starts, stops)]
        return [self._with_end(*span) for span in spans] or None

    def _with_end(self, start: int, stop: int) -> tuple[int, int, bool]:
        """What a template marks, with the token that ends the turn, which some leave out."""
        whole, ids = self._whole, self._template.ends[0]
        last = stop - _blanks(whole[start:stop][::-1])
        behind = stop + _blanks(whole[stop:])
        inside = last > start and isinstance(whole[last - 1], int)
        outside = behind < len(whole) and isinstance(whole[behind], int)
        if inside and (whole[last - 1] in ids or not (outside and whole[behind] in ids)):
            return start, last, True
        return (start, self._closed(behind), True) if outside else (start, stop, False)

    def _closed(self, at: int) -> int:
        """Where a turn is over whose end begins with the special token at `at`."""
        closing = _closing(self._template)
        return at + max(1, len(closing) if self._whole[at : at + len(closing)] == closing else 1)

    def _found(self, number: int) -> tuple[int, int, bool]:
        """Where a reply starts and stops, and whether a special token is its turn's end there."""
        whole, start = self._whole, None
        if number:
            opening = self._items(self._messages[:number], opened=True)
            start = len(opening) if whole[: len(opening)] == opening else None
        try:
            other = self._without(number)
        except ConfigError:  # where results of tools must follow a call, for one
            if start is None:
                raise
            return self._until(number, start)
        check(
            other.count(self._marks[0]) == 1,
            f"messages[{number}]: the chat template does not write it once: choose one that writes "
            "every reply, or that has {% generation %} around it",
        )
        start = _common(whole, other) if start is None else start
        # What the template writes behind a reply of words, and how much of that is here, too.
        tail = other[other.index(self._marks[0]) + 1 :]
        most = min(len(tail), len(whole) - start)
        same = min(_common(whole[::-1], other[::-1]), most)
        end = _blanks(tail)
        if end == len(tail) or isinstance(tail[end], str):
            found = start, len(whole) - same, False
        elif end >= len(tail) - same:
            found = start, self._closed(len(whole) - len(tail) + end), True
        else:  # behind a call another token ends the turn than behind words
            last = len(whole) - same
            found = start, last - _blanks(whole[start:last][::-1]), True
        calls = self._messages[number].get("tool_calls") and number + 1 < len(self._messages)
        if calls and _common(whole, self._without(number + 1)) < found[1]:
            return self._until(number, start)  # results stand within the turn
        return found

    def _at_once(self, replies: Sequence[int]) -> dict[int, tuple[int, int, bool]]:
        """As `_found` of every reply, by one rendering for all; {} where that does not do.

        It does for words that the template writes as they are, or trimmed.
        """
        said, lead = [self._messages[i] for i in replies], _lead(self._template)
        plain = all(
            isinstance(m.get("content"), str)
            and m["content"].strip()
            and not m.keys() - {"role", "content", "weight"}
            for m in said
        )
        if lead is None or not plain or not replies or not replies[0] or self._variables:
            return {}
        texts = [well_formed(m["content"]) for m in said]
        marks = private_characters([self._messages, self._context, self._variables], len(said))
        changed = list(self._messages)
        for number, mark in zip(replies, marks):
            changed[number] = {"role": "assistant", "content": mark}
        other = self._items(changed)
        places = [i for i, item in enumerate(other) if item in marks]
        if [other[i] for i in places] != marks:
            return {}
        for words in (texts, [text.strip() for text in texts]):
            whole, spans, at = [], [], 0
            for place, text in zip(places, words):
                whole += other[at:place]
                spans.append((len(whole), len(whole) + len(text)))
                whole += text
                at = place + 1
            if whole + other[at:] == self._whole:
                break
        else:
            return {}
        opening = self._items(self._messages[: replies[0]], opened=True)
        if self._whole[: spans[0][0] - lead] != opening:
            return {}
        found = {}
        for number, (start, stop) in zip(replies, spans):
            end = stop + _blanks(self._whole[stop:])
            ended = end < len(self._whole) and isinstance(self._whole[end], int)
            found[number] = (start - lead, self._closed(end) if ended else stop, ended)
        return found

    def _until(self, number: int, start: int) -> tuple[int, int, bool]:
        """`_found`, by the conversation up to the reply, which must be the whole's beginning."""
        until, whole = self._items(self._messages[: number + 1]), self._whole
        stop = _common(whole, until)
        rest = [x for x in until[stop:] if not _blank(x)]
        check(
            stop > start and all(isinstance(x, int) for x in rest),
            f"messages[{number}]: it cannot be found out of the chat template what of its turn is "
            "the assistant's: choose one that has {% generation %} around it",
        )
        stop -= _blanks(whole[:stop][::-1])
        if rest and isinstance(whole[stop], int):  # what comes next ends it, not what would
            return start, stop + 1, True
        return start, stop, isinstance(whole[stop - 1], int)


@functools.lru_cache(8)
def _lead(template: ChatTemplate) -> int | None:
    """How much stands between the opening of a reply and its words; None where that depends."""
    texts = private_characters(dict(template.texts), 4)
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    leads = set()
    for count in (2, 4):
        for number in range(1, count, 2):
            try:
                writer = _Writer(template, messages[:count], (None, None), {})
                opening = writer._items(messages[:number], opened=True)
            except ConfigError:
                return None
            whole = writer._whole
            if whole.count(texts[number]) != 1 or whole[: len(opening)] != opening:
                return None
            leads.add(whole.index(texts[number]) - len(opening))
    return leads.pop() if len(leads) == 1 and min(leads) >= 0 else None


@functools.lru_cache(8)
def _closing(template: ChatTemplate) -> Items:
    """What stands behind a reply at the end of a conversation, from the first special token on."""
    (said,) = private_characters(dict(template.texts), 1)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": said}]
    try:
        parts = template.parts(messages, add_generation_prompt=False)
    except ConfigError:
        return []
    items = [x for part in parts for x in (part if isinstance(part, str) else [part])]
    if items.count(said) != 1:
        return []
    tail = items[items.index(said) + 1 :]
    tail = tail[_blanks(tail) : len(tail) - _blanks(tail[::-1])]
    return tail if tail and all(isinstance(x, int) or _blank(x) for x in tail) else []


def _common(one: Items, other: Items) -> int:
    """How many items both begin with."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def _blank(item: str | int) -> bool:
    return isinstance(item, str) and item.isspace()


def _blanks(items: Items) -> int:
    """How many blanks they begin with."""
    return next((i for i, item in enumerate(items) if not _blank(item)), len(items))


def _encoded(tokenizer: Tokenizer, items: Items, learn: np.ndarray) -> tuple[list[int], list[bool]]:
    """The tokens, and which of them have any of the items to be learnt in them."""
    parts: list[str | int] = []
    wanted: list[np.ndarray] = []  # of each part's items
    at = 0
    for special, group in itertools.groupby(items, lambda item: isinstance(item, int)):
        group = list(group)
        parts += group if special else ["".join(group)]
        wanted += np.split(learn[at : at + len(group)], len(group) if special else 1)
        at += len(group)
    ids = tokenizer.encode_parts(parts)
    flags: list[bool] = []
    for number, (part, learnt) in enumerate(zip(parts, wanted)):
        if isinstance(part, int):
            flags.append(bool(learnt[0]))
            continue
        behind = parts[number + 1] if number + 1 < len(parts) else None
        stop = ids.index(behind, len(flags)) if behind is not None else len(ids)
        flags += _of_tokens(tokenizer, part, ids[len(flags) : stop], learnt)
    return ids, flags


def _of_tokens(tokenizer: Tokenizer, text: str, ids: list[int], learn: np.ndarray) -> list[bool]:
    """Which tokens of a text have any of the characters to be learnt in them."""
    if learn.all() or not learn.any():
        return [bool(learn.any())] * len(ids)
    lengths = _lengths(tokenizer)
    ends = np.cumsum(lengths[ids])
    begins = ends - lengths[ids]
    size = len(text.encode())
    spaced = tokenizer.drops_first_space and len(ids) > 0 and ends[-1] == size + 1

    def place(at: int) -> int:
        """Where a character's bytes begin among those of the tokens."""
        if tokenizer.lossless:
            return len(text[:at].encode()) + spaced * (at > 0)
        return int(lengths[tokenizer.encode(text[:at])].sum())

    found = np.zeros(len(ids), bool)
    edges = np.flatnonzero(np.diff(learn, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        stop = place(last) if last < len(text) else np.inf
        found |= (ends > place(first)) & (begins < stop)
    return found.tolist()


@functools.lru_cache(4)
def _lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of every token; one of those that lose what they stand for."""
    return np.maximum(tokenizer.byte_lengths(), 1)

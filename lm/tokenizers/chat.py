"""Chat templates: the messages of several speakers as the one text that a model was trained on.

A template is Jinja text, as Hugging Face directories hold it: in tokenizer_config.json,
chat_template.jinja or chat_template.json, one or several with names. It is rendered as transformers
does, in a sandbox that cannot change what it is given or reach out of it.

What the template writes may be special tokens; what messages say never is. Before rendering, a
character that occurs nowhere is put into every name of a special token in the messages, and between
what could become one when texts are joined; it is taken out again when names have become ids.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from lm.config import ConfigError, check, nearest
from lm.files import read_bytes
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.chat_built_in import BUILT_IN
from lm.tokenizers.settings import Settings, template_of_file

Message = Mapping[str, Any]  # "role" and "content", and what else the template knows
GENERATION = "generation_marks"  # a template's variable; see `lm.tokenizers.turns`


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer's way to write a conversation; `chat_template` finds it."""

    tokenizer: Tokenizer
    texts: Mapping[str, str]  # Jinja, by name: "default", and perhaps "tool_use"
    begin: Sequence[int] = ()  # what stands before every text (`Framing.before`)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text, with the names of special tokens in it.

        Args:
          messages: in order; fields that are None count as left out.
          tools: JSON schemas of functions that the model may call.
          documents: with "title" and "text", for templates that quote them.
          add_generation_prompt: whether the reply's opening stands at the end.
          **variables: what else the template asks for, such as `enable_thinking`.

        Raises:
          ConfigError: no message, or messages that the template refuses or cannot write.
        """
        check(len(messages) > 0, "messages=[] must have one at least")
        for i, message in enumerate(messages):
            told = isinstance(message, Mapping) and isinstance(message.get("role"), str)
            check(told, f"messages[{i}] must be an object with a 'role'")
        given = [{k: v for k, v in m.items() if v is not None} for m in messages]
        name = "tool_use" if tools and "tool_use" in self.texts else "default"
        template = self._compiled(name)
        try:
            return template.render(
                {
                    **self._names,
                    **variables,
                    "messages": given,
                    "tools": list(tools) if tools is not None else None,
                    "documents": list(documents) if documents is not None else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise ConfigError(f"messages: the chat template refuses them: {error}") from None
        except Exception as error:  # whatever an expression of the template meets
            raise ConfigError(
                f"messages: the chat template cannot write them: {type(error).__name__}: {error}"
            ) from None

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The ids of `render`'s text, complete: nothing is to be put around them.

        A special token is only what the template itself wrote.
        """
        return self.tokenizer.encode_parts(
            self.parts(messages, tools, documents, add_generation_prompt, **variables)
        )

    def parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[str | int]:
        """`render`'s text as ids of special tokens and the plain text between them."""
        (mark,) = private_characters([list(messages), tools, documents, variables], 1)
        text = self.render(
            [self._marked(message, mark) for message in messages],
            self._marked(tools, mark),
            self._marked(documents, mark),
            add_generation_prompt,
            **self._marked(variables, mark),
        )
        parts: list[str | int] = []
        at = 0
        for found in self._special.finditer(text) if self._special else ():
            parts += [text[at : found.start()], self.tokenizer.special_ids[found.group()]]
            at = found.end()
        parts = [p.replace(mark, "") if isinstance(p, str) else p for p in (*parts, text[at:])]
        return [part for part in parts if part != ""]

    @functools.cached_property
    def ends(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What ends a reply, as ids and as texts: what the template writes behind one.

        A text, where it is no special token, ends with its line.
        """
        for turns in (2, 3):  # behind the last reply, else between it and the next turn
            said = ["1 2 3", "4 5 6", "7 8 9"][:turns]
            roles = ["user", "assistant", "user"]
            try:
                parts = self.parts(
                    [{"role": r, "content": c} for r, c in zip(roles, said)],
                    add_generation_prompt=False,
                )
            except ConfigError:
                continue
            texts = [i for i, part in enumerate(parts) if isinstance(part, str) and said[1] in part]
            if not texts:
                continue
            after = parts[texts[-1]].partition(said[1])[2]
            if not after.strip() and texts[-1] + 1 < len(parts):
                return (parts[texts[-1] + 1],), ()
            line = re.match(r"\s*\S[^\n]*", after.partition(said[-1])[0] if turns == 3 else after)
            if line:
                return (), (line.group().rstrip(),)
        return (), ()

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """`bos_token` and so on, for the template; begin-of-text as texts here begin."""
        named = self.tokenizer.special_names
        tokens = {}
        for role in ("eos", "pad", "unk", "mask"):
            id = getattr(self.tokenizer, f"{role}_id")
            if id in named:
                tokens[f"{role}_token"] = named[id]
        kept = Settings(self.tokenizer.extra_files()).tokens
        tokens |= {name: token for name, token in kept.items() if token}
        if self.tokenizer.specials.bos is None:  # where end-of-text serves, or nothing does
            tokens["bos_token"] = "".join(named.get(id, "") for id in self.begin)
        else:
            tokens.setdefault("bos_token", named.get(self.tokenizer.bos_id, ""))
        return tokens

    def _compiled(self, name: str) -> jinja2.Template:
        try:
            return _compile(self.texts[name])
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is not Jinja: line {error.lineno}: {error.message}"
            ) from None

    @functools.cached_property
    def _special(self) -> re.Pattern | None:
        """Finds the names of special tokens, the longer before those that begin alike."""
        names = sorted((n for n in self.tokenizer.special_ids if len(n) > 1), key=len)
        return re.compile("|".join(map(re.escape, reversed(names)))) if names else None

    @functools.cached_property
    def _edges(self) -> tuple[set[str], set[str], int]:
        """How special tokens may begin and end, short of the whole, and how long that is."""
        names = [name for name in self.tokenizer.special_ids if len(name) > 1]
        begins = {name[:n] for name in names for n in range(1, len(name))}
        ends = {name[n:] for name in names for n in range(1, len(name))}
        return begins, ends, max(map(len, begins), default=0)

    def _marked(self, value: Any, mark: str) -> Any:
        """`value` with `mark` in every text that spells a special token, or could help to."""
        if isinstance(value, str) and self._special:
            return self._marked_text(value, mark)
        if isinstance(value, Mapping):
            return {
                self._marked_name(key, mark): self._marked_name(item, mark)
                if key in ("role", "type")  # which templates compare
                else self._marked(item, mark)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._marked(item, mark) for item in value]
        return value

    def _marked_name(self, value: Any, mark: str) -> Any:
        plain = isinstance(value, str) and value.isidentifier()
        return value if plain else self._marked(value, mark)

    def _marked_text(self, text: str, mark: str) -> str:
        begins, ends, longest = self._edges
        text = re.sub(f"(?s)(?=(?:{self._special.pattern}))(.)", rf"\1{mark}", text)
        # A template may trim what it joins to other texts.
        for end in {len(text), len(text.rstrip())}:
            if any(text[max(end - n, 0) : end] in begins for n in range(1, longest + 1)):
                text = text[:end] + mark + text[end:]
        for start in {0, len(text) - len(text.lstrip())}:
            if any(text[start : start + n] in ends for n in range(1, longest + 1)):
                text = text[:start] + mark + text[start:]
        return text


def chat_template(
    tokenizer: Tokenizer,
    chosen: str = "",
    begin: Sequence[int] = (),
    field: str = "config.chat_template",
) -> ChatTemplate:
    """The chat template to use with a tokenizer.

    Args:
      tokenizer: whose own is taken, if it has one and nothing is chosen.
      chosen: a name, of its own templates or of `BUILT_IN`; or the path of a file with Jinja text.
      begin: see `ChatTemplate`.
      field: what errors call `chosen`.

    Raises:
      ConfigError: there is none, or it is not Jinja.
    """
    own = Settings(tokenizer.extra_files()).templates
    check(
        bool(chosen or own),
        f"{field}='' must name a chat template, as the model has none: {field.split('.')[-1]}="
        f"chatml, another of {', '.join(map(repr, BUILT_IN))}, or a file with Jinja text",
    )
    if not chosen:
        check("default" in own, f"{field}='' must be one of the model's: {', '.join(own)}")
        texts = own
    elif chosen in own or chosen in BUILT_IN:
        texts = {"default": own.get(chosen) or BUILT_IN[chosen].text}
    else:
        texts = {"default": read_template(chosen, field)}
    template = ChatTemplate(tokenizer, texts, tuple(begin))
    for name in texts:
        try:
            template._compiled(name)
        except ConfigError as error:
            raise ConfigError(f"{field}={chosen!r}: {error}" if chosen else str(error)) from None
    return template


def read_template(chosen: str, field: str) -> str:
    """The Jinja text that `chosen` names: of `BUILT_IN`, or in a file.

    Raises:
      ConfigError: neither of them.
    """
    if chosen in BUILT_IN:
        return BUILT_IN[chosen].text
    path = Path(chosen).expanduser()
    check(
        path.is_file(),
        f"{field}={chosen!r} is neither a file nor one of {', '.join(map(repr, BUILT_IN))}"
        f"{nearest(chosen, BUILT_IN)}",
    )
    return template_of_file(read_bytes(path), chosen)


def private_characters(data: Any, count: int) -> list[str]:
    """Private characters of Unicode that occur nowhere in `data`, which JSON can write.

    Raises:
      ConfigError: there are not so many.
    """
    text = json.dumps(data, ensure_ascii=False, default=str)
    unused = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in text)
    found = list(itertools.islice(unused, count))
    check(len(found) == count, "messages have every private character of Unicode")
    return found


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, around what the model is to learn.

    The variable `GENERATION` has two texts that are written around it, if it is given.
    """

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body", [jinja2.nodes.Name(GENERATION, "load")])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, around: Any, caller: Any) -> str:
        return f"{around[0]}{caller()}{around[1]}" if around else caller()


@functools.lru_cache(32)
def _compile(text: str) -> jinja2.Template:
    """A template as transformers renders it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)

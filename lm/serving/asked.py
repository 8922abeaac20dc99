"""From a request's body to what the engine is to do, every field checked before any work."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from lm.config import ConfigError, view
from lm.inference.grammar import Grammar, Grammars
from lm.inference.prompts import Framing, check_ids
from lm.inference.requests import Request
from lm.inference.sampling import SamplingConfig
from lm.models import ModelConfig
from lm.serving.config import ServeConfig
from lm.serving.errors import ApiError, of_config
from lm.serving.reply import Choice
from lm.serving.schema import ChatBody, CompletionBody, Message, Sampled, Tool
from lm.serving.tools import CallReader, call_schema
from lm.tokenizers import Tokenizer

# What the API calls a field of `SamplingConfig`.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_ids": "stop_token_ids",
    "allowed_ids": "allowed_token_ids",
}
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "logit_bias",
)


@dataclasses.dataclass(frozen=True)
class Served:
    """The model that a server serves, as far as requests are checked against it.

    Attributes:
      chat: writes a conversation, its tools and whether a reply follows, as ids; None: it cannot.
      chat_ends: ids and texts that end a reply.
      grammars: compiles what a reply must keep to; None: the server cannot see to that.
    """

    name: str
    model: ModelConfig
    tokenizer: Tokenizer
    framing: Framing
    limits: ServeConfig
    chat: Callable[..., list[int]] | None = None
    chat_ends: tuple[Sequence[int], Sequence[str]] = ((), ())
    grammars: Grammars | None = None

    @property
    def encodes(self) -> bool:
        """Whether a prompt goes to an encoder and is no part of the text that is made."""
        return self.model.architecture == "encoder_decoder"


@dataclasses.dataclass
class Asked:
    """A request to generate, checked.

    Attributes:
      requests, choices: for the engine, and what becomes of each.
      prompts: the ids of each prompt.
      reader: splits the text of a choice into text and calls; None: all is text.
    """

    body: Sampled
    requests: list[Request]
    choices: list[Choice]
    prompts: list[list[int]]
    reader: Callable[[], CallReader] | None = None


def completion(served: Served, body: CompletionBody) -> Asked:
    """What `POST /v1/completions` asks for.

    Raises:
      ApiError: a field that cannot be followed.
    """
    _refuse(body.suffix, "suffix", "there is nothing that fills a gap")
    _refuse(None if body.best_of in (None, body.n or 1) else body.best_of, "best_of", "set n")
    _few("prompt", len(body.prompt), served.limits.max_rows)
    with_logprobs = body.logprobs is not None
    prompts = [readable(served, text, "prompt") for text in body.prompt]
    if body.echo and served.encodes:
        raise ApiError("echo=True: the text that an encoder-decoder makes has no prompt", "echo")
    fields = {"logprobs": body.logprobs}
    if body.echo and with_logprobs:
        fields["prompt_logprobs"] = body.logprobs
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError("max_tokens=0 must be at least 1, but with echo", "max_tokens")
    return _asked(served, body, prompts, fields, max_tokens, grammar=_wanted(served, body))


def chat(served: Served, body: ChatBody) -> Asked:
    """What `POST /v1/chat/completions` asks for.

    Raises:
      ApiError: a field that cannot be followed.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs=true", "top_logprobs")
    if body.max_tokens == 0:
        raise ApiError("max_tokens=0 must be at least 1", "max_tokens")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = body.tool_choice or ("auto" if tools else "none")
    if choice != "none" and not tools:
        raise ApiError(f"tool_choice={choice!r} needs tools", "tool_choice")
    tools = tools if choice != "none" else []
    ids = conversation(served, body.messages, body.tools if tools else None, True, body)
    ids = readable(served, ids, "messages")
    reader, grammar = None, _wanted(served, body)
    if tools:
        mode = choice if isinstance(choice, str) else "named"
        name = choice["name"] if isinstance(choice, dict) else ""
        if mode != "auto":
            if grammar is not None:
                raise ApiError("response_format cannot go with a call", "response_format")
            schema = call_schema(tools, name or None)
            grammar = _grammar(served, "json", schema, "tools")

        def reader() -> CallReader:
            return CallReader(mode, name, body.parallel_tool_calls is not False)

    max_tokens = body.max_completion_tokens or body.max_tokens or served.model.max_length
    fields = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    end_ids, end_texts = served.chat_ends
    asked = _asked(served, body, [ids], fields, max_tokens, grammar, end_ids, end_texts)
    asked.reader = reader
    return asked


def conversation(
    served: Served,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    reply: bool,
    body: ChatBody | None = None,
) -> list[int]:
    """The ids of a conversation.

    Raises:
      ApiError: the model has no chat template, or that refuses the messages.
    """
    if served.chat is None:
        raise ApiError(
            "messages: the model has no chat template; the server's config.chat_template "
            "names one, and /v1/completions needs none",
            "messages",
        )
    written = []
    for message in messages:
        plain = message.model_dump(exclude_none=True)
        plain["role"] = "system" if message.role == "developer" else message.role
        for call in plain.get("tool_calls", ()):
            call["function"]["arguments"] = _object(call["function"]["arguments"])
        written.append(plain)
    functions = [tool.model_dump(exclude_none=True) for tool in tools or ()] or None
    variables = (body.chat_template_kwargs if body else None) or {}
    for name in variables:
        if not name.isidentifier() or name in ("messages", "tools", "add_generation_prompt"):
            field = "chat_template_kwargs"
            raise ApiError(f"{field}: {name!r} is not the name of a variable", field)
    try:
        return served.chat(written, functions, add_generation_prompt=reply, **variables)
    except ConfigError as error:
        raise ApiError(str(error), "messages") from None


def text_ids(served: Served, text: str, param: str, framed: bool = True) -> list[int]:
    """The ids of a text, what stands around it included.

    Raises:
      ApiError: there is nothing for the model to read.
    """
    try:
        return (
            served.framing.encode(served.tokenizer, text)
            if framed
            else served.tokenizer.encode(text)
        )
    except ConfigError as error:
        raise ApiError(str(error).replace("prompt=", f"{param}=", 1), param) from None


def readable(served: Served, value: str | list[int], param: str) -> list[int]:
    """The ids of a text, or ids as they are, that the model can read.

    Raises:
      ApiError: too long, or not of its vocabulary.
    """
    ids = text_ids(served, value, param) if isinstance(value, str) else value
    known = min(served.tokenizer.vocab_size, served.model.vocab_size)
    if ids and max(ids) >= known:
        raise ApiError(f"{param}: {max(ids)} is not a token: ids are 0 … {known - 1}", param)
    try:
        check_ids(param, ids, served.model)
    except ConfigError as error:
        raise ApiError(str(error), param, code="context_length_exceeded") from None
    return ids


def _asked(
    served: Served,
    body: Sampled,
    prompts: list[list[int]],
    fields: dict[str, Any],
    max_tokens: int,
    grammar: Grammar | None = None,
    end_ids: Sequence[int] = (),
    end_texts: Sequence[str] = (),
) -> Asked:
    """The requests and choices of `prompts`, n of each."""
    limits, n = served.limits, body.n or 1
    _few("n", n * len(prompts), limits.max_rows, " (prompts times n)")
    _few("stop", len(body.stop), limits.max_stop)
    for text in body.stop:
        longest = limits.max_stop_length
        if len(text) > longest:
            raise ApiError(f"stop has a text of {len(text)} characters: {longest} at most", "stop")
    echo, discard = bool(getattr(body, "echo", None)), max_tokens == 0
    values = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    values |= {name: value for name, value in fields.items() if value is not None}
    values |= {
        "stop_ids": tuple(dict.fromkeys([*(body.stop_token_ids or ()), *end_ids])),
        "min_new_tokens": body.min_tokens or 0,
        "stop_at_end_of_text": not body.ignore_eos,
        "truncate_prompt": False,
    }
    if body.allowed_token_ids is not None:
        values["allowed_ids"] = tuple(body.allowed_token_ids)
    if grammar is not None:  # these end what it allows, in a conversation or not
        values["stop_ids"] = tuple({*values["stop_ids"], *served.chat_ends[0]})
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    if body.min_tokens and body.min_tokens > max(max_tokens, 1):
        raise ApiError(f"min_tokens={body.min_tokens} is more than max_tokens", "min_tokens")
    requests, choices = [], []
    known = min(served.tokenizer.vocab_size, served.model.vocab_size)
    try:
        for number, prompt in enumerate(prompts):
            read = len(served.framing.decoder_start or ()) if served.encodes else len(prompt)
            room = served.model.max_length - read + 1
            values["max_new_tokens"] = max(min(max_tokens, room), 1)
            values["min_new_tokens"] = min(values["min_new_tokens"], values["max_new_tokens"])
            sampling = view(SamplingConfig, values, "sampling")
            sampling.check_ids(known)
            for sample in range(n):
                index = len(requests)
                where = {"prompt": number, "sample": sample}
                requests.append(Request(tuple(prompt), sampling, seed, grammar=grammar, **where))
                before = () if served.encodes else prompt
                stops = [*body.stop, *end_texts]
                echoed = prompt if echo else ()
                choices.append(
                    Choice(served.tokenizer, index, before, stops, echoed, discard, grammar)
                )
    except ConfigError as error:
        raise of_config(error, _NAMES) from None
    return Asked(body, requests, choices, prompts)


def _wanted(served: Served, body: Sampled) -> Grammar | None:
    """What constrains the reply; None where nothing does."""
    form, outputs = body.response_format, body.structured_outputs
    found: list[tuple[str, Any, str]] = []
    if form is not None and form.type == "json_object":
        found.append(("json", {"type": "object"}, "response_format"))
    if form is not None and form.type == "json_schema":
        schema = form.json_schema.schema_ if form.json_schema else None
        param = "response_format.json_schema.schema"
        if schema is None:
            raise ApiError(f"{param} is missing: the type 'json_schema' needs it", param)
        found.append(("json", schema, param))
    if outputs is not None:
        given = {
            "json": outputs.json_,
            "regex": outputs.regex,
            "choice": None if outputs.choice is None else {"enum": outputs.choice},
            "lark": outputs.grammar,
        }
        for kind, value in given.items():
            if value is not None:
                found.append((kind, value, "structured_outputs"))
    if len(found) > 1:
        param = found[-1][2]
        raise ApiError(f"{param}: a reply can follow one format, not several", param)
    return _grammar(served, *found[0]) if found else None


def _grammar(served: Served, kind: str, value: Any, param: str) -> Grammar:
    if served.grammars is None:
        raise ApiError(f"{param}: the server cannot constrain what this model writes", param)
    if kind == "choice":
        kind, value = "lark", "start: " + " | ".join(json.dumps(v) for v in value["enum"])
    text = value if isinstance(value, str) else json.dumps(value)
    limit = served.limits.max_grammar
    if len(text.encode(errors="replace")) > limit:
        raise ApiError(f"{param} has more than {limit:,} bytes", param)
    try:
        return served.grammars.compile(kind, text)
    except ConfigError as error:
        raise ApiError(f"{param}: {error}", param) from None


def _object(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _few(param: str, count: int, limit: int, what: str = "") -> None:
    if count > limit:
        raise ApiError(f"{param} asks for {count:,} texts{what}: {limit:,} at most", param)


def _refuse(value: Any, param: str, why: str) -> None:
    if value not in (None, ""):
        raise ApiError(f"{param}={str(value)[:99]!r} cannot be followed: {why}", param)

"""The bodies of requests: OpenAI's fields, those of vLLM that go beyond, and nothing unknown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

Token = Annotated[int, Field(ge=0, lt=2**31)]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}


def _texts(value: Any) -> list[str | list[int]]:
    """Texts or lists of token ids, of what may be one of them alone."""
    several = value if isinstance(value, list) and not _are_ids(value) else [value]
    if several and all(isinstance(v, str) or _are_ids(v) for v in several):
        return several
    raise ValueError("must be a text, token ids, or a list of texts or of token ids, not empty")


def _are_ids(value: Any) -> bool:
    def is_id(v: Any) -> bool:
        return type(v) is int and 0 <= v < 2**31

    return isinstance(value, list) and bool(value) and all(map(is_id, value))


def _strings(value: Any) -> list[str]:
    several = [] if value is None else value if isinstance(value, list) else [value]
    if all(isinstance(v, str) and v for v in several):
        return several
    raise ValueError("must be a text or a list of texts, none of them empty")


def _content(value: Any) -> str | None:
    """The text of a message: as it is, or of its parts, all of which must be text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be text, or a list of parts")
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            raise ValueError("may only have parts like {'type': 'text', 'text': …}")
        if not isinstance(part.get("text"), str):
            raise ValueError("has a part without text")
    return "".join(part["text"] for part in value)


def _tool_choice(value: Any) -> str | dict[str, str] | None:
    if value in (None, "none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if named and value.get("type") == "function":
        return {"name": function["name"]}
    raise ValueError("must be 'none', 'auto', 'required', or name a function of tools")


Texts = Annotated[Any, PlainValidator(_texts), WithJsonSchema(_TEXTS)]
Strings = Annotated[
    Any, PlainValidator(_strings), WithJsonSchema({"anyOf": [*_TEXTS["anyOf"][:2]]})
]
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Content = Annotated[
    Any,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]
_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
    "required": ["type", "function"],
}
ToolChoice = Annotated[
    Any,
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED]}),
]


class Body(BaseModel):
    """What all bodies have in common: types are meant, unknown fields are mistakes."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class JsonSchema(Body):
    """`response_format.json_schema`."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What a reply must be, by OpenAI's name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What a reply must be, by vLLM's name; one of them."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None  # Lark's notation


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of OpenAI; nothing is


class Named(Body):
    """A request that says which model it is for."""

    model: str | None = None
    user: str | None = None  # this and the next are taken and change nothing


class Sampled(Named):
    """How to draw; neutral where left out. Names beyond OpenAI's are vLLM's."""

    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1024)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: list[Token] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Strings = ()
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None


class CompletionBody(Sampled):
    """`POST /v1/completions`."""

    prompt: Texts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None


class Function(Body):
    """`tools[].function`."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """`tools[]`."""

    type: Literal["function"]
    function: Function


class Called(BaseModel):
    """The function of a call that an earlier reply made."""

    name: str
    arguments: str = "{}"


class Call(BaseModel):
    """A call that an earlier reply made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(BaseModel):
    """`messages[]`; what else clients send back of a reply is not read."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class ChatBody(Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Taken, and change nothing that is computed.
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class EmbeddingBody(Named):
    """`POST /v1/embeddings`."""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class TokenizeBody(Named):
    """`POST /tokenize`: a text, or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True  # what stands around a text (`lm.inference.Framing`)
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(Named):
    """`POST /detokenize`."""

    tokens: list[Token]


def openapi(routes: dict[str, tuple[type[Body] | None, str]], secured: bool) -> dict[str, Any]:
    """The server's OpenAPI document.

    Args:
      routes: path → the body that it is posted, None where it is only read, and what it does.
      secured: whether a key is asked for.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    wrong = {"description": "What is wrong with the request, naming the field."}
    for path, (body, about) in routes.items():
        operation: dict[str, Any] = {
            "summary": about,
            "responses": {"200": {"description": "As asked."}, "4XX": wrong},
        }
        if body is not None:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {}) | {body.__name__: schema}
            content = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": content},
            }
        paths[path] = {"get" if body is None else "post": operation}
    components: dict[str, Any] = {"schemas": schemas}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "lm", "version": "1"},
        "paths": paths,
        "components": components,
    }
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document

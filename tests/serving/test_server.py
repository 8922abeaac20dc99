"""The server as OpenAI's own client sees it, around an engine that draws what it is told to."""

import base64
import json
import threading
import time
import types

import httpx
import numpy as np
import openai
import pytest
from fake_engine import TOKENIZER, FakeEngine, embed, serving, until

from lm.serving.config import ServeConfig

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with serving() as (address, engine):
        yield address, engine


@pytest.fixture
def engine(server):
    engine = server[1]
    yield engine
    engine.says.clear()
    engine.pause = 0.0
    until(lambda: not engine.held)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], timeout=30) as client:
        yield client


# ---- What OpenAI's client asks for ---------------------------------------------------------------


def test_the_model_is_listed(client):
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len, card.chat) == ("tiny", 512, True)
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_completion_is_the_same_whole_and_streamed_and_says_what_it_took(client, engine):
    asked = dict(model="tiny", prompt="Once", max_tokens=30, seed=3)
    whole = client.completions.create(**asked)
    (choice,) = whole.choices
    assert len(choice.text) == 30 and choice.finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 30)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == choice.text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {chunks[0].id}
    assert client.completions.create(**{**asked, "seed": 4}).choices[0].text != choice.text


def test_n_samples_of_several_prompts_stand_side_by_side(client, engine):
    engine.says = {"A": "one", "B": "two"}
    reply = client.completions.create(model="tiny", prompt=["A", "B"], n=2, max_tokens=9)
    assert [c.text for c in reply.choices] == ["one", "one", "two", "two"]
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == 4  # each prompt once
    free = client.completions.create(model="tiny", prompt="C", n=3, max_tokens=9).choices
    assert len({c.text for c in free}) == 3
    ids = client.completions.create(model="tiny", prompt=[[256, 65]], max_tokens=9)
    assert ids.choices[0].text == "one"


def test_echo_and_logprobs_name_every_token_and_where_it_stands(client, engine):
    engine.says = {"é": "ü!"}
    asked = dict(model="tiny", prompt="aé", echo=True, logprobs=3, max_tokens=9)
    for extra in ({}, {"stream": True}):
        reply = client.completions.create(**asked, **extra)
        choices = [c.choices[0] for c in (reply if extra else [reply])]
        text = "".join(c.text for c in choices)
        assert text == "aéü!"
        lists = [c.logprobs for c in choices if c.logprobs]
        offsets = [offset for one in lists for offset in one.text_offset]
        tokens = [token for one in lists for token in one.tokens]
        told = [value for one in lists for value in one.token_logprobs]
        tops = [top for one in lists for top in one.top_logprobs]
        assert tokens[:2] == ["<|endoftext|>", "a"] and tokens[-1] == "<|endoftext|>"
        assert tokens[2] == r"bytes:\xc3" and len(tokens) == 8
        assert told[0] is None and set(told[1:]) == {-0.5}
        assert all(text[at:].startswith(t) for at, t in zip(offsets, tokens) if len(t) == 1)
        assert tops[0] is None and tops[1]["A"] == -1.0
        assert tops[1]["B"] == -9999.0  # JSON has no infinity
    scored = client.completions.create(**{**asked, "max_tokens": 0})
    assert scored.choices[0].text == "aé" and scored.usage.completion_tokens == 0


def test_a_stop_string_ends_the_text_frees_the_slot_and_never_shows(client, engine):
    engine.says = {"A": "one two three " * 30}
    engine.pause = 0.005
    for stream in (False, True):
        reply = client.completions.create(
            model="tiny", prompt="A", max_tokens=400, stop=["o th", "x"], logprobs=0, stream=stream
        )
        chunks = [c.choices[0] for c in (reply if stream else [reply])]
        assert "".join(c.text for c in chunks) == "one tw"
        assert [t for c in chunks for t in c.logprobs.tokens] == list("one tw")
        assert chunks[-1].finish_reason == "stop"
        until(lambda: not engine.held, seconds=1)


def test_a_chat_streams_and_names_its_tokens(client, engine):
    engine.says = {"hi\nassistant: ": "Hé!"}
    asked = dict(model="tiny", messages=ASK, logprobs=True, top_logprobs=1)
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content == "Hé!" and whole.finish_reason == "stop"
    assert whole.message.role == "assistant" and whole.message.tool_calls is None
    told = whole.logprobs.content
    assert b"".join(bytes(t.bytes) for t in told).decode() == "Hé!"
    assert told[0].token == "H" and told[0].top_logprobs[0].logprob == -0.5
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hé!"
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == told
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    asked["messages"] = [{"role": "user", "content": parts}]
    assert client.chat.completions.create(**asked).choices[0].message.content == "Hé!"


CALL = '{"name": "weather", "arguments": {"city": "Saint-\\"É}{", "n": [1, {}]}}'


@pytest.mark.parametrize(
    "choice, written, said",
    [
        ("auto", f"I look. <tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "I"),
        ("required", CALL, None),
        ({"type": "function", "function": {"name": "weather"}}, CALL[32:-1], None),
    ],
)
def test_calls_of_tools_come_whole_and_in_pieces(choice, written, said):
    wanted = json.loads(CALL)["arguments"]
    anything = types.SimpleNamespace(start=lambda: None)
    grammars = types.SimpleNamespace(compile=lambda kind, text: anything)
    with serving(grammars=grammars) as (address, engine):
        engine.says = {"assistant: ": written}
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
        asked = dict(model="tiny", messages=ASK, tools=TOOLS, tool_choice=choice)
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls"
        calls = whole.message.tool_calls
        assert [c.function.name for c in calls] == ["weather"] * (2 if said else 1)
        assert all(json.loads(c.function.arguments) == wanted for c in calls)
        assert (whole.message.content or "").startswith(said or "")
        with client.chat.completions.stream(**asked) as stream:
            pieces = [e for e in stream if e.type == "tool_calls.function.arguments.delta"]
            last = stream.get_final_completion().choices[0]
        assert len(pieces) > 10 and last.finish_reason == "tool_calls"
        assert [c.function.arguments for c in last.message.tool_calls] == [
            c.function.arguments for c in calls
        ]


def test_what_is_no_call_after_all_is_text(client, engine):
    for text in (
        "a <tool_call> b",
        "<tool_cal",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name"',
    ):
        engine.says = {"assistant: ": text}
        asked = dict(model="tiny", messages=ASK, tools=TOOLS)
        whole = client.chat.completions.create(**asked).choices[0]
        assert (whole.message.content, whole.finish_reason) == (text, "stop")


def test_embeddings_have_length_one_as_numbers_and_packed(client):
    texts = ["some text", "another"]
    for form in ("float", "base64"):
        reply = client.embeddings.create(model="tiny", input=texts, encoding_format=form)
        vectors = [e.embedding for e in reply.data]
        if form == "base64":
            vectors = [np.frombuffer(base64.b64decode(v), "<f4") for v in vectors]
        raw = embed([[256, *text.encode()] for text in texts])
        wanted = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        np.testing.assert_allclose(np.array(vectors), wanted, rtol=1e-6)
    assert reply.usage.prompt_tokens == 18


def test_text_and_tokens_are_told(http):
    told = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert told["tokens"] == [256, *"hé".encode()] and told["count"] == 4
    assert told["token_strs"][:2] == ["<|endoftext|>", "h"] and told["max_model_len"] == 512
    bare = http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "hé"}
    chat = http.post("/tokenize", json={"messages": ASK}).json()
    assert TOKENIZER.decode(chat["tokens"]) == "user: hi\nassistant: "


# ---- What cannot be ------------------------------------------------------------------------------


def test_errors_are_those_that_the_client_knows(client, http):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="a")
    assert error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert error.value.param == "temperature" and "at least" in str(error.value).replace(
        "greater than or equal to", "at least"
    )
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert http.get("/v1/completions").status_code == 405


LONG = "x" * 600
BAD = {
    "prompt": [None, 3, [], [[]], ["a", 1], [-1], [999], [257], [1.5], {}, LONG, [["a"]]],
    "temperature": [-1, 1e9, "1", [], True],
    "top_p": [-0.1, 1.1, {}],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [2],
    "repetition_penalty": [0, -1],
    "presence_penalty": [3],
    "frequency_penalty": [-3],
    "logit_bias": [{"x": 1}, {"999": 1}, {"1": 101}, {"-1": 1}, [1], {"1": "a"}],
    "seed": [2**64, "a"],
    "n": [0, -1, 10**6, 1.5],
    "max_tokens": [-1, 0, "a"],
    "min_tokens": [-1, 17],
    "stop": ["", [""], ["s"] * 10_000, "s" * 10_000, 5],
    "stop_token_ids": [[-1], [999], "a"],
    "logprobs": [-1, 21, True],
    "echo": ["yes"],
    "stream": [1],
    "stream_options": [{"other": 1}, 3],
    "response_format": [{}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object"}],
    "structured_outputs": [{"regex": 3}, {"regex": "a", "grammar": "b"}],
    "best_of": [3],
    "suffix": ["s"],
    "temprature": [1],
}
CASES = [(field, value) for field, values in BAD.items() for value in values]


@pytest.mark.parametrize("field, value", CASES, ids=lambda x: str(x)[:20])
def test_an_error_names_the_field(http, field, value):
    reply = http.post("/v1/completions", json={"prompt": "a", field: value})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"].split(".")[0].split("[")[0] == field
    assert error["type"] == "invalid_request_error"
    assert field in error["message"] and len(error["message"]) < 1100


BAD_CHAT = {
    "messages": [
        [],
        None,
        "hi",
        [{}],
        [{"role": "pirate", "content": "a"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": LONG}],
    ],
    "top_logprobs": [3, 21],
    "max_tokens": [0],
    "max_completion_tokens": [0],
    "tools": [[{}], [{"type": "function", "function": {"name": "a b"}}]],
    "tool_choice": ["auto", "other", {"type": "function"}],
    "chat_template_kwargs": [{"messages": 1}, {"a b": 1}],
}
CHAT_CASES = [(field, value) for field, values in BAD_CHAT.items() for value in values]


@pytest.mark.parametrize("field, value", CHAT_CASES, ids=lambda x: str(x)[:20])
def test_an_error_of_a_chat_names_the_field(http, field, value):
    reply = http.post("/v1/chat/completions", json={"messages": ASK, field: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].split("[")[0] in (field, "messages")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'"a"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "logit_bias": {"1": Infinity}}',
    ],
    ids=lambda body: str(body[:24]),
)
def test_bodies_that_are_no_request(http, body):
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        reply = http.post(path, content=body, headers=headers)
        assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_other_bodies_and_larger_ones_are_refused(http):
    form = http.post("/v1/completions", content=b'{"prompt": "a"}')
    assert form.status_code == 415  # what a browser sends from any page without asking
    large = http.post("/v1/completions", json={"prompt": "a" * 5 * 2**20})
    assert large.status_code == 413 and large.json()["error"]["message"]


def test_embeddings_and_tokens_refuse_what_the_model_cannot_read(http):
    for value in (LONG, [999], [], [[]], 3, None, ["a"] * 1000):
        reply = http.post("/v1/embeddings", json={"input": value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input")
    reply = http.post("/v1/embeddings", json={"input": "a", "dimensions": 3})
    assert reply.json()["error"]["param"] == "dimensions"
    assert http.post("/detokenize", json={"tokens": [999]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400


# ---- Many, slow, gone ----------------------------------------------------------------------------


def test_who_has_no_key_is_told_so():
    with serving(keys=("secret", "other")) as (address, _):
        for key, right in (("secret", True), ("other", True), ("wrong", False), ("sécret", False)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            posted = httpx.post(
                address + "/v1/completions", json={"prompt": "a"}, headers=headers, timeout=30
            )
            assert posted.status_code == (200 if right else 401)
        assert httpx.post(address + "/tokenize", json={"prompt": "a"}).status_code == 401
        assert httpx.get(address + "/v1/models").status_code == 401
        assert httpx.get(address + "/health").status_code == 200


def test_a_full_queue_is_told_with_when_to_come_back():
    engine = FakeEngine(max_slots=1, max_queue=1)
    engine.pause = 0.05
    with serving(engine) as (address, _):
        asked = {"prompt": "a", "max_tokens": 100, "n": 2, "stream": True}
        with httpx.stream("POST", address + "/v1/completions", json=asked, timeout=30) as first:
            assert first.status_code == 200
            late = httpx.post(address + "/v1/completions", json={"prompt": "b"}, timeout=30)
            assert late.status_code == 429 and int(late.headers["Retry-After"]) >= 1
            assert late.json()["error"]["code"] == "queue_full"
        until(lambda: not engine.held)
        # More at once than there is room for: none is begun.
        many = httpx.post(address + "/v1/completions", json={**asked, "n": 3}, timeout=30)
        assert many.status_code == 429
        until(lambda: not engine.held)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots_within_a_step(server, engine, stream):
    engine.pause = 0.02
    asked = {"prompt": "a", "max_tokens": 400, "n": 3, "stream": stream}
    with httpx.Client(base_url=server[0], timeout=30) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=asked) as reply:
                next(reply.iter_lines())
                assert len(engine.held) == 3
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=asked, timeout=0.5)
    until(lambda: not engine.held, seconds=5)
    text = httpx.get(server[0] + "/metrics").text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"}' in text


def test_a_request_that_takes_too_long_is_ended():
    engine = FakeEngine()
    engine.pause = 0.02
    with serving(engine, ServeConfig(timeout=0.3, body_timeout=0.3)) as (address, _):
        asked = {"prompt": "a", "max_tokens": 400}
        late = httpx.post(address + "/v1/completions", json=asked, timeout=30)
        assert late.status_code == 408 and late.json()["error"]["code"] == "timeout"
        streamed = httpx.post(address + "/v1/completions", json={**asked, "stream": True})
        *_, error, done, empty = streamed.text.split("\n\n")
        assert done == "data: [DONE]" and empty == ""
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: not engine.held, seconds=5)

        def slowly():
            yield b'{"prompt": '
            time.sleep(1)
            yield b'"a"}'

        headers = {"Content-Type": "application/json"}
        slow = httpx.post(
            address + "/v1/completions", content=slowly(), headers=headers, timeout=30
        )
        assert slow.status_code == 408


def test_an_engine_that_fails_is_told_to_all_and_to_who_looks_after_it():
    engine = FakeEngine()
    engine.pause = 0.02
    with serving(engine) as (address, _):
        asked = {"prompt": "a", "max_tokens": 400}
        replies = []
        post = httpx.post
        one = threading.Thread(
            target=lambda: replies.append(post(address + "/v1/completions", json=asked, timeout=30))
        )
        one.start()
        until(lambda: engine.held)
        engine.failing = True
        one.join(20)
        assert replies[0].status_code == 503
        assert "out of order" in replies[0].json()["error"]["message"]
        assert post(address + "/v1/completions", json=asked).status_code == 503
        assert httpx.get(address + "/health").status_code == 503


def test_what_was_accepted_is_finished_before_the_server_ends():
    engine = FakeEngine(max_slots=2)
    engine.pause = 0.01
    replies = []
    with serving(engine) as (address, _):
        asked = {"prompt": "a", "max_tokens": 50}

        def ask(stream):
            body = {**asked, "stream": stream}
            replies.append(httpx.post(address + "/v1/completions", json=body, timeout=30))

        threads = [threading.Thread(target=ask, args=(n % 2 == 0,)) for n in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.held) == 6)
    for thread in threads:
        thread.join(20)
    assert [reply.status_code for reply in replies] == [200] * 6
    for reply in replies:
        if reply.text.startswith("data"):
            assert reply.text.endswith("data: [DONE]\n\n")
        else:
            assert reply.json()["usage"]["completion_tokens"] == 50


def test_metrics_have_the_names_of_vllm(http, engine):
    http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5})
    text = http.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket",
        "request_success_total",
    ):
        assert f"\nvllm:{name}{{" in text


@pytest.mark.slow
def test_no_body_that_fits_the_openapi_document_or_nearly_does_is_a_fault(server, tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-m", "schemathesis.cli", "run", server[0] + "/openapi.json"]
    command += ["--checks=not_a_server_error", "--mode=all", "--seed=0", "--max-examples=40"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

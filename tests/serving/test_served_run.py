"""A run directory, served: through the engine, and through main.py until SIGTERM."""

import concurrent.futures
import json
import random
import re
import signal
import threading

import httpx
import openai
import pytest
from fake_engine import running, until
from tiny_jobs import start
from tiny_run import write_tiny_run

import lm
from lm.config import view
from lm.jobs.serve import ServeJob, make_app

SMALL = {
    "max_slots": 3,
    "page_size": 16,
    "num_pages": 70,  # little more than one text of the whole context needs
    "prefill_chunk": 32,
    "decode_chunk": 4,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "tiny"
    directory.mkdir()
    write_tiny_run(directory, max_length=1024)
    return directory


@pytest.fixture(scope="module")
def address(directory):
    fields = {"init_from": str(directory), "warm_up": False, "chat_template": "chatml"}
    job = view(ServeJob, {**fields, "engine": SMALL})
    with running(make_app(job, lm.load(directory))) as address:
        yield address


def ask(address, number):
    """A text of random settings: its tokens, their log-probabilities, and why it ended."""
    draw = random.Random(number)
    body = {
        "prompt": "The cat sat on the mat and saw"[: draw.randrange(1, 30)],
        "max_tokens": draw.randrange(1, 40),
        "temperature": draw.choice([0, 1]),
        "top_p": draw.choice([0.8, 1]),
        "repetition_penalty": draw.choice([1, 1.2]),
        "seed": number,
        "logprobs": draw.choice([0, 3]),
        "return_token_ids": True,
        "echo": draw.random() < 0.3,
    }
    reply = httpx.post(address + "/v1/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def test_tokens_in_company_are_those_alone_and_nothing_is_held(address):
    alone = [ask(address, number) for number in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda number: ask(address, number), range(12)))
    assert together == alone
    metrics = httpx.get(address + "/metrics").text
    for name in ("running", "waiting"):
        assert f'vllm:num_requests_{name}{{model_name="tiny"}} 0.0' in metrics


def test_the_text_is_what_the_run_generates(address, directory):
    run = lm.load(directory)
    reply = openai.OpenAI(base_url=address + "/v1", api_key="none").completions.create(
        model="tiny", prompt="The cat", max_tokens=20, temperature=0, echo=True
    )
    wanted = run.generate("The cat", max_new_tokens=20, temperature=0.0)
    assert reply.choices[0].text == wanted


def test_a_conversation_and_vectors(address, directory):
    client = openai.OpenAI(base_url=address + "/v1", api_key="none")
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8, seed=1
    )
    assert chat.choices[0].message.role == "assistant" and chat.usage.completion_tokens <= 8
    (vector,) = client.embeddings.create(model="tiny", input="The cat").data
    raw = lm.load(directory).embed("The cat")
    cosine = raw @ vector.embedding / (raw @ raw) ** 0.5
    assert cosine == pytest.approx(1, abs=1e-5)


def test_replies_keep_to_what_is_asked(address):
    client = openai.OpenAI(base_url=address + "/v1", api_key="none")
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "many": {"type": "boolean"}},
        "required": ["kind", "many"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    asked = dict(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=400)
    (choice,) = client.chat.completions.create(**asked, response_format=form, seed=1).choices
    pet = json.loads(choice.message.content)
    assert choice.finish_reason == "stop" and pet["kind"] in ("cat", "dog")
    assert set(pet) == {"kind", "many"} and isinstance(pet["many"], bool)
    tools = [{"type": "function", "function": {"name": "buy", "parameters": schema}}]
    for choose in ("required", {"type": "function", "function": {"name": "buy"}}):
        (choice,) = client.chat.completions.create(
            **asked, tools=tools, tool_choice=choose, seed=2
        ).choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name == "buy" and set(json.loads(call.function.arguments)) == set(pet)
    outputs = {"structured_outputs": {"regex": "(ab|cd){3}"}}
    made = client.completions.create(model="tiny", prompt="a", max_tokens=50, extra_body=outputs)
    assert re.fullmatch("(ab|cd){3}", made.choices[0].text) and made.choices[0].finish_reason
    cut = client.completions.create(model="tiny", prompt="a", max_tokens=3, extra_body=outputs)
    assert cut.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": "(a"},
        {"grammar": "start: b"},
        {"json": {"type": "nothing"}},
        {"json": {"$ref": "#/missing"}},
        {"json": {"enum": []}},
        {"choice": []},
        {"regex": "a" * 70_000},
    ],
    ids=lambda outputs: str(outputs)[:30],
)
def test_what_cannot_be_kept_to_is_refused(address, outputs):
    body = {"prompt": "a", "structured_outputs": outputs}
    reply = httpx.post(address + "/v1/completions", json=body, timeout=300)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("structured_outputs")


def test_a_client_that_leaves_frees_its_pages(address):
    body = {"prompt": "a", "max_tokens": 90, "ignore_eos": True, "n": 8, "stream": True}
    with httpx.stream("POST", address + "/v1/completions", json=body, timeout=300) as reply:
        next(reply.iter_lines())

    def free():
        text = httpx.get(address + "/metrics").text
        return 'vllm:num_requests_running{model_name="tiny"} 0.0' in text

    until(free)


@pytest.mark.slow
def test_main_serves_until_sigterm_and_answers_what_it_accepted(directory):
    process = start(
        ["python", "main.py", "--config=configs/serve.py", f"--config.init_from={directory}"]
        + ["--config.serve.port=0", "--config.warm_up=False"]
        + [f"--config.engine.{name}={value}" for name, value in {**SMALL, "cache": "int8"}.items()]
    )
    address, told = "", []
    for line in process.stderr:
        told.append(line)
        if "running on" in line:
            address = line.split("running on ")[1].split()[0]
            break
    assert address, "".join(told)
    body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
    texts = []

    def read():
        with httpx.stream("POST", address + "/v1/completions", json=body, timeout=300) as reply:
            begun.release()
            texts.append("".join(reply.iter_text()))

    begun = threading.Semaphore(0)
    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in threads:
        begun.acquire()
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(60) == 0
    for text in texts:
        *chunks, done, _ = text.split("\n\n")
        assert done == "data: [DONE]"
        last = json.loads(chunks[-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"

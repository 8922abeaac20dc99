"""Many prompts from a file of JSON lines, and their texts into another, which a kill only delays.

A line of the input is {"prompt": …} or {"messages": […]}, with an "id" (else its number, from 1),
and fields of `SamplingConfig` where it wants them otherwise. A line of the output is {"id": …,
"text": …, "tokens": …, "finish_reason": "stop" or "length"}, with "logprob" where `logprobs` asks:
that of the whole text, in nats, given the prompt. With several samples these are in a list,
"samples". Lines are written when they are done, in any order; a text follows from the seed and the
number of its line, in whatever company.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm.config import ConfigError, check, view
from lm.files import parse_object, read_bytes, take_off_torn_line
from lm.inference.engine import Engine, Request
from lm.inference.prompts import check_ids
from lm.inference.sampling import SamplingConfig
from lm.inference.stream import TextStream

WAITING = 64  # requests an engine is given beyond those it works on
SECONDS = 5  # between two words of progress


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input: what to continue, and how."""

    number: int
    id: str | int
    ids: tuple[int, ...]
    sampling: SamplingConfig


@dataclasses.dataclass
class _Sample:
    """One text of a line, as far as it has come."""

    line: Line
    stream: TextStream
    text: str = ""
    tokens: int = 0
    logprob: float = 0.0
    finish: str = ""


def read_lines(
    path: str,
    engine: Engine,
    sampling: SamplingConfig,
    encode: Callable[[dict[str, Any]], tuple[Sequence[int], Sequence[int], Sequence[str]]],
) -> list[Line]:
    """The lines of a file, all looked at before any is worked on.

    Args:
      path: of JSON lines; empty ones are left out.
      engine: that will do them.
      sampling: where a line says nothing else.
      encode: a line's object → its ids, and the ids and texts that end what follows.

    Raises:
      ConfigError: naming file and line: no JSON, unknown fields, values out of range, a prompt too
        long, an id that another line has.
    """
    data = read_bytes(pathlib.Path(path).expanduser())
    lines: list[Line] = []
    seen: dict[str | int, int] = {}
    for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = _line(parse_object(text, "it"), number, engine, sampling, encode)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        first = seen.setdefault(line.id, number)
        check(first == number, f"{where}: id={line.id!r} is line {first}'s already")
        lines.append(line)
    check(bool(lines), f"config.batch_file={path!r} has no lines")
    return lines


def _line(
    given: dict[str, Any],
    number: int,
    engine: Engine,
    sampling: SamplingConfig,
    encode: Callable[[dict[str, Any]], tuple[Sequence[int], Sequence[int], Sequence[str]]],
) -> Line:
    check(
        ("prompt" in given) != ("messages" in given),
        "it must have either 'prompt' or 'messages'",
    )
    name = given.get("id", number)
    plain = isinstance(name, str | int) and not isinstance(name, bool)
    check(plain, f"id={name!r} must be text or a whole number")
    read = {key: given[key] for key in ("prompt", "messages", "tools") if key in given}
    ids, ends, texts = encode(read)
    more = {key: value for key, value in given.items() if key not in read and key != "id"}
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    usual = {name: value for name, value in vars(sampling).items() if name in fields}
    own = view(SamplingConfig, {**usual, **more}, "sampling")
    if own.stop_at_end_of_text:
        ends, texts = (*own.stop_ids, *ends), (*own.stop, *texts)
        own = dataclasses.replace(own, stop_ids=tuple(ends), stop=tuple(texts))
    own.check_ids(engine.tokenizer.vocab_size)
    cut = own.truncate_prompt and not engine.encodes
    check_ids("prompt", ids[: engine.context] if cut else ids, engine.model.config)
    return Line(number, name, tuple(ids), own)


def done_lines(path: str, lines: Sequence[Line], source: str) -> set[str | int]:
    """The ids of the lines whose texts a file has already; its torn last line is taken off.

    Raises:
      ConfigError: another batch's file, or one that cannot be read.
    """
    file = pathlib.Path(path).expanduser()
    field = f"config.output_file={path!r}"
    if not file.exists():
        check(file.parent.is_dir(), f"{field}: there is no directory {str(file.parent)!r}")
        return set()
    data = read_bytes(file)
    whole = data.rfind(b"\n") + 1
    known, done = {line.id for line in lines}, set()
    for number, text in enumerate(data[:whole].splitlines(), 1):
        where = f"{field}, line {number}"
        try:
            name = parse_object(text, "it").get("id")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}: choose another file") from None
        plain = isinstance(name, str | int)
        check(
            plain and name in known,
            f"{where}: id={name!r} is of no line of {source}: choose another file, or remove it",
        )
        done.add(name)
    take_off_torn_line(file, data)
    return done


def texts(engine: Engine, lines: Sequence[Line], seed: int = 0) -> Iterator[dict[str, Any]]:
    """What to write for each line, as soon as it is done."""
    waiting = [(line, sample) for line in lines for sample in range(line.sampling.num_samples)]
    waiting.reverse()
    running: dict[int, _Sample] = {}
    samples: dict[int, list[_Sample]] = {}
    while waiting or running:
        while waiting and len(running) < engine.config.max_slots + WAITING:
            line, sample = waiting.pop()
            drawn = dataclasses.replace(line.sampling, stop=(), num_samples=1)
            request = Request(line.ids, drawn, seed, prompt=line.number, sample=sample)
            prompt = () if engine.encodes else line.ids
            one = _Sample(line, TextStream(engine.tokenizer, prompt, line.sampling.stop))
            running[engine.submit(request)] = one
            samples.setdefault(line.number, []).append(one)
        for event in engine.step():
            one = running.get(event.number)
            if one is None:  # cancelled, as a stop string was found
                continue
            for step in event.steps:
                one.text += one.stream.push(step.id)
                one.tokens += 1
                one.logprob += step.logprob
                if one.stream.stop is not None:
                    break
            if one.stream.stop is not None:
                one.finish = "stop"
                if event.finish is None:
                    engine.cancel(event.number)
            elif event.finish is not None:
                one.text += one.stream.flush()
                one.finish = "stop" if one.stream.stop is not None else event.finish
            if one.finish:
                del running[event.number]
                together = samples[one.line.number]
                if len(together) == one.line.sampling.num_samples and all(
                    other.finish for other in together
                ):
                    yield _written(samples.pop(one.line.number))


def _written(samples: Sequence[_Sample]) -> dict[str, Any]:
    line = samples[0].line
    found = []
    for one in samples:
        found.append({"text": one.text, "tokens": one.tokens, "finish_reason": one.finish})
        if line.sampling.logprobs is not None:
            found[-1]["logprob"] = round(one.logprob, 6)
    alone = line.sampling.num_samples == 1
    return {"id": line.id, **(found[0] if alone else {"samples": found})}


def write_texts(
    path: str, engine: Engine, lines: Sequence[Line], seed: int = 0, done: int = 0
) -> Iterator[str]:
    """Appends `texts` to a file; how far it is, every few seconds and at the end.

    Args:
      path: of the output.
      engine, lines, seed: as of `texts`.
      done: how many lines the output had before.

    Raises:
      ConfigError: the file cannot be written.
    """
    total, tokens = done + len(lines), 0
    began = told = time.monotonic()
    try:
        with pathlib.Path(path).expanduser().open("ab") as file:
            for line in texts(engine, lines, seed):
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                done += 1
                tokens += sum(sample["tokens"] for sample in line.get("samples", [line]))
                if (now := time.monotonic()) - told > SECONDS or done == total:
                    told, rate = now, tokens / max(now - began, 1e-9)
                    yield f"{done:,} of {total:,} lines · {tokens:,} tokens · {rate:,.0f} tokens/s"
    except OSError as error:
        raise ConfigError(
            f"config.output_file={path!r} cannot be written: {error.strerror}"
        ) from None

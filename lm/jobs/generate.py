"""Continues a prompt, or translates a source, with a trained model, printing as it goes."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

import lm
from lm.config import ConfigError, Path, Seed, check, view
from lm.inference import (
    Engine,
    EngineConfig,
    Generation,
    SamplingConfig,
    SearchConfig,
    batch,
    search,
)
from lm.inference.prepare import CacheKind, Weights
from lm.parallel.platform import keep_programs

_OF_BATCHES = ("job", "seed", "init_from", "ignore", "weights", "cache", "batch_file",
               "output_file", "chat_template", "source_language", "target_language")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerateJob(SearchConfig):
    """What to continue, with which model; how to draw and to search is inherited."""

    job: str = "generate"
    seed: Seed = 0  # of the random draws: the same seed, the same text
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    # Of a Hugging Face directory: regular expressions of fields of config.json and of tensors that
    # may be left out though they are not known.
    ignore: str | tuple[str, ...] = ()
    weights: Weights = "compute"  # int8: matrices in eight bits, a quarter of float32's memory
    cache: CacheKind = "compute"  # int8: keys and values in eight bits; not of a search
    # One at most that the texts keep to: a JSON schema, a regular expression, or a grammar for Lark
    # (`lm.inference.grammar`); the text of it, not a file's name.
    json_schema: str = ""
    regex: str = ""
    grammar: str = ""
    prompt: str = ""  # "-" reads it from standard input
    prompt_file: Path = ""  # read it from this file instead; "-" is standard input
    # Many prompts instead, a line of JSON each, and where their texts go; see `lm.inference.batch`.
    batch_file: Path = ""
    output_file: Path = ""  # what it has already is not done again
    chat_template: Path = ""  # of lines with messages; see configs/chat.py
    # Of a translator of many languages, by their codes: "en_XX" and "ro_RO" of mBART, the target
    # alone, "ron", of Marian; "": those that its files name.
    source_language: str = ""
    target_language: str = ""

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        super().validate(prefix)
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        check(
            not (self.prompt and self.prompt_file),
            f"{prefix}.prompt_file={self.prompt_file!r} must be empty when {prefix}.prompt is set",
        )
        check(
            bool(self.batch_file) == bool(self.output_file)
            and (self.batch_file != self.output_file or not self.batch_file),
            f"{prefix}.batch_file={self.batch_file!r} and {prefix}.output_file="
            f"{self.output_file!r} must both be set, to different files, or neither",
        )
        for name in ("prompt_logprobs", *(() if self.batch_file else ("logprobs",))):
            value = getattr(self, name)
            check(
                value is None,
                f"{prefix}.{name}={value} is not part of a text: leave it out. A batch's lines "
                "have logprobs, and what Run.generator.generate gives has both",
            )
        if self.batch_file:
            sampled = {field.name for field in dataclasses.fields(SamplingConfig)}
            for field in dataclasses.fields(GenerateJob):
                used = field.name in sampled or field.name in _OF_BATCHES
                value = getattr(self, field.name)
                check(
                    used or value == field.default,
                    f"{prefix}.{field.name}={value!r} is not for a batch: leave it out, or set "
                    f"{prefix}.batch_file='' and a prompt",
                )


def run(config: ml_collections.ConfigDict, workdir: str) -> list[str]:
    """Prints what a `GenerateJob` asks for; notices and timing go to standard error.

    Returns:
      The texts, one for each sample: the prompt and what follows, or an encoder-decoder's target.
      None of a batch. Nothing is written to `workdir`.

    Raises:
      ConfigError: no such run, a prompt that cannot be read or is too long and not to be cut, or
        a model that cannot generate.
    """
    job = view(GenerateJob, config)
    keep_programs()
    if job.batch_file:
        _batch(job)
        return []
    prompt = _read_prompt(job)
    loaded = _loaded(job)
    draft = lm.load(job.draft, ignore=job.ignore).generator if job.draft else None
    generator = loaded.writer(job.weights, job.cache)
    kept = generator.grammar(
        json=job.json_schema or None, regex=job.regex or None, lark=job.grammar or None
    )
    generation = search(generator, [loaded.encode(prompt)], job, job.seed, draft, kept)
    texts = _print(generation, generator.opening(prompt), job.num_samples)
    for notice in generation.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(f"{loaded.directory} at step {loaded.step:,}:\n{generation.timing}", file=sys.stderr)
    return texts


def _loaded(job: GenerateJob) -> lm.Run:
    loaded = lm.load(job.init_from, ignore=job.ignore)
    return loaded.between(job.source_language, job.target_language)


def _batch(job: GenerateJob) -> None:
    """Does the lines of `batch_file` that `output_file` lacks."""
    loaded = _loaded(job)
    sizes = EngineConfig(weights=job.weights, cache=job.cache, read_first=True)
    engine = Engine(loaded.skeleton, loaded.params, loaded.framing, loaded.tokenizer, sizes)
    template = functools.cache(lambda: loaded.chat_template(job.chat_template))

    def encode(given: dict[str, Any]) -> tuple[Sequence[int], Sequence[int], Sequence[str]]:
        if "prompt" in given:
            return loaded.encode(given["prompt"]), (), ()
        check(isinstance(given["messages"], list), "messages must be a list")
        return template().encode(given["messages"], given.get("tools")), *template().ends

    lines = batch.read_lines(job.batch_file, engine, job, encode)
    done = batch.done_lines(job.output_file, lines, job.batch_file)
    left = [line for line in lines if line.id not in done]
    for told in batch.write_texts(job.output_file, engine, left, job.seed, len(done)):
        print(told, file=sys.stderr)
    if not left:
        print(f"all {len(lines):,} lines were done before", file=sys.stderr)


def _read_prompt(job: GenerateJob) -> str:
    """The prompt; without the last line break of a file, which editors and shells add."""
    if job.prompt != "-" and not job.prompt_file:
        return job.prompt
    field = "prompt" if job.prompt else "prompt_file"
    file = getattr(job, field)
    try:
        if file == "-":
            data = sys.stdin.buffer.read()
        else:
            data = pathlib.Path(file).expanduser().read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise ConfigError(f"config.{field}={file!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config.{field}={file!r} is neither UTF-8 nor UTF-16 text") from None
    return text.removesuffix("\n").removesuffix("\r")


def _print(generation: Generation, opening: str, samples: int) -> list[str]:
    """Prints the samples one below the other, each after `opening`.

    They are drawn together: the first appears as it comes, and each other one when those before it
    have ended, with what it has by then.
    """
    texts = [opening] * samples
    shown = [0] * samples
    current = 0

    def show(row: int) -> None:
        print(texts[row][shown[row] :], end="", flush=True)
        shown[row] = len(texts[row])

    def advance(row: int) -> int:
        show(row)
        print(f"\n--- sample {row + 2}")
        return row + 1

    if samples > 1:
        print("--- sample 1")
    show(current)
    for row, text in generation.texts():
        texts[row] += text
        while generation.ended[current] and row > current:
            current = advance(current)
        if row == current:
            show(current)
    while current + 1 < samples:
        current = advance(current)
    show(current)
    print()
    return texts

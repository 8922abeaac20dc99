"""Talks with a model, turn by turn, in the terminal or from a pipe."""

from __future__ import annotations

import dataclasses
import sys

import ml_collections

import lm
from lm.config import ConfigError, Path, Seed, check, view
from lm.inference import SamplingConfig
from lm.inference.conversation import Conversation
from lm.parallel.platform import keep_programs

HELP = """\
/reset       forget the conversation
/undo        take back the last message and its reply
/retry       another reply to the last message
/save FILE   write the conversation as a line of JSON, as configs/generate.py's batch_file reads it
/quit        leave, as Ctrl-D does
Ctrl-C stops a reply. A line of three quotes begins and ends a message of several lines."""
QUOTES = '"' * 3


@dataclasses.dataclass(frozen=True)
class ChatJob(SamplingConfig):
    """With which model to talk, and how; how to draw is inherited."""

    job: str = "chat"
    seed: Seed = 0  # of the random draws: the same seed and messages, the same replies
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    # Of a Hugging Face directory: regular expressions of fields of config.json and of tensors that
    # may be left out though they are not known.
    ignore: str | tuple[str, ...] = ()
    # How the conversation is written: "chatml", "llama3", "gemma", "plain", one of several that the
    # model has, or a file of Jinja text; "": the model's own.
    chat_template: Path = ""
    system: str = ""  # what the model is told before all else

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        super().validate(prefix)
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        check(
            self.num_samples == 1,
            f"{prefix}.num_samples={self.num_samples} must be 1: a message has one reply",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None, f"{prefix}.{name}={value} is not part of a reply: leave it out")


def run(config: ml_collections.ConfigDict, workdir: str) -> list[dict[str, str]]:
    """Reads messages and prints replies until there are no more.

    Returns:
      The conversation. Nothing is written to `workdir`.

    Raises:
      ConfigError: no such run, no chat template, or a model that cannot chat.
    """
    job = view(ChatJob, config)
    keep_programs()
    loaded = lm.load(job.init_from, ignore=job.ignore)
    template = loaded.chat_template(job.chat_template)
    talk = Conversation(loaded.generator, template, job, job.system, job.seed)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # `input` then has a history, and can be edited

        print(f"{loaded.directory} at step {loaded.step:,}. /help lists commands.", file=sys.stderr)
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        try:
            message = _read(terminal)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nCtrl-D leaves.", file=sys.stderr)
            continue
        if message.strip() == "/quit":
            break
        try:
            _answer(talk, message)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
    return talk.messages


def _read(terminal: bool) -> str:
    """The next message; raises EOFError where there is none."""

    def line(prompt: str) -> str:
        if terminal:
            return input(prompt)
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.removesuffix("\n").removesuffix("\r")

    first = line("> ")
    if not first.strip().startswith(QUOTES):
        return first
    text = first.strip().removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        try:
            text += "\n" + line(". ")
        except EOFError:  # the quotes were not closed: that is the message
            return text
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def _answer(talk: Conversation, message: str) -> None:
    """Does what one line asks for."""
    command, _, rest = message.strip().partition(" ")
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        talk.reset()
    elif command == "/undo":
        talk.undo()
    elif command == "/save":
        talk.save(rest.strip())
        print(f"saved {len(talk.messages)} messages in {rest.strip()}", file=sys.stderr)
    elif command == "/retry":
        _print(talk, talk.undo())
    elif command.startswith("/") and command[1:].isalpha():
        raise ConfigError(f"{command} is no command: /help lists them")
    elif message.strip():
        _print(talk, message)


def _print(talk: Conversation, message: str) -> None:
    """Prints the reply as it comes, then what it took, and what there is to know."""
    try:
        for piece in talk.reply(message):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        talk.interrupt()
    print()
    for notice in talk.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(talk.timing, file=sys.stderr)

"""A conversation with a model: messages, replies that come piece by piece, and a full context."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

from lm.config import ConfigError, check, check_path
from lm.files import replacing
from lm.inference.generate import Generator, Timing
from lm.inference.sampling import SamplingConfig
from lm.tokenizers import ChatTemplate


class Conversation:
    """Messages in turn, of which the last ones that the context holds are what the model reads.

    Args:
      generator: a decoder's.
      template: how a conversation is written, and what ends a reply.
      sampling: how to draw; `max_new_tokens` of a reply where the context has so much room.
      system: what stands before all messages; "" for nothing.
      seed: of the random draws.

    Attributes:
      messages: all of them, as {"role": …, "content": …}.
      timing: of the last reply.
      notices: what the reader should know of it, one line each.

    Raises:
      ConfigError: another kind of model, or a template that cannot write what is asked for.
    """

    def __init__(
        self,
        generator: Generator,
        template: ChatTemplate,
        sampling: SamplingConfig,
        system: str = "",
        seed: int = 0,
    ):
        check(
            not generator.encodes,
            "config.init_from: an encoder-decoder makes one text of another and does not talk: "
            "see configs/generate.py",
        )
        ids, texts = template.ends
        self._generator, self._template, self._seed = generator, template, seed
        ids = (*sampling.stop_ids, *ids) if sampling.stop_at_end_of_text else sampling.stop_ids
        self._sampling = dataclasses.replace(
            sampling, stop=(*sampling.stop, *texts), stop_ids=tuple(ids)
        )
        self._system = [{"role": "system", "content": system}] if system else []
        self.timing, self.notices = Timing(), []
        self._replies = 0
        self.reset()
        try:
            template.render([*self._system, {"role": "user", "content": "a"}])
        except ConfigError as error:
            raise ConfigError(
                f"config.system={system!r}: {error}" if system else str(error)
            ) from None

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages = [*self._system]
        self._left_out = 0  # of the messages after the system's, the first so many

    def undo(self) -> str:
        """Takes back the last message of the user and what came after it; the message.

        Raises:
          ConfigError: there is none.
        """
        asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        check(bool(asked), "there is no message to take back")
        message = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return message

    def reply(self, message: str) -> Iterator[str]:
        """Adds a message and the reply to it, whose text comes piece by piece.

        Raises:
          ConfigError: a message that the context does not hold; it is not added.
        """
        self.notices, self.timing = [], Timing()
        self.messages.append({"role": "user", "content": message})
        try:
            ids = self._fitted()
        except ConfigError:
            self.messages.pop()
            raise
        room = self._generator.room(len(ids))
        sampling = dataclasses.replace(
            self._sampling, max_new_tokens=min(self._sampling.max_new_tokens, room)
        )
        seed = (self._seed + self._replies) % 2**32
        generation = self._generator.generate([ids], sampling, seed)
        self.timing, self._replies = generation.timing, self._replies + 1
        said = {"role": "assistant", "content": ""}
        self.messages.append(said)
        for _, piece in generation.texts():
            self.timing = generation.timing
            said["content"] += piece
            yield piece
        self.timing = generation.timing
        if not generation.ended[0]:
            self.notices.append(
                f"the reply stopped after {sampling.max_new_tokens} tokens: "
                + ("the context is full" if room == sampling.max_new_tokens else "max_new_tokens")
            )

    def interrupt(self) -> None:
        """Keeps of the last reply what there is, or takes the message back if that is nothing."""
        self.notices.append("stopped")
        if self.messages[-1]["role"] == "user" or not self.messages[-1]["content"]:
            self.undo()

    def save(self, path: str) -> None:
        """Writes the messages as a line of JSON.

        Raises:
          ConfigError: no path, or one that cannot be written.
        """
        check(bool(path), "/save needs the name of a file")
        check_path("/save", path)
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            with replacing(pathlib.Path(path).expanduser()) as file:
                file.write(line.encode("utf-8", "replace"))
        except OSError as error:
            raise ConfigError(f"/save {path}: {error.strerror}") from None

    def _fitted(self) -> list[int]:
        """The ids of the last turns that leave a reply room: a quarter of the context, or enough.

        Turns are left out from a user's message up to the next.
        """
        context = self._generator.context
        wanted = min(self._sampling.max_new_tokens, context // 4)
        turns = self.messages[len(self._system) :]
        users = [i for i, message in enumerate(turns) if message["role"] == "user"]
        starts = [i for i in users if i >= self._left_out] or users[-1:]
        for start in starts:
            ids = self._template.encode([*self._system, *turns[start:]])
            if self._generator.room(len(ids)) >= wanted:
                break
        check(
            self._generator.room(len(ids)) >= 1,
            f"the message makes {len(ids)} tokens, and the model's context holds {context}: "
            "shorten it",
        )
        if start > self._left_out:
            self._left_out = start
            count = sum(i < start for i in users)
            self.notices.append(
                f"the context of {context} tokens is full: the oldest {count} of {len(users)} "
                "messages and their replies are left out"
            )
        return ids

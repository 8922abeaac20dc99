"""The special tokens around a text: what a model reads before its first token and after its last.

A model has seen texts framed in one way, and a prompt must be framed alike.

| architecture    | reads                                | writes                               |
|-----------------|--------------------------------------|--------------------------------------|
| decoder         | begin-of-text, text                  | what follows, up to end-of-text      |
| encoder         | begin-of-text, text, end-of-text     |                                      |
| encoder_decoder | text, end-of-text                    | after begin-of-text, to end-of-text  |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.config import check, view
from lm.models import ModelConfig
from lm.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Framing:
    """The section `framing` of a run's config, for models that do not follow the table above."""

    before: tuple[int, ...] | None = None  # ids in front of every text that is read; None: as above
    after: tuple[int, ...] | None = None  # ids behind it
    decoder_start: tuple[int, ...] | None = None  # what an encoder-decoder's decoder continues
    end_of_text: tuple[int, ...] | None = None  # each ends what is written
    empty: tuple[int, ...] | None = None  # what stands for a text without a token

    @classmethod
    def of_run(
        cls, config: Mapping[str, Any], model: ModelConfig, tokenizer: Tokenizer, where: str
    ) -> Framing:
        """The framing of a run's texts, complete: as its config's section says, or as usual.

        Args:
          config: the whole config of the run.
          model, tokenizer: the run's.
          where: what errors call the section.
        """
        begins = config.get("data", {}).get("end_of_text", True)
        return view(cls, config.get("framing", {}), where).filled(model, tokenizer, begins)

    def filled(self, model: ModelConfig, tokenizer: Tokenizer, begins: bool = True) -> Framing:
        """With the table's choice for each field that is None.

        Args:
          model: says which row.
          tokenizer: has the ids.
          begins: whether documents were told apart in training; False: a decoder's or encoder's
            text is a part of one stream, with nothing around it.
        """
        bos, eos = (tokenizer.bos_id,), (tokenizer.eos_id,)
        both = model.architecture == "encoder_decoder"
        usual = Framing(
            before=() if both or not begins else bos,
            after=eos if both or (begins and model.architecture == "encoder") else (),
            decoder_start=bos if both else (),
            end_of_text=eos,
            empty=bos if begins else (),
        )
        given = {name: ids for name, ids in dataclasses.asdict(self).items() if ids is not None}
        return dataclasses.replace(usual, **given)

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The tokens the model reads for `text`.

        For nothing at all that is begin-of-text, or, where documents were not told apart in
        training, a line break.

        Raises:
          ConfigError: nothing to start from, or what is no text.
        """
        check(isinstance(text, str), f"prompt={text!r} must be text, not {type(text).__name__}")
        check(
            text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text),
            f"prompt={text!r} is no text: it has bytes that are not UTF-8, or halves of characters",
        )
        ids = [*(self.before or ()), *tokenizer.encode(text), *(self.after or ())]
        ids = ids or list(self.empty or ())
        if not ids:
            newline = tokenizer.encode("\n")
            ids = newline if newline != [tokenizer.unk_id] else []
        check(
            bool(ids),
            f"prompt={text!r} has no tokens, and the model was trained without separators "
            "between documents (config.data.end_of_text=False): give it a prompt to start from",
        )
        return ids

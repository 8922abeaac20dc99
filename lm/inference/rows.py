"""Texts under way as the rows of one dispatch: what the compiled functions are given of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lm.inference.programs import Level, Rows
from lm.inference.prompts import NOTHING
from lm.inference.sampling import SamplingConfig, warping
from lm.inference.scheduler import Text
from lm.inference.warpers import History, Kind, Warping

REMEMBERED = 8  # groups of texts that draw together, and their warpers' values
ALTERNATIVES = 20  # most that a request may ask for beside each token
# What programs can do, from little to all: few, so that few are compiled.
LEVELS = (
    Level(Kind("plain"), 0),
    Level(Kind("filtered"), 0),
    Level(Kind("filtered", history=True, masked=True), ALTERNATIVES),
)


class Batch:
    """Makes `Rows` of texts, and keeps what does not change while the same texts draw.

    Args:
      vocab_size: ids from here up are never drawn.
      end_of_text: ids that end a text.
      nobody: the slot of rows that are no text.
      length: the most tokens a window may have had before a dispatch, and will have after it.
    """

    def __init__(self, vocab_size: int, end_of_text: Sequence[int], nobody: int, length: int):
        self._vocab_size, self._end_of_text = vocab_size, end_of_text
        self._nobody, self._length = nobody, length
        self._known: dict[tuple, tuple[Level, Warping]] = {}

    def rows(
        self,
        texts: Sequence[Text],
        size: int,
        width: int,
        limit: Callable[[Text], int],
        least: Level = LEVELS[0],
    ) -> tuple[Level, Rows]:
        """The texts as rows, filled up to `size`, and at what level, `least` or above.

        Args:
          width: pages of a row.
          limit: how many tokens a text may draw now.
        """
        key = (size, least, *(text.number for text in texts))
        if key not in self._known:
            while len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = self._warped(texts, size, least)
        level, warping = self._known[key]
        filled = [*texts, *[None] * (size - len(texts))]

        def ints(of: Callable[[Text], int], nobody: int = 0) -> np.ndarray:
            return np.array([nobody if text is None else of(text) for text in filled], np.int32)

        seeds = [0 if text is None else text.request.seed % 2**32 for text in filled]
        table_BN = np.zeros((size, width), np.int32)
        for row, text in enumerate(texts):
            table_BN[row, : len(text.pages)] = text.pages
        rows = Rows(
            token_B=ints(lambda text: text.ids[-1]),
            position_B=ints(lambda text: text.cached, NOTHING),
            limit_B=ints(limit),
            count_B=ints(lambda text: text.drawn),
            seed_B=np.array(seeds, np.uint32),
            prompt_B=ints(lambda text: text.request.prompt),
            sample_B=ints(lambda text: text.request.sample),
            table_BN=table_BN,
            slot_B=ints(lambda text: text.slot, self._nobody),
            warping=_allowing(texts, warping),
            history=self._history(filled) if level.kind.history else None,
        )
        return level, rows

    def _warped(self, texts: Sequence[Text], size: int, least: Level) -> tuple[Level, Warping]:
        """The least of `LEVELS` that serves the texts, and their warpers' values."""
        settings = [text.request.sampling for text in texts]
        kinds = [text.request.sampling.kind(text.grammar is not None) for text in texts]
        named = any(config.logprobs for config in settings)

        def serves(level: Level) -> bool:
            covering = Kind.covering([level.kind, *kinds]) == level.kind
            return covering and (level.alternatives > 0 or not named)

        level = next(level for level in LEVELS[LEVELS.index(least) :] if serves(level))
        settings += [SamplingConfig(temperature=0)] * (size - len(texts))
        return level, warping(settings, self._vocab_size, self._end_of_text, level.kind)[0]

    def _history(self, texts: Sequence[Text | None]) -> History:
        """What each window holds, and where what was drawn begins in it."""
        tokens_BL = np.full((len(texts), self._length), NOTHING, np.int32)
        output_B, end_B = np.zeros((2, len(texts)), np.int32)
        for row, text in enumerate(texts):
            if text is not None:
                tokens_BL[row, : len(text.ids)] = text.ids
                end_B[row] = len(text.ids)
                output_B[row] = len(text.ids) - text.window_drawn
        return History(tokens_BL, output_B, end_B)


def _allowing(texts: Sequence[Text], warping: Warping) -> Warping:
    """The warpers, with what the texts' grammars allow next."""
    if all(text.grammar is None for text in texts):
        return warping
    allowed_BW = warping.allowed_BW.copy()
    for row, text in enumerate(texts):
        if text.grammar is not None:
            mask_W = np.asarray(text.grammar.mask(), np.uint32)
            allowed_BW[row] &= mask_W[: allowed_BW.shape[1]]
    return warping._replace(allowed_BW=allowed_BW)

"""Translators' tokenizers: SentencePiece models whose pieces have ids of their own.

Marian's texts are cut by the model of their language, source.spm or target.spm, and the pieces
looked up in vocab.json, which both share. mBART's ids are those of its model shifted by one, with a
token for each language after them (fairseq's dictionary, Liu et al. 2020).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import sentencepiece

from lm.config import ConfigError, check
from lm.files import parse_object
from lm.tokenizers.base import (
    Specials,
    Tokenizer,
    byte_piece,
    check_named,
    first_line,
    first_loss,
)
from lm.tokenizers.config import TokenizerConfig
from lm.tokenizers.sentence_piece import SPACE
from lm.tokenizers.settings import USUAL_NAMES, Settings

SOURCE, TARGET, VOCABULARY = "source.spm", "target.spm", "vocab.json"  # Marian's
SHIFTED = "sentencepiece.bpe.model"  # mBART's
_LANGUAGE = re.compile(r">>([^<]*)<<")  # of the target, in front of Marian's source
_THREADS = 2
_CC25 = """
    ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV
    my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN
"""
_MORE = """
    af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX
    sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI
"""
_LANGUAGES = {"MBart": _CC25, "MBart50": _CC25 + _MORE}  # in the order of their ids


class PieceTokenizer(Tokenizer):
    """Pieces of SentencePiece models, looked up in one vocabulary.

    Attributes:
      target: the same for texts of the target's language; of one model, this one.
    """

    drops_first_space = True

    def __init__(
        self,
        files: Mapping[str, bytes],
        specials: Specials,
        lossy_because: str | None = None,
        side: str = "source",
    ):
        self._files, self._side = dict(files), side
        self.is_marian = SOURCE in files
        model = files[SHIFTED if not self.is_marian else SOURCE if side == "source" else TARGET]
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._ids = _vocabulary(self.processor, files)
        for name in specials.ids:
            self._ids.pop(name, None)
        ids = [*self._ids.values(), *specials.ids.values()]
        super().__init__("pieces", max(ids) + 1, specials)
        self.lossy_because = first_loss(self) if lossy_because is None else lossy_because

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        marked = [_LANGUAGE.match(text) if self.is_marian else None for text in texts]
        bare = [text[mark.end() :] if mark else text for text, mark in zip(texts, marked)]
        pieces = self.processor.encode(bare, out_type=str, num_threads=_THREADS)
        found = [[mark[0], *cut] if mark else cut for mark, cut in zip(marked, pieces)]
        return [np.array([self._ids.get(p, self.unk_id) for p in cut], np.int32) for cut in found]

    def _table(self) -> list[bytes]:
        table, processor = [b""] * self.vocab_size, self.processor
        for piece, id in self._ids.items():
            is_byte = processor.is_byte(processor.piece_to_id(piece))
            table[id] = byte_piece(piece) if is_byte else piece.replace(SPACE, " ").encode()
        return table

    @functools.cached_property
    def target(self) -> Tokenizer:
        """See `Tokenizer.target`."""
        if not self.is_marian or self._side == "target":
            return self
        return PieceTokenizer(self._files, self.specials, None, "target").with_extra(self._extra)

    @property
    def languages(self) -> dict[str, int]:
        """See `Tokenizer.languages`."""
        if not self.is_marian:
            return super().languages
        marks = {_LANGUAGE.fullmatch(piece): id for piece, id in self._ids.items()}
        return {mark[1]: id for mark, id in marks.items() if mark}

    @property
    def marks_target(self) -> bool:
        """See `Tokenizer.marks_target`."""
        return self.is_marian

    def model_files(self) -> dict[str, bytes]:
        """Those that it came with."""
        return dict(self._files)

    def options(self) -> dict[str, Any]:
        """Which of two models cuts texts, where it is not the source's."""
        return {} if self._side == "source" else {"side": self._side}

    def is_piece(self, name: str) -> bool:
        """Whether a text may be given the token of that name."""
        return name in self._ids

    @classmethod
    def _opened(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        own = {name: files[name] for name in info["model_files"]}
        return cls(own, specials, info["lossy_because"], info["options"].get("side", "source"))

    @classmethod
    def from_files_beside(
        cls, files: Mapping[str, bytes], settings: Settings, config: TokenizerConfig
    ) -> Tokenizer:
        """A tokenizer of Marian's files, or of mBART's model, and the settings beside them.

        Raises:
          ConfigError: a file is damaged, a token that must be there is not, or the model is of
            none of their classes.
        """
        try:
            models = [
                sentencepiece.SentencePieceProcessor(model_proto=data)
                for name, data in files.items()
                if name != VOCABULARY
            ]
        except Exception as error:
            raise ConfigError(f"not a SentencePiece model: {first_line(error)}") from None
        check(
            not settings.own.get("separate_vocabs"),
            "tokenizer_config.json: separate_vocabs=True is not supported: source and target must "
            "share a vocabulary",
        )
        ids = _vocabulary(models[0], files)
        found = {name: ids[name] for names in USUAL_NAMES.values() for name in names if name in ids}
        if SHIFTED in files:
            kind, size = settings.kind, models[0].get_piece_size() + 1
            check(
                kind in _LANGUAGES,
                f"{SHIFTED} of a tokenizer_class={kind!r} is not supported, only of "
                + " or ".join(map(repr, _LANGUAGES)),
            )
            found |= {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
            found |= {
                name: size + i for i, name in enumerate([*_LANGUAGES[kind].split(), "<mask>"])
            }
        found |= settings.added_tokens()
        check_named(found, config)
        roles = settings.roles
        named = {
            role: next((n for n in (roles.get(role), *usual) if n in found), None)
            for role, usual in USUAL_NAMES.items()
        }
        named |= {"eos": config.eos_token or named["eos"], "bos": config.bos_token or named["bos"]}
        for role in ("eos", "unk"):
            check(named[role] is not None, f"the vocabulary has no {role}_token")
        role_ids = {role: found[name] for role, name in named.items() if name is not None}
        if SHIFTED not in files and not config.bos_token:
            role_ids["bos"] = role_ids.get("pad")  # Marian's decoder starts with padding
        return cls(files, Specials(found, **role_ids)).with_extra(settings.kept)


def _vocabulary(
    processor: sentencepiece.SentencePieceProcessor, files: Mapping[str, bytes]
) -> dict[str, int]:
    """Piece → id."""
    if VOCABULARY in files:
        return {
            str(name): int(id) for name, id in parse_object(files[VOCABULARY], VOCABULARY).items()
        }
    return {processor.id_to_piece(id): id + 1 for id in range(3, processor.get_piece_size())}

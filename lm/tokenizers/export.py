"""Our tokenizers as the files that Hugging Face's libraries read, with the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from lm.config import check
from lm.tokenizers.base import PROBES, Tokenizer, huggingface_config
from lm.tokenizers.huggingface import HuggingFaceTokenizer, byte_values
from lm.tokenizers.pieces import PieceTokenizer
from lm.tokenizers.plain import ByteTokenizer, CharTokenizer
from lm.tokenizers.sentence_piece import SPACE, SentencePieceTokenizer
from lm.tokenizers.settings import Settings, template_files


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`, for `transformers.AutoTokenizer`.

    A text's ids are those of `tokenizer.encode`, but for what the original adds of its own: one
    that came from Hugging Face is given back as it came, templates included. Outside this package a
    "▁" in a text is a space to a SentencePiece vocabulary.

    Raises:
      ConfigError: a kind that cannot be written so, or not with the same ids.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer | PieceTokenizer):
        return {**tokenizer.extra_files(), **tokenizer.model_files()}
    builders = {ByteTokenizer: _byte, CharTokenizer: _char, SentencePieceTokenizer: _sentencepiece}
    check(
        type(tokenizer) in builders,
        f"a tokenizer of kind {tokenizer.kind!r} cannot be written as a tokenizer.json",
    )
    engine = builders[type(tokenizer)](tokenizer)
    names = sorted(tokenizer.special_ids, key=tokenizer.special_ids.get)
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    for name in names:
        check(
            engine.token_to_id(name) == tokenizer.special_ids[name],
            f"a tokenizer of kind {tokenizer.kind!r} whose special {name!r} has id "
            f"{tokenizer.special_ids[name]} cannot be written as a tokenizer.json",
        )
    for probe in PROBES:
        probe = probe.replace(SPACE, "")
        if not any(name in probe for name in names):
            check(
                engine.encode(probe, add_special_tokens=False).ids == tokenizer.encode(probe),
                f"this tokenizer of kind {tokenizer.kind!r} has rules of its own that a "
                f"tokenizer.json cannot hold: {probe!r} would have other ids",
            )
    files = template_files(Settings(tokenizer.extra_files()).templates)
    config = json.loads(huggingface_config(tokenizer)) | Settings(files).own
    return {
        **files,
        "tokenizer.json": engine.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def framed(data: bytes, before: Sequence[int], after: Sequence[int]) -> bytes:
    """A `tokenizer.json` that puts special tokens around every text, as training did.

    Args:
      data: the file.
      before, after: their ids.
    """
    if not before and not after:
        return data
    engine = tokenizers.Tokenizer.from_str(data.decode())
    ids = {engine.id_to_token(id): id for id in (*before, *after)}
    template = [*map(engine.id_to_token, before), "$A", *map(engine.id_to_token, after)]
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=list(ids.items())
    )
    return engine.to_str(pretty=True).encode()


def _byte(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
    """Bytes are byte-level BPE that has learnt nothing."""
    engine = tokenizers.Tokenizer(models.BPE(vocab=byte_values(), merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    return engine


def _char(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    """Characters are words that are cut everywhere."""
    vocabulary = {character: id for id, character in enumerate(tokenizer.characters)}
    unknown = tokenizer.special_names[tokenizer.unk_id]
    vocabulary[unknown] = tokenizer.unk_id
    engine = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    every = tokenizers.Regex(r"[\s\S]")
    engine.pre_tokenizer = pre_tokenizers.Split(every, "isolated")
    engine.decoder = decoders.Fuse()
    return engine


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Pieces and their scores; merges, where it merges, in the order of scores."""
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(id) for id in range(processor.get_piece_size())]
    unk = processor.unk_id()
    if tokenizer.kind == "sentencepiece_unigram":
        scored = [(piece, processor.get_score(id)) for id, piece in enumerate(pieces)]
        model = models.Unigram(scored, unk, byte_fallback=True)
    else:
        vocabulary = {piece: id for id, piece in enumerate(pieces)}
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(processor, vocabulary),
            unk_token=pieces[unk],
            fuse_unk=True,
            byte_fallback=True,
        )
    engine = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    if tokenizer.drops_first_space:
        engine.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        engine.normalizer = spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if tokenizer.drops_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    engine.decoder = decoders.Sequence(steps)
    return engine


def _merges(processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int]):
    """Every pair of pieces that makes a third, those that make a likelier one first."""
    pairs = []
    for piece, id in vocabulary.items():
        if processor.is_byte(id) or processor.is_control(id) or processor.is_unknown(id):
            continue
        score = processor.get_score(id)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]

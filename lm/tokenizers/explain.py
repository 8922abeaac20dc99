"""Why a tokenizer cuts a word the way it does: its merges, its scores, its longest matches."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import regex

from lm.tokenizers.base import Tokenizer, byte_piece
from lm.tokenizers.huggingface import HuggingFaceTokenizer, byte_string
from lm.tokenizers.sentence_piece import SPACE, SentencePieceTokenizer
from lm.tokenizers.tiktoken_ranks import TiktokenTokenizer

Rank = Callable[[str, str], int | None]  # neighbours → the rank of their merge; None: no merge


@dataclasses.dataclass(frozen=True)
class Merge:
    """One step of byte-pair encoding."""

    rank: int  # how early the merge was learnt, from 0
    merged: bytes  # the new piece
    pieces: tuple[bytes, ...]  # the whole word after the step


@dataclasses.dataclass(frozen=True)
class Segment:
    """One token of a word."""

    id: int
    text: bytes  # what the token adds to the text
    name: str  # how the vocabulary writes it
    score: float | None = None  # unigram: log probability, in nats


def merges(tokenizer: Tokenizer, word: str) -> list[tuple[tuple[bytes, ...], list[Merge]]]:
    """For each part that `word` is cut into, its smallest pieces, and the merges that build it.

    Byte-pair encoding starts from the smallest pieces and merges, again and again, the neighbours
    whose merge was learnt first (the leftmost of equals), until no neighbours have a merge. The
    tokenizer is of a kind for which `is_merging`.
    """
    symbols, to_bytes, rank = _merging(tokenizer, word)
    return [(tuple(map(to_bytes, part)), _steps(part, rank, to_bytes)) for part in symbols]


def is_merging(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer builds words by merging pairs."""
    return tokenizer.kind in ("tiktoken", "sentencepiece_bpe") or (
        isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.is_byte_level
    )


def segments(tokenizer: Tokenizer, word: str) -> list[Segment]:
    """The tokens of `word`, with log probabilities where the model has them."""
    return [_segment(tokenizer, id) for id in tokenizer.encode(word)]


def alternatives(
    tokenizer: SentencePieceTokenizer, word: str, count: int = 5
) -> list[list[Segment]]:
    """The `count` most probable segmentations of `word` under a unigram model, best first.

    A segmentation's log probability is the sum of its pieces' (Kudo 2018, arXiv:1804.10959).
    """
    found = tokenizer.processor.nbest_encode(word, nbest_size=count, out_type=int)
    unique = dict.fromkeys(tuple(ids) for ids in found)  # in order
    return [[_segment(tokenizer, id) for id in ids] for ids in unique]


def _segment(tokenizer: Tokenizer, id: int) -> Segment:
    text = tokenizer.token_bytes(id)
    name, score = text.decode("utf-8", "backslashreplace"), None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        name = tokenizer.rust.id_to_token(id)
    elif isinstance(tokenizer, SentencePieceTokenizer) and id < len(tokenizer.processor):
        name = tokenizer.processor.id_to_piece(id)
        if tokenizer.kind == "sentencepiece_unigram" and not tokenizer.processor.is_byte(id):
            score = tokenizer.processor.get_score(id)
    return Segment(id, text, tokenizer.special_names.get(id, name), score)


def _merging(
    tokenizer: Tokenizer, word: str
) -> tuple[list[list[str]], Callable[[str], bytes], Rank]:
    """The word's parts as smallest symbols, what a symbol's bytes are, and the ranks of merges."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.is_byte_level:
        learnt = {}
        for index, pair in enumerate(tokenizer.model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            learnt[left, right] = index
        normalizer, cut = tokenizer.rust.normalizer, tokenizer.rust.pre_tokenizer
        text = normalizer.normalize_str(word) if normalizer else word
        parts = [list(part) for part, _ in cut.pre_tokenize_str(text)]
        return parts, byte_string, lambda left, right: learnt.get((left, right))
    if isinstance(tokenizer, TiktokenTokenizer):
        # One character per byte, so that pieces concatenate as strings.
        text = regex.findall(tokenizer.pattern.replace(r"\z", r"\Z"), word)
        parts = [list(part.encode().decode("latin-1")) for part in text]
        ranks = tokenizer.ranks
        return parts, _latin, lambda left, right: ranks.get(_latin(left + right))
    if isinstance(tokenizer, SentencePieceTokenizer):
        processor = tokenizer.processor

        def rank(left: str, right: str) -> int | None:
            id = processor.piece_to_id(left + right)
            if processor.is_unknown(id) or processor.is_control(id) or processor.is_byte(id):
                return None
            return -int(processor.get_score(id))

        # A "▁" of the text is not merged: it is encoded as its bytes (see SentencePieceTokenizer).
        parts = [
            [f"<0x{b:02X}>" for b in SPACE.encode()]
            if part == SPACE
            else list(processor.normalize(part).replace(" ", SPACE))
            for part in re.split(f"({SPACE})", word)
        ]
        return [part for part in parts if part], _piece_bytes, rank
    raise ValueError(f"kind {tokenizer.kind!r} does not merge pairs")


def _piece_bytes(piece: str) -> bytes:
    return byte_piece(piece) or piece.replace(SPACE, " ").encode()


def _latin(symbols: str) -> bytes:
    return symbols.encode("latin-1")


def _steps(pieces: list[str], rank: Rank, to_bytes: Callable[[str], bytes]) -> list[Merge]:
    steps = []
    while True:
        ranked = [
            (found, i)
            for i in range(len(pieces) - 1)
            if (found := rank(pieces[i], pieces[i + 1])) is not None
        ]
        if not ranked:
            return steps
        best, i = min(ranked)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
        steps.append(Merge(best, to_bytes(pieces[i]), tuple(map(to_bytes, pieces))))


def explanation(tokenizer: Tokenizer, word: str) -> list[str]:
    """How `tokenizer` arrives at the tokens of `word`, in lines."""
    lines = []
    if is_merging(tokenizer):
        for start, steps in merges(tokenizer, word):
            lines.append(("start", _shown(start)))
            lines += [(f"merge {step.rank}", _shown(step.pieces)) for step in steps]
    tokens = segments(tokenizer, word)
    if tokenizer.kind == "sentencepiece_unigram":
        for choice in alternatives(tokenizer, word):
            scores = [s.name if s.score is None else f"{s.name} {s.score:.2f}" for s in choice]
            total = sum(s.score or 0.0 for s in choice)
            lines.append((f"{total:.2f}", " + ".join(scores)))
    elif tokenizer.kind == "wordpiece":
        lines += [("longest", token.name) for token in tokens]
    lines.append(("tokens", "  ".join(f"{token.name}={token.id}" for token in tokens)))
    return [f"  {what:>12}  {shown}" for what, shown in lines]


def _shown(pieces: tuple[bytes, ...]) -> str:
    """Pieces side by side; a space as "␣", bytes of unfinished characters in hexadecimal."""
    return " ".join(p.decode("utf-8", "backslashreplace").replace(" ", "␣") for p in pieces)

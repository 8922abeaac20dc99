"""Training byte-level BPE and WordPiece with Hugging Face `tokenizers`.

BPE: Sennrich et al. 2016 (arXiv:1508.07909), over bytes as in GPT-2. WordPiece: Schuster and
Nakajima 2012, with BERT's word splitting; this trainer, like the library's, merges by frequency.
"""

from __future__ import annotations

import collections
import dataclasses
import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from lm.tokenizers.base import roles
from lm.tokenizers.config import TokenizerConfig, pattern
from lm.tokenizers.huggingface import HuggingFaceTokenizer

UNKNOWN = "[UNK]"


def train_bpe(config: TokenizerConfig, texts: list[str], prefix: str) -> HuggingFaceTokenizer:
    """Byte-level BPE: ids 0 … 255 are the bytes, then one id per merge, then the specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern(config.pattern, f"{prefix}.pattern")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(config.specials),
        min_frequency=config.min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, len(texts))
    ids = _add_specials(tokenizer, config.specials)
    named = roles(ids, config.specials[0], config.bos_token)
    return HuggingFaceTokenizer("bpe", _json(tokenizer), named, "")


def train_wordpiece(config: TokenizerConfig, texts: list[str], prefix: str) -> HuggingFaceTokenizer:
    """WordPiece: words cut at white space and punctuation, then into pieces; "##" continues a word.

    At most half the vocabulary goes to single characters; rarer ones are unknown.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.lowercase, strip_accents=config.lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()

    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    room = config.vocab_size - 1 - len(config.specials)
    alphabet: list[str] = []
    rare = []
    for character in sorted(sorted(counts), key=lambda c: -counts[c]):
        forms = [f for f in _forms(tokenizer, character) if f not in alphabet]
        if 2 * (len(alphabet) + len(forms)) <= room:
            alphabet += forms
        else:
            rare.append(character)
    if rare:
        blank = str.maketrans(dict.fromkeys(rare, " "))
        texts = [text.translate(blank) for text in texts]
    # The library numbers continuing characters in the order of a hash map, which differs from run
    # to run, and breaks ties between merges by number. Naming them first makes training repeatable.
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size - len(config.specials),
        min_frequency=config.min_frequency,
        special_tokens=[UNKNOWN, *sorted(alphabet)],
        limit_alphabet=config.vocab_size,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, len(texts))
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []  # the characters were special to the trainer only
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    ids = _add_specials(tokenizer, (UNKNOWN, *config.specials))
    named = roles(ids, config.specials[0], config.bos_token)
    case = "case, accents, " if config.lowercase else ""
    return HuggingFaceTokenizer(
        "wordpiece",
        _json(tokenizer),
        dataclasses.replace(named, unk=ids[UNKNOWN]),
        f"{case}line breaks, repeated spaces and spaces around punctuation are normalised; unknown "
        "characters and words over 100 characters become unknown",
    )


def _forms(tokenizer: Tokenizer, character: str) -> list[str]:
    """The vocabulary entries `character` needs: itself, and its continuation inside a word."""
    forms = set()
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str(character)
    ):
        forms |= {word[0], *("##" + c for c in word[1:])}
    inside = tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str("a" + character)
    )
    if len(inside) == 1:
        forms |= {"##" + c for c in inside[0][0][1:]}
    return sorted(forms)


def _add_specials(tokenizer: Tokenizer, names: tuple[str, ...]) -> dict[str, int]:
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return {name: tokenizer.token_to_id(name) for name in names}


def _json(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str(pretty=True).encode() + b"\n"

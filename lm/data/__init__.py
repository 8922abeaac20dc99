"""Corpora and synthetic worlds → packed, resumable batches.

    config.py     the `data` section
    storage.py    files here and on object stores: found, read, recognised
    files.py      files → documents, and what was left out and why
    conversations.py  lines of JSON → conversations, preferences, prompts
    conversation_rows.py  those → tokens with what is to be learnt, and rows
    stdlib.py     the running Python's documentation and source → documents
    storyworld/   generated stories together with what is true in them, and an invented language
    random_walks.py, tasks.py, pronouns.py  walks; sums, strings, facts; whom a pronoun means:
                  generated, with right answers
    source.py     what a corpus is
    lines.py      generated lines of conversations
    corpora.py    corpora by name; training and validation splits
    shards.py     some documents ⇄ tokens on disk
    cache.py      corpora → shards, found again
    parallel_tokenize.py  the same by many machines
    packing.py    tokens → rows
    encoder_decoder_rows.py  pairs, and documents with hidden spans → rows on two sides
    transforms.py what each objective hides and predicts
    counter_rng.py random numbers that depend on nothing but the row
    batches.py    rows → batches
    prefetch.py   batches → device

In one breath:

    train, validation = prepare(config, tokenizer, seed)
    for batch in train_batches(config, train, seed=seed): ...
    for batch in evaluation_batches(config, validation): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from absl import logging

from lm.config import check
from lm.data import conversation_rows, conversations
from lm.data.batches import BatchIterator, evaluation_batches, train_batches
from lm.data.cache import TokenizedCorpus, cache_directory, corpus_fingerprint, tokenize
from lm.data.config import CONVERSATIONAL, OBJECTIVES, CorruptionConfig, DataConfig
from lm.data.conversations import Example, examples
from lm.data.corpora import documents, pairs, sources
from lm.data.files import CorpusReport
from lm.data.prefetch import prefetch_to_device
from lm.parallel import hosts
from lm.tokenizers import ChatTemplate, Tokenizer

__all__ = [
    "CONVERSATIONAL",
    "OBJECTIVES",
    "BatchIterator",
    "CorpusReport",
    "CorruptionConfig",
    "DataConfig",
    "Example",
    "TokenizedCorpus",
    "corpus_fingerprint",
    "documents",
    "evaluation_batches",
    "examples",
    "pairs",
    "prefetch_to_device",
    "prepare",
    "train_batches",
    "training_texts",
]


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    notify: Callable[[str], None] = logging.info,
    objective: str = "causal",
    template: ChatTemplate | None = None,
) -> tuple[tuple[TokenizedCorpus, ...], tuple[TokenizedCorpus, ...]]:
    """The training and validation corpora of `config`, tokenised, from the cache where possible.

    Of several processes the first tokenises, and the others find what it wrote. `seed` is for
    generated corpora; `notify` receives one line for each thing worth knowing. Objectives of
    `CONVERSATIONAL` need the tokenizer's chat template.

    Returns:
      (training corpora in the order of `config.paths`, validation corpora). The latter is empty
      only where `validation_fraction` is 0 and there is no `validation_path`.

    Raises:
      ConfigError: a corpus cannot be used, or a split has no documents.
    """
    with hosts.first_alone(cache_directory(config), notify):
        if objective in CONVERSATIONAL:
            return conversation_rows.prepare(config, template, seed, objective, notify)
        corpora, held_out = sources(config, seed)
        splits = [tokenize(corpus, tokenizer, notify) for corpus in corpora]
        train = [both["train"] for both in splits]
        validation = [tokenize(corpus, tokenizer, notify)["train"] for corpus in held_out]
    if config.validation_fraction and not held_out:
        validation = [both["validation"] for both in splits]
    for corpus in train:
        check(corpus.num_documents > 0, _too_few(config, corpus, "train"))
    # One small corpus of a mixture may do without validation documents, but not all.
    if validation and not any(corpus.num_documents for corpus in validation):
        check(False, _too_few(config, validation[0], "validate"))
    return tuple(train), tuple(c for c in validation if c.num_documents)


def training_texts(config: DataConfig, seed: int, objective: str = "causal") -> Iterator[str]:
    """The texts of all corpora that are trained on: documents, or what is said in conversations.

    Raises:
      ConfigError: see `documents`.
    """
    if objective in CONVERSATIONAL:
        return conversations.texts(config, seed)
    return documents(config, "train", seed)


def _too_few(config: DataConfig, corpus: TokenizedCorpus, purpose: str) -> str:
    return (
        f"data.split={config.split!r} with data.validation_fraction={config.validation_fraction} "
        f"leaves no documents of {corpus.name} to {purpose} on; "
        "give more text, or set data.validation_path or data.validation_fraction=0.0"
    )

"""What a model makes of whole texts: a vector or scores for each, or what a mask hides."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check, check_choice
from lm.inference.generate import Generator
from lm.inference.prompts import NOTHING, Framing, check_ids, padded_after
from lm.inference.sampling import SamplingConfig
from lm.models import ModelConfig, bind, skeleton
from lm.models.text import last_places
from lm.parallel.sharding import constrain
from lm.tokenizers import Tokenizer

POOLINGS = ("mean", "first", "last", "pooler")
BATCH = 32  # texts read at once


def embed(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    texts: Sequence[Sequence[int]],
    pooling: str = "mean",
) -> np.ndarray:
    """A vector for each text, float32 [N, D], of the last residual stream.

    That of the encoder where there is one, else of the decoder; after its final norm. A text's
    vector does not depend on the others, nor on padding.

    Args:
      config, params: a model of any architecture.
      texts: token ids, framed as the model has seen them.
      pooling: "mean" over the tokens; the "first" one or the "last", which alone has seen all of a
        decoder's text; or the "pooler", an encoder's trained projection of the first (Devlin et al.
        2019), if it has one.

    Raises:
      ConfigError: an unknown pooling, a pooler that is not there, a text that is empty or longer
        than the model's context.
    """
    check_choice("pooling", pooling, POOLINGS)
    check(
        pooling != "pooler" or config.pooler,
        "pooling='pooler' needs a model with config.model.pooler=True: use 'mean' or 'first'",
    )
    for ids in texts:
        check_ids("text", ids, config)
    config = dropless(config)
    return _of_texts(
        texts,
        config.table_width,
        lambda batch: _pooled(config, pooling, params, *padded_after(batch, config.max_length)),
    )


def score(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    texts: Sequence[Sequence[int]],
    length: int = 0,
) -> np.ndarray:
    """What its classifier says of each text, float32 [N, labels]: a reward model's one reward.

    A text's scores do not depend on the others, nor on padding: a decoder's are read from its last
    token, whatever that is. Texts are padded to the next power of two, so that few programs serve
    texts of any lengths.

    Args:
      config, params: a model with a classifier of texts.
      texts: token ids, complete.
      length: to which shorter texts are padded, so that one program serves them all.

    Raises:
      ConfigError: no such classifier; a text that is empty or longer than the model's context.
    """
    check(
        config.classifier == "sequence",
        f"config.model.classifier={config.classifier!r} has no score of a text: it needs "
        "'sequence', which a reward model has",
    )
    for ids in texts:
        check_ids("text", ids, config)
    config = dropless(config)

    def scores(batch: Sequence[Sequence[int]]) -> jax.Array:
        longest = max(map(len, batch))
        places = length if longest <= length else max(8, 1 << (longest - 1).bit_length())
        shape = len(batch), min(config.max_length, places)
        tokens_NS, segments_NS = np.zeros((2, *shape), np.int32)
        for row, ids in enumerate(batch):
            tokens_NS[row, : len(ids)], segments_NS[row, : len(ids)] = ids, 1
        return scores_of_texts(config, params, tokens_NS, segments_NS)

    return _of_texts(texts, config.num_labels, scores)


@functools.partial(jax.jit, static_argnums=0)
def scores_of_texts(config: ModelConfig, params, tokens_NS, segments_NS):
    """What the classifier says of each of these texts, float32 [N, labels]."""
    model = bind(skeleton(config), params)
    x_NSD = model.hidden(tokens_NS, segments_BT=segments_NS)
    return constrain(model.classify(x_NSD, last_places(segments_NS), segments_NS), None, None)


def dropless(config: ModelConfig) -> ModelConfig:
    """Without a capacity: padding and other texts could take a token's place at its expert."""
    return dataclasses.replace(config, capacity_factor=0.0)


def _of_texts(
    texts: Sequence[Sequence[int]],
    width: int,
    function: Callable[[Sequence[Sequence[int]]], jax.Array],
) -> np.ndarray:
    """`function` of all texts, float32 [N, width], asked for up to `BATCH` of them at once."""
    results = np.zeros((len(texts), width), np.float32)
    # Texts of similar lengths are read together, so that little of a batch is padding.
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    for start in range(0, len(texts), BATCH):
        chosen = order[start : start + BATCH]
        rows = min(BATCH, 1 << (len(chosen) - 1).bit_length())  # few shapes, so few compilations
        batch = [texts[n] for n in chosen] + [()] * (rows - len(chosen))
        results[chosen] = np.asarray(function(batch))[: len(chosen)]
    return results


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(config: ModelConfig, pooling: str, params, tokens_NS, segments_NS):
    model = bind(skeleton(config), params)
    if config.architecture == "encoder_decoder":
        x_NSD = model.encode(tokens_NS, segments_BS=segments_NS)
    else:
        x_NSD = model.hidden(tokens_NS, segments_BT=segments_NS)
    if pooling == "pooler":
        return model.pool(x_NSD).astype(jnp.float32)
    x_NSD = x_NSD.astype(jnp.float32)
    if pooling == "first":
        return x_NSD[:, 0]
    lengths_N1 = segments_NS.sum(1, keepdims=True)
    if pooling == "last":
        return jnp.take_along_axis(x_NSD, jnp.maximum(lengths_N1 - 1, 0)[..., None], 1)[:, 0]
    return jnp.where(segments_NS[..., None] > 0, x_NSD, 0).sum(1) / jnp.maximum(lengths_N1, 1)


class Candidate(NamedTuple):
    """A token that may stand where the mask does."""

    text: str  # what it adds to the text, its space included; the name of a special
    probability: float
    id: int


def fill(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    tokenizer: Tokenizer,
    framing: Framing,
    text: str,
    top_k: int = 5,
) -> list[list[Candidate]]:
    """The likeliest tokens in place of each mask, by a masked language model.

    Each mask is one token, guessed with the others unseen. Where words carry the space before
    them, the space before a mask is part of what it hides.

    Args:
      config, params: an encoder.
      tokenizer: has a mask token; its name in `text`, such as "[MASK]", stands for it.
      framing: what stands around the text, complete (`Framing.filled`).
      text: "The cat [MASK] on the mat."
      top_k: how many candidates for each mask.

    Returns:
      For each mask its candidates, likeliest first.

    Raises:
      ConfigError: not an encoder, no mask in the tokenizer or the text, or a text that is too long.
    """
    check(
        config.architecture == "encoder",
        f"config.model.architecture={config.architecture!r} cannot fill a mask: it needs 'encoder'",
    )
    check(top_k >= 1, f"top_k={top_k} must be at least 1")
    ids = framing.around(mask_ids(tokenizer, text))
    check_ids("text", ids, config)
    tokens_1S, segments_1S = padded_after([ids], config.max_length)
    logits_1SV = _logits(config, params, tokens_1S, segments_1S)
    shares_SV = np.asarray(jax.nn.softmax(logits_1SV[0, :, : tokenizer.vocab_size]))
    names = {id: name for name, id in tokenizer.special_ids.items()}

    def candidate(place: int, id: int) -> Candidate:
        text = names.get(id) or tokenizer.token_bytes(id).decode("utf-8", "replace")
        return Candidate(text, float(shares_SV[place, id]), id)

    return [
        [
            candidate(place, id)
            for id in np.argsort(-shares_SV[place], kind="stable")[:top_k].tolist()
        ]
        for place in np.flatnonzero(tokens_1S[0] == tokenizer.mask_id)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params, tokens_NS, segments_NS):
    logits_NSV = bind(skeleton(config), params)(tokens_NS, segments_BT=segments_NS)
    return constrain(logits_NSV, None, None, None)  # whole on every device


def fill_spans(generator: Generator, text: str, max_new_tokens: int = 100) -> list[str]:
    """The likeliest stretch of text for each sentinel, by greedy decoding (T5; Raffel et al. 2020).

    Args:
      generator: of an encoder-decoder trained on span corruption, with a tokenizer that has
        sentinels; their names in `text`, such as "<extra_id_0>", stand for them.
      text: "The cat <extra_id_0> on the <extra_id_1>.", its sentinels numbered from 0.
      max_new_tokens: of all stretches together.

    Returns:
      For each sentinel of the text what the model writes for it; empty where it writes nothing.

    Raises:
      ConfigError: not an encoder-decoder, no sentinels in the tokenizer or the text, sentinels out
        of order, or a text that is too long.
    """
    architecture, tokenizer = generator.model.config.architecture, generator.tokenizer
    check(
        architecture == "encoder_decoder",
        f"config.model.architecture={architecture!r} cannot fill spans: it needs 'encoder_decoder'",
    )
    asked, ids = sentinel_ids(tokenizer, text)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    written: dict[int, list[int]] = {}
    current: list[int] = []
    for tokens_1N in generator.generate([generator.framing.around(ids)], sampling):
        for id in tokens_1N[0].tolist():
            if id in tokenizer.sentinel_ids:
                current = written.setdefault(id, [])
            elif id != NOTHING:
                current.append(id)
    return [tokenizer.decode(written.get(id, [])).strip() for id in asked]


def mask_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text`, in which the name of the mask token stands for it.

    Raises:
      ConfigError: the tokenizer has no mask token, or the text does not.
    """
    check(
        tokenizer.mask_id is not None,
        "the tokenizer has no mask token: train one with config.tokenizer.mask_token=True",
    )
    name = next(name for name, id in tokenizer.special_ids.items() if id == tokenizer.mask_id)
    check(name in text, f"text={text!r} must have {name!r} where a token is to be guessed")
    return ids_with(tokenizer, text, {name: tokenizer.mask_id})


def sentinel_ids(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The sentinels that `text` names, and its ids, in which they stand for themselves.

    Raises:
      ConfigError: no sentinels in the tokenizer or the text, or out of order.
    """
    sentinels = tokenizer.sentinel_ids
    check(
        len(sentinels) > 0,
        "the tokenizer has no sentinels: train one with config.tokenizer.num_sentinels",
    )
    names = {id: name for name, id in tokenizer.special_ids.items()}
    ids = ids_with(tokenizer, text, {names[id]: id for id in sentinels})
    asked = [id for id in ids if id in sentinels]
    check(
        bool(asked) and asked == list(sentinels[: len(asked)]),
        f"text={text!r} must have {names[sentinels[0]]!r}, and further ones in order, where "
        "something is to be filled in",
    )
    return asked, ids


def ids_with(tokenizer: Tokenizer, text: str, specials: Mapping[str, int]) -> list[int]:
    """The ids of `text`, in which the names of some special tokens (name → id) stand for them.

    Where words carry the space before them, the space before a special belongs to the special.
    """
    names = "|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True))
    space = " ?" if _carries_space(tokenizer) else ""
    first, *others = re.split(f"{space}({names})", text)
    ids = tokenizer.encode(first)
    for name, part in zip(others[::2], others[1::2], strict=True):
        # Encoding puts that space there by itself.
        part = part.removeprefix(" ") if tokenizer.drops_first_space else part
        ids += [specials[name], *tokenizer.encode(part)]
    return ids


@functools.lru_cache(maxsize=8)
def _carries_space(tokenizer: Tokenizer) -> bool:
    """Whether tokens begin with the space before their word."""
    tokens = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return any(data[:1] == b" " and len(data) > 1 for data in tokens)

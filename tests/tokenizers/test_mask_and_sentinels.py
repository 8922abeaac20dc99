"""Tokens that hide others, and where words begin."""

import json

import numpy as np
import pytest
from trained_tokenizers import ALL, corpus, trained

from lm.config import ConfigError
from lm.tokenizers import TokenizerConfig, explain, train
from lm.tokenizers.base import DESCRIPTION

TRAINED = [kind for kind in ALL if kind != "tiktoken"]
TEXT = "the cat [MASK] sat<extra_id_0> <s> on<extra_id_1>it"


@pytest.fixture(params=TRAINED, scope="module")
def hiding(request):
    config = TokenizerConfig(
        kind=request.param, vocab_size=440, bos_token="<s>", mask_token=True, num_sentinels=12
    )
    return train(config, corpus())


def test_a_trained_vocabulary_has_them_where_asked(hiding):
    ids = [hiding.eos_id, hiding.bos_id, hiding.mask_id, *hiding.sentinel_ids]
    assert len(set(ids)) == 15
    assert hiding.special_ids["[MASK]"] == hiding.mask_id
    assert hiding.sentinel_ids == tuple(hiding.special_ids[f"<extra_id_{i}>"] for i in range(12))
    same = TokenizerConfig(kind="byte", eos_token="</s>", bos_token="</s>")
    assert train(same, []).vocab_size == 257, "one token may begin and end"
    plain = trained(hiding.kind)
    assert plain.mask_id is None and plain.sentinel_ids == () and plain.bos_id == plain.eos_id
    assert plain.fingerprint != hiding.fingerprint


def test_text_never_gives_them_and_they_give_no_text(hiding):
    ids = hiding.encode(TEXT)
    specials = {hiding.bos_id, hiding.mask_id, *hiding.sentinel_ids}
    assert not specials & set(ids)
    assert {hiding.token_bytes(id) for id in specials} == {b""}
    between = [id for pair in zip(ids, [*specials, *[hiding.mask_id] * len(ids)]) for id in pair]
    assert hiding.decode(between) == hiding.decode(ids)


def test_vocabularies_without_them_are_described_as_before(tmp_path):
    trained("bpe").save(tmp_path)
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    assert not {"mask_id", "sentinel_ids"} & set(described)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_special_may_be_called_like_a_word(kind):
    names = ("the", "together", "đem")
    tokenizer = train(TokenizerConfig(kind=kind, vocab_size=420, special_tokens=names), corpus())
    specials = {tokenizer.special_ids[name] for name in names}
    text = "the other cat together"
    ids = tokenizer.encode(text)
    assert not specials & set(ids) and tokenizer.decode(ids) == text
    if kind == "bpe":  # the explanation knows of it
        [(_, steps)] = explain.merges(tokenizer, "together")
        assert steps[-1].pieces == tuple(map(tokenizer.token_bytes, tokenizer.encode("together")))
    if kind in ("bpe", "wordpiece"):
        config = TokenizerConfig(kind=kind, special_tokens=("a",))
        with pytest.raises(ConfigError, match=r"config\.tokenizer: the special token 'a' must be"):
            train(config, corpus())


@pytest.mark.parametrize("kind", ALL)
def test_words_begin_where_they_do(kind):
    tokenizer = trained(kind)
    begins, ends = tokenizer.word_edges()
    assert begins.shape == ends.shape == (tokenizer.vocab_size,)
    text = "Together grapo didn't room OK! tacalunder 12."
    ids = np.array(tokenizer.encode(text))
    starts = begins[ids].copy()
    starts[0] = True
    starts[1:] |= ends[ids[:-1]]
    words = []
    for id, start in zip(ids.tolist(), starts, strict=True):
        if start:
            words.append(b"")
        words[-1] += tokenizer.token_bytes(id)
    # White space may be a word of its own, and does not matter here.
    found = " ".join(word.decode().strip() for word in words if word.strip())
    assert found.replace("' t", "'t") == "Together grapo didn 't room OK ! tacalunder 12 ."
    assert begins[tokenizer.eos_id] and ends[tokenizer.eos_id], "specials belong to no word"

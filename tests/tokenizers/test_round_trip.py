"""Text → ids → text."""

import functools

import numpy as np
import pytest
import tokenizers as rust
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained_tokenizers import trained

from lm.config import ConfigError
from lm.inference.stream import TextStream
from lm.tokenizers import TokenizerConfig, load
from lm.tokenizers.base import PROBES
from lm.tokenizers.export import huggingface_files
from lm.tokenizers.huggingface import HuggingFaceTokenizer
from lm.tokenizers.settings import Settings

# Any Unicode text, drawn often from what breaks tokenizers.
BLANKS = [" ", "  ", "\0", "\n", "\r\n", "\t", "\u2581", "\u2585", "\u2047", "\ufffd", "\ufeff"]
SYMBOLS = "🙂 👩‍👩‍👧 e\u0301 \u00e9 ﬁ שלום مرحبا 漢字 𠮷 \ue000 \U0010ffff"
NAMES = "don't Ġ ##a <|endoftext|> <unk> <s> </s> <0x41> [UNK] [CLS]"
AWKWARD = st.sampled_from([*BLANKS, *SYMBOLS.split(), *NAMES.split()])
TEXTS = st.one_of(st.text(), st.lists(st.one_of(AWKWARD, st.text(max_size=5))).map("".join))
ONCE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ONCE
@given(text=TEXTS)
def test_lossless_kinds_return_any_unicode_text(lossless, text):
    assert lossless.lossless
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert lossless.byte_lengths()[ids].sum() == len(text.encode())


@ONCE
@given(text=TEXTS)
def test_encoding_never_gives_a_special_id_but_unknown(tokenizer, text):
    found = set(tokenizer.encode(text)) & set(tokenizer.special_ids.values())
    assert found <= ({tokenizer.unk_id} if not tokenizer.lossless else set())


@ONCE
@given(ids=st.lists(st.integers(0, 256)))
def test_streamed_text_equals_decoded_text_for_any_ids(tokenizer, ids):
    ids = [i % tokenizer.vocab_size for i in ids]
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)


ADDED = [
    "đem",
    "漢字",
    "Ġx",
    "ça",
    "▁▁",
    "  ",
    "\n\n\n",
    "🙂",
    "שלום",
    "мир",
    "e\u0301",
    "##a",
    "<x>",
]


@functools.cache
def with_added_tokens(kind):
    """A `tokenizer.json` with added tokens that are text, of every kind of decoder."""
    files = huggingface_files(trained(kind))
    engine = rust.Tokenizer.from_str(files["tokenizer.json"].decode())
    engine.add_tokens([rust.AddedToken(name, normalized=False) for name in ADDED])
    files["tokenizer.json"] = engine.to_str().encode()
    return HuggingFaceTokenizer.from_json(files["tokenizer.json"], Settings(), TokenizerConfig())


@pytest.mark.parametrize("kind", ["byte", "bpe", "sentencepiece_unigram", "sentencepiece_bpe"])
@ONCE
@given(text=st.lists(st.one_of(st.sampled_from(ADDED), AWKWARD, st.text(max_size=3))).map("".join))
def test_added_tokens_are_text_like_any_other(kind, text):
    tokenizer = with_added_tokens(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.lossless or kind not in ("byte", "bpe")
    if tokenizer.lossless:
        assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)
    for name in ADDED:
        id = tokenizer.rust.token_to_id(name)
        assert tokenizer.token_bytes(id) == name.encode() or not tokenizer.lossless


def test_an_added_token_that_swallows_what_is_around_it_is_a_loss(tmp_path):
    engine = rust.Tokenizer.from_str(huggingface_files(trained("bpe"))["tokenizer.json"].decode())
    engine.add_tokens([rust.AddedToken("<tool>", rstrip=True, normalized=False)])
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert not tokenizer.lossless and "<tool>" in tokenizer.lossy_because


@pytest.mark.parametrize("unit", ["a", "Ab1", " ", "\n", "🙂", "!", "漢", "▁", "\0"])
def test_a_megabyte_without_a_break_round_trips(lossless, unit):
    text = unit * (1_000_000 // len(unit.encode()))
    assert lossless.decode(lossless.encode(text)) == text
    padded = (
        f"x{text}y"  # white space that does not end the text takes another way through tiktoken
    )
    assert lossless.decode(lossless.encode(padded)) == padded


def test_a_stream_holds_back_an_unfinished_character(lossless):
    ids = lossless.encode("🙂")
    assert len(ids) == 4  # not in the corpus, so bytes
    stream = TextStream(lossless)
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"


def test_a_batch_equals_its_texts_one_by_one(tokenizer):
    texts = [*PROBES, "", "x" * 300]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)
    assert all(tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) for ids in batch)
    assert tokenizer.encode_batch([]) == []


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude42") == tokenizer.encode("🙂")  # a pair is a character


def test_lossy_kinds_say_what_is_lost(tokenizer):
    exact = all(tokenizer.decode(tokenizer.encode(probe)) == probe for probe in PROBES)
    assert tokenizer.lossless == exact
    assert tokenizer.lossless == (not tokenizer.lossy_because)


def test_char_maps_unseen_characters_to_unknown():
    char = trained("char")
    assert char.encode("🙂") == [char.unk_id]
    assert char.decode(char.encode("ta🙂po")) == "tapo"


def test_ids_of_other_tokenizers_are_refused(tokenizer):
    with pytest.raises(ConfigError, match=f"token id {tokenizer.vocab_size} is not in"):
        tokenizer.decode([0, tokenizer.vocab_size])
    with pytest.raises(ConfigError, match="token id -1"):
        tokenizer.token_bytes(-1)


def test_specials_add_nothing_to_the_text(tokenizer):
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == tokenizer.decode(ids)
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    assert tokenizer.byte_lengths().shape == (tokenizer.vocab_size,)
    assert tokenizer.vocab_size > max(tokenizer.special_ids.values())

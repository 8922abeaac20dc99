"""Training: repeatable, within its vocabulary, and clear about what it cannot do."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from tiktoken_ext import openai_public
from trained_tokenizers import corpus, trained

from lm.config import ConfigError
from lm.tokenizers import TokenizerConfig, train
from lm.tokenizers.config import PATTERNS, TRAINED_KINDS

AGAIN = """
import sys
from trained_tokenizers import trained
print(*[trained(kind).fingerprint for kind in sys.argv[1:]])
"""


def test_training_is_the_same_in_any_process_and_on_any_number_of_threads():
    here = [trained(kind).fingerprint for kind in TRAINED_KINDS]
    for threads, seed in (("1", "1"), ("2", "2")):
        path = str(Path(__file__).parent)
        env = {
            **os.environ,
            "PYTHONPATH": path,
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": seed,
        }
        command = [sys.executable, "-c", AGAIN, *TRAINED_KINDS]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == here


def test_different_text_or_settings_give_another_fingerprint():
    prints = {trained(kind).fingerprint for kind in TRAINED_KINDS}
    assert len(prints) == len(TRAINED_KINDS)
    assert trained("bpe", 400).fingerprint != trained("bpe").fingerprint
    more = train(TokenizerConfig(kind="byte", special_tokens=("<|user|>",)), [])
    assert more.fingerprint != trained("byte").fingerprint


def test_vocabulary_has_the_size_asked_for(tokenizer):
    fixed = {"byte": 257, "char": len({*"".join(corpus())}) + 2}  # characters, unknown, end
    assert tokenizer.vocab_size == fixed.get(tokenizer.kind, 420)


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_further_specials_get_ids_of_their_own(kind):
    config = TokenizerConfig(
        kind=kind, vocab_size=420, eos_token="<end>", special_tokens=("<|user|>", "<|pad|>")
    )
    tokenizer = train(config, corpus())
    ids = [tokenizer.special_ids[name] for name in ("<end>", "<|user|>", "<|pad|>")]
    assert len(set(ids)) == 3
    assert (tokenizer.eos_id, tokenizer.pad_id) == (ids[0], ids[2])
    assert not set(tokenizer.encode("<|user|><|pad|><end>")) & set(ids)


def test_char_keeps_the_most_frequent_characters():
    tokenizer = train(TokenizerConfig(kind="char", vocab_size=5), ["zzzzyyyxxw"])
    assert tokenizer.characters == ["x", "y", "z"]


def test_training_stops_reading_at_its_limit():
    def texts():
        yield "ab" * 40
        yield "é" * 40  # crosses the limit inside a character
        raise AssertionError("read on")

    tokenizer = train(TokenizerConfig(kind="char", train_bytes=101), texts())
    assert tokenizer.characters == ["a", "b", "é"]


def test_patterns_cut_as_the_published_ones(monkeypatch):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *a, **k: {})
    published = {
        "gpt2": openai_public.r50k_base()["pat_str"],
        "cl100k": openai_public.cl100k_base()["pat_str"],
        "o200k": openai_public.o200k_base()["pat_str"],
    }
    draw = random.Random(0)
    parts = ["a", "B", "é", "漢", "\u0301", "1", "23", " ", "  ", "\n", "\r", "\t", "!", "/", "'s"]
    for name, ours in PATTERNS.items():
        ours = ours.replace(r"\z", r"\Z")  # this library's name for the end of the text
        theirs = regex.sub(r"\$", r"\\Z", published[name])
        for _ in range(2000):
            text = "".join(draw.choices(parts, k=12))
            cut = [m.group() for m in regex.finditer(ours, text)]
            assert cut == [m.group() for m in regex.finditer(theirs, text)], (name, text)
            assert "".join(cut) == text


@pytest.mark.parametrize("name", [*PATTERNS, r"\w+|\s+|[^\w\s]+"])
def test_bpe_is_lossless_under_any_pattern(name):
    tokenizer = train(TokenizerConfig(vocab_size=300, pattern=name), corpus()[:50])
    text = "Don't  stop\r\n\n  12345 \0 漢字!!\n "
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bpee"}, r"config.tokenizer.kind='bpee' is not one of .*did you mean 'bpe'\?"),
        ({"kind": "tiktoken"}, "config.tokenizer.path='' must name a file"),
        ({"vocab_size": 256}, "config.tokenizer.vocab_size=256 must be at least 257"),
        ({"vocab_size": 0, "kind": "char"}, "vocab_size=0 must be at least 1"),
        ({"vocab_size": 2, "kind": "char"}, "vocab_size=2 must be at least 3"),
        ({"kind": "wordpiece", "vocab_size": 20}, "vocab_size=20 must be at least"),
        ({"pattern": "gpt3"}, r"pattern='gpt3' .*did you mean 'gpt2'\?"),
        ({"pattern": "(a"}, r"pattern='\(a' is not a regular expression"),
        ({"special_tokens": ("<a>", "<a>")}, "must be distinct"),
        ({"special_tokens": ("[MASK]",), "mask_token": True}, "must be distinct"),
        ({"special_tokens": ("<extra_id_1>",), "num_sentinels": 2}, "must be distinct"),
        ({"num_sentinels": -1}, "num_sentinels=-1 must be at least 0"),
        ({"special_tokens": ("<|endoftext|>",)}, "must be distinct"),
        ({"min_frequency": 0}, "min_frequency=0 must be at least 1"),
        ({"character_coverage": 1.5}, "character_coverage=1.5 must be in"),
        ({"path": "/no/such"}, "config.tokenizer.path='/no/such' does not exist"),
        (
            {"kind": "sentencepiece_unigram", "vocab_size": 9000},
            "vocab_size=9000 is too large for this corpus .*at most [0-9]+",
        ),
        ({"kind": "sentencepiece_bpe", "vocab_size": 9000}, "vocab_size=9000 is too large"),
        ({"kind": "sentencepiece_bpe", "vocab_size": 260}, "vocab_size=260 is too small"),
    ],
)
def test_mistakes_are_one_line_that_names_the_field(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train(TokenizerConfig(**changes), corpus()[:50])
    assert "\n" not in str(caught.value)


def test_the_size_an_error_proposes_works():
    for kind in ("sentencepiece_unigram", "sentencepiece_bpe"):
        config = TokenizerConfig(kind=kind, vocab_size=9000)
        with pytest.raises(ConfigError) as caught:
            train(config, corpus()[:50])
        size = int(str(caught.value).split("at most ")[1].split(",")[0])
        assert train(TokenizerConfig(kind=kind, vocab_size=size), corpus()[:50]).vocab_size == size


@pytest.mark.parametrize("kind", [k for k in TRAINED_KINDS if k != "byte"])
@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error(kind, texts):
    with pytest.raises(ConfigError, match="no text to train on"):
        train(TokenizerConfig(kind=kind), texts)


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_text_of_awkward_characters_alone_trains_or_is_refused(kind):
    texts = ["\0\0", "\ud800", "▁▁\t", "\n\n"] * 20
    try:
        tokenizer = train(TokenizerConfig(kind=kind, vocab_size=262), texts)
    except ConfigError:
        return
    assert tokenizer.lossless == (tokenizer.decode(tokenizer.encode("▁ \0é")) == "▁ \0é")

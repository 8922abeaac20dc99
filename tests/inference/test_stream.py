"""Streamed text: the pieces are the whole, whatever the pieces, and no stop string shows."""

import codecs
import functools

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.inference.stream import StopStrings, TextStream
from lm.tokenizers import TokenizerConfig, load, train

CORPUS = ["The cat sat on the mat, the café — naïve 漢字 🙂👩‍👩‍👧.\n\n"] * 3 + [
    "a b c d e f g h i j k"
] * 40
KINDS = {"byte": 300, "bpe": 300, "sentencepiece_unigram": 290, "wordpiece": 80, "char": 60}


@functools.cache
def tokenizer(kind):
    return train(TokenizerConfig(kind=kind, vocab_size=KINDS[kind]), CORPUS)


def text_of(stream, ids):
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_pieces_joined_are_the_whole_text_at_every_split(kind, data):
    known = tokenizer(kind)
    any_ids = st.lists(st.integers(0, known.vocab_size - 1), max_size=20)
    ids = data.draw(st.text(max_size=20).map(known.encode) | any_ids)
    assert "".join(text_of(TextStream(known), ids)) == known.decode(ids)
    for split in range(len(ids) + 1):
        prompt, drawn = ids[:split], ids[split:]
        pieces = "".join(text_of(TextStream(known, prompt), drawn))
        if _ends_whole(known, prompt):
            assert known.decode(prompt) + pieces == known.decode(ids)
        else:  # the prompt's last character may come whole, and nothing else of the prompt does
            assert known.decode(ids).endswith(pieces)


def _ends_whole(known, prompt):
    """Whether the prompt does not end inside a character."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(b"".join(map(known.token_bytes, prompt)))
    return not utf8.getstate()[0]


@pytest.mark.parametrize("text", ["é", "漢字", "🙂👩‍👩‍👧", "a🙂"])
def test_a_character_that_the_prompt_began_comes_whole_or_not_at_all(text):
    known = tokenizer("byte")
    ids = known.encode(text)
    for split in range(len(ids)):
        drawn = "".join(text_of(TextStream(known, ids[:split]), ids[split:]))
        begun = ids[:split]
        kept = bytes(begun).decode("utf-8", "ignore")
        assert kept + drawn == text
        # Other text after it: nothing of the prompt's character, and no U+FFFD for it.
        assert "".join(text_of(TextStream(known, begun), known.encode("xyz"))) == "xyz"
        assert "".join(text_of(TextStream(known, begun), [])) == ""
        assert "".join(text_of(TextStream(known, begun), known.encode("é"))) == "é"


def test_only_bytes_that_are_no_character_become_the_replacement():
    known = tokenizer("byte")
    assert text_of(TextStream(known), [0xFF, 0x61]) == ["\ufffd", "a", ""]
    assert text_of(TextStream(known), [0xE2, 0x82]) == ["", "", "\ufffd"]
    replacement = known.encode("\ufffd")  # a character like any other
    assert "".join(text_of(TextStream(known, replacement[:2]), replacement[2:])) == "\ufffd"
    # The prompt's byte goes on, and then the character breaks off: what was drawn is invalid.
    assert "".join(text_of(TextStream(known, [0xF0]), [0x9F, 0x61])) == "\ufffda"


def test_a_space_that_begins_the_text_is_dropped_once(tmp_path):
    model = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=model,
        vocab_size=64,
        minloglevel=3,
        hard_vocab_limit=False,
    )
    known = load(f"{model}.model")
    assert known.drops_first_space
    ids = known.encode("a b c")
    for split in range(len(ids) + 1):
        before = "".join(map(TextStream(known).push, ids[:split])) if split else ""
        pieces = text_of(TextStream(known, ids[:split]), ids[split:])
        assert known.decode(ids[:split]) + "".join(pieces) == "a b c"
        assert before == known.decode(ids[:split])


def stopped(text, stops):
    """What `StopStrings` should pass on, character by character, and what it should find."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


ALPHABET = st.text("ab\n", max_size=12)


@settings(deadline=None, max_examples=500)
@given(st.lists(ALPHABET, max_size=6), st.lists(st.text("ab\n", min_size=1, max_size=5)))
def test_what_passes_does_not_depend_on_the_pieces_and_nothing_of_a_stop_string_leaks(
    pieces, stops
):
    text = "".join(pieces)
    expected, found = stopped(text, stops)
    stream = StopStrings(stops)
    passed = ""
    for number, piece in enumerate(pieces):
        passed += stream.push(piece)
        seen = "".join(pieces[: number + 1])
        # What is out can no longer be part of a stop string, however the text goes on ...
        assert seen.startswith(passed) and expected.startswith(passed)
        if stream.found is None:
            held = seen[len(passed) :]
            # ... and nothing is held back that cannot be.
            assert not held or any(s.startswith(held) and s != held for s in stops)
    passed += stream.flush()
    assert (passed, stream.found) == (expected, found)
    assert not any(s in passed for s in stops)


def test_a_stop_string_is_found_across_tokens_and_inside_characters():
    known = tokenizer("byte")
    text = "one 🙂\nUser: two"
    for stop in ("\nUser:", "🙂", "e 🙂\n", "two"):
        stream = TextStream(known, known.encode(">"), [stop])
        pieces = text_of(stream, known.encode(text))
        assert "".join(pieces) == text.partition(stop)[0]
        assert stream.stop == stop


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from("abc"), max_size=12).map("".join), st.data())
def test_tokens_of_every_kind_stop_at_the_same_character(text, data):
    stops = data.draw(st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
    streams = [TextStream(tokenizer(kind), (), stops) for kind in ("byte", "bpe", "char")]
    texts = {"".join(text_of(s, s._tokenizer.encode(text))) for s in streams}
    assert texts == {stopped(text, stops)[0]}
    assert {s.stop for s in streams} == {stopped(text, stops)[1]}

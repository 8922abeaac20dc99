"""Sentinels in a text are those of training, and what is written is told apart by them."""

from types import SimpleNamespace

import numpy as np
import pytest

from lm.config import ConfigError
from lm.inference import Framing, fill_spans
from lm.inference.fill import ids_with
from lm.models import ModelConfig
from lm.tokenizers import TokenizerConfig, train

STORY = "The cat sat on the mat. The dog ran in the park. The cat and the dog played. "


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request):
    config = TokenizerConfig(kind=request.param, vocab_size=300, num_sentinels=3)
    return train(config, [STORY] * 3)


class Scripted:
    """A generator that writes given tokens, and remembers what it read."""

    def __init__(self, tokenizer, tokens, architecture="encoder_decoder"):
        self.tokenizer, self.framing = tokenizer, Framing((), (tokenizer.eos_id,))
        self.model = SimpleNamespace(config=ModelConfig(architecture=architecture))
        self.tokens, self.read = tokens, None

    def generate(self, prompts, sampling):
        assert sampling.temperature == 0
        self.read = prompts[0]
        for start in range(0, len(self.tokens), 4):
            yield np.array([self.tokens[start : start + 4]])


def test_a_span_is_what_stands_between_its_sentinel_and_the_next(tokenizer):
    first, second, third = tokenizer.sentinel_ids
    cat, park = tokenizer.encode(" cat"), tokenizer.encode(" park")
    generator = Scripted(tokenizer, [second, *park, first, *cat, third, tokenizer.eos_id, -1])
    text = "The <extra_id_0> sat in the <extra_id_1>. The <extra_id_2> ran."
    assert fill_spans(generator, text) == ["cat", "park", ""]
    assert generator.read[-1] == tokenizer.eos_id
    assert [id for id in generator.read if id in tokenizer.sentinel_ids] == [first, second, third]


def test_marks_replace_whole_tokens_and_change_nothing_around_them(tokenizer):
    whole = tokenizer.encode("The cat sat on the mat.")
    word = tokenizer.encode(" sat") if tokenizer.kind == "bpe" else tokenizer.encode("sat")
    start = next(i for i in range(len(whole)) if whole[i : i + len(word)] == word)
    expected = [*whole[:start], tokenizer.sentinel_ids[0], *whole[start + len(word) :]]
    marks = {"<extra_id_0>": tokenizer.sentinel_ids[0]}
    assert ids_with(tokenizer, "The cat <extra_id_0> on the mat.", marks) == expected


@pytest.mark.parametrize(
    "architecture, text, message",
    [
        ("decoder", "The <extra_id_0>", "'decoder' cannot fill spans"),
        ("encoder_decoder", "The cat", "must have '<extra_id_0>'"),
        ("encoder_decoder", "<extra_id_1> <extra_id_0>", "further ones in order"),
    ],
)
def test_what_cannot_be_filled_is_refused(tokenizer, architecture, text, message):
    with pytest.raises(ConfigError, match=message):
        fill_spans(Scripted(tokenizer, [], architecture), text)


def test_a_tokenizer_without_sentinels_is_refused():
    plain = train(TokenizerConfig(kind="char"), [STORY])
    with pytest.raises(ConfigError, match="train one with config"):
        fill_spans(Scripted(plain, []), "The <extra_id_0>")

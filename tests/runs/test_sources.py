"""A directory with a model in it is opened once, however often a job asks for it."""

import json

import pytest

from lm.config import ConfigError, to_dict
from lm.models import ModelConfig
from lm.runs.sources import open_source
from lm.tokenizers import TokenizerConfig, train


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, vocab_size=300)
    train(TokenizerConfig(kind="byte"), []).save(tmp_path / "tokenizer")
    return tmp_path


def write(directory, **model):
    config = {"job": "train", "model": to_dict(ModelConfig(**model))}
    (directory / "config.json").write_text(json.dumps(config))


def test_what_is_open_is_not_read_again(directory):
    first = open_source(directory)
    assert open_source(str(directory)).tokenizer is first.tokenizer
    first.config["model"].clear()  # its owner may do so
    assert open_source(directory).config["model"]["vocab_size"] == 300


def test_what_has_changed_is_read_again(directory):
    first = open_source(directory)
    write(directory, vocab_size=1000)
    second = open_source(directory)
    assert (first.model.vocab_size, second.model.vocab_size) == (300, 1000)
    next((directory / "tokenizer").iterdir()).unlink()
    with pytest.raises(ConfigError):
        open_source(directory)

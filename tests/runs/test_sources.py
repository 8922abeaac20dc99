"""A directory with a model in it is opened once, and again only when it has changed."""

import json

import pytest
from tiny_run import write_tiny_run

from lm.config import ConfigError
from lm.runs.sources import open_source


def test_what_is_open_is_read_again_only_when_it_has_changed(tmp_path):
    write_tiny_run(tmp_path, steps=())
    first = open_source(tmp_path)
    assert open_source(str(tmp_path)).tokenizer is first.tokenizer
    first.config["model"].clear()  # its owner may do so
    config = open_source(tmp_path).config
    assert config["model"]["vocab_size"] == 257
    config["model"]["vocab_size"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (first.model.vocab_size, open_source(tmp_path).model.vocab_size) == (257, 1000)
    next((tmp_path / "tokenizer").iterdir()).unlink()
    with pytest.raises(ConfigError):
        open_source(tmp_path)

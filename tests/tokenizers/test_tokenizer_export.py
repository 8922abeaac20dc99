"""Tokenizers as Hugging Face's files: opened again, they give the same ids and texts."""

import json

import pytest
import tokenizers as rust
from trained_tokenizers import ALL, corpus, trained

from lm.config import ConfigError
from lm.tokenizers import load
from lm.tokenizers.base import DESCRIPTION, PROBES
from lm.tokenizers.export import huggingface_files

KINDS = [kind for kind in ALL if kind != "tiktoken"]
# Outside, "▁" is a space to SentencePiece, and the name of a special is that special.
TEXTS = [*corpus()[:40], *(p.replace("▁", "") for p in PROBES if "[UNK]" not in p)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rust_library_gives_the_same_ids(kind):
    tokenizer = trained(kind)
    files = huggingface_files(tokenizer)
    engine = rust.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in TEXTS:
        ids = engine.encode(text).ids
        assert ids == tokenizer.encode(text), text
        if tokenizer.lossless:
            assert engine.decode(ids) == text
    for name, id in tokenizer.special_ids.items():
        assert engine.token_to_id(name) == id
    assert engine.encode("<|endoftext|>").ids == [tokenizer.eos_id]
    named = json.loads(files["tokenizer_config.json"])
    assert tokenizer.special_ids[named["eos_token"]] == tokenizer.eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_opens_here_with_the_same_ids(kind, tmp_path):
    tokenizer = trained(kind)
    for name, data in huggingface_files(tokenizer).items():
        assert name != DESCRIPTION
        (tmp_path / name).write_bytes(data)
    again = load(tmp_path)
    assert again.vocab_size == tokenizer.vocab_size and again.eos_id == tokenizer.eos_id
    assert again.special_ids == tokenizer.special_ids
    assert again.kind == "huggingface"
    kept = tokenizer.lossless and "sentencepiece" not in kind  # outside, "▁" is a space
    assert again.lossless == kept
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    again.save(tmp_path / "saved")
    assert load(tmp_path / "saved").files() == again.files()


def test_a_kind_without_an_equivalent_is_refused():
    with pytest.raises(ConfigError, match="'tiktoken' cannot be written"):
        huggingface_files(trained("tiktoken"))

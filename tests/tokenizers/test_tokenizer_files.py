"""Saving, reloading, and opening what others wrote."""

import contextlib
import json
import pickle

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from trained_tokenizers import corpus, trained

from lm.config import ConfigError
from lm.tokenizers import TokenizerConfig, load, train
from lm.tokenizers.base import DESCRIPTION, PROBES
from lm.tokenizers.export import huggingface_files


def assert_same(a, b):
    assert (a.fingerprint, a.files(), a.kind) == (b.fingerprint, b.files(), b.kind)
    assert (a.eos_id, a.bos_id, a.pad_id, a.unk_id) == (b.eos_id, b.bos_id, b.pad_id, b.unk_id)
    assert (a.vocab_size, a.lossless) == (b.vocab_size, b.lossless)
    for text in (*PROBES, *corpus()[:20]):
        assert a.encode(text) == b.encode(text)
    assert [a.token_bytes(i) for i in range(a.vocab_size)] == [
        b.token_bytes(i) for i in range(b.vocab_size)
    ]


def test_saved_loaded_and_pickled_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert_same(load(tmp_path), tokenizer)
    assert_same(train(TokenizerConfig(path=str(tmp_path)), iter(())), tokenizer)
    assert_same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)
    load(tmp_path).save(tmp_path / "again")
    for file in tmp_path.glob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_fields_set_beside_a_path_are_followed(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    asked = {"mask_token": True, "num_sentinels": 3, "special_tokens": ("<|user|>", "<|bot|>")}
    changed = train(TokenizerConfig(path=str(tmp_path), **asked), [])
    names = ["<|user|>", "<|bot|>", "[MASK]", *(f"<extra_id_{i}>" for i in range(3))]
    new = {name: tokenizer.vocab_size + i for i, name in enumerate(names)}
    assert changed.special_ids == tokenizer.special_ids | new
    assert changed.vocab_size == tokenizer.vocab_size + len(new)
    assert changed.mask_id == new["[MASK]"] and changed.sentinel_ids == tuple(new.values())[3:]
    for text in (*PROBES, *corpus()[:20], "<|user|>hi[MASK]<extra_id_2>"):
        assert changed.encode(text) == tokenizer.encode(text)
    assert changed.decode([*new.values(), *changed.encode("the cat")]) == "the cat"
    changed.save(tmp_path / "changed")
    assert_same(load(tmp_path / "changed"), changed)
    again = train(TokenizerConfig(path=str(tmp_path / "changed"), **asked), [])
    assert again.fingerprint == changed.fingerprint, "what is there is not added again"
    swapped = TokenizerConfig(path=str(tmp_path / "changed"), bos_token="<|user|>")
    assert train(swapped, []).bos_id == new["<|user|>"]
    if tokenizer.kind != "tiktoken":
        files = huggingface_files(changed)
        engine = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        assert {name: engine.token_to_id(name) for name in new} == new
        assert json.loads(files["tokenizer_config.json"])["mask_token"] == "[MASK]"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"kind": "char"}, r"kind='char' is not the kind .* 'bpe'"),
        ({"kind": "tiktoken"}, r"kind='tiktoken' is not the kind"),
        ({"special_tokens": ("the",)}, r"'the' cannot be a special token"),
        ({"bos_token": "<nobody>"}, r"bos_token='<nobody>' is not one of '<\|endoftext\|>'"),
        ({"eos_token": "the"}, r"eos_token='the' is not one of"),
    ],
)
def test_fields_that_a_tokenizer_cannot_follow_are_refused(fields, words, tmp_path):
    trained("bpe").save(tmp_path)
    with pytest.raises(ConfigError, match=rf"config\.tokenizer\.path=.*{words}"):
        train(TokenizerConfig(path=str(tmp_path), **fields), [])
    (tmp_path / DESCRIPTION).unlink()  # and so it is where others wrote the files
    with pytest.raises(ConfigError, match=r"config\.tokenizer\.path="):
        train(TokenizerConfig(path=str(tmp_path), **fields), [])


def test_roles_come_from_the_files_beside_tokenizer_json(tmp_path):
    rust = tokenizers.Tokenizer.from_str(trained("bpe").model_files()["tokenizer.json"].decode())
    rust.add_special_tokens(["<a>", "<b>", "<c>"])
    rust.add_tokens(["<think>"])  # an added token that is text, not a special
    rust.enable_truncation(3)
    rust.enable_padding()
    rust.save(str(tmp_path / "tokenizer.json"))
    roles = {"eos_token": {"content": "<a>"}, "pad_token": "<c>", "chat_template": "{{x}}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<b>"}))
    found = load(tmp_path)
    ids = [rust.token_to_id(name) for name in ("<a>", "<b>", "<c>")]
    assert [found.eos_id, found.bos_id, found.pad_id] == ids
    text = "<a> <think> <|endoftext|> one two three four"
    assert found.decode(found.encode(text)) == text
    assert not set(found.encode(text)) & set(found.special_ids.values())
    assert rust.token_to_id("<think>") in found.encode(text)
    found.save(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), found)
    kept = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == "{{x}}"


def test_a_vocabulary_without_end_of_text_gets_one_after_its_last_id(tmp_path):
    rust = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.unk_id) == (2, 3, 0)
    tokenizer.save(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), tokenizer)


def test_rank_files_load_and_follow_the_merges_of_the_bpe_they_came_from(tmp_path):
    bpe, ranks = trained("bpe"), trained("tiktoken")
    ranks.save(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    again = load(tmp_path)  # only the rank file
    assert again.fingerprint == ranks.fingerprint
    same = sum(again.encode(text) == bpe.encode(text) for text in corpus())
    assert same > 0.95 * len(corpus())
    assert again.eos_id == bpe.eos_id


def truncate(directory, name):
    data = (directory / name).read_bytes()
    (directory / name).write_bytes(data[: len(data) // 2])


def test_damaged_files_are_named_not_traced(tokenizer, tmp_path):
    for name in tokenizer.files():
        if name == "tokenizer_config.json":
            continue
        directory = tmp_path / name
        tokenizer.save(directory)
        truncate(directory, name)
        with pytest.raises(ConfigError, match=r"damaged|rank file|missing") as caught:
            load(directory)
        assert "\n" not in str(caught.value)
        tokenizer.save(directory)
        (directory / name).unlink()
        refused = pytest.raises(ConfigError, match="missing")
        # Without its description a directory may still open as someone else's.
        with refused if name != DESCRIPTION else contextlib.suppress(ConfigError):
            load(directory)


def test_a_changed_file_is_noticed(tmp_path):
    trained("char").save(tmp_path)
    file = tmp_path / "characters.json"
    file.write_text(file.read_text().replace("a", "q"))
    with pytest.raises(ConfigError, match="changed or damaged: its fingerprint"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "x.tiktoken", "corpus.txt"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe\0garbage", b"some text\nof a corpus"])
def test_files_that_are_no_tokenizer_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.path=") as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load(tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write a tokenizer into"):
        trained("byte").save(tmp_path / "file" / "below")

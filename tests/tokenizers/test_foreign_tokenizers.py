"""Directories of the model families, built small with the library they were made with."""

import io
import json

import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from trained_tokenizers import corpus

from lm.config import ConfigError
from lm.tokenizers import load

TEXTS = (
    *corpus()[:10],
    "The cat sat.",
    "  two  spaces",
    "<mask> [MASK] <extra_id_0> </s> <pad>",
    "",
)


def special(name):
    return AddedToken(name, special=True, normalized=False)


def byte_level(specials):
    """GPT-2's kind of tokenizer, its specials first."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[special(name) for name in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(corpus(), trainer)
    return rust


def word_piece():
    """BERT's."""
    rust = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer()
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=[special(name) for name in names], show_progress=False
    )
    rust.train_from_iterator(corpus(), trainer)
    return rust


def unigram():
    """T5's: normalised, a space in front, sentinels last and counted down."""
    rust = Tokenizer(models.Unigram())
    rust.normalizer = normalizers.NFKC()
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=[special(name) for name in ("<pad>", "</s>", "<unk>")],
        unk_token="<unk>",
        show_progress=False,
    )
    rust.train_from_iterator(corpus(), trainer)
    rust.add_special_tokens([special(f"<extra_id_{i}>") for i in range(99, -1, -1)])
    return rust


def with_bytes(specials, prefix):
    """Llama's, with a space in front, or Gemma's, without: pairs of characters, else bytes."""
    rust = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blank = normalizers.Replace(" ", "▁")
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if prefix else blank
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*map(special, specials), *bytes_], show_progress=False
    )
    # The trainer's words: whatever a "▁" begins.
    rust.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    rust.train_from_iterator([text.replace("\n", " ") for text in corpus()], trainer)
    rust.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    description = json.loads(rust.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] in specials
    ]
    return Tokenizer.from_str(json.dumps(description))


def save(directory, rust, config=None, specials=None):
    rust.save(str(directory / "tokenizer.json"))
    for name, content in (("tokenizer_config", config), ("special_tokens_map", specials)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))


def check_same(tokenizer, rust, exact=True):
    """Ids and text are the library's, and the text is that of the tokens one by one."""
    rust = Tokenizer.from_str(rust.to_str())
    rust.encode_special_tokens = True
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if "<" not in text:  # names of specials are text here, and some libraries find them
            assert ids == rust.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == rust.decode(ids)
        if exact:
            assert tokenizer.decode(ids) == text
        assert not set(tokenizer.special_names) - {tokenizer.unk_id} & set(ids)


def roles(tokenizer):
    names = {id: name for name, id in tokenizer.special_ids.items()}
    ids = ("bos", "eos", "pad", "unk", "mask")
    return [names.get(getattr(tokenizer, f"{role}_id")) for role in ids]


FAMILIES = {
    "gpt2": (
        ["<|endoftext|>"],
        dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        ["<|endoftext|>", "<|endoftext|>", None, "<|endoftext|>", None],
    ),
    "roberta": (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        {
            **{"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"},
            **{"pad_token": "<pad>", "unk_token": "<unk>"},
            "mask_token": {"content": "<mask>", "lstrip": True},
        },
        ["<s>", "</s>", "<pad>", "<unk>", "<mask>"],
    ),
    "opt": (
        ["<s>", "<pad>", "</s>", "<unk>"],
        {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"},
        ["</s>", "</s>", "<pad>", "</s>", None],
    ),
    "bloom": (
        ["<unk>", "<s>", "</s>", "<pad>"],
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ["<s>", "</s>", "<pad>", "<unk>", None],
    ),
    "neox": (
        ["<|endoftext|>", "<|padding|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        ["<|endoftext|>", "<|endoftext|>", "<|padding|>", None, None],
    ),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|begin_of_text|>", "<|eot_id|>", None, None, None],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_byte_level_families_have_their_roles_and_their_text(family, file, tmp_path):
    names, config, expected = FAMILIES[family]
    rust = byte_level(names)
    if family == "neox":  # runs of spaces were added as tokens that are text
        rust.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    save(tmp_path, rust, **{"config" if file == "tokenizer_config" else "specials": config})
    tokenizer = load(tmp_path)
    assert roles(tokenizer) == expected
    assert tokenizer.lossless
    check_same(tokenizer, rust)


@pytest.mark.parametrize("family", ["gpt2", "roberta", "opt"])
def test_vocabularies_without_a_tokenizer_json_are_the_same(family, tmp_path):
    names, config, expected = FAMILIES[family]
    rust = byte_level(names)
    description = json.loads(rust.to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(description["model"]["vocab"]))
    merges = [" ".join(pair) for pair in description["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(config))
    size = rust.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size}))
    tokenizer = load(tmp_path)
    assert roles(tokenizer) == expected
    assert tokenizer.vocab_size == size + 1 and tokenizer.special_ids["<new>"] == size
    check_same(tokenizer, rust)
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size + 5}))
    with pytest.raises(ConfigError, match=rf"'<new>' cannot have the id {size + 5}"):
        load(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"vocab\.json has no merges\.txt"):
        load(tmp_path)


def test_bert_has_its_brackets(tmp_path):
    rust = word_piece()
    save(tmp_path, rust)
    for config in (None, {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}):
        save(tmp_path, rust, config)
        tokenizer = load(tmp_path)
        assert roles(tokenizer) == ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
        check_same(tokenizer, rust, exact=False)


@pytest.mark.parametrize("settings", [None, {"do_lower_case": True}])
def test_berts_vocabulary_alone_is_the_same(settings, tmp_path):
    rust = word_piece()
    names = sorted(rust.get_vocab(), key=rust.get_vocab().__getitem__)
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n")
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(tmp_path)
    assert roles(tokenizer) == ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    assert tokenizer.vocab_size == rust.get_vocab_size()
    check_same(tokenizer, rust, exact=False)
    assert tokenizer.encode("THE") == tokenizer.encode("the")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load(tmp_path).encode("THE") != tokenizer.encode("the")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"vocab\.txt is no WordPiece vocabulary"):
        load(tmp_path)


CASES = ["The CAT", "the cat", "Café", "cafe"]


@pytest.mark.parametrize("kind", ["BertTokenizer", "BertTokenizerFast", None])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_berts_settings_overrule_its_tokenizer_json(settings, stored, kind, tmp_path):
    rust = word_piece()
    rust.normalizer = normalizers.BertNormalizer(lowercase=stored)
    save(tmp_path, rust, {**settings, "tokenizer_class": kind})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    ids = [load(tmp_path).encode(text) for text in CASES]
    assert (ids[0] == ids[1]) == settings.get("do_lower_case", True)
    assert (ids[2] == ids[3]) == (not settings)
    # Of a class of its own, the file is the tokenizer.
    save(tmp_path, rust, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    check_same(load(tmp_path), rust, exact=False)


def test_a_space_in_front_is_the_classes_choice(tmp_path):
    rust = byte_level(["<|endoftext|>"])
    save(tmp_path, rust, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})
    assert load(tmp_path).encode("cat") == rust.encode(" cat").ids != rust.encode("cat").ids
    save(tmp_path, rust, {"tokenizer_class": "GPT2Tokenizer"})
    assert load(tmp_path).encode("cat") == rust.encode("cat").ids


def test_qwen_has_words_of_its_own(tmp_path):
    rust = byte_level(["<|endoftext|>", "<|im_end|>"])
    description = json.loads(rust.to_str())["model"]
    vocabulary = description["vocab"] | {"12": len(description["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in [*description["merges"], ["1", "2"]]]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    plain = load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    qwen = load(tmp_path)
    assert qwen.encode("e\u0301") == plain.encode("é") != plain.encode("e\u0301")
    assert (len(plain.encode("12")), len(qwen.encode("12"))) == (1, 2)


def test_gpt1_marks_the_ends_of_words(tmp_path):
    rust = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    rust.train_from_iterator(corpus(), trainer)
    model = json.loads(rust.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokenizer = load(tmp_path)
    assert tokenizer.unk_id == 0
    for text in corpus()[:10]:
        assert tokenizer.encode(text) == rust.encode(text).ids


def test_t5_counts_its_sentinels_down_and_starts_with_padding(tmp_path):
    rust = unigram()
    save(tmp_path, rust, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    tokenizer = load(tmp_path)
    size = rust.get_vocab_size()
    assert tokenizer.sentinel_ids == tuple(range(size - 1, size - 101, -1))
    assert tokenizer.sentinel_ids[0] == rust.token_to_id("<extra_id_0>")
    assert roles(tokenizer) == ["<pad>", "</s>", "<pad>", "<unk>", None]
    assert not tokenizer.lossless and tokenizer.lossy_because
    assert rust.encode("the cat</s>").ids[-1] == tokenizer.eos_id, "the library finds names"
    check_same(tokenizer, rust, exact=False)
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved").sentinel_ids == tokenizer.sentinel_ids


def sentence_piece(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        vocab_size=330,
        minloglevel=3,
        **settings,
    )
    return model.getvalue()


LISTED = {str(332 - i): {"content": f"<extra_id_{i}>"} for i in (0, 1)}


@pytest.mark.parametrize(
    "file, content, count",
    [
        ("config.json", {"model_type": "t5"}, 100),
        ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 7}, 7),
        ("tokenizer_config.json", {"added_tokens_decoder": LISTED}, 2),
    ],
)
def test_t5s_sentence_pieces_get_the_sentinels_they_lack(file, content, count, tmp_path):
    data = sentence_piece(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "spiece.model").write_bytes(data)
    assert load(tmp_path).sentinel_ids == ()
    (tmp_path / file).write_text(json.dumps(content))
    tokenizer = load(tmp_path)
    last = 332 if count == 2 else 329 + count
    assert tokenizer.sentinel_ids == tuple(range(last, last - count, -1))
    assert tokenizer.vocab_size == last + 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 1, 0, 2)
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    ids = tokenizer.encode("the cat <extra_id_0>")
    assert ids == library.encode("the cat <extra_id_0>")
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*ids, tokenizer.sentinel_ids[0]]) == library.decode(ids) == "the cat"
    tokenizer.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (again.fingerprint, again.bos_id) == (tokenizer.fingerprint, 0)


def test_llamas_sentence_pieces_have_their_roles(tmp_path):
    data = sentence_piece(model_type="bpe", byte_fallback=True, hard_vocab_limit=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load(tmp_path)
    assert roles(tokenizer) == ["<s>", "</s>", None, "<unk>", None]
    assert tokenizer.kind == "sentencepiece_bpe" and not tokenizer.lossless
    assert tokenizer.sentinel_ids == ()
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in ("the cat sat", "Mia 🙂 ran.", ""):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved").files() == tokenizer.files()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_pairs_with_bytes_behind_them_keep_the_text(family, tmp_path):
    if family == "llama":
        rust = with_bytes(["<unk>", "<s>", "</s>"], prefix=True)
        expected = ["<s>", "</s>", None, "<unk>", None]
    else:
        rust = with_bytes(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], prefix=False)
        expected = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>"]
    save(tmp_path, rust)
    tokenizer = load(tmp_path)
    assert roles(tokenizer) == expected
    assert tokenizer.drops_first_space == (family == "llama")
    check_same(tokenizer, rust)
    ids = tokenizer.encode("漢字 é")
    assert tokenizer.decode(ids) == "漢字 é" == rust.decode(ids)
    assert b"\xe6" in [tokenizer.token_bytes(id) for id in ids], "what is unknown is bytes"

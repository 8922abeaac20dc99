"""Tokenizers of translators: Marian's two models of one vocabulary, mBART's with languages."""

import io
import json
import pickle

import pytest
import sentencepiece

from lm import tokenizers
from lm.config import ConfigError
from lm.inference import Framing
from lm.tokenizers.export import huggingface_files
from lm.tokenizers.kinds import languages_of

ENGLISH = ["The old cat sat on the mat.", "A cat is not a dog."]
FRENCH = ["Le vieux chat est assis.", "Un chat n’est pas un chien."]


def pieces(texts):
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 9), model_writer=data, vocab_size=60, minloglevel=3,
        hard_vocab_limit=False,
    )  # fmt: skip
    return data.getvalue()


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    directory = tmp_path_factory.mktemp("marian")
    known = ["</s>", "<unk>"]
    for name, texts in (("source.spm", ENGLISH), ("target.spm", FRENCH)):
        (directory / name).write_bytes(pieces(texts))
        processor = sentencepiece.SentencePieceProcessor(str(directory / name))
        known += [processor.id_to_piece(id) for id in range(3, processor.get_piece_size())]
    known = dict.fromkeys([*known, ">>fra<<", ">>deu<<", "<pad>"])
    vocabulary = {name: id for id, name in enumerate(known)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return directory


def mbart(directory, kind):
    (directory / "sentencepiece.bpe.model").write_bytes(pieces(ENGLISH))
    config = {"tokenizer_class": kind, "src_lang": "fr_XX", "tgt_lang": "ro_RO"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_source_and_target_are_cut_by_models_of_their_own(marian):
    tokenizer = tokenizers.load(marian)
    for own, texts in ((tokenizer, ENGLISH), (tokenizer.target, FRENCH)):
        for text in texts:
            ids = own.encode(text)
            assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.encode(FRENCH[0]) != tokenizer.target.encode(FRENCH[0])
    names = {id: name for name, id in tokenizer.special_ids.items()}
    assert [names[i] for i in (tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id)] == [
        "</s>", "<unk>", "<pad>",
    ]  # fmt: skip
    assert not set(tokenizer.encode("</s> <pad>")) & {tokenizer.eos_id, tokenizer.pad_id}


def test_the_language_in_front_of_a_source_is_one_token(marian):
    tokenizer = tokenizers.load(marian)
    assert tokenizer.languages == {"fra": tokenizer.vocab_size - 3, "deu": tokenizer.vocab_size - 2}
    rest = tokenizer.encode("A cat")
    assert tokenizer.encode(">>deu<< A cat") == [tokenizer.languages["deu"], *rest]
    assert tokenizer.encode(">>xyz<<A cat") == [tokenizer.unk_id, *rest]


@pytest.mark.parametrize("kind", ["", "MBartTokenizer", "MBart50Tokenizer"])
def test_saved_and_opened_it_is_the_same(marian, kind, tmp_path):
    tokenizer = tokenizers.load(mbart(tmp_path, kind) if kind else marian)
    tokenizer.save(tmp_path / "saved")
    for other in (tokenizers.load(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode(ENGLISH[0]) == tokenizer.encode(ENGLISH[0])
        assert other.languages == tokenizer.languages
    side = pickle.loads(pickle.dumps(tokenizer.target))
    assert side.encode(FRENCH[0]) == tokenizer.target.encode(FRENCH[0])
    (tmp_path / "out").mkdir()
    for name, data in huggingface_files(tokenizer).items():
        (tmp_path / "out" / name).write_bytes(data)
    assert tokenizers.load(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_mbart_has_a_token_for_each_language(tmp_path):
    first = tokenizers.load(mbart(tmp_path, "MBartTokenizer"))
    assert len(first.languages) == 25 and first.special_names[first.vocab_size - 1] == "<mask>"
    assert first.decode(first.encode(ENGLISH[0])) == ENGLISH[0]
    more = tokenizers.load(mbart(tmp_path, "MBart50Tokenizer"))
    assert len(more.languages) == 52 and first.languages.items() <= more.languages.items()
    assert languages_of(tmp_path) == ("fr_XX", "ro_RO", False)


def test_languages_stand_where_each_model_has_them(marian, tmp_path):
    two = tokenizers.load(marian)
    plain = Framing((), (two.eos_id,), (two.pad_id,))
    assert plain.between(two, target="fra").before == (two.languages["fra"],)
    with pytest.raises(ConfigError, match=r"source_language=.fra..*do not name"):
        plain.between(two, source="fra")
    with pytest.raises(ConfigError, match=r"target_language=.fr..*did you mean 'fra'"):
        plain.between(two, target="fr")

    many = tokenizers.load(mbart(tmp_path, "MBart50Tokenizer"))
    english, french, czech = (many.languages[code] for code in ("en_XX", "fr_XX", "cs_CZ"))
    end = many.eos_id
    for start in ((end,), (end, english)):
        found = Framing((english,), (end,), start).between(many, "fr_XX", "cs_CZ")
        assert found == Framing((french,), (end,), (end, czech))
    behind = Framing((), (end, english), (english,)).between(many, "fr_XX", "cs_CZ")
    assert behind == Framing((), (end, french), (czech,))


@pytest.mark.parametrize(
    "config, word",
    [
        ({"tokenizer_class": "XLMRobertaTokenizer"}, "tokenizer_class='XLMRoberta'"),
        ({"tokenizer_class": "MBartTokenizer", "separate_vocabs": True}, "separate_vocabs"),
    ],
)
def test_what_cannot_be_read_is_named(config, word, tmp_path):
    directory = mbart(tmp_path, "MBartTokenizer")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=word):
        tokenizers.load(directory)


def test_a_missing_file_is_named(marian, tmp_path):
    (tmp_path / "source.spm").write_bytes((marian / "source.spm").read_bytes())
    with pytest.raises(ConfigError, match=r"target\.spm"):
        tokenizers.load(tmp_path)

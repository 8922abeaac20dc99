"""The invented language: its rules, read off its sentences."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from bytes_tokenizer import ByteTokenizer

from lm.config import ConfigError
from lm.data import DataConfig, documents, pairs, prepare
from lm.data.storyworld import language
from lm.data.storyworld import language_words as lw
from lm.data.storyworld.language import Clause, Phrase, Relative, Sentence, pair

PAIRS = [pair(7, index) for index in range(4000)]


def word_forms():
    """Every form of every word: the form → what it is."""
    forms = {}

    def add(form, *meaning):
        assert forms.setdefault(form, meaning) == meaning, f"{form!r} has two meanings"

    for noun in lw.BEINGS + lw.THINGS + lw.PLACES:
        for plural, definite, case, also in itertools.product(
            (False, True), (False, True), ("", lw.ACCUSATIVE, *lw.CASES.values()), (False, True)
        ):
            if also and case not in ("", lw.ACCUSATIVE):
                continue
            suffixes = [lw.PLURAL] * plural + [lw.DEFINITE] * definite
            suffixes += [case] * bool(case) + [lw.ALSO] * also
            add(lw.attach(noun.stem, *suffixes), "noun", noun, plural, definite, case, also)
    for name in lw.NAMES:
        for case in ("", lw.ACCUSATIVE, *lw.CASES.values()):
            add(lw.attach(name.lower(), *[case] * bool(case)), "name", name, case, False)
        for case in ("", lw.ACCUSATIVE):
            suffixes = [*[case] * bool(case), lw.ALSO]
            add(lw.attach(name.lower(), *suffixes), "name", name, case, True)
        add(lw.attach(name.lower(), lw.GENITIVE), "of", name)
    for adjective, stem in lw.ADJECTIVES.items():
        add(stem, "adjective", adjective, False)
        add(lw.attach(stem, lw.PLURAL), "adjective", adjective, True)
    for kind, table in (
        ("number", lw.NUMBERS),
        ("adverb", lw.ADVERBS),
        ("post", lw.POSTPOSITIONS),
        ("joint", lw.JOINED),
        ("order", {"because": lw.BECAUSE, "when": lw.WHEN}),
    ):
        for word, stem in table.items():
            add(stem, kind, word)
    add(lw.THAT, "that")
    for verb in lw.TRANSITIVE + lw.GIVING + lw.INTRANSITIVE + lw.GOING:
        for tense, negated, many, relative in itertools.product(
            (lw.PAST, lw.PRESENT, lw.FUTURE), *[(False, True)] * 3
        ):
            suffixes = [tense] + [lw.NOT] * negated + [lw.MANY] * many + [lw.RELATIVE] * relative
            add(lw.attach(verb.stem, *suffixes), "verb", verb, tense, negated, many, relative)
    return forms


FORMS = word_forms()


class Reader:
    """Ilvani → the structure it was spelled from."""

    def __init__(self, text):
        assert text.endswith(".")
        self.words = [FORMS[word] for word in text[:-1].split()]
        self.at = 0

    def peek(self, *kinds):
        return self.at < len(self.words) and self.words[self.at][0] in kinds

    def take(self):
        self.at += 1
        return self.words[self.at - 1]

    def sentence(self):
        parts, joints = [self.part()], []
        while self.at < len(self.words):
            kind, joint = self.take()
            assert kind == "joint"
            joints.append(joint)
            parts.append(self.part())
        return Sentence(tuple(parts), tuple(joints))

    def part(self):
        clause = self.clause()
        if self.peek("order"):
            relation = self.take()[1]
            return self.clause(), relation, clause
        return clause, "", None

    def clause(self):
        subjects, adverb, places, objects = [self.phrase("")], "", [], []
        if self.peek("noun", "name") and self.words[self.at][-1]:
            subjects.append(self.phrase("", also=True))
        if self.peek("adverb"):
            adverb = self.take()[1]
        while self.peek("noun", "name"):
            case = self.words[self.at][-2]
            phrase = self.phrase(case, self.words[self.at][-1])
            if case == lw.ACCUSATIVE:
                objects.append(phrase)
            elif case:
                assert not objects, "objects come last"
                places.append((next(p for p, c in lw.CASES.items() if c == case), phrase))
            else:
                assert not objects, "objects come last"
                kind, preposition = self.take()
                assert kind == "post"
                places.append((preposition, phrase))
        kind, verb, tense, negated, many, relative = self.take()
        assert kind == "verb" and not relative, "a clause ends with its verb"
        read = Clause(
            tuple(subjects), verb, tense, negated, tuple(objects), tuple(places[::-1]), adverb
        )
        assert read.several == many, "the verb agrees with its subject"
        return read

    def phrase(self, case, also=False):
        word = self.take()
        assert word[-2:] == (case, also)
        if word[0] == "name":
            return Phrase(None, word[1])
        _, noun, plural, definite, *_ = word
        adjectives, determiner, relative = [], "the" if definite else "a", None
        while self.peek("adjective"):
            _, adjective, many = self.take()
            assert many == plural, "an adjective agrees with its noun"
            adjectives.append(adjective)
        if self.peek("number", "of"):
            assert determiner == "a"
            kind, determiner = self.take()
            assert kind == "of" or not plural, "no plural after a number"
        if self.peek("that"):
            self.take()
            other_case = self.words[self.at][-2]
            assert other_case in ("", lw.ACCUSATIVE)
            other = self.phrase(other_case)
            kind, verb, tense, negated, many, is_relative = self.take()
            assert kind == "verb" and is_relative and not negated
            relative = Relative(verb, tense == lw.PAST, other, other_case == "")
            subject = other if relative.subject else Phrase(noun, "", determiner, plural)
            assert subject.several == many, "the verb of a relative clause agrees with its subject"
        return Phrase(noun, "", determiner, plural, tuple(adjectives[::-1]), relative)


def test_translations_can_be_read_back_to_the_very_sentence():
    for source, translation in PAIRS:
        assert language.english(Reader(translation).sentence()) == source


def test_a_sentence_has_one_translation_and_a_translation_one_sentence():
    there, back = {}, {}
    for source, translation in PAIRS:
        assert there.setdefault(source, translation) == translation
        assert back.setdefault(translation, source) == source


def test_the_example_of_the_docstring_is_true():
    nouns = {noun.one: noun for noun in lw.BEINGS + lw.THINGS}
    saw_tom = Relative(lw.TRANSITIVE[1], True, Phrase(None, "Tom"), False)
    clause = Clause(
        (Phrase(nouns["dog"], "", "the", False, ("old",), saw_tom),),
        lw.GIVING[0],
        lw.FUTURE,
        True,
        (Phrase(nouns["ball"], "", "two", False, ("red",)),),
        (("to", Phrase(nouns["cat"], "", "the", True)),),
    )
    sentence = Sentence(((clause, "", None),), ())
    for text in (language.english(sentence), language.ilvani(sentence)):
        assert f"    {text}\n" in language.__doc__


def test_a_pair_depends_on_its_numbers_only():
    code = "from lm.data.storyworld.language import pair; print(pair(7, 3), pair(7, 2**63))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown == f"{pair(7, 3)} {pair(7, 2**63)}\n"
    assert pair(7, 3) == PAIRS[3] != pair(8, 3)
    for seed, index in ((-1, 0), (0, -1), (0, 2**64)):
        with pytest.raises(ConfigError, match="must be"):
            pair(seed, index)


def test_sentences_are_short_and_long_and_new():
    lengths = np.array([len(source.split()) for source, _ in PAIRS])
    assert lengths.min() <= 3 and lengths.max() == language.MAX_WORDS
    shares, _ = np.histogram(lengths, (0, 5, 10, 20, 30, 41))
    assert (shares > 0.05 * len(PAIRS)).all(), "every length is common"
    seen = {pair(8, index)[0] for index in range(4000)}
    new = [source for source, _ in PAIRS if len(source.split()) > 6 and source not in seen]
    assert len(new) > 0.99 * (lengths > 6).sum()


def test_stems_and_words_keep_to_one_class_of_vowels():
    for word in {word.strip(".") for _, text in PAIRS for word in text.split()}:
        if not word.startswith(tuple(name.lower() for name in lw.NAMES)):
            assert not (set(word) & set(lw.BACK) and set(word) & set(lw.FRONT)), word


def test_suffixes_take_their_vowels_from_the_word():
    assert lw.attach("kolu", lw.PLURAL, lw.DEFINITE, lw.ACCUSATIVE) == "kolurusam"
    assert lw.attach("selin", lw.PLURAL, lw.DEFINITE, lw.ACCUSATIVE) == "selinrisem"
    assert lw.attach("selin", lw.ACCUSATIVE) == "selinem", "a vowel links two consonants"
    assert lw.attach("kolu", lw.ACCUSATIVE) == "kolum"
    assert lw.attach("rosie", lw.GENITIVE) == "rosieni" and lw.attach("tom", "lA") == "tomla"


# As a corpus.

CONFIG = DataConfig(path="translation", num_documents=600, validation_fraction=0.2)


def test_splits_are_disjoint_and_whole(tmp_path):
    parts = {split: list(pairs(CONFIG, split, 3)) for split in ("train", "validation")}
    assert sorted(itertools.chain(*parts.values())) == sorted(pair(3, i) for i in range(600))
    sources = {split: {source for source, _ in both} for split, both in parts.items()}
    assert not sources["train"] & sources["validation"]
    assert len(parts["validation"]) == pytest.approx(120, abs=40)
    texts = list(documents(CONFIG, "train", 3))
    assert texts == [text for both in parts["train"] for text in both]
    # The cache holds the same: a source, its target, and so on.
    config = dataclasses.replace(CONFIG, cache_dir=str(tmp_path))
    (train,), (validation,) = prepare(config, ByteTokenizer(), 3)
    assert train.pairs and validation.pairs
    assert train.num_documents == len(texts)
    read = bytes(np.where(train.tokens < 256, train.tokens, 10).astype(np.uint8))
    assert read.decode().split("\n")[:-1] == texts
    (again,), _ = prepare(config, ByteTokenizer(), 3)
    assert again.pairs and again.key == train.key

"""Questions on little stories have the answers that follow, and known readers get known scores."""

import re
import types
import zlib

import numpy as np
import pytest
import tiny_jobs

from lm.config import defaults
from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.asking import Draw
from lm.evaluation import reasoning
from lm.evaluation.card import NotApplicable
from lm.evaluation.reasoning import ReasoningSettings, measure
from lm.evaluation.scoring import Scored
from lm.evaluation.subject import Likely
from lm.jobs import evaluate
from lm.tokenizers import TokenizerConfig, train


class Reader:
    """One who finds a continuation as likely as a function of both says."""

    run = types.SimpleNamespace(config={"data": {"path": "storyworld"}})

    def __init__(self, logprob, tokenizer=None):
        self.logprob = logprob
        self.tokenizer = tokenizer or train(TokenizerConfig(kind="byte"), [])

    def likely(self, pairs):
        numbers = [np.array([self.logprob(*pair)], np.float32) for pair in pairs]
        return [Likely(Scored(n, n.astype(np.int32), n), False) for n in numbers]


def names(text):
    return re.findall("|".join((*lx.GIRLS, *lx.BOYS)), text)


def test_who_has_a_thing_is_the_last_that_it_was_given_to():
    found = reasoning.handed_on(Draw("x"), 0)
    assert len(found) == 9 and len({one.story for one in found}) == 1
    for one in found:
        *_, last = re.findall(r"\w+ gave (?:the \w+ to )?(\w+)", one.context)
        assert one.options[one.right].startswith(f" {last} had the ")
        assert one.roles[one.right] == ("second" if "one gift" in one.kind else "third")
    rights = [names(one.options[one.right])[0] for one in found if "two gifts" in one.kind]
    assert len({*rights}) == 3  # no name is the likeliest answer


def test_where_a_thing_is_follows_from_who_has_it():
    found = [one for n in range(20) for one in reasoning.whereabouts(Draw(f"{n}"), n)]
    for one in found:
        *told, asking = one.context.split(". ")
        what = asking.split()[-2]
        who = what if what in names(what) else next(names(s)[0] for s in told if what in s)
        place = one.options[one.right].strip(" .")
        assert f"{who} was {place}" in one.context
    assert 0.4 < np.mean([one.right for one in found]) < 0.6


def test_how_many_are_left_is_what_was_there_less_the_gifts():
    for number in range(30):
        for one in reasoning.left_over(Draw(f"{number}"), number):
            counts = re.findall(r"(?:had|gave \w+) (one|two|three|four|five|six) ", one.context)
            first, *given = map(lx.NUMBERS.index, counts)
            assert len(given) == (2 if one.kind.endswith("two") else 1)
            answer = lx.NUMBERS.index(one.options[one.right].split()[0])
            assert answer == first - sum(given) > 0
            assert len({*one.options}) == len(one.options) == 6


def test_negations_are_of_true_and_false_statements_in_turn():
    found = reasoning.negations(3, 10)
    assert [one.kind for one in found] == ["true", "false"] * (len(found) // 2)
    assert [one.right for one in found] == [0, 1] * (len(found) // 2)
    assert len({one.story for one in found}) == 10
    for one in found:
        assert one.context.endswith(" was") and one.options[1] == one.options[0].replace(
            " ", " not ", 1
        )


def test_one_who_knows_is_right_and_one_who_is_anchored_is_moved():
    # The truth of each question, found anew by its text.
    settings, draw = ReasoningSettings(stories=8), Draw("reasoning 5")
    every = [one for n in range(8) for one in reasoning.handed_on(draw, n)]
    every += [one for n in range(8) for one in reasoning.whereabouts(draw, n)]
    every += [one for n in range(8) for one in reasoning.left_over(draw, n)]
    every += reasoning.negations(5, 8)
    truth = {
        (one.context, option): -9.0 * (place != one.right)
        for one in every
        for place, option in enumerate(one.options)
    }

    section = measure(Reader(lambda *pair: truth[pair]), settings, 5)
    found = {score.name: score.estimate.value for score in section.scores}
    for name, value in found.items():
        if name.startswith(("transitivity", "composition", "framing", "negation")):
            assert value == 1, name
    assert abs(found["anchoring: shift"]) < 1e-3 and found["anchoring: changed"] == 0
    assert found["anchoring: right"] == 1

    def anchored(context, option):
        birds = re.search(r"There were (\w+) birds", context)
        return 0.0 if birds and option.startswith(f" {birds[1]} ") else -20.0

    moved = measure(Reader(anchored), settings, 5)
    assert moved.score("anchoring: shift").estimate.value == pytest.approx(1, abs=1e-3)
    assert moved.score("anchoring: changed").estimate.value == 1


def test_one_who_knows_names_alone_is_as_right_as_chance():
    section = measure(Reader(lambda context, option: -zlib.crc32(option.encode()) / 2**32), *_FEW)
    for name in ("transitivity: two gifts", "composition: where a thing is"):
        score = section.score(name)
        assert score.estimate.value == pytest.approx(score.chance)
        assert score.estimate.clusters == 12


def test_a_model_that_writes_no_stories_is_not_asked():
    tokenizer = train(TokenizerConfig(kind="char"), ["0123456789+="])
    with pytest.raises(NotApplicable, match="cannot write stories"):
        measure(Reader(lambda *_: 0.0, tokenizer), *_FEW)


def test_the_way_back_is_asked_of_one_who_was_told_the_way_there(tmp_path):
    fields = {"tokenizer__kind": "char", "tokenizer__chat_template": "plain"}
    fields |= {"data__packing": "none", "data__block_size": 10, "data__num_documents": 600}
    run = tiny_jobs.run(
        tmp_path, "run", objective__name="sft", data__path="reversal", train__steps=2, **fields
    )
    config = defaults(evaluate.EvaluateJob)
    config.init_from, config.suites = str(run), ("reasoning",)
    section = evaluate.run(config, str(tmp_path))["reasoning"]
    found = {score.name: score for score in section.scores}
    assert [one.estimate.items for one in found.values()] == [400, 200, 200, 200]
    assert found["reversal: backward, held out"].estimate.value < 0.02
    beside = found["reversal: right beside another name"]
    assert beside.estimate.low < beside.chance < beside.estimate.high


_FEW = ReasoningSettings(stories=12), 0

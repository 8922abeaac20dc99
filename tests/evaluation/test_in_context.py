"""Curves, labels, formats and reasoning of models whose way of learning is known."""

import json
import re
import types

import numpy as np
import pytest
from tiny_run import write_talker

import lm
from lm.config import ConfigError, defaults
from lm.evaluation import chain_of_thought, few_shot
from lm.evaluation.chain_of_thought import ReasoningSettings
from lm.evaluation.in_context import InContextSettings, measure
from lm.evaluation.scoring import Scored
from lm.evaluation.statistics import pass_at_k
from lm.evaluation.subject import Likely, Written
from lm.jobs import evaluate

FEW = ReasoningSettings(questions=6, samples=4)
SETTINGS = InContextSettings((0, 1, 4, 8), stories=200, items=12, reasoning=FEW)


class Oracle:
    """What is asked of a subject, answered by a rule: (prompt, choices) → a choice."""

    tokenizer = types.SimpleNamespace(encode=lambda text: text.split())
    template = None
    run = types.SimpleNamespace(config={"job": "train"})

    def __init__(self, rule, replies=lambda prompt, number: "", max_length=10_000):
        self.rule, self.replies, self.max_length = rule, replies, max_length

    def text(self, text):
        return text.split()

    def likely(self, pairs):
        choices = {}
        for context, choice in pairs:
            choices.setdefault(context, []).append(choice.strip())
        best = {context: self.rule(context, some) for context, some in choices.items()}
        log = [float(best[context] == choice.strip()) for context, choice in pairs]
        return [Likely(Scored.none()._replace(logprob=np.array([one])), False) for one in log]

    def write(self, prompts, sampling, seed=0):
        samples = range(sampling.num_samples)
        texts = [[self.replies(p, i) for i in samples] for p in prompts]
        return [[Written(text, -1.0, 1, True, False) for text in some] for some in texts]


def first(prompt, choices):
    return choices[0]


def learner(prompt, choices):
    """Follows the examples: the label of the same text, else of the nearest word."""
    *shown, asked = re.split(r"(?<=[.\n]) ?", prompt) if "smiled" not in prompt else [prompt]
    if "smiled" in prompt:  # whether names are labelled as they are, or the other way round
        known = re.findall(r"(\w+) smiled, and (\w+) was", prompt)
        asked = re.findall(r"(\w+) smiled, and$", prompt)[0]
        labels = {(truth(name), label) for name, label in known}
        return dict(labels).get(truth(asked), choices[0])
    for one in shown:
        if one.startswith(f"{asked} "):
            return one.removeprefix(f"{asked} ").strip(".")
    return choices[0]


SHE = {*few_shot.lx.GIRLS, *few_shot.lx.ANIMAL_NAMES["she"]}


def truth(name):
    return "she" if name in SHE else "he"


def knower(prompt, choices):
    """Knows what is right, whatever the examples say."""
    found = re.findall(r"(\w+) smiled, and$", prompt)
    return truth(found[0]) if found and truth(found[0]) in choices else choices[0]


def test_examples_are_nested_and_never_what_is_asked():
    for task, some in few_shot.items(200, 12, 8, 0).items():
        assert len(some) == 12
        for item in some:
            assert item.asked.label in item.choices and len({*item.choices}) == len(item.choices)
            if task != "mapping":
                assert item.asked.text not in [one.text for one in item.shown]
            form = few_shot.FORMATS[task]["words"]
            prompts = [form.prompt(item, k) for k in (0, 1, 8)]
            assert prompts[0] in prompts[1] and prompts[2].startswith(prompts[1][:9])
    both = few_shot.items(200, 12, 8, 0)["feeling"]
    labels = [one.label for item in both for one in (item.asked, *item.shown)]
    assert 0.35 < labels.count("sad") / len(labels) < 0.65


def test_a_mapping_is_learnt_where_all_of_it_is_shown():
    found = measure(Oracle(learner), SETTINGS, 0)
    assert found.score("mapping_chosen_8").estimate.value == 1.0
    chosen = {row[1]: row[2] for row in found.tables[0].rows if row[0] == "mapping"}
    assert chosen[4].startswith("1.00") and not chosen[0].startswith("1.00")
    assert found.score("gain").estimate.value > 0.1


def test_labels_tell_who_follows_the_examples_from_who_knows():
    follows, knows = (measure(Oracle(rule), SETTINGS, 0) for rule in (learner, knower))
    for way, expected in (("true", 1.0), ("exchanged", 1.0), ("unrelated", 1.0)):
        assert follows.score(f"names_labels_{way}").estimate.value == expected
    for way, expected in (("true", 1.0), ("exchanged", 0.0), ("random", 1.0)):
        assert knows.score(f"names_labels_{way}").estimate.value == expected
    assert follows.score("names_labels_random").estimate.value < 1.0


def test_the_spread_of_formats_is_that_of_the_best_and_the_worst():
    def fond_of_arrows(prompt, choices):
        return knower(prompt.replace(" ->", " smiled, and"), choices)

    found = measure(Oracle(fond_of_arrows), SETTINGS, 0)
    row = next(row for row in found.tables[2].rows if row[0] == "names")
    shares = dict(zip(found.tables[2].head[2:], map(float, row[2:7])))
    assert shares["arrow"] == 1.0
    spread = found.score("names_formats_spread")
    assert spread.estimate.value == pytest.approx(1.0 - min(shares.values()), abs=0.01)
    assert 0 < spread.chance < spread.estimate.value
    mean = found.score("names_formats_mean").estimate.value
    assert mean == pytest.approx(sum(shares.values()) / 5, abs=0.01)


def test_what_is_written_is_parsed_or_counted_as_unparsed():
    def replies(prompt, number):
        return " she was" if prompt.endswith("Mia smiled, and") else " it"

    settings = InContextSettings((0, 1), items=40, stories=200, reasoning=FEW)
    found = measure(Oracle(first, replies), settings, 0).score("names_written_1")
    assert found.unparsed == 39 and found.estimate.value == pytest.approx(1 / 40)


def test_what_the_context_does_not_hold_is_not_asked():
    found = measure(Oracle(first, max_length=40), SETTINGS, 0)
    rows = {row[:2]: row[2] for row in found.tables[0].rows}
    assert rows["place", 8] == "not asked: longer than the context"
    assert rows["mapping", 8][0].isdigit()
    assert [row[2] for row in found.tables[3].rows][:2] == [
        "not asked: longer than the context"
    ] * 2


def test_steps_majority_and_samples_are_scored_as_they_are_defined():
    def replies(prompt, number):
        question = prompt.rpartition("Question: ")[2]
        numbers = re.findall(r"\d+", question)
        if "Steps:" not in question or not numbers:
            return " I think so"
        right = sum(map(int, numbers))
        wrong = number > (right % 4)  # 1 to 4 of 4 samples are right
        return f" so it is.\nAnswer: {right + wrong}"

    settings = ReasoningSettings(questions=40, samples=4)
    scores, table, _ = chain_of_thought.measure(Oracle(first, replies), settings, 0)
    found = {score.name: score for score in scores}
    assert found["sums_direct"].estimate.value == 0 and found["sums_direct"].unparsed == 40
    assert found["sums_steps"].estimate.value == 1.0 and found["sums_steps"].unparsed == 0
    assert found["handing_steps"].unparsed == 40
    several, _ = chain_of_thought._questions(settings, False, 0)["sums"]
    counts = [int(one.answer) % 4 + 1 for one in several]
    for k in (1, 4):
        expected = np.mean([pass_at_k(count, 4, k) for count in counts])
        assert found[f"sums_pass@{k}"].estimate.value == pytest.approx(expected)
    majority = np.mean([count >= 2 for count in counts])  # of two and two the first that was said
    assert found["sums_majority"].estimate.value == pytest.approx(majority)
    assert "+1.00, p = 0.00" in table.rows[0] and "left out" in table.rows[2][1]


def test_questions_have_one_answer_that_their_steps_lead_to():
    made = chain_of_thought._questions(ReasoningSettings(questions=20), True, 3)
    for asked, examples in (made["sums"], made["handing"]):
        assert len(asked) == 20 and not {q.asked for q in asked} & {q.asked for q in examples}
        for one in (*asked, *examples):
            assert one.right(one.says(f" {one.answer}")) and not one.right(one.says("nobody"))
    for one in made["handing"][0]:
        thing = re.findall(r"has the (\w+)\?", one.asked)[0]
        last = re.findall(rf"(?:to (\w+)\.|(\w+) had the {thing}\.)", one.asked)
        moves = re.findall(rf"gave the {thing} to (\w+)\.", one.asked)
        assert (
            last and moves[-1] == one.answer and one.steps.endswith(f"{moves[-1]} had the {thing}.")
        )
    for one in made["stories"][0]:
        assert one.right(one.answer) and not one.right("I do not know.")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run that converses, about bytes."""
    root = tmp_path_factory.mktemp("in_context")
    write_talker(root / "run", 512)
    config = json.loads((root / "run" / "config.json").read_text())
    (root / "run" / "config.json").write_text(json.dumps(config | {"objective": {"name": "sft"}}))
    return root


def card(place, new=8, **settings):
    config = defaults(evaluate.EvaluateJob)
    config.init_from, config.suites = str(place / "run"), ("in_context",)
    few = {"stories": 60, "items": 3, "shots": (0, 1), "format_shots": 1}
    config.in_context.update({**few, **settings})
    config.in_context.reasoning.update({"questions": 2, "samples": 2, "max_new_tokens": new})
    evaluate.run(config, str(place / "card"))
    return json.loads((place / "card" / "card.json").read_text())["sections"]["in_context"]


def test_the_card_says_what_the_logits_say(place):
    found = card(place)
    scores = {score["name"]: score for score in found["scores"]}
    run, right = lm.load(place / "run"), []
    for item in few_shot.items(60, 3, 1, 0)["names"]:
        prompt = few_shot.FORMATS["names"]["words"].prompt(item, 1)
        rows = [[run.tokenizer.bos_id, *f"{prompt} {choice}".encode()] for choice in item.choices]
        totals = []
        for ids, choice in zip(rows, item.choices):
            logits = np.asarray(run.model([ids[:-1]])[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            new = range(len(ids) - len(choice) - 1, len(ids))
            totals.append(sum(log_p[i - 1, ids[i]] for i in new))
        right.append(float(item.choices[int(np.argmax(totals))] == item.asked.label))
    assert scores["names_chosen_1"]["items"] == right
    assert scores["names_chosen_1"]["estimate"]["value"] == pytest.approx(np.mean(right))
    assert scores["copy_written_1"]["unparsed"] == 3  # a random model writes no words
    assert scores["mapping_chosen_0"]["chance"] == 0.25
    # It has learnt conversations, and is asked in them.
    direct = scores["stories_direct"]["estimate"]
    assert (direct["value"], direct["items"]) == (0.0, 2)
    assert scores["stories_pass@2"]["estimate"]["value"] == 0.0
    assert "conversation" in found["tables"][3]["rows"][2][1]


def test_more_examples_than_there_are_or_too_long_replies_are_one_line(place):
    with pytest.raises(ConfigError, match=r"config.in_context.shots=64 .* 'copy' has 54"):
        card(place, shots=(64,), stories=2000)
    with pytest.raises(ConfigError, match=r"'place' has \d+, .*or raise config.in_context.stories"):
        card(place, shots=(32,), stories=20)
    with pytest.raises(ConfigError, match=r"config.in_context.shots=\(\)"):
        card(place, shots=())
    with pytest.raises(ConfigError, match=r"reasoning.max_new_tokens=512 leaves no room .* 512"):
        card(place, new=512)

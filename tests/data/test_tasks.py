"""Tasks have the answers that arithmetic and Python give, and hold out what they say."""

import operator
import re

import pytest

from lm.data import tasks
from lm.data.config import DataConfig
from lm.data.files import CorpusReport
from lm.data.lines import LINES, Lines

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
BY_HAND = {
    "copy": lambda text: text,
    "reverse": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
}


@pytest.mark.parametrize("name", tasks.NAMES)
def test_answers_are_right(name):
    kind, size, lowest_first = tasks.task(name)
    for index in range(40):
        prompt, answer, _, choices, _ = tasks.item(name, 3, index, held_out=index % 2 == 1)
        assert {*answer} <= {*choices}
        if kind in tasks.SUMS:
            a, sign, b = re.fullmatch(r"(\d+)(.)(\d+)=", prompt).groups()
            assert len(a) == size or sign in "+-*"
            value = SIGNS[sign](int(a), int(b))
            assert int(answer[::-1] if lowest_first else answer) == value
            if kind == "division":
                assert int(a) % int(b) == 0
            if lowest_first:
                assert len(answer) == {"addition": size + 1, "multiplication": 2 * size}.get(
                    kind, size
                )
        elif kind == "counting":
            letter, text = re.fullmatch(r"count (.) in (\w+)=", prompt).groups()
            assert answer == str(text.count(letter)) and len(text) == size
        elif kind == "unscrambling":
            shuffled = prompt.split()[1][:-1]
            assert sorted(shuffled) == sorted(answer) and shuffled != answer
            assert len(answer) == size
        else:
            verb, text = prompt[:-1].split()
            assert answer == BY_HAND[verb](text) and len(text) == size


def test_carries_are_those_of_working_by_hand():
    for kind, one, other, number in (
        ("addition", 385, 747, 3),
        ("addition", 999, 1, 3),
        ("addition", 123, 456, 0),
        ("subtraction", 500, 123, 2),
        ("subtraction", 555, 123, 0),
        ("multiplication", 12, 9, 2),
        ("multiplication", 12, 34, 0),
        ("division", 108, 9, 2),
        ("division", 408, 12, 0),
    ):
        assert tasks.carries(kind, one, other) == number, (kind, one, other)
    assert tasks.item("addition_3", 0, 5).carries == tasks.carries(
        "addition", *map(int, re.findall(r"\d+", tasks.item("addition_3", 0, 5).prompt))
    )


@pytest.mark.parametrize("name", ["addition_1", "multiplication_1", "counting_3", "unscrambling_3"])
def test_held_out_questions_are_never_trained_on(name):
    sides = [
        {tasks.item(name, seed, n, held_out) for seed in (0, 1) for n in range(1500)}
        for held_out in (False, True)
    ]
    trained, held_out = ({one.operands for one in side} for side in sides)
    assert held_out and not trained & held_out
    if name == "addition_1":
        both = {one.prompt for one in sides[0]}
        mirrored = {"+".join(reversed(p[:-1].split("+"))) + "=" for p in both}
        assert not mirrored & {one.prompt for one in sides[1]}
        other_way = {tasks.item(name + "_reversed", 7, n).operands for n in range(500)}
        assert not other_way & held_out


def test_facts_are_told_one_way_round_or_both():
    lines = [tasks.fact(4, n) for n in range(600)]
    held_out = [tasks.fact(4, n, True) for n in range(200)]
    told = {(one["prompt"], one["response"]) for one in lines}
    asked = {(one["prompt"], one["response"]) for one in held_out}
    assert len(told) == 600 and len(asked) == 200 and not told & asked
    back = {(response + "<", prompt[:-1]) for prompt, response in told if prompt[-1] == ">"}
    assert len(back) == 400 and asked < back and len(back & told) == 200
    names = {name for pair in tasks.pairs(4) for name in pair}
    assert len(names) == 800
    assert tasks.fact(4, 600) == lines[0] and tasks.fact(4, 200, True) == held_out[0]
    assert tasks.pairs(4) != tasks.pairs(5)


def test_tasks_are_corpora_by_name():
    assert {*tasks.NAMES, "reversal"} <= {*LINES}
    source = Lines("sorting_4", DataConfig(num_documents=3), "data.path", 5)
    found = [line for _, line in source.records(CorpusReport())]
    assert found == [tasks.line("sorting_4", 5, n) for n in range(3)]

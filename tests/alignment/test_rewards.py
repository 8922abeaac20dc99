"""What replies are worth: functions of users, built-in ones, and their sums."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lm.alignment.held_out import accuracy, calibration_error
from lm.alignment.rewards import Rewards, RewardsConfig, Worth
from lm.config import ConfigError, view

PROMPTS = ["1 + 1 =", [{"role": "user", "content": "2 + 2 ="}]]
MODULE = """
import numpy as np

def share(prompts, responses, **fields):
    return [len(r) / 7 for r in responses]

def counts(prompts, responses, answer, **fields):
    assert [type(p) for p in prompts] == [str, list]
    return np.array([r == a for r, a in zip(responses, answer)])

def few(prompts, responses, **fields):
    return [1.0]

def texts(prompts, responses, **fields):
    return ["1.0" for _ in responses]

def nothing(prompts, responses, **fields):
    pass

def unsure(prompts, responses, **fields):
    return [0.5, None]

def endless(prompts, responses, **fields):
    return [0.5, float("nan")]

def broken(prompts, responses, **fields):
    return fields["missing"]

value = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return str(path)


def rewards(*functions, **fields):
    config = RewardsConfig(functions=functions, **fields)
    return Rewards(view(RewardsConfig, config, "config.rewards"))


def test_a_weighted_sum_of_functions_stays_floating_point(file):
    both = rewards(f"{file}:share", f"{file}:counts", weights=(0.5, -2.0))
    worth = both(PROMPTS, ["2", "four"], answer=["2", "4"])
    np.testing.assert_allclose(worth.total_N, [0.5 / 7 - 2, 2 / 7], rtol=1e-6)
    assert worth.total_N.dtype == np.float32 and list(worth.parts) == ["share", "counts"]
    np.testing.assert_array_equal(worth.parts["counts"], [1, 0])
    found = worth.metrics()
    assert set(found) == {
        f"reward{part}{kind}" for part in ("", "_share", "_counts") for kind in ("", "_std")
    }
    assert found["reward_counts"] == 0.5 and found["reward_counts_std"] == 0.5
    assert set(Worth(worth.total_N, {"one": worth.total_N}).metrics()) == {"reward", "reward_std"}


def test_any_array_of_numbers_is_a_result():
    from lm.alignment import rewards as room

    for returned in ([1, 2], np.array([True, False]), jnp.ones(2, jnp.bfloat16), (0.5, 1)):
        function = lambda prompts, responses, **fields: returned  # noqa: B023, E731
        values = room._values(function, "it", ["a", "b"], ["c", "d"], {})
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.asarray(returned, np.float32))


@pytest.mark.parametrize(
    "name, words",
    [
        ("few", ["functions=", "mine.py:few'", "1 numbers for 2 responses", "one for each"]),
        ("texts", ["returned list", "'1.0'", "finite numbers"]),
        ("nothing", ["returned NoneType", "2 finite numbers"]),
        ("unsure", ["returned list", "None"]),
        ("endless", ["returned nan for response 1, 'four'"]),
        ("broken", ["raised KeyError: 'missing'", "mine.py:", "given prompts, responses, answer"]),
        ("value", ["has no function 'value'"]),
        ("shar", ["has no function 'shar'", "did you mean 'share'"]),
    ],
)
def test_what_is_wrong_with_a_function_is_said_with_its_name(file, name, words):
    with pytest.raises(ConfigError) as error:
        rewards(f"{file}:{name}")(PROMPTS, ["2", "four"], answer=["2", "4"])
    assert not [word for word in words if word not in str(error.value)], error.value


def test_a_function_is_tried_out_before_any_work(file):
    with pytest.raises(ConfigError, match=r"counts.*raised TypeError.*answer"):
        rewards(f"{file}:counts").try_out(PROMPTS)
    rewards(f"{file}:counts").try_out(PROMPTS, answer=["2", "4"])
    with pytest.raises(ConfigError, match="lines have a field 'responses'"):
        rewards(f"{file}:share").try_out(PROMPTS, responses=["2", "4"])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"functions": ()}, "must name a reward"),
        ({"functions": "exact_mach"}, "did you mean 'exact_match'"),
        ({"functions": "no.such.module:f"}, "cannot be imported: ModuleNotFoundError"),
        ({"functions": "nowhere.py:f"}, "cannot be imported: FileNotFoundError"),
        ({"functions": "format"}, "pattern=''"),
        ({"functions": "format", "pattern": "("}, "is not a regular expression"),
        ({"functions": "exact_match", "pattern": "a"}, "must have a group"),
        ({"functions": "length"}, "max_length=0"),
        ({"functions": "length", "max_length": 2, "length_buffer": 3}, "length_buffer=3"),
        ({"functions": "exact_match", "weights": (1.0, 2.0)}, "one number for each of the 1"),
    ],
)
def test_mistakes_in_the_config_are_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        Rewards(view(RewardsConfig, RewardsConfig(**fields), "config.rewards"))


def test_exact_match_compares_the_reply_or_what_a_pattern_finds_in_it():
    def match(responses, answer, **fields):
        found = rewards("exact_match", **fields)(["?"] * len(responses), responses, answer=answer)
        return found.total_N.tolist()

    assert match([" 2\n", "two", "2."], ["2", ["2", "two"], 2]) == [1, 1, 0]
    pattern = r"answer: (\w+)"
    replies = ["answer: 3, no, answer: 4", "4", "answer: 3"]
    assert match(replies, ["4", "4", "4"], pattern=pattern) == [1, 0, 0]
    with pytest.raises(ConfigError, match="no field 'right'"):
        rewards("exact_match", answer="right")(["?"], ["2"])


def test_a_format_is_that_of_the_whole_reply():
    pattern = "<think>.*</think>\\d+"
    worth = rewards("format", pattern=pattern)(["?"] * 2, ["<think>a\nb</think>12", "12"])
    assert worth.total_N.tolist() == [1, 0]


def test_long_replies_lose_up_to_one():
    length = rewards("length", max_length=8, length_buffer=4)
    ids = [[0] * n for n in (0, 4, 5, 6, 8, 20)]
    worth = length(["?"] * 6, [""] * 6, response_ids=ids)
    assert worth.total_N.tolist() == [0, 0, -0.25, -0.5, -1, -1]


def test_calibration_is_how_far_probabilities_are_from_shares():
    # 3 of 4 right at a probability of 3/4, and 1 of 2 at 9/10.
    three, nine = math.log(3), math.log(9)
    differences = np.array([three, three, three, -three, nine, -nine])
    pairs = np.stack([differences, np.zeros(6)], 1).astype(np.float32)
    assert calibration_error(pairs) == pytest.approx(2 / 6 * 0.4, abs=1e-6)
    assert accuracy(pairs) == pytest.approx(4 / 6)
    assert calibration_error(pairs[:4]) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.zeros((5, 2), np.float32)) == 0

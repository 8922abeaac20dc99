"""Heads are called specialised when taking them out and putting them in says so."""

import json

import numpy as np
import pytest
from test_heads import V, induction_head
from test_main import main
from tiny_run import write_tiny_run

import lm
from lm.config import ConfigError, defaults
from lm.data import pronouns
from lm.evaluation.subject import Subject
from lm.interpretability import head_stories
from lm.interpretability.head_history import History
from lm.interpretability.head_tests import Bar, induction_task, pronoun_task, run_task, task_of
from lm.jobs import heads
from lm.tokenizers import TokenizerConfig, train


def repeat_task():
    """ "… a b … a" → "b", and "… a c … a" → "c"; the distractor stands beside."""
    rng, texts, answers = np.random.default_rng(0), [], []
    targets = np.zeros((2, 16, 7, 7), bool)
    for row in range(0, 16, 2):
        a, b, c, d, e = rng.permutation(np.arange(1, V))[:5].tolist()
        texts += [[0, d, a, b, e, a], [0, d, a, c, e, a]]
        answers += [(b, c), (c, b)]
        targets[0, row : row + 2, 5, 3] = targets[1, row : row + 2, 5, 4] = True
    return task_of("repeats", texts, targets[:, :, :6, :6], np.array(answers).T, range(1, V))


def test_a_hand_built_induction_head_is_specialised_and_its_helper_is_needed_but_looks_elsewhere():
    task, bar = repeat_task(), Bar()
    found = run_task(*induction_head(), task)
    assert found.accuracy == found.preference == 1 and found.chance == 1 / (V - 1)
    assert found.attention_LH[:, 0] == pytest.approx([0, 1])
    assert found.distractor_LH[:, 0] == pytest.approx([1, 0])  # the token before the last
    assert (found.zeroed_LH < 0.5).all() and (found.averaged_LH < 0.5).all()
    assert found.denoised_LH[1, 0] == pytest.approx(1)
    assert found.denoised_LH[0, 0] == pytest.approx(0, abs=1e-6)  # it is the same in both texts
    assert bar.verdict(found, 1, 0) == "specialised"
    assert bar.verdict(found, 0, 0) == ""
    shuffled = run_task(*induction_head(), task.relabelled(0))
    assert shuffled.preference == 0.5 and shuffled.attention_LH[1, 0] == pytest.approx(0.5)
    assert bar.verdict(shuffled, 1, 0).startswith("untested")


def test_attention_alone_is_not_called_specialised():
    found = run_task(*induction_head(), repeat_task())
    idle = found._replace(zeroed_LH=np.ones((2, 1)), averaged_LH=np.ones((2, 1)))
    assert Bar().verdict(idle, 1, 0) == "attends; not confirmed by ablation"
    idle = idle._replace(denoised_LH=np.full((2, 1), 0.16))
    assert Bar().verdict(idle, 1, 0) == "attends; not confirmed by ablation and patching"
    assert Bar(attention=1.0, ablation=0.0, patching=0.1).verdict(idle, 1, 0) == "specialised"


def test_pairs_differ_in_the_pronoun_and_held_out_names_never_met():
    she, he = pronouns.pair(0, 5)
    assert she.text.removesuffix("She") == he.text.removesuffix("He")
    assert (she.antecedent, she.distractor) == (he.distractor, he.antecedent)
    met = [{frozenset(pronouns.pair(0, n, held)[0][2:]) for n in range(300)} for held in (0, 1)]
    assert not met[0] & met[1] and len(met[1]) > 5
    order = [pronouns.pair(0, n)[0] for n in range(200)]
    first = np.mean([one.text.index(one.antecedent) < one.text.index(one.distractor)
                     for one in order])  # fmt: skip
    assert 0.4 < first < 0.6


def test_the_window_of_the_largest_change_is_found():
    steps = [*range(0, 200, 10)]
    history = History(steps, {"a": [0.0] * 12 + [0.4, 0.9] + [1.0] * 6, "b": [0.5] * 20})
    assert history.phase_change("a") == (110, 130, 0.9)
    assert history.phase_change("b")[2] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on stories that has learnt nothing, with words as tokens and two checkpoints."""
    path = tmp_path_factory.mktemp("runs") / "stories"
    path.mkdir()
    texts = [head_stories.generate(0, number).text for number in range(600)]
    tokenizer = train(TokenizerConfig(kind="bpe", vocab_size=1024), texts)
    write_tiny_run(path, tokenizer=tokenizer, steps=(1, 2), max_length=192)
    return path


def test_the_ground_truth_of_stories_is_found_in_their_tokens(run):
    subject = Subject(lm.load(run))
    spell = subject.tokenizer.decode
    task = head_stories.pronoun_choice(subject, 0, 8)
    nearer = 0
    for row, (tokens, place) in enumerate(zip(task.tokens_BT, task.place_B)):
        she = spell([task.answer_B[row]]).strip().lower() == "she"
        meant = spell(tokens[task.targets_BTS[row, place]])
        girls = {n for n in head_stories._NAMED if head_stories._MIRROR[n] in (
            *pronouns.lx.BOYS, *pronouns.lx.ANIMAL_NAMES["he"], "Dad", "Grandpa")}  # fmt: skip
        assert any(name in meant for name in girls) == she, meant
        assert not (task.targets_BTS[row] & task.distractors_BTS[row]).any()
        last = [np.flatnonzero(t[row, place]).max() for t in (task.targets_BTS,
                task.distractors_BTS)]  # fmt: skip
        nearer += last[0] > last[1]
    assert 4 <= nearer <= 12
    told = head_stories.read(subject, 0, 4)
    text = spell(told.tokens_BT[0][told.segments_BT[0] > 0])
    assert text == head_stories.generate(head_stories.FAR, 1).text
    names = told.tokens_BT[told.classes_BT == 1]
    assert len(names) and not {*"".join(map(spell, [[n] for n in names]))} & {*".,"}
    assert (told.subject_BTS.sum() > 0) and not (told.antecedent_BTS & told.distractor_BTS).any()


def test_every_checkpoint_is_scored_and_a_page_says_that_nothing_was_learnt(run, tmp_path):
    config = defaults(heads.HeadsJob)
    config.init_from, config.rows, config.pairs = str(run), 8, 8
    verdicts = heads.run(config, str(tmp_path))
    assert len(verdicts) == 3
    assert all(said.startswith("untested") for some in verdicts.values() for said in some.values())
    found = json.loads((tmp_path / "heads.json").read_text())
    assert found["steps"] == [1, 2]
    assert all(len(v) == 2 for v in found["history"].values())
    scores = found["sections"]["scores"]["tables"][0]
    even = dict(zip(scores["head"], scores["rows"][0]))
    assert even["head"] == "uniform" and 0 < even["induction"] < 0.2
    page = (tmp_path / "heads.html").read_text()
    assert "untested" in page and "random initialisation" in page and "<svg" in page
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_no_heads_is_said_in_a_line(tmp_path):
    config = defaults(heads.HeadsJob)
    with pytest.raises(ConfigError, match=r"config.init_from='' must name"):
        heads.run(config, str(tmp_path))
    write_tiny_run(tmp_path, cell="lstm")
    config.init_from = str(tmp_path)
    with pytest.raises(ConfigError, match="is of cell='lstm'"):
        heads.run(config, str(tmp_path))


def test_a_task_that_the_tokens_cannot_write_is_left_out(tmp_path):
    digits = train(TokenizerConfig(kind="char"), ["0123456789"])
    write_tiny_run(tmp_path, tokenizer=digits, max_length=8)
    subject = Subject(lm.load(tmp_path))
    assert pronoun_task(subject, 0) is None and head_stories.read(subject, 0) is None
    assert head_stories.pronoun_choice(subject, 0, 2) is None
    with pytest.raises(ConfigError, match="a context of 8 tokens"):
        induction_task(subject, 0)


@pytest.mark.slow
def test_one_head_learns_whom_a_pronoun_means_and_is_needed_for_it(tmp_path):
    caches = [f"--config.data.cache_dir={tmp_path}", "--config.train.compilation_cache="]
    for words in (
        ["pronouns", *caches, "--config.train.steps=100", f"--workdir={tmp_path}/run"],
        ["heads", f"--config.init_from={tmp_path}/run", "--config.every=4",
         "--config.rows=8", f"--workdir={tmp_path}/page"],
    ):  # fmt: skip
        code, output, errors = main(f"--config=configs/interpret/{words[0]}.py", *words[1:])
        assert code == 0, output + errors
    assert "the antecedent of a pronoun: right in 100%\n  head 0.0: specialised\n" in output
    found = json.loads((tmp_path / "page/heads.json").read_text())
    section = found["sections"]["the-antecedent-of-a-pronoun"]
    head, attention, distractor, zeroed, averaged, patched, verdict = section["tables"][0]["rows"][
        0
    ]
    assert (head, verdict) == ("0.0", "specialised")
    assert attention >= 0.95 and distractor <= 0.05 and patched >= 0.8
    assert zeroed <= 0.2 and averaged <= 0.2
    followed = found["history"]["0.0: the antecedent of a pronoun: attention"]
    assert followed[0] < 0.6 < 0.95 < followed[-1]
    assert found["history"]["the antecedent of a pronoun"][-1] == 1
    _, shuffled, random = section["tables"][1]["rows"]
    assert shuffled[1] == pytest.approx(0.5, abs=0.02) and random[1] < 0.3
    assert pronoun_task(Subject(lm.load(tmp_path / "run")), 0, 4).tokens_BT.shape[0] == 8

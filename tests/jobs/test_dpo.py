"""Preferences as users learn them: a file of pairs, and the model that they start from."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny_jobs
import tiny_run
from test_main import main

import lm
from lm.training.metrics import read_metrics

PROMPTS = ["Who sat?", "Where?", "When?", "Why?", "What?", "How?", "Which?", "Whose?"]
PAIRS = [{"prompt": each, "chosen": "Yes, sir.", "rejected": "No way."} for each in PROMPTS]
SMALL = [
    "--config.data.validation_fraction=0.25",
    "--config.data.block_size=48",
    "--config.data.batch_size=4",
    "--config.optimizer.learning_rate=1e-3",
    "--config.optimizer.warmup_steps=0",
    "--config.train.steps=20",
    "--config.train.steps_per_dispatch=1",
    "--config.train.log_every=1",
    "--config.train.eval_every=10",
    "--config.checkpoint.every=10",
    "--config.prompt=",
]


def learn(place, name, lines, *fields, devices=1):
    """Exit code, output and errors of learning `lines` into `place / name`."""
    path = place / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return main(
        "--config=configs/align/dpo.py",
        f"--workdir={place / name}",
        f"--config.init_from={place / 'talker'}",
        f"--config.data.path={path}",
        f"--config.data.cache_dir={place / 'tokens'}",
        f"--config.train.compilation_cache={place / 'xla'}",
        *SMALL,
        *fields,
        devices=devices,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run that talks, of random parameters."""
    place = tmp_path_factory.mktemp("dpo")
    (place / "talker").mkdir()
    tiny_run.write_talker(place / "talker", 64)
    return place


def values(directory, name):
    return [record[name] for record in read_metrics(directory) if name in record]


def test_a_model_learns_preferences_from_where_it_stands(place):
    code, _, errors = learn(place, "dpo", PAIRS)
    assert code == 0, errors
    directory = place / "dpo"
    assert tiny_jobs.losses(directory)[0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert values(directory, "margin")[0] == 0
    assert values(directory, "accuracy")[-1] == 1 and values(directory, "margin")[-1] > 0.3
    gap = np.subtract(values(directory, "chosen_reward"), values(directory, "rejected_reward"))
    np.testing.assert_allclose(values(directory, "margin"), gap, atol=1e-5)
    # Held-out prompts, the same preference.
    assert values(directory, "eval_accuracy") == [1, 1]
    losses = values(directory, "eval_loss")
    assert losses[1] < losses[0] < math.log(2)

    def preference(run):
        """How much likelier the chosen reply's first token is than the rejected one's."""
        template = run.chat_template()
        ids = template.encode([{"role": "user", "content": "Is it?"}])
        logits = np.asarray(run.model(np.array([ids])))[0, -1]
        chosen, rejected = (run.tokenizer.encode(text)[0] for text in ("Yes", "No"))
        return logits[chosen] - logits[rejected]

    assert preference(lm.load(directory)) > preference(lm.load(place / "talker")) + 1


@pytest.mark.slow
def test_a_run_that_goes_on_compares_with_what_it_started_from(place):
    """Also where that model has gone on learning since."""
    source = place / "busy"
    shutil.copytree(place / "talker", source)
    fields = [f"--config.init_from={source}", "--config.train.eval_every=0"]
    fields += ["--config.optimizer.schedule=constant"]
    code, _, errors = learn(place, "whole", PAIRS, *fields)
    assert code == 0, errors
    assert learn(place, "resumed", PAIRS, *fields, "--config.train.steps=10")[0] == 0
    tokenizer = lm.load(source).tokenizer
    tiny_run.write_tiny_run(source, tokenizer=tokenizer, max_length=64, steps=(9,))
    assert learn(place, "resumed", PAIRS, *fields)[0] == 0
    one, two = (lm.load(place / name).params for name in ("whole", "resumed"))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("before", ["talker", "adapted"])
def test_adapters_are_compared_with_those_they_started_from(place, before):
    """New ones with their base, which adds nothing to it; older ones with themselves."""
    fields = ["--config.adapter.kind=lora", "--config.adapter.rank=4"]
    if before == "adapted" and not (place / before).exists():
        assert learn(place, before, PAIRS, *fields)[0] == 0
    name = f"{before}_lora"
    rest = fields if before == "talker" else []
    code, _, errors = learn(place, name, PAIRS, f"--config.init_from={place / before}", *rest)
    assert code == 0, errors
    assert tiny_jobs.losses(place / name)[0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert values(place / name, "margin")[0] == 0
    assert values(place / name, "margin")[-1] > 0.05
    assert values(place / name, "eval_accuracy")[-1] == 1


@pytest.mark.parametrize(
    ("name", "field", "first"),
    [
        ("kto", "objective.name", 0.5),
        pytest.param("ipo", "objective.preference.loss", 25.0, marks=pytest.mark.slow),
        pytest.param("hinge", "objective.preference.loss", 1.0, marks=pytest.mark.slow),
        pytest.param("simpo", "objective.preference.loss", None, marks=pytest.mark.slow),
        pytest.param("orpo", "objective.name", None, marks=pytest.mark.slow),
    ],
)
def test_every_loss_of_preferences_is_a_field_away(place, name, field, first):
    fields = [f"--config.{field}={name}", "--config.train.accumulation=2"]
    code, _, errors = learn(place, name, PAIRS, *fields)
    assert code == 0, errors
    losses = [loss for _, loss in tiny_jobs.losses(place / name)]
    if first is not None:
        assert losses[0] == pytest.approx(first, rel=1e-5)
    assert losses[-1] < losses[0] - 0.01
    assert values(place / name, "eval_accuracy")[-1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_meshes_and_micro_batches_change_nothing(place, objective):
    fields = [f"--config.objective.name={objective}", "--config.data.batch_size=16"]
    fields += [
        "--config.train.steps=5",
        "--config.train.eval_every=5",
        "--config.checkpoint.every=0",
    ]
    ways = [f"--config.mesh.{axis}={n}" for axis, n in {"data": 1, "fsdp": 4, "tensor": 2}.items()]
    found = []
    for devices, more in ((1, []), (8, [*ways, "--config.train.accumulation=4"])):
        name = f"{objective}_{devices}"
        code, _, errors = learn(place, name, PAIRS, *fields, *more, devices=devices)
        assert code == 0, errors
        found.append([values(place / name, each) for each in ("loss", "margin", "eval_loss")])
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_student_learns_what_a_teacher_of_another_size_predicts(place):
    tokenizer = lm.load(place / "talker").tokenizer
    (place / "teacher").mkdir()
    sizes = dict(max_length=64, width=16, steps=(5,))
    tiny_run.write_tiny_run(place / "teacher", tokenizer=tokenizer, **sizes)
    fields = ["--config.objective.name=distillation"]
    teacher = f"--config.objective.distillation.teacher={place / 'teacher'}"
    code, _, errors = learn(place, "student", PAIRS, *fields, teacher)
    assert code == 0, errors
    losses = [loss for _, loss in tiny_jobs.losses(place / "student")]
    assert 0 < losses[-1] < 0.7 * losses[0]
    code, _, errors = learn(place, "none", PAIRS, *fields)
    assert code == 2 and "distillation.teacher='' must name the model that" in errors


def test_what_cannot_be_compared_is_refused_in_a_line(place):
    code, _, errors = learn(place, "none", PAIRS, "--config.init_from=")
    assert code == 2 and "config.init_from='' must name the model that" in errors
    code, _, errors = learn(place, "none", PAIRS, "--config.objective.preference.margin=1")
    assert code == 2 and "preference.margin=1.0 does nothing for 'sigmoid'" in errors

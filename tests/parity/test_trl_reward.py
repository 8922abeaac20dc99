"""The reward model's loss and gradient are TRL's, but where padding is end-of-text."""

import collections
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402
from trl.trainer.reward_trainer import DataCollatorForPreference  # noqa: E402

from lm.inference import score  # noqa: E402
from lm.models import bind, skeleton  # noqa: E402
from lm.models.huggingface import to_tensors  # noqa: E402
from lm.objectives import ObjectiveConfig, loss  # noqa: E402

LENGTH, END = 20, 1
MARGINS = [0.7, -0.2, 0.0, 1.5]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def models(request, tmp_path_factory):
    """A reward model there, and its family, config and parameters here."""
    model = decoder_oracles.build(
        request.param, "ForSequenceClassification", num_labels=1, pad_token_id=0
    )
    directory = tmp_path_factory.mktemp("reward")
    model.save_pretrained(directory)
    return model, family_checks.load(directory)


def pairs():
    """Texts [P][2]: a prompt of three tokens, a reply, end-of-text."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 97, 3).tolist() for _ in MARGINS]
    lengths = rng.integers(1, LENGTH - 6, (len(MARGINS), 2))
    return [[p + rng.integers(3, 97, n).tolist() + [END] for n in two]
            for p, two in zip(prompts, lengths)]  # fmt: skip


def rows(texts):
    """As `lm.data` has them."""
    shape = (len(texts), 2, LENGTH)
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["weights"] = np.zeros(shape, np.float32)
    for place in np.ndindex(shape[:2]):
        ids = texts[place[0]][place[1]]
        at = (*place, slice(len(ids) - 1))
        batch["inputs"][at], batch["targets"][at] = ids[:-1], ids[1:]
        batch["segment_ids"][at], batch["positions"][at] = 1, range(len(ids) - 1)
        batch["weights"][at][2:] = 1
    return batch


def theirs(model, texts, pad, margins, coefficient):
    """TRL's loss, gradient and metrics."""
    model.config.pad_token_id = pad
    examples = [{"chosen_ids": c, "rejected_ids": r} for c, r in texts]
    if margins is not None:
        examples = [{**each, "margin": m} for each, m in zip(examples, margins)]
    inputs = DataCollatorForPreference(pad_token_id=pad)(examples)
    same = lambda x: x  # noqa: E731
    trainer = types.SimpleNamespace(
        model=model,
        args=types.SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=types.SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    model.zero_grad()
    found = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    found.backward()
    gradient = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    metrics = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    return float(found.detach()), gradient, metrics


def ours(models, texts, margins, coefficient):
    family, config, params = models
    batch = rows(texts)
    if margins is not None:
        batch["margin"] = np.array(margins, np.float32)
    objective = ObjectiveConfig(name="reward", centering=coefficient or 0.0)

    @jax.jit
    def computed(params):
        def mean(params):
            total, metrics = loss(bind(skeleton(config), params), batch, objective)
            return total / metrics["weight"], metrics

        return jax.value_and_grad(mean, has_aux=True)(params)

    (value, metrics), gradient = computed(params)
    metrics = {name: float(x / metrics["weight"]) for name, x in metrics.items()}
    gradient = {name: np.asarray(x) for name, x in gradient.items()}
    return float(value), to_tensors(family, config, gradient), metrics


@pytest.mark.parametrize("margins", [None, MARGINS], ids=["plain", "margin"])
@pytest.mark.parametrize("coefficient", [None, 0.3], ids=["free", "centered"])
def test_loss_gradient_and_metrics_are_those_of_trl(models, margins, coefficient):
    model, imported = models
    expected, gradient, metrics = theirs(model, pairs(), 0, margins, coefficient)
    found, our_gradient, our_metrics = ours(imported, pairs(), margins, coefficient)
    assert found == pytest.approx(expected, abs=1e-5)
    largest = max(np.abs(array).max() for array in gradient.values())
    assert set(our_gradient) == set(gradient)
    for name, array in gradient.items():
        np.testing.assert_allclose(our_gradient[name], array, rtol=0, atol=1e-5 * largest)
    assert our_metrics["accuracy"] == pytest.approx(metrics["accuracy"])
    assert our_metrics["margin"] == pytest.approx(metrics["margin"], abs=1e-5)
    assert our_metrics["reward"] == pytest.approx(metrics["mean_reward"], abs=1e-5)


def test_where_padding_is_end_of_text_trl_judges_the_token_before_it_and_we_the_end(models):
    model, (_, config, params) = models
    texts = [ids for pair in pairs() for ids in pair]
    ends, before = (score(config, params, t)[:, 0] for t in (texts, [ids[:-1] for ids in texts]))
    # What a text is worth depends on its end: that it has one is what a reward model must see.
    assert np.abs(ends - before).max() > 1e-2
    _, _, separate = theirs(model, pairs(), 0, None, None)
    _, _, shared = theirs(model, pairs(), END, None, None)
    assert separate["mean_reward"] == pytest.approx(ends.mean(), abs=1e-5)
    assert shared["mean_reward"] == pytest.approx(before.mean(), abs=1e-5)

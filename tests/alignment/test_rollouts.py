"""What is trained on is what was drawn, and ratios are those of what it was drawn from."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import tiny_model

from lm.alignment.rollouts import RolloutConfig, Sample, Sampler, rollout_seed, rows
from lm.alignment.scoring import Scorer, put
from lm.inference import Framing
from lm.models import bind
from lm.objectives import ObjectiveConfig
from lm.objectives.policy import PolicyConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.training.config import OptimizerConfig, TrainConfig
from lm.training.setup import set_up
from lm.training.workload import Workload

LENGTH, KNOWN = 24, 250  # the model has ids that no tokenizer knows
ENDS = tuple(range(20))
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
SAMPLERS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6, "temperature": 1.3},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
}


class Known:
    """As much of a tokenizer as an engine asks for."""

    vocab_size = KNOWN


def training(layout, model_fields=None, accumulation=1, **fields):
    model, _ = tiny_model(**model_fields or {})
    workload = Workload(
        model.config,
        block_size=LENGTH,
        batch_size=8,
        objective=ObjectiveConfig(name="policy", policy=PolicyConfig(**fields)),
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=4, accumulation=accumulation),
        layout=layout,
    )
    return set_up(workload)


def one_device():
    return lay_out("", MeshConfig(), -1, jax.devices()[:1])


def drawn(config, params=None, seed=1):
    """Samples of the tiny model, which ends a text in several ways."""
    model, own = tiny_model()
    sampler = Sampler(model, params or own, Framing(end_of_text=ENDS), Known, config, LENGTH)
    return sampler(params or own, PROMPTS, seed)


def scored(config, layout=None, model_fields=None, accumulation=1):
    """(training, state, experience) of one rollout."""
    layout = layout or one_device()
    train = training(layout, model_fields, accumulation, temperature=config.temperature)
    with layout.active():
        state = train.create_state(tiny_model(**model_fields or {})[1])
        samples = drawn(config, state["params"])
        found = Scorer(train, None, config, KNOWN)(rows(PROMPTS, samples, LENGTH), state, None, {})
    return train, state, found


def test_rows_hold_what_was_drawn_the_end_of_text_last():
    samples = [Sample(0, [7, 8, 3], [-1.0, -2.0, -3.0], True), Sample(1, [5], [-4.0], False)]
    made = rows([[1, 2], [9, 9, 9]], samples, 6)
    assert made["inputs"].tolist() == [[1, 2, 7, 8, 0, 0], [9, 9, 9, 0, 0, 0]]
    assert made["targets"].tolist() == [[2, 7, 8, 3, 0, 0], [9, 9, 5, 0, 0, 0]]
    assert made["weights"].tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert made["segment_ids"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert made["positions"].tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]]
    assert made["rollout_logprob"].tolist() == [[0, -1, -2, -3, 0, 0], [0, 0, -4, 0, 0, 0]]


def test_a_rollout_is_a_function_of_weights_and_seed():
    config = RolloutConfig(samples=3, max_new_tokens=12)
    model, params = tiny_model()
    sampler = Sampler(model, params, Framing(end_of_text=ENDS), Known, config, LENGTH)
    first, other = sampler(params, PROMPTS, 1), sampler(params, PROMPTS, 2)
    assert first != other
    assert sampler(params, PROMPTS, 1) == first  # whatever came in between
    fewer = dataclasses.replace(config, slots=2)  # and however many at a time
    assert drawn(fewer) == first
    assert rollout_seed(0, 1) != rollout_seed(1, 0)


def test_responses_end_with_end_of_text_or_are_marked_as_cut_off():
    samples = drawn(RolloutConfig(samples=4, max_new_tokens=12))
    assert {sample.ended for sample in samples} == {True, False}
    for sample in samples:
        assert (sample.ids[-1] in ENDS) == sample.ended
        assert not {*sample.ids[:-1]} & {*ENDS}
        assert sample.ended or len(sample.ids) == 12


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_trainer_finds_what_was_drawn_as_likely_as_the_sampler_did(name):
    config = RolloutConfig(samples=4, max_new_tokens=10, **SAMPLERS[name])
    _, _, found = scored(config)
    mask = found["weights"] > 0
    gap = np.abs(found["old_logprob"] - found["rollout_logprob"])[mask]
    assert gap.max() < 1e-4
    assert (found["old_logprob"][~mask] == 0).all()


def first_update(train, state, found):
    """The metrics of an update of half of the rows, with companions other than in scoring."""
    names = ("inputs", "targets", "weights", "segment_ids", "positions", "old_logprob", "support")
    batch = {name: found[name] for name in names if name in found}
    advantage = np.random.default_rng(0).normal(size=found["weights"].shape)
    batch |= {"advantage": advantage.astype(np.float32), "ref_logprob": batch["old_logprob"]}
    order = np.random.default_rng(0).permutation(len(advantage))[:8]
    with train.workload.layout.active():
        _, metrics = train.step(state, put(train, batch, order[None]), {})
    metrics = {name: float(value[0]) for name, value in metrics.items()}
    assert metrics["weight"] == (batch["weights"][order] > 0).sum()
    return metrics


@pytest.mark.parametrize("name", SAMPLERS)
def test_before_the_first_update_every_ratio_is_exactly_one(name):
    config = RolloutConfig(samples=4, max_new_tokens=10, **SAMPLERS[name])
    metrics = first_update(*scored(config))
    assert metrics["ratio"] == metrics["weight"]
    assert metrics["approx_kl"] == metrics["kl"] == metrics["clip_fraction"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{}, {"data": 1, "fsdp": 4, "tensor": 2}], ids=["one", "mesh"])
def test_the_ratio_is_exactly_one_in_parts_scanned_rounded_and_on_a_mesh(dtype, sizes):
    count = 8 if sizes else 1
    layout = lay_out("", MeshConfig(**sizes), -1, jax.devices()[:count])
    fields = {"compute_dtype": dtype, "scan_layers": True}
    config = RolloutConfig(samples=4, max_new_tokens=10, **SAMPLERS["all"])
    metrics = first_update(*scored(config, layout, fields, accumulation=1 if sizes else 2))
    assert metrics["ratio"] == metrics["weight"] and metrics["approx_kl"] == 0


def test_without_the_support_the_mean_ratio_is_the_kept_mass():
    config = RolloutConfig(samples=8, max_new_tokens=10, top_k=5)
    train, state, found = scored(config)
    mask = found["weights"] > 0
    model = bind(train.model, state["params"])
    logits = np.array(model(found["inputs"]), np.float64)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    kept = np.sort(share[..., :KNOWN], -1)[..., -5:].sum(-1)
    chosen = np.take_along_axis(share, found["targets"][..., None], -1)[..., 0]
    ratio = chosen / np.exp(found["old_logprob"])
    np.testing.assert_allclose(ratio[mask], kept[mask], rtol=1e-4)
    assert ratio[mask].mean() < 0.9

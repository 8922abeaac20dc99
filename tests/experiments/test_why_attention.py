"""What the report on attention measures, and that it measures it rightly."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError, view
from lm.experiments.why_attention.config import TRANSLATORS, WhyAttentionJob
from lm.experiments.why_attention.measure import accuracy, measure_bottleneck, reach
from lm.experiments.why_attention.tasks import TEST, Task, copying, repeated, translation
from lm.inference import Framing, Generator, SamplingConfig
from lm.inference.prompts import NOTHING
from lm.jobs import why_attention
from lm.models import ModelConfig, init, param_specs, skeleton
from lm.tokenizers import TokenizerConfig

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "why_attention.py"
BPE = TokenizerConfig(kind="bpe", vocab_size=300)


def get_config():
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def tiny(**fields) -> ModelConfig:
    sizes = {"num_layers": 1, "num_heads": 2, "width": 8, "mlp_width": 16, "vocab_size": 12}
    return ModelConfig(**{**sizes, "max_length": 16, "compute_dtype": "float32", **fields})


def start(config, seed=0):
    values = init(param_specs(skeleton(config)), jax.random.key(seed))
    return {name: value * 20 for name, value in values.items()}


# ---- Tasks -----------------------------------------------------------------------------------


def test_the_repetition_alone_is_predicted_and_can_be():
    batch = repeated(0, 3, batch_size=4, length=5, symbols=26)
    assert batch["weights"].tolist() == [[0] * 6 + [1] * 5] * 4
    # A target is the token as many places before its input as there are symbols.
    np.testing.assert_array_equal(batch["targets"][:, 6:], batch["inputs"][:, 1:6])
    again, other = (repeated(0, n, 4, 5, 26) for n in (3, 4))
    np.testing.assert_array_equal(batch["inputs"], again["inputs"])
    assert not np.array_equal(batch["inputs"], other["inputs"])


def pairs_of(task: Task, batch):
    """The pairs in a batch, row by row."""
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["source_segment_ids"][row] == segment
            to = batch["segment_ids"][row] == segment
            source, inputs = batch["source"][row, at], batch["inputs"][row, to]
            targets = batch["targets"][row, to]
            assert source[-1] == targets[-1] == task.end and inputs[0] == task.begin
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            assert batch["source_positions"][row, at].tolist() == list(range(at.sum()))
            assert batch["positions"][row, to].tolist() == list(range(to.sum()))
            yield source[:-1].tolist(), targets[:-1].tolist()


@pytest.mark.parametrize("length", [7, 20])
def test_rows_hold_the_drawn_pairs_in_order_and_whole(length):
    task = copying(0, symbols=5, length=6, test_pairs=2)
    batch = task.packed(number=4, rows=3, length=length)
    assert batch["inputs"].shape == (3, length)
    np.testing.assert_array_equal(batch["weights"] > 0, batch["segment_ids"] > 0)
    found = list(pairs_of(task, batch))
    assert len(found) >= 3
    for (source, target), (drawn, _) in zip(found, task.draw(4)):
        assert source == target == drawn.tolist()


def test_translations_to_test_on_are_not_among_those_to_train_on():
    task = translation(0, words=6, many=50, settings=BPE, test_pairs=4)
    tested = {tuple(source) for pairs in task.test.values() for source, _ in pairs}
    stream = task.draw(0)
    trained = {tuple(next(stream)[0]) for _ in range(400)}
    assert len(trained) == 50 and len(tested) == 24 and not trained & tested
    assert list(task.test) == sorted(task.test) and max(task.test) <= 6
    assert all(max(map(len, pair)) < task.length for pair in task.test[max(task.test)])


# ---- What is measured ------------------------------------------------------------------------


def test_a_network_that_forgets_everything_feels_its_loss_at_the_last_token_alone():
    config = tiny(cell="rnn")
    batch = repeated(0, TEST, 3, 4, symbols=10)
    run = tiny_models.compiled(lambda values: reach(config, values, batch))
    values = start(config)
    shares, _ = run(values)
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-5)
    assert shares[1] > 1e-3
    forgetful = {**values, "blocks.state": jnp.zeros_like(values["blocks.state"])}
    np.testing.assert_allclose(run(forgetful)[0], [1] + [0] * 8, atol=1e-6)


def test_the_share_of_whole_texts_is_that_of_greedy_decoding():
    config = tiny(cell="gru", architecture="encoder_decoder")
    values, task = start(config), copying(0, 10, 6, 4)
    sources = [source for pairs in task.test.values() for source, _ in pairs]
    framing = Framing(decoder_start=(task.begin,), end_of_text=(task.end,))
    greedy = SamplingConfig(temperature=0, max_new_tokens=6)
    generation = Generator(skeleton(config), values, framing).generate(
        [[*source, task.end] for source in sources], greedy
    )
    written = np.concatenate(list(generation), 1)
    # Up to a token that the model takes for the end, what it writes is right by definition.
    texts = [text[~np.isin(text, (task.end, NOTHING))] for text in written]
    ended = np.array(generation.ended)
    own = dataclasses.replace(
        task, test={float(i): [pair] for i, pair in enumerate(zip(sources, texts))}
    )
    exact = np.array(accuracy(config, values, own)["exact"])
    np.testing.assert_array_equal(exact[ended], 1)
    wrong = [np.append(text[:-1], (text[-1] + 1) % 10) for text in texts if len(text)]
    assert wrong
    other = dataclasses.replace(task, test={0.0: list(zip(sources, wrong))})
    assert accuracy(config, values, other)["exact"] == [0.0]


# ---- The job ---------------------------------------------------------------------------------


def tiny_job():
    config = get_config()
    config.gradients.update(length=4, steps=2, batch_size=4)
    config.bottleneck.update(steps=2, batch_size=2, symbols=6, words=5, pairs=40, test_pairs=2)
    config.bottleneck.tokenizer.vocab_size = 300
    config.speed.update(lengths=(4, 8), rows=2, repeats=1)
    config.optimizer.warmup_steps = 0
    for section in (config.gradients.model, config.speed.model, config.bottleneck.transformer):
        section.update(width=8, mlp_width=8, num_layers=1)
    config.bottleneck.fixed.width = config.bottleneck.attending.width = 8
    return config


@pytest.mark.slow
def test_one_command_writes_the_report_the_picture_and_the_numbers(tmp_path):
    why_attention.run(tiny_job(), str(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    gradients = results["gradients"]["models"]
    assert list(gradients) == ["RNN", "GRU", "LSTM", "Transformer"]
    for model in gradients.values():
        assert len(model["at_start"]) == len(model["trained"]) == 9
        assert model["at_start"] != model["trained"]
    for task in ("copy", "translation"):
        found = results["bottleneck"][task]
        assert all(len(m["exact"]) == len(found["lengths"]) for m in found["models"].values())
        weights = np.array(found["pattern"]["weights"])
        assert weights.shape == (len(found["pattern"]["target"]), len(found["pattern"]["source"]))
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-2)
    assert len(results["speed"]["models"]["LSTM"]["tokens_per_second"]) == 2
    assert (tmp_path / "run" / "why_attention.png").stat().st_size > 50_000
    assert "![" in (tmp_path / "run" / "report.md").read_text()


def test_the_config_compares_models_of_about_the_same_size():
    job = view(WhyAttentionJob, get_config())
    sizes = []
    for section in TRANSLATORS:
        sized = {"vocab_size": 512, "max_length": 64}
        config = dataclasses.replace(getattr(job.bottleneck, section), **sized)
        specs = param_specs(skeleton(config))
        sizes.append(sum(spec.size for name, spec in specs.items() if "embedding" not in name))
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.parametrize(
    "field, value, line",
    [
        ("bottleneck.fixed.cross_attention", True, "config.bottleneck.fixed.cross_attention=True"),
        ("bottleneck.attending.cell", "gru", "config.bottleneck.attending.cell='gru' must be"),
        ("bottleneck.row_length", 20, "config.bottleneck.row_length=20 must be more than"),
        ("gradients.model.vocab_size", 9, "config.gradients.model.vocab_size=9 must be 0"),
        ("speed.lengths", (), "config.speed.lengths=() must be at least one length"),
        ("gradients.length", 1, "config.gradients.length=1 must be at least 2"),
        ("alphabet", 1, "config.alphabet=1 must be at least 2"),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value, line):
    config = get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError) as error:
        view(WhyAttentionJob, config)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_rows_too_short_for_a_sentence_are_refused_before_training(tmp_path):
    config = tiny_job()
    config.bottleneck.row_length = 7
    with pytest.raises(ConfigError, match=r"row_length=7 is too short for the longest text"):
        measure_bottleneck(view(WhyAttentionJob, config), print)

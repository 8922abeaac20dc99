"""An encoder-decoder reads a source and writes a target; special tokens frame both."""

import json

import numpy as np
import pytest
from tiny_run import general_params, tiny_model, write_tiny_run

import lm
from lm.config import ConfigError, defaults
from lm.inference import Framing, Generator, SamplingConfig
from lm.inference.prompts import NOTHING
from lm.jobs.generate import GenerateJob
from lm.jobs.generate import run as generate_job
from lm.tokenizers import TokenizerConfig, train

BOTH = {"architecture": "encoder_decoder", "positions": "learned"}
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("translate")
    write_tiny_run(path, **BOTH)
    return path


@pytest.fixture(scope="module")
def run(directory):
    return lm.load(directory)


def test_the_text_is_the_target_alone(run):
    source = run.encode("The cat")
    assert source == [*b"The cat", run.tokenizer.eos_id]
    drawn = np.concatenate(list(run.generator.generate([source], GREEDY)), 1)[0]
    target = [id for id in drawn.tolist() if id != NOTHING]
    logits_1TV = run.model([source], [[run.tokenizer.bos_id, *target[:-1]]])
    assert target == logits_1TV[0].argmax(-1).tolist()
    text = run.generate("The cat", temperature=0, max_new_tokens=12)
    assert text == run.tokenizer.decode(target)  # end-of-text, if it came, adds nothing


def test_samples_of_a_source_differ_and_sources_do_not_mix(run):
    texts = run.generate(["a", "The cat sat"], max_new_tokens=8, num_samples=2, seed=3)
    assert len(texts) == 4 and texts[0] != texts[1]
    alone = run.generate("a", max_new_tokens=8, num_samples=2, seed=3)
    assert alone == texts[:2]


def test_the_job_prints_the_target_alone(directory, run, capsys):
    config = defaults(GenerateJob)
    config.update({"init_from": str(directory), "prompt": "The cat", "max_new_tokens": 6})
    texts = generate_job(config, "unused")
    assert capsys.readouterr().out == texts[0] + "\n"
    assert texts[0] == run.generate("The cat", max_new_tokens=6)


def test_source_and_target_each_have_the_whole_context(run):
    with pytest.raises(ConfigError, match=r"prompt is 33 tokens long.*context is 32"):
        run.generate("x" * 32)
    generator = run.generator
    sampling = SamplingConfig(max_new_tokens=50, stop_at_end_of_text=False)
    [tokens] = np.concatenate(list(generator.generate([[1] * 32], sampling)), 1)
    assert (tokens != NOTHING).sum() == 32


def test_the_model_needs_what_its_architecture_reads(run, tmp_path):
    with pytest.raises(ConfigError, match="reads two texts"):
        run.model([[1, 2]])
    write_tiny_run(tmp_path)
    with pytest.raises(ConfigError, match="reads one text"):
        lm.load(tmp_path).model([[1, 2]], [[3]])


def test_a_decoder_may_start_from_several_tokens():
    model, _ = tiny_model(**BOTH)
    params = general_params(model)
    sources = [[5, 6], [9, 8, 7, 6]]

    def drawn(*start):
        generator = Generator(model, params, Framing(end_of_text=(), decoder_start=start))
        return np.concatenate(list(generator.generate(sources, GREEDY)), 1).tolist()

    [first, _] = drawn(3)
    assert drawn(3, first[0])[0][:11] == first[1:12]
    with pytest.raises(ConfigError, match="decoder_start"):
        drawn()


def test_any_of_several_tokens_ends_a_text():
    model, params = tiny_model()

    def drawn(*end):
        generation = Generator(model, params, Framing(end_of_text=end)).generate(
            [[5, 6, 7]], GREEDY
        )
        return [t for t in np.concatenate(list(generation), 1)[0].tolist() if t != NOTHING]

    free = drawn()
    first = next(n for n, token in enumerate(free) if n and token not in free[:n])
    assert drawn(free[first], -5) == drawn(-5, free[first]) == free[: first + 1]


def test_texts_are_framed_by_architecture_unless_the_config_says_otherwise(tmp_path):
    tokenizer = train(TokenizerConfig(kind="byte", bos_token="<s>"), [])
    end, begin = (tokenizer.eos_id,), (tokenizer.bos_id,)
    framings = {
        "decoder": Framing(begin, (), (), end, begin),
        "encoder": Framing(begin, end, (), end, begin),
        "encoder_decoder": Framing((), end, begin, end, begin),
    }
    for architecture, expected in framings.items():
        model, _ = tiny_model(architecture=architecture)
        assert Framing().filled(model.config, tokenizer) == expected
    write_tiny_run(tmp_path, tokenizer=tokenizer, **BOTH)
    config = json.loads((tmp_path / "config.json").read_text())
    config["framing"] = {"before": [1, 2], "decoder_start": [4], "end_of_text": [7, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = lm.load(tmp_path)
    assert run.framing == Framing((1, 2), end, (4,), (7, 8), begin)
    assert run.encode("a") == [1, 2, *b"a", *end]
    assert run.generator.framing.decoder_start == (4,)

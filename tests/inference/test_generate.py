"""Generation: what one compiled loop draws is what a plain loop would, row by row."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_run import tiny_model

from lm.config import ConfigError, view
from lm.inference import Framing, Generator, SamplingConfig
from lm.inference.prepare import in_compute_dtype, spread
from lm.inference.prompts import NOTHING, padded
from lm.models import bind
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.tokenizers import TokenizerConfig, train

FREE = Framing(end_of_text=())  # nothing ends a text
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5]]


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(vocab_size=61, num_layers=1)


@pytest.fixture(scope="module")
def generator(tiny):
    return Generator(*tiny, FREE)


def rows(generation):
    """Each row's tokens."""
    drawn_BN = np.concatenate(list(generation), 1)
    return [[t for t in row if t != NOTHING] for row in drawn_BN.tolist()]


@pytest.mark.parametrize("chunk", [3, 40])
def test_the_chunk_size_does_not_change_the_tokens(tiny, generator, chunk):
    sampling = SamplingConfig(max_new_tokens=12, num_samples=2)
    expected = rows(generator.generate(PROMPTS, sampling, seed=3))
    chunked = Generator(*tiny, FREE, chunk=chunk)
    assert rows(chunked.generate(PROMPTS, sampling, seed=3)) == expected


def test_a_sample_does_not_depend_on_its_companions(generator):
    sampling = SamplingConfig(max_new_tokens=12, num_samples=3)
    together = rows(generator.generate(PROMPTS, sampling, seed=7))
    first_alone = rows(generator.generate(PROMPTS[:1], sampling, seed=7))
    assert together[:3] == first_alone
    # Nor on how many samples there are, or on what the other prompts say.
    one_each = SamplingConfig(max_new_tokens=12)
    others = [[8] * 20, PROMPTS[1], [2]]
    assert rows(generator.generate(others, one_each, seed=7))[1] == together[3]


def test_samples_differ_and_follow_the_seed(generator):
    sampling = SamplingConfig(max_new_tokens=12, num_samples=2)
    first, second = rows(generator.generate(PROMPTS[:1], sampling, seed=1))
    assert first != second
    assert rows(generator.generate(PROMPTS[:1], sampling, seed=1)) == [first, second]
    assert rows(generator.generate(PROMPTS[:1], sampling, seed=2))[0] != first


def test_a_mesh_shares_parameters_and_cache_and_draws_the_same(tiny, generator):
    model, params = tiny
    sampling = SamplingConfig(temperature=0, max_new_tokens=11, num_samples=2)
    expected = rows(generator.generate(PROMPTS, sampling))
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    mesh, params = spread(model, {name: jnp.copy(x) for name, x in params.items()}, mesh)
    shared = Generator(model, params, FREE)
    assert rows(shared.generate(PROMPTS, sampling)) == expected
    spec = shared.engine._device.cache.keys_PKSC[0].sharding.spec
    assert spec == PartitionSpec(None, "tensor", None, None), "two heads"


def test_a_mesh_draws_by_filters_from_a_large_vocabulary():
    """Where the filters look at the head of the vocabulary alone."""
    model, params = tiny_model(vocab_size=300, num_layers=1)
    sampling = SamplingConfig(max_new_tokens=6, top_k=20, top_p=0.9)
    expected = rows(Generator(model, params, FREE).generate(PROMPTS, sampling))
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    _, shared = spread(model, {name: jnp.copy(x) for name, x in params.items()}, mesh)
    assert rows(Generator(model, shared, FREE).generate(PROMPTS, sampling)) == expected


def test_a_row_stops_at_end_of_text_and_the_others_go_on(tiny, generator):
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    free = rows(generator.generate(PROMPTS, sampling))
    end = free[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len(expected[0]) <= 5
    stopping = Generator(*tiny, Framing(end_of_text=(end,)))
    assert rows(stopping.generate(PROMPTS, sampling)) == expected
    ignoring = SamplingConfig(temperature=0, max_new_tokens=20, stop_at_end_of_text=False)
    assert rows(stopping.generate(PROMPTS, ignoring)) == free


def test_nothing_runs_once_every_row_has_ended(tiny, generator):
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    end = rows(generator.generate(PROMPTS[:1], sampling))[0][0]
    generation = Generator(*tiny, Framing(end_of_text=(end,))).generate(PROMPTS[:1], sampling)
    assert [chunk.tolist() for chunk in generation] == [[[end]]]
    assert generation.timing.tokens == 1


def slid(tiny, ids, new, begin=()):
    """Greedy decoding of a text that outgrows 32 tokens, each from a full forward pass."""
    bound, window, drawn = jax.jit(bind(*tiny)), list(ids), []
    for _ in range(new):
        if len(window) > 32:
            window = [*begin, *window[len(window) - 24 + len(begin) :]]
        row = jnp.array([window + [0] * (32 - len(window))])
        drawn.append(int(bound(row)[0, len(window) - 1].argmax()))
        window.append(drawn[-1])
    return drawn


@pytest.mark.parametrize(
    "fields",
    [{}, {"cell": "lstm"}, pytest.param({"positions": "learned"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_text_that_outgrows_the_context_slides(fields):
    tiny = tiny_model(vocab_size=61, **fields)
    prompts = [[1] * 30, [5, 7], list(range(32)), list(range(2, 40))]
    sampling = SamplingConfig(temperature=0, max_new_tokens=75)
    generation = Generator(*tiny, FREE).generate(prompts, sampling)
    expected = [slid(tiny, ids, 75) for ids in [*prompts[:3], prompts[3][-32:]]]
    assert rows(generation) == expected
    assert len(set(expected[1])) > 5  # not one token over and over
    assert any("outgrew the model's context of 32" in notice for notice in generation.notices)
    assert generation.timing.tokens == 4 * 75


def test_begin_of_text_stays_in_front_when_a_window_slides(tiny):
    generator = Generator(*tiny, Framing(end_of_text=(), before=(5,)))
    sampling = SamplingConfig(temperature=0, max_new_tokens=60)
    drawn = rows(generator.generate([[5, 6, 7], [9, 6, 7]], sampling))
    assert drawn == [slid(tiny, [5, 6, 7], 60, [5]), slid(tiny, [9, 6, 7], 60)]
    long = list(range(5, 45))
    [drawn] = rows(generator.generate([long], sampling))
    assert drawn == slid(tiny, [5, *long[-31:]], 60, [5])


def test_a_sliding_row_depends_on_nothing_but_its_prompt_and_seed(tiny, generator):
    sampling = SamplingConfig(max_new_tokens=50, num_samples=2)
    together = rows(generator.generate(PROMPTS, sampling, seed=7))
    assert together[:2] == rows(generator.generate(PROMPTS[:1], sampling, seed=7))
    assert together == rows(Generator(*tiny, FREE, chunk=3).generate(PROMPTS, sampling, seed=7))
    # One row stops at least, the others go on as they did.
    end = next(t for t in together[2] if any(t not in row for row in together))
    expected = [row[: row.index(end) + 1] if end in row else row for row in together]
    assert any(len(row) == 50 for row in expected)
    stopping = Generator(*tiny, Framing(end_of_text=(end,)))
    assert rows(stopping.generate(PROMPTS, sampling, seed=7)) == expected


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny):
    tokenizer = train(TokenizerConfig(kind="char", vocab_size=4), ["ab"])
    generator = Generator(*tiny, FREE, tokenizer)
    drawn = rows(generator.generate(PROMPTS, SamplingConfig(temperature=3.0, max_new_tokens=20)))
    assert {id for row in drawn for id in row} == {0, 1, 2, 3}


def test_timing_counts_every_token(generator):
    generation = generator.generate(PROMPTS, SamplingConfig(max_new_tokens=10))
    rows(generation)
    timing = generation.timing
    assert timing.tokens == 30 and len(timing.token_seconds) == 9
    assert 0 < timing.first_token_seconds < timing.seconds
    assert timing.first_token_seconds + sum(timing.token_seconds) == pytest.approx(timing.seconds)
    again = generator.generate(PROMPTS, SamplingConfig(max_new_tokens=10))
    rows(again)
    assert again.timing.compile_seconds == 0


def test_prompts_of_similar_lengths_share_shapes():
    for length, bucket in [(1, 8), (8, 8), (9, 16), (33, 64), (65, 128), (200, 256), (250, 255)]:
        tokens_PT, positions_PT = padded([list(range(length))], context=255)
        assert tokens_PT.shape == (1, bucket if bucket < 256 else 255)
        assert positions_PT[0, -length:].tolist() == list(range(length))
        assert (positions_PT[0, :-length] == -1).all()


def test_casting_once_changes_no_logit():
    model, params = tiny_model(compute_dtype="bfloat16", bias=True, tie_embeddings=False)
    tokens_BT = jnp.array([[1, 2, 3, 4]])
    cast = in_compute_dtype(model, params)
    assert cast["blocks.mlp.up"].dtype == jnp.bfloat16
    assert cast["final_norm.scale"].dtype == jnp.float32
    np.testing.assert_array_equal(bind(model, cast)(tokens_BT), bind(model, params)(tokens_BT))


@pytest.mark.parametrize(
    "prompt, words",
    [
        ([], "at least one token"),
        ([1] * 33, "33 tokens long.*context is 32.*by 1"),
        ([61], "0 … 60"),
    ],
)
def test_impossible_prompts_are_refused(generator, prompt, words):
    with pytest.raises(ConfigError, match=words):
        generator.generate([prompt], SamplingConfig(truncate_prompt=False))


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("top_p", -0.5),
        ("top_p", 1.5),
        ("max_new_tokens", 0),
        ("num_samples", 2**31),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"config\.{field}={value}"):
        view(SamplingConfig, {field: value})


@pytest.mark.parametrize("seed", [-(2**31) - 1, 2**32, 1.5, None])
def test_seeds_that_would_be_taken_for_others_are_refused(generator, seed):
    with pytest.raises(ConfigError, match=f"seed={seed} must be a whole number"):
        generator.generate(PROMPTS, SamplingConfig(), seed)


def test_more_rows_than_memory_holds_take_turns(tiny, generator, monkeypatch):
    sampling = SamplingConfig(max_new_tokens=12, num_samples=5)
    expected = rows(generator.generate(PROMPTS, sampling, seed=3))
    monkeypatch.setattr("lm.inference.engine.device_memory", lambda: 6 * 2**14)
    small = Generator(*tiny, FREE)
    assert rows(small.generate(PROMPTS, sampling, seed=3)) == expected
    assert small.engine.config.max_slots == 3, "half of six pages"


def test_a_prompt_is_read_once_for_all_its_samples(tiny):
    generator = Generator(*tiny, FREE)
    sampling = SamplingConfig(max_new_tokens=12, num_samples=5)
    together = rows(generator.generate(PROMPTS, sampling, seed=3))
    # But for the last token, which is read where the first is drawn.
    assert generator.engine.stats_read == sum(len(ids) - 1 + 5 for ids in PROMPTS)
    assert len({tuple(row) for row in together}) == 15
    alone = rows(generator.generate(PROMPTS[:1], dataclasses.replace(sampling, num_samples=1), 3))
    assert alone == together[:1]
    assert generator.engine.held == 0


def test_two_texts_may_be_written_in_turns(generator):
    sampling = SamplingConfig(max_new_tokens=20)
    expected = [rows(generator.generate(PROMPTS[:1], sampling, seed)) for seed in (1, 2)]
    both = [iter(generator.generate(PROMPTS[:1], sampling, seed)) for seed in (1, 2)]
    pairs = list(itertools.zip_longest(*both))
    for number, each in enumerate(expected):
        assert rows(pair[number] for pair in pairs if pair[number] is not None) == each


def test_what_is_left_or_interrupted_leaves_nothing_behind(generator, monkeypatch):
    sampling = SamplingConfig(max_new_tokens=20)
    expected = rows(generator.generate(PROMPTS, sampling, seed=1))
    for _ in generator.generate(PROMPTS, sampling, seed=1):
        break
    assert generator.engine.under_way == generator.engine.held == 0
    generation = iter(generator.generate(PROMPTS, sampling, seed=1))
    next(generation)
    whole = generator.engine._device.decode

    def interrupted(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(generator.engine._device, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    monkeypatch.undo()
    assert rows(generator.generate(PROMPTS, sampling, seed=1)) == expected


def test_a_stop_string_ends_a_row_and_is_not_part_of_its_text(tiny):
    tokenizer = train(TokenizerConfig(kind="char", vocab_size=40), ["abcdefghijklmnopqrstuvwxyz"])
    generator = Generator(*tiny, FREE, tokenizer)

    def texts(most=30, **fields):
        sampling = SamplingConfig(max_new_tokens=most, num_samples=2, **fields)
        generation, found = generator.generate(PROMPTS, sampling, seed=4), [""] * 6
        for row, piece in generation.texts():
            found[row] += piece
        return found, generation

    free, _ = texts()
    stop = free[0][9:11]
    found, generation = texts(stop=stop)
    assert found == [text.partition(stop)[0] for text in free]
    assert generation.ended == [stop in text for text in free]
    for steps, ended in zip(generation.steps, generation.ended):
        whole = tokenizer.decode([step.id for step in steps])
        assert whole.endswith(stop) if ended else len(steps) == 30
    _, short = texts(most=13, stop=stop)  # of the chunk that the first one's stop string ends in
    assert short.steps[0] == generation.steps[0]
    assert generator.engine.held == 0


def test_every_token_has_its_log_probability(tiny, generator):
    sampling = SamplingConfig(temperature=0, max_new_tokens=4, logprobs=2, prompt_logprobs=1)
    generation = generator.generate([[5, 6, 7]], sampling)
    [drawn] = rows(generation)
    model, params = tiny
    logits_BTV = jax.jit(lambda params, *tokens: bind(model, params)(*tokens))(
        params, jnp.array([[5, 6, 7, *drawn]])
    )
    forward = jax.nn.log_softmax(logits_BTV)[0]
    steps = generation.prompt_steps[0] + generation.steps[0]
    assert [step.id for step in steps] == [6, 7, *drawn]
    expected = [float(forward[t, step.id]) for t, step in enumerate(steps)]
    np.testing.assert_allclose([step.logprob for step in steps], expected, atol=1e-5)
    assert all(step.top[0][0] == step.id and len(step.top) == 2 for step in generation.steps[0])

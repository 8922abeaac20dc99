"""The engine: what a request gets depends on nothing but the request."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from tiny_run import general_params, tiny_model

from lm.config import ConfigError
from lm.inference.engine import Engine, EngineConfig, QueueFull, Request
from lm.inference.pages import Pages
from lm.inference.prepare import spread
from lm.inference.prompts import Framing
from lm.inference.sampling import SamplingConfig, packed
from lm.inference.scheduler import Scheduler, Text
from lm.models import bind
from lm.parallel.mesh import MeshConfig, make_mesh

END = 7
FRAMING = Framing(end_of_text=(END,))
SIZES = EngineConfig(max_slots=3, page_size=4, prefill_chunk=8, decode_chunk=4)
FAMILIES = {
    "rotary": {"num_kv_heads": 1},
    "local": {
        "attention_pattern": ("local", "local", "global"),
        "num_layers": 3,
        "window": 6,
        "attention_softcap": 5.0,
        "attention_sinks": True,
        "logits_softcap": 8.0,
    },
    "all_local": {"attention_pattern": ("local",), "window": 6},
    "experts": {"num_experts": 4, "activation": "swiglu", "expert_width": 16},
    "latents": {
        "head_dim": 12,
        "kv_rank": 10,
        "query_rank": 6,
        "shared_key_dim": 4,
        "value_dim": 5,
    },
    "alibi": {"positions": "alibi"},
    "unrotated": {
        "num_layers": 3,
        "scan_layers": True,
        "rotary_pattern": (True, False),
        "attention_pattern": ("global", "local"),
        "window": 5,
        "norm_position": "reordered",
        "qk_norm": True,
        "qk_norm_joint": True,
    },
    "relative": {"positions": "relative", "relative_buckets": 8, "relative_distance": 10},
    "learned": {"positions": "learned", "scan_layers": True, "scale_by_layer": True},
}


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(vocab_size=61, num_layers=1)


def engine_of(tiny, **fields):
    return Engine(*tiny, FRAMING, config=dataclasses.replace(SIZES, **fields))


def run(engine, requests):
    """What each of the requests, submitted at once, gets: steps and how it ended."""
    numbers = [engine.submit(request) for request in requests]
    gained = {number: ([], []) for number in numbers}
    while not engine.idle:
        collect(gained, engine.step())
    return [gained[number] for number in numbers]


def collect(gained, events):
    for event in events:
        steps, ends = gained[event.number]
        assert not ends, "nothing comes after the end"
        steps += event.steps
        ends += [event.finish] if event.finish else []


def alone(engine, request):
    """The same of an engine that remembers no prompt and has nothing else to do."""
    engine.update(engine.given)
    return run(engine, [request])[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "local" else pytest.mark.slow) for name in FAMILIES],
)
def test_greedy_tokens_and_log_probabilities_are_those_of_full_forward_passes(name):
    model, _ = tiny_model(vocab_size=61, **FAMILIES[name])
    params = general_params(model)
    engine = Engine(model, params, Framing(), config=SIZES)
    sampling = SamplingConfig(temperature=0, max_new_tokens=12, logprobs=3)
    prompts = [[5, 6, 7], [9], list(range(3, 16)), [8] * 8]
    results = run(engine, [Request(tuple(ids), sampling) for ids in prompts])
    forward = jax.jit(lambda tokens_1T: jax.nn.log_softmax(bind(model, params)(tokens_1T)))
    for ids, (steps, ends) in zip(prompts, results):
        assert ends == ["length"]
        text = ids + [step.id for step in steps]
        logprobs_TV = np.asarray(forward(np.array([text + [0] * (32 - len(text))])))[0]
        for t, step in enumerate(steps, len(ids) - 1):
            assert step.id == logprobs_TV[t].argmax() == step.top[0][0]
            np.testing.assert_allclose(step.logprob, logprobs_TV[t].max(), atol=2e-5)
            named = [logprobs_TV[t, id] for id, _ in step.top]
            np.testing.assert_allclose([x for _, x in step.top], named, atol=2e-5)
    assert engine.held == 0


PREFIXES = [(), tuple(range(10, 26)), tuple(range(10, 18)), tuple(range(30, 46))]
KINDS = [
    {"temperature": 0},
    {},
    {"top_k": 5, "temperature": 0.7},
    {"top_p": 0.8, "logprobs": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]
requests = st.builds(
    lambda prefix, ids, kind, most, seed: Request(
        (*prefix, *ids), SamplingConfig(max_new_tokens=most, **kind), seed
    ),
    st.sampled_from(PREFIXES),
    st.lists(st.integers(8, 60), min_size=1, max_size=12).map(tuple),
    st.sampled_from(KINDS),
    st.integers(1, 30),
    st.integers(0, 3),
)
arrivals = st.lists(
    st.tuples(requests, st.integers(0, 3), st.one_of(st.none(), st.integers(0, 6))),
    min_size=1,
    max_size=8,
)


@pytest.fixture(
    scope="module",
    params=[
        ("local", "compute"),
        pytest.param(("experts", "compute"), marks=pytest.mark.slow),
        pytest.param(("local", "int8"), marks=pytest.mark.slow),
        pytest.param(("latents", "int8"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def engines(request):
    """One for many requests, one for requests alone; hardly more pages than one text needs."""
    name, cache = request.param
    model, _ = tiny_model(vocab_size=61, **FAMILIES[name])
    params = general_params(model)
    sizes = dataclasses.replace(SIZES, num_pages=11, cache=cache)
    pair = [Engine(model, params, FRAMING, config=sizes) for _ in range(2)]
    for engine in pair:
        engine.given = params
    return pair


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(arrivals=arrivals)
def test_a_request_gets_what_it_would_get_alone(engines, arrivals):
    engine, lonely = engines
    gained, cancelled, numbers = {}, {}, []
    for request, steps, cancel in arrivals:
        numbers.append(number := engine.submit(request))
        gained[number] = ([], [])
        if cancel is not None:
            cancelled[number] = cancel
        for _ in range(steps):
            _step(engine, gained, cancelled)
    for _ in range(1000):
        _step(engine, gained, cancelled)
        if engine.idle:
            break
    assert engine.idle and engine.held == 0 and engine.stats.running == engine.stats.queued == 0
    for (request, _, _), number in zip(arrivals, numbers):
        steps, ends = gained[number]
        expected, expected_ends = alone(lonely, request)
        if ends == ["cancelled"]:
            assert steps == expected[: len(steps)]
        else:
            assert (steps, ends) == (expected, expected_ends)


def _step(engine, gained, cancelled):
    for number in [number for number, left in cancelled.items() if left == 0]:
        engine.cancel(number)
        del cancelled[number]
    for number in cancelled:
        cancelled[number] -= 1
    collect(gained, engine.step())


def test_a_larger_batch_changes_no_bit_at_the_sizes_of_real_models():
    model, _ = tiny_model(
        vocab_size=1024, width=128, num_heads=4, activation="swiglu", norm="rmsnorm"
    )
    sizes = EngineConfig(max_slots=20, page_size=16, prefill_chunk=64, decode_chunk=8)
    engine = Engine(model, general_params(model), FRAMING, config=sizes)
    requests = [
        Request(tuple(range(10, 12 + n)), SamplingConfig(max_new_tokens=12), seed=n)
        for n in range(20)
    ]
    together = run(engine, requests)
    for n in (0, 7, 19):
        assert run(engine, [requests[n]])[0] == together[n]
    assert run(engine, requests[:3]) == together[:3]


def test_too_few_pages_make_the_newest_wait_and_change_nothing(tiny):
    sampling = SamplingConfig(max_new_tokens=24)
    asked = [Request((9, 8), sampling, seed=seed) for seed in range(4)]
    wide, narrow = engine_of(tiny), engine_of(tiny, num_pages=9)
    assert run(narrow, asked) == run(wide, asked)
    assert narrow.stats.preemptions > 0 and wide.stats.preemptions == 0


@pytest.mark.parametrize("pages", [None, 9])
def test_what_is_read_for_one_sample_is_there_for_the_others_and_changes_nothing(tiny, pages):
    sampling = SamplingConfig(max_new_tokens=9, logprobs=1)
    asked = [Request(tuple(range(8, 21)), sampling, sample=sample) for sample in range(3)]
    engine = engine_of(tiny, num_pages=pages)
    together = run(engine, asked)
    assert engine.stats.prompt_tokens == 3 * 13
    if pages is None:  # of each, the last token is read where the first is drawn
        assert engine.stats_read == 12 + 3
    assert engine.held == 0
    alone_in_turn = [run(engine_of(tiny), [request])[0] for request in asked]
    assert together == alone_in_turn


def test_keys_and_values_of_eight_bits_are_the_same_alone_in_company_found_and_preempted(tiny):
    _, params = tiny
    sampling = SamplingConfig(max_new_tokens=20)
    asked = [Request((*range(10, 20), n), sampling, seed=n) for n in range(4)]
    engine, alone = engine_of(tiny, num_pages=9, cache="int8"), []
    for request in asked:
        engine.update(params)
        alone += run(engine, [request])
    assert engine.stats.preemptions == engine.stats.found_tokens == 0
    assert run(engine, asked) == alone
    assert engine.stats.preemptions > 0 and engine.stats.found_tokens > 0


def test_a_text_of_the_whole_context_comes_back_to_as_many_pages_as_it_had():
    saved = []
    scheduler = Scheduler(
        Pages(12), 2, 4, 8, 0, list, lambda pages, held: saved.extend((held, pages))
    )
    old, new = (Text(n, Request((9,), SamplingConfig()), [9]) for n in range(2))
    scheduler.waiting.append(new)
    scheduler.admit()
    assert scheduler.room(new, 32)
    scheduler.preempt(new)
    scheduler.waiting.appendleft(old)
    scheduler.admit()
    assert scheduler.admitted == [old, new]
    assert len(saved[0]) == 8 and saved[1] == new.pages


def test_every_page_of_a_remembered_prompt_can_be_had_again():
    pages = Pages(3)
    first = pages.take(1)
    pages.keep(b"first", b"", first)
    pages.release(first)
    second, third = pages.take(2)  # the first is forgotten before the second is remembered
    pages.keep(b"second", b"first", [second])
    pages.keep(b"first", b"", [third])
    pages.release([second, third])
    assert len(pages.take(2)) == 2


def test_a_prompt_read_before_is_not_read_again(tiny):
    engine, sampling = engine_of(tiny), SamplingConfig(max_new_tokens=5)
    long = Request(tuple(range(8, 30)), sampling)
    first = run(engine, [long])
    read = engine.stats.prompt_tokens - engine.stats.found_tokens
    assert (read, engine.stats.found_tokens) == (22, 0)
    assert run(engine, [long]) == first
    assert engine.stats.found_tokens == 16
    assert run(engine, [Request((1, *range(9, 30)), sampling)]) != first
    assert engine.stats.found_tokens == 16


def test_after_an_update_the_output_is_that_of_a_fresh_engine(tiny):
    model, _ = tiny
    other = general_params(model)
    engine, fresh = engine_of(tiny), Engine(model, other, FRAMING, config=SIZES)
    request = Request(tuple(range(8, 30)), SamplingConfig(max_new_tokens=6, temperature=0))
    before = run(engine, [request])
    gained = {engine.submit(request): ([], [])}
    collect(gained, engine.step())
    engine.update(other)
    late = engine.submit(request)
    gained[late] = ([], [])
    while not engine.idle:
        collect(gained, engine.step())
    assert gained[late] == run(fresh, [request])[0] != before[0]
    assert all(len(steps) == 6 for steps, _ in gained.values())
    assert engine.held == 0


def test_the_number_of_programs_is_fixed_after_a_warm_up(tiny):
    model, params = tiny  # as a checkpoint gives them: bound to where they are
    # Pages as no other test has them: what another has compiled is not compiled anew.
    engine = engine_of((model, jax.device_put(params, jax.devices()[0])), num_pages=10)
    engine.warm_up()
    compiled = engine.num_programs
    rng = np.random.default_rng(0)
    for kind in KINDS:
        sampling = SamplingConfig(max_new_tokens=10, **kind)
        lengths = rng.integers(1, 20, 5)
        run(engine, [Request((9,) * int(n), sampling, seed=int(n)) for n in lengths])
    assert engine.num_programs == compiled


def test_engines_of_one_config_share_what_is_compiled(tiny):
    request = Request((9, 8), SamplingConfig(max_new_tokens=3))
    drawn = run(engine_of(tiny), [request])
    other = engine_of(tiny_model(seed=1, vocab_size=61, num_layers=1))
    assert run(other, [request]) != drawn
    assert other.compile_seconds == 0


def test_a_prompt_has_log_probabilities_too(tiny):
    model, params = tiny
    ids = tuple(range(8, 28))
    sampling = SamplingConfig(temperature=0, max_new_tokens=2, prompt_logprobs=2)
    engine = engine_of(tiny)
    run(engine, [Request(ids, sampling)])  # a prompt that is remembered is read all the same
    engine.submit(Request(ids, sampling))
    events = []
    while not engine.idle:
        events += engine.step()
    [prompt] = [event.prompt for event in events if event.prompt]
    logprobs_TV = np.asarray(jax.nn.log_softmax(bind(model, params)(np.array([ids]))))[0]
    assert [step.id for step in prompt] == list(ids[1:])
    expected = logprobs_TV[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([step.logprob for step in prompt], expected, atol=2e-5)
    best = np.sort(logprobs_TV[:-1], -1)[:, :-3:-1]
    np.testing.assert_allclose([[x for _, x in step.top] for step in prompt], best, atol=2e-5)


class Counting:
    """A grammar that wants the tokens 20, 21, 22, …, `length` of them."""

    def __init__(self, length, at=0):
        self.length, self.at = length, at

    def start(self):
        return Counting(self.length)

    def mask(self):
        return packed([20 + self.at], 61)

    def advance(self, id):
        assert id == 20 + self.at
        self.at += 1

    error = ""

    @property
    def ended(self):
        return self.at == self.length


def test_each_text_follows_a_grammar_of_its_own(tiny):
    engine, sampling = engine_of(tiny), SamplingConfig(max_new_tokens=9)
    grammars = [Counting(4), None, Counting(5), Counting(12)]
    asked = [Request((9, n), sampling, grammar=grammar) for n, grammar in enumerate(grammars)]
    results = run(engine, asked)
    ids = [[step.id for step in steps] for steps, _ in results]
    assert [ids[0], ids[2], ids[3]] == [list(range(20, 20 + n)) for n in (4, 5, 9)]
    assert [ends for _, ends in results[2:]] == [["stop"], ["length"]]
    assert results[1] == run(engine, asked[1:2])[0]


def test_a_mesh_shares_the_heads_of_pages_and_draws_the_same(tiny):
    model, params = tiny
    sampling = SamplingConfig(temperature=0, max_new_tokens=9)
    asked = [Request(ids, sampling) for ids in ((9, 8), tuple(range(8, 25)))]
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    _, shared = spread(model, {name: jnp.copy(x) for name, x in params.items()}, mesh)
    engine = Engine(model, shared, FRAMING, config=dataclasses.replace(SIZES, cache="int8"))
    tokens = [
        [[step.id for step in steps] for steps, _ in run(e, asked)]
        for e in (engine, engine_of(tiny, cache="int8"))
    ]
    assert tokens[0] == tokens[1]
    keys = engine._device.cache.keys_PKSC[0]
    assert keys.values_PKSC.sharding.spec == PartitionSpec(None, "tensor", None, None)
    assert keys.scale_PKS.sharding.spec == PartitionSpec(None, "tensor", None)


def test_a_long_prompt_does_not_stall_those_who_draw(tiny):
    engine = engine_of(tiny)
    drawing = engine.submit(Request((9, 8), SamplingConfig(max_new_tokens=30, temperature=0)))
    engine.step()
    engine.submit(Request(tuple(range(8, 38)), SamplingConfig(max_new_tokens=1)))
    for _ in range(3):  # the prompt has four chunks
        assert [event.number for event in engine.step()] == [drawing]


def test_pages_are_as_many_as_memory_holds(tiny, monkeypatch):
    assert engine_of(tiny).stats.pages == 24  # three texts of the context's 32 tokens
    monkeypatch.setattr("lm.inference.engine.device_memory", lambda: 40 * 1024)
    assert engine_of(tiny).stats.pages == 20
    assert engine_of(tiny, num_pages=40).stats.pages == 40
    with pytest.raises(ConfigError, match=r"num_pages=41 of 4 tokens need .* GiB"):
        engine_of(tiny, num_pages=41)


def test_what_cannot_be_served_is_refused(tiny):
    engine = engine_of(tiny, max_queue=1)
    with pytest.raises(ConfigError, match="at least one token"):
        engine.submit(Request((), SamplingConfig()))
    with pytest.raises(ConfigError, match="33 tokens long"):
        engine.submit(Request((9,) * 33, SamplingConfig(truncate_prompt=False)))
    with pytest.raises(ConfigError, match=r"sampling\.temperature"):
        engine.submit(Request((9,), SamplingConfig(temperature=-1.0)))
    with pytest.raises(ConfigError, match="num_pages=7 cannot hold"):
        engine_of(tiny, num_pages=7)
    engine.submit(Request((9,), SamplingConfig()))
    with pytest.raises(QueueFull):
        engine.submit(Request((9,), SamplingConfig()))
    engine.cancel(0)
    assert [(event.number, event.finish) for event in engine.step()] == [(0, "cancelled")]
    assert engine.idle

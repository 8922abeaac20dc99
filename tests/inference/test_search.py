"""Beams, contrastive search and speculation: what their papers define, whatever the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import general_params, tiny_model, write_tiny_run

import lm
from lm.config import ConfigError, view
from lm.inference import Framing, Generator, SamplingConfig, SearchConfig, search
from lm.inference.prompts import NOTHING
from lm.inference.sampling import log_distribution, warping
from lm.inference.speculation import keep_share, look_up, residual, verified
from lm.models import bind

VOCABULARY, END, START = 17, 3, (7,)
PROMPTS = [[5, 6, 7], [9], [4, 1, 4, 1, 5, 9, 2, 6, 5]]
MODELS = {
    "llama": {},
    "windowed": {"attention_pattern": ("local",), "window": 4, "num_layers": 2},
    "lstm": {"cell": "lstm"},
    "bart": {"architecture": "encoder_decoder", "positions": "learned", "num_encoder_layers": 1},
}


@functools.cache
def generator_of(name, layers=1):
    model, _ = tiny_model(**{"vocab_size": VOCABULARY, "num_layers": layers, **MODELS[name]})
    framing = Framing(end_of_text=(END,), decoder_start=START)
    return Generator(model, general_params(model), framing)


def found(name, prompts=PROMPTS, guesser=None, seed=0, **fields):
    """The search, and each row's tokens."""
    config = view(SearchConfig, {"max_new_tokens": 9, **fields})
    result = search(generator_of(name), prompts, config, seed, guesser)
    drawn_BN = np.concatenate(list(result), 1)
    return result, [[t for t in row if t != NOTHING] for row in drawn_BN.tolist()]


@functools.cache
def forward(name):
    """prompt, ids → the last logits [V] and hidden states [T, D] of a full forward pass."""
    model = generator_of(name).model
    params = general_params(model)
    encodes = model.config.architecture == "encoder_decoder"

    @jax.jit
    def run(source_1S, tokens_1T, segments_1S):
        fields = {"source_segments_BS": segments_1S} if encodes else {}
        texts = (source_1S, tokens_1T) if encodes else (tokens_1T,)
        x_1TD = bind(model, params).hidden(*texts, **fields)
        return bind(model, params).unembed(x_1TD)[0], x_1TD[0]

    @functools.cache
    def of(prompt, ids):
        text = [*(START if encodes else prompt), *ids]
        source = np.zeros((2, 1, 16), np.int32)
        source[0, 0, : len(prompt)], source[1, 0, : len(prompt)] = prompt, 1
        row = np.array([text + [0] * (32 - len(text))], np.int32)
        logits_TV, x_TD = run(source[0], row, source[1])
        return np.asarray(logits_TV)[len(text) - 1], np.asarray(x_TD)[: len(text)]

    return of


distribution = jax.jit(log_distribution, static_argnums=2)


def share_of(logits_V, **fields):
    """What a token is drawn from, after logits."""
    warpers, kind = warping([SamplingConfig(**fields)], VOCABULARY)
    return np.exp(np.asarray(distribution(jnp.asarray(logits_V)[None], warpers, kind)))[0]


def log_softmax(logits_V):
    return logits_V - np.logaddexp.reduce(logits_V)


def beams_by_definition(next_logits, width, groups, diversity, penalty, early, limit):
    """Finished (score, ids) of all groups, best first; texts are lists, nothing is an array."""
    running = [[(0.0, ())] for _ in range(groups)]
    finished, done = [[] for _ in range(groups)], [False] * groups
    for length in range(1, limit + 1):
        taken = np.zeros(VOCABULARY)
        for g in range(groups):
            options = [
                (total + log, (*ids, token))
                for total, ids in running[g]
                for token, log in enumerate(
                    log_softmax(next_logits(ids)) - np.float32(diversity) * taken
                )
            ]
            options = sorted(options, reverse=True)[: 2 * width]
            ending = [ids[-1] == END or length == limit for _, ids in options]
            if not done[g]:
                best = zip(options[:width], ending)
                new = [(total / length**penalty, ids) for (total, ids), ends in best if ends]
                finished[g] = sorted(finished[g] + new, reverse=True)[:width]
            running[g] = [option for option in options if option[1][-1] != END][:width]
            for _, ids in running[g]:
                taken[ids[-1]] += 1
            if len(finished[g]) == width:
                ahead = limit if early == "never" and penalty > 0 else length
                hopeless = running[g][0][0] / ahead**penalty <= finished[g][-1][0]
                done[g] |= hopeless or early is True
        if all(done):
            break
    return sorted((option for each in finished for option in each), reverse=True)


@pytest.mark.parametrize(
    "name, width, groups, penalty, early",
    [
        ("llama", 3, 1, 1.0, False),
        ("llama", 6, 3, 0.0, False),
        ("windowed", 2, 1, 2.0, "never"),
        ("lstm", 4, 2, 1.0, True),
        ("bart", 5, 1, -1.0, True),
        pytest.param("bart", 4, 1, 0.5, "never", marks=pytest.mark.slow),
    ],
)
def test_beams_are_those_of_the_definition(name, width, groups, penalty, early):
    diversity = 0.8 if groups > 1 else 0.0
    result, rows = found(
        name,
        num_beams=width,
        num_samples=width,
        num_beam_groups=groups,
        diversity_penalty=diversity,
        length_penalty=penalty,
        early_stopping=early,
    )
    expected = []
    for prompt in PROMPTS:
        step = functools.partial(forward(name), tuple(prompt))
        expected += beams_by_definition(
            lambda ids, step=step: step(ids)[0],
            width // groups,
            groups,
            diversity,
            penalty,
            early,
            limit=9,
        )
    assert rows == [list(ids) for _, ids in expected]
    np.testing.assert_allclose(result.scores, [score for score, _ in expected], atol=1e-4)
    assert result.ended == [ids[-1] == END for _, ids in expected]


def test_beams_do_not_depend_on_their_companions():
    fields = {"num_beams": 3, "num_samples": 3}
    result, together = found("llama", **fields)
    alone, rows = found("llama", PROMPTS[2:], **fields)
    assert together[6:] == rows
    np.testing.assert_allclose(result.scores[6:], alone.scores, atol=1e-5)


def test_drawn_beams_follow_the_seed_and_the_filters():
    fields = {"num_beams": 3, "beam_sampling": True, "num_samples": 3, "temperature": 2.0}
    _, first = found("llama", seed=1, **fields)
    assert found("llama", seed=1, **fields)[1] == first
    assert found("llama", seed=2, **fields)[1] != first
    # The first token is drawn by Plackett and Luce: both texts differ, in proportion.
    share_V = share_of(forward("llama")((9,), ())[0], temperature=2.0, top_k=5)
    fields |= {"num_beams": 2, "num_samples": 1, "max_new_tokens": 1, "top_k": 5}
    counts_V = np.zeros(VOCABULARY)
    _, rows = found("llama", [[9]] * 400, **fields)
    for [id] in rows:
        counts_V[id] += 1
    assert set(np.flatnonzero(counts_V)) <= set(np.flatnonzero(share_V))
    # Of the four drawn the likeliest is kept: a token is that with what is left for the others.
    order = [id for id in np.argsort(-share_V) if share_V[id] > 0]
    assert counts_V[order[0]] > counts_V[order[1]] > 0 == counts_V[order[2:]].sum()


@pytest.mark.parametrize("name", ["llama", "lstm", pytest.param("bart", marks=pytest.mark.slow)])
def test_contrastive_search_is_that_of_the_paper(name):
    alpha, k = 0.6, 4
    result, rows = found(name, penalty_alpha=alpha, top_k=k, max_new_tokens=8)
    _, greedy = found(name, temperature=0, max_new_tokens=8)
    assert rows != greedy
    for prompt, row, ended in zip(PROMPTS, rows, result.ended):
        of, ids = functools.partial(forward(name), tuple(prompt)), ()
        while len(ids) < 8 and not (ids and ids[-1] == END):
            logits_V, before_TD = of(ids)
            share_V = np.exp(log_softmax(logits_V))
            scores = {}
            for token in np.argsort(-share_V, kind="stable")[:k].tolist():
                hidden_D = of((*ids, token))[1][-1]
                norms_T = np.linalg.norm(before_TD, axis=1) * np.linalg.norm(hidden_D)
                worst = (before_TD @ hidden_D / norms_T).max()
                scores[token] = (1 - alpha) * share_V[token] - alpha * worst
            ids = (*ids, max(scores, key=scores.get))
        assert row == list(ids)
        assert ended == (ids[-1] == END)


# ---- Speculation -----------------------------------------------------------------------------

GUESSING = [
    ("windowed", "draft", 3),
    pytest.param("bart", "lookup", 2, marks=pytest.mark.slow),
    pytest.param("llama", "draft", 4, marks=pytest.mark.slow),
    pytest.param("bart", "draft", 2, marks=pytest.mark.slow),
    pytest.param("llama", "lookup", 3, marks=pytest.mark.slow),
]


def guessing(name, kind, guesses):
    """Fields of the config, and the draft."""
    if kind == "lookup":
        return {"prompt_lookup": guesses}, None
    return {"draft": "another", "draft_tokens": guesses}, generator_of(name, layers=2)


@pytest.mark.parametrize("name, kind, guesses", GUESSING)
def test_greedy_guessing_gives_what_greedy_decoding_gives(name, kind, guesses):
    fields, draft = guessing(name, kind, guesses)
    fields |= {"temperature": 0, "max_new_tokens": 20, "stop_at_end_of_text": False}
    plain = SamplingConfig(temperature=0, max_new_tokens=20, stop_at_end_of_text=False)
    drawn = np.concatenate(list(generator_of(name).generate(PROMPTS, plain)), 1)[:, :20].tolist()
    result, rows = found(name, guesser=draft, **fields)
    assert rows == drawn
    timing = result.timing
    assert timing.tokens == 60 == 3 + timing.passes + timing.kept
    assert 0 < timing.kept <= timing.guessed <= timing.passes * guesses
    assert found(name, PROMPTS[:1], draft, **fields)[1] == drawn[:1]  # one row rewinds otherwise


@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_guesses_are_verified_by_what_the_warpers_leave(kind):
    fields, draft = guessing("llama", kind, 3)
    settings = {"temperature": 0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    settings |= {"frequency_penalty": 0.3, "min_new_tokens": 12, "max_new_tokens": 20}
    plain = generator_of("llama").generate(PROMPTS, SamplingConfig(**settings))
    drawn = [[t for t in row if t != NOTHING] for row in np.concatenate(list(plain), 1).tolist()]
    result, rows = found("llama", guesser=draft, **fields, **settings)
    assert rows == drawn
    assert result.timing.kept > 0


def test_the_model_keeps_all_its_own_guesses():
    itself = generator_of("llama")
    fields = {"draft": "itself", "stop_at_end_of_text": False, "max_new_tokens": 21}
    result, _ = found("llama", guesser=itself, **fields)
    assert result.timing.kept == result.timing.guessed == 3 * 16
    assert result.timing.passes == 3 * 4


@pytest.mark.parametrize("kind", ["draft", pytest.param("lookup", marks=pytest.mark.slow)])
def test_guessing_does_not_change_the_distribution(kind):
    name = "llama"
    fields, draft = guessing(name, kind, 2)
    settings = {"temperature": 1.3, "top_k": 8, "top_p": 0.9}
    samples, prompt = 4000, (4, 1, 4, 1, 5, 4)
    fields |= {**settings, "num_samples": samples, "max_new_tokens": 3}
    result, rows = found(name, [list(prompt)], draft, stop_at_end_of_text=False, **fields)
    assert 0.02 < result.timing.kept / result.timing.guessed < 0.98
    # The exact distribution of three tokens, rare texts together.
    texts = {(): 1.0}
    for _ in range(3):
        longer = {}
        for ids, share in texts.items():
            share_V = share_of(forward(name)(prompt, ids)[0], **settings)
            longer |= {(*ids, t): share * share_V[t] for t in np.flatnonzero(share_V).tolist()}
        texts = longer
    counts = dict.fromkeys(texts, 0)
    for row in rows:
        counts[tuple(row)] += 1
    common = [ids for ids, share in texts.items() if share * samples >= 5]
    expected = np.array([texts[ids] * samples for ids in common])
    seen = np.array([counts[ids] for ids in common])
    expected, seen = (np.append(x, samples - x.sum()) for x in (expected, seen))
    freedom = len(expected) - 1
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def distributions(seed, shape=(200, 6)):
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(shape[-1], 0.5), shape[:-1])
    share *= random.random(shape) < 0.7
    share[..., 0] += share.sum(-1) == 0
    return (share / share.sum(-1, keepdims=True)).astype(np.float32)


def test_kept_and_residual_together_are_the_model_s_distribution():
    p, q = distributions(0), distributions(1)
    q[:20] = p[:20]
    q[20:30] = 0  # no guess
    kept = q * keep_share(p, q)
    refused = 1 - kept.sum(-1, keepdims=True)
    np.testing.assert_allclose(kept + refused * residual(p, q), p, atol=1e-6)


def test_verified_rows_are_drawn_from_the_product_of_distributions():
    rows, p, q = 20_000, distributions(2, (3, 4)), distributions(3, (2, 4))
    p[0], p[1] = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    keys = jax.random.split(jax.random.key(0), rows * 2).reshape(2, rows)
    tokens = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(q)))(keys[0])
    wide = [jnp.broadcast_to(x, (rows, *x.shape)) for x in (p, q)]
    there = jnp.ones((rows, 2), bool)
    drawn, kept = map(np.asarray, jax.jit(verified)(*wide, tokens, there, keys[1]))
    first = np.bincount(drawn[:, 0], minlength=4) / rows
    np.testing.assert_allclose(first, p[0], atol=0.015)
    for before in range(4):
        second = drawn[(kept >= 1) & (drawn[:, 0] == before), 1]
        if len(second) > 500:
            share = np.bincount(second, minlength=4) / len(second)
            np.testing.assert_allclose(share, p[1], atol=4 * 0.5 / np.sqrt(len(second)))


@pytest.mark.parametrize(
    "text, expected",
    [
        ([1, 2, 3, 9, 2, 3], [9, 2, 3]),
        ([2, 3, 7, 1, 2, 3, 8, 5, 2, 3], [8, 5, 2]),  # where it stands last
        ([1, 2, 3, 7, 4, 3, 8, 1, 2, 3], [7, 4, 3]),  # three tokens rather than one
        ([1, 2, 3], [-1, -1, -1]),
        ([5, 5], [5, -1, -1]),
        ([5], [-1, -1, -1]),
    ],
)
def test_what_followed_the_last_tokens_before_is_looked_up(text, expected):
    text_1H = np.full((1, 14), NOTHING, np.int32)
    text_1H[0, 2 : 2 + len(text)] = text
    guesses = look_up(jnp.array(text_1H), jnp.array([2 + len(text)]), 3)
    assert guesses.tolist() == [expected]


def test_a_cache_turns_back_to_what_it_was():
    model, params = tiny_model(vocab_size=VOCABULARY)
    bound = bind(model, params)
    extend = jax.jit(bound.extend)
    cache = bound.new_cache(2, 12).rows(jnp.array([1, 0]))
    first, wrong, right = jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.full((2, 2), 9), jnp.array([7, 8])
    _, cache = extend(first, jnp.array([[0, 1, 2], [-1, 0, 1]]), cache)
    _, cache = extend(wrong, jnp.array([[3, 4], [2, 3]]), cache)
    cache = cache.rewind(jnp.array([2, 1]))  # the second row keeps one of them
    assert int(cache.slot) == 3
    x_B1D, _ = extend(right[:, None], jnp.array([[3], [3]]), cache)
    for row, text in enumerate(([1, 2, 3, 7], [5, 6, 9, 8])):
        whole = jax.jit(bound)(jnp.array([text]))[0, 3]
        np.testing.assert_allclose(bound.unembed(x_B1D)[row, 0], whole, atol=1e-5)


# ---- What does not go together ---------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_beams": 2, "penalty_alpha": 0.5}, "penalty_alpha=0.5 and config.num_beams=2 excl"),
        ({"draft": "a", "prompt_lookup": 2}, "prompt_lookup=2 and config.draft='a' exclude"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples=3 must be at most config.num_beams=2"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 is for beams: set config.num_beams"),
        ({"beam_sampling": True}, "beam_sampling=True is for beams"),
        ({"num_beams": 6, "num_beam_groups": 4}, "num_beam_groups=4 must divide"),
        ({"num_beams": 6, "num_beam_groups": 3}, "diversity_penalty=0.0 go together"),
        ({"num_beams": 6, "diversity_penalty": 1.0}, "num_beam_groups=1 and .* go together"),
        ({"num_beams": 2, "beam_sampling": True, "temperature": 0.0}, "temperature=0.0"),
        ({"num_beams": 2, "early_stopping": "always"}, "False, True, 'never'"),
        ({"num_beams": 0}, "num_beams=0 must be"),
        ({"penalty_alpha": 0.6}, "set top_k to 2 or more"),
        ({"penalty_alpha": 0.6, "top_k": 4, "num_samples": 2}, "num_samples=2"),
    ],
)
def test_settings_that_exclude_each_other_are_named(fields, words):
    with pytest.raises(ConfigError, match=words) as error:
        view(SearchConfig, fields)
    assert "\n" not in str(error.value)


def test_a_draft_that_cannot_guess_is_refused():
    def refused(name, words, guesser=None, **fields):
        with pytest.raises(ConfigError, match=words):
            found(name, guesser=guesser, **fields)

    refused("lstm", "cell='lstm' cannot take back", prompt_lookup=2)
    refused("llama", "cell='lstm' cannot take back", generator_of("lstm"), draft="a")
    refused("llama", "architecture='encoder_decoder'", generator_of("bart"), draft="a")
    other = Generator(*tiny_model(vocab_size=19, num_layers=1), Framing(end_of_text=()))
    refused("llama", "another tokenizer", other, draft="a")
    short = Generator(*tiny_model(vocab_size=17, max_length=12), Framing(end_of_text=()))
    refused("llama", "context of 12 tokens, and the texts need 17", short, draft="a")


def test_a_run_searches_as_it_is_told(tmp_path):
    write_tiny_run(tmp_path / "run", num_layers=2)
    write_tiny_run(tmp_path / "draft")
    run, draft = lm.load(tmp_path / "run"), lm.load(tmp_path / "draft")
    greedy = run.generate("abab", temperature=0, max_new_tokens=12)
    plain = {"temperature": 0, "max_new_tokens": 12}
    assert run.generate("abab", prompt_lookup=3, **plain) == greedy
    assert run.generate("abab", draft=draft, **plain) == greedy
    assert run.generate("abab", draft=str(tmp_path / "draft"), **plain) == greedy
    best = run.generate(["abab", "a"], num_beams=3, num_samples=2, max_new_tokens=6)
    assert len(best) == 4 and best[0].startswith("abab") and best[0] != best[1]
    with pytest.raises(ConfigError, match=r"generate\.prompt_lookup=2 and generate\.draft="):
        run.generate("abab", draft=draft, prompt_lookup=2)

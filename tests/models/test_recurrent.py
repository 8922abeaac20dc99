"""What the networks before the Transformer compute, against PyTorch's and against themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError, view
from lm.models import ModelConfig, bind, count, init, param_specs, skeleton
from lm.models.cells import KINDS
from lm.models.hooks import reading, replacing
from lm.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from lm.parallel.sharding import parameter_shardings

CELLS = ("rnn", "gru", "lstm")
VOCAB = 40
# All cells go through the same loop: of what takes long to compile, these are enough to be quick.
QUICK = {("rnn", "attending"), ("gru", "attending"), ("lstm", "fixed")}


def kinds(*names):
    """Every cell in each of these models; all but the quick ones and language models are slow."""
    return [
        pytest.param(
            cell, name, marks=() if name == "decoder" or (cell, name) in QUICK else pytest.mark.slow
        )
        for cell in CELLS
        for name in names
    ]


def config(cell="lstm", **fields):
    sizes = {"num_layers": 2, "num_heads": 1, "width": 12, "vocab_size": VOCAB, "max_length": 16}
    result = ModelConfig(cell=cell, **{**sizes, "compute_dtype": "float32", **fields})
    view(type(result), result)
    return result


def pair_config(cell="lstm", attends=True, **fields):
    fields = {"architecture": "encoder_decoder", "cross_attention": attends, **fields}
    return config(cell, **fields)


@functools.cache
def params(config):
    """Values in general position, large enough for states to matter."""
    values = {}
    for name, spec in param_specs(skeleton(config)).items():
        rng = np.random.default_rng(len(name))
        values[name] = rng.normal(0, 0.4, spec.shape).astype(np.float32)
    return values


def tokens(batch=2, length=9, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, (batch, length), np.int32)


@functools.partial(tiny_models.compiled, static_argnums=0)
def logits(config, values, *texts, **arguments):
    return bind(skeleton(config), values)(*texts, **arguments)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=2e-5)


# ---- Against PyTorch -------------------------------------------------------------------------


def torch_weights(cell, values, name):
    """(input, state, input bias, state bias) of PyTorch's layout: rows are gates, and outputs."""
    inputs, states, bias = (values[f"{name}.{part}"] for part in ("input", "state", "bias"))
    rows = [w.reshape(w.shape[0], -1).T for w in (inputs, states)]
    if cell != "gru":
        return (*rows, bias, np.zeros_like(bias))
    width = len(bias) // 4
    late = np.concatenate([np.zeros(2 * width, np.float32), bias[3 * width :]])
    return (*rows, bias[: 3 * width], late)


@pytest.mark.parametrize("cell", CELLS)
def test_cells_and_all_their_gradients_equal_pytorchs(cell):
    torch = pytest.importorskip("torch")
    model_config = config(cell, num_layers=3)
    values, text = params(model_config), tokens()
    model = skeleton(model_config)
    weigh = np.random.default_rng(1).normal(size=(2, 9, 12)).astype(np.float32)

    @tiny_models.compiled
    def ours(values):
        def score(values):
            x_BTD = bind(model, values).hidden(text)
            return jnp.sum(weigh * x_BTD), x_BTD

        return jax.value_and_grad(score, has_aux=True)(values)

    (_, x_BTD), gradients = ours(values)
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    theirs = kind(12, 12, num_layers=3, batch_first=True)
    for layer in range(3):
        one = {name: value[layer] for name, value in values.items() if "blocks" in name}
        with torch.no_grad():
            for mine, parameter in zip(
                torch_weights(cell, one, "blocks"), theirs.all_weights[layer]
            ):
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(mine)))
    embedded = torch.tensor(values["embedding.tokens"][text], requires_grad=True)
    output, _ = theirs(embedded)
    close(x_BTD, output.detach())
    (output * torch.from_numpy(weigh)).sum().backward()
    for layer in range(3):
        inputs, states, bias, late = (w.grad.numpy() for w in theirs.all_weights[layer])
        G = inputs.shape[0] // 12
        close(gradients["blocks.input"][layer], inputs.T.reshape(12, G, 12), 1e-4)
        close(gradients["blocks.state"][layer], states.T.reshape(12, G, 12), 1e-4)
        bias = np.concatenate([bias, late[-12:]]) if cell == "gru" else bias
        close(gradients["blocks.bias"][layer], bias, 1e-4)
    table = np.zeros_like(values["embedding.tokens"])
    np.add.at(table, text, embedded.grad.numpy())
    close(gradients["embedding.tokens"], table, 1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_the_encoder_that_reads_both_ways_is_pytorchs_bidirectional_one(cell):
    torch = pytest.importorskip("torch")
    model_config = pair_config(cell)
    values, text = params(model_config), tokens()
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    theirs = kind(12, 6, num_layers=2, batch_first=True, bidirectional=True)
    for layer in range(2):
        one = {name: value[layer] for name, value in values.items() if "blocks" in name}
        for i, way in enumerate(("forward", "backward")):
            weights = torch_weights(cell, one, f"encoder.blocks.{way}")
            with torch.no_grad():
                for mine, parameter in zip(weights, theirs.all_weights[2 * layer + i]):
                    parameter.copy_(torch.from_numpy(np.ascontiguousarray(mine)))
    with torch.no_grad():
        output, _ = theirs(torch.from_numpy(values["embedding.tokens"][text]))
    encode = tiny_models.compiled(lambda v: bind(skeleton(model_config), v).encode(text))
    close(encode(values), output)


# ---- Gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("cell, kind", kinds("attending", "fixed"))
def test_gradients_are_finite_differences(cell, kind):
    # Packed pairs, so that restarts, masks and both weights inside the loop take part.
    model_config = pair_config(cell, kind == "attending")
    values, source, target = params(model_config), tokens(), tokens(seed=1)
    segments = np.array([[1, 1, 1, 2, 2, 0, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    sources = np.array([[1, 1, 2, 2, 2, 2, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 0]])
    model = skeleton(model_config)

    def score(values):
        logits = bind(model, values)(
            source, target, segments_BT=segments, source_segments_BS=sources
        )
        return jnp.sum(jnp.sin(jnp.arange(logits.size)) * logits.ravel()) / 10

    gradients = tiny_models.compiled(jax.grad(score))(values)
    score, step = tiny_models.compiled(score), 1e-2
    for index, name in enumerate(sorted(values)):
        assert np.any(gradients[name] != 0), name
        direction = np.random.default_rng(index).normal(size=values[name].shape)
        direction = (direction / np.linalg.norm(direction)).astype(np.float32)
        ends = [score({**values, name: values[name] + s * direction}) for s in (step, -step)]
        difference = (ends[0] - ends[1]) / (2 * step)
        expected = np.vdot(gradients[name], direction)
        scale = np.linalg.norm(gradients[name])
        assert abs(difference - expected) < 1e-2 * abs(expected) + 5e-3 * scale + 1e-3, name


def test_bfloat16_computes_the_same_function_to_its_precision():
    exact_config = pair_config("lstm")
    half = dataclasses.replace(exact_config, compute_dtype="bfloat16")
    values, text = params(exact_config), tokens()
    exact, rounded = (logits(c, values, text, text) for c in (exact_config, half))
    assert rounded.dtype == jnp.float32
    assert jnp.abs(exact - rounded).max() < 0.04 * jnp.abs(exact).max()


def test_eight_devices_compute_what_one_does():
    model_config = pair_config("lstm", width=16, num_layers=1)
    model, values = skeleton(model_config), params(model_config)
    text, segments = tokens(4, 6), np.array([[1, 1, 1, 2, 2, 0]] * 4)

    @jax.jit
    def run(values, text):
        def score(values):
            arguments = {"segments_BT": segments, "source_segments_BS": segments}
            return jnp.sum(jnp.sin(bind(model, values)(text, text, **arguments)))

        return jax.value_and_grad(score)(values)

    alone = run(values, text)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        shared = jax.device_put(values, parameter_shardings(param_specs(model), mesh))
        several = run(shared, jax.device_put(text, batch_sharding(mesh, 0)))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), alone, several)


# ---- Packing and padding ---------------------------------------------------------------------


@pytest.mark.parametrize("segments", [[3] * 4 + [1] * 5, [0, 1, 1, 0, 0, 1, 2, 0, 2]])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_documents_and_padding_anywhere_change_no_state(cell, segments):
    model_config, text, segments = config(cell), tokens(1, 9), np.array(segments)
    values = params(model_config)
    packed = logits(model_config, values, text, segments_BT=segments[None])
    for segment in set(segments) - {0}:
        mine = segments == segment
        close(packed[:, mine], logits(model_config, values, text[:, mine]))


@pytest.mark.parametrize("cell, kind", kinds("attending", "fixed"))
def test_packed_pairs_compute_what_they_compute_alone(cell, kind):
    model_config = pair_config(cell, kind == "attending")
    values, source, target = params(model_config), tokens(1, 9), tokens(1, 8, seed=1)
    packed = logits(
        model_config, values, source, target,
        segments_BT=np.array([[1, 1, 1, 2, 2, 2, 2, 0]]),
        source_segments_BS=np.array([[0, 1, 1, 1, 1, 2, 2, 0, 0]]),
    )  # fmt: skip
    close(packed[:, :3], logits(model_config, values, source[:, 1:5], target[:, :3]))
    close(packed[:, 3:7], logits(model_config, values, source[:, 5:7], target[:, 3:7]))


# ---- Decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize("cell, kind", kinds("decoder", "fixed", "attending"))
def test_prefill_and_single_steps_equal_the_full_forward_pass(cell, kind):
    model_config = config(cell) if kind == "decoder" else pair_config(cell, kind == "attending")
    model, values = skeleton(model_config), params(model_config)
    text, lengths, steps = tokens(3, 7), (3, 5, 1), 2
    source = (tokens(3, 6, seed=1),) if kind != "decoder" else ()
    segments = np.array([[1] * 6, [1] * 4 + [0] * 2, [0] + [1] * 5])
    masks = {"source_segments_BS": segments} if source else {}
    expected_BTV = logits(model_config, values, *source, text, **masks)

    @tiny_models.compiled
    def start(values):
        return bind(model, values).new_cache(3, 16, *source, *masks.values())

    @tiny_models.compiled
    def extend(values, tokens_BT, positions_BT, cache):
        bound = bind(model, values)
        x_BTD, cache = bound.extend(tokens_BT, positions_BT, cache)
        return bound.unembed(x_BTD), cache

    prompts, positions = np.zeros((3, 5), np.int32), np.full((3, 5), -1)
    for row, n in enumerate(lengths):
        prompts[row, 5 - n :], positions[row, 5 - n :] = text[row, :n], np.arange(n)
    logits_BTV, cache = extend(values, prompts, positions, start(values))
    for row, n in enumerate(lengths):
        close(logits_BTV[row, -n:], expected_BTV[row, :n], 1e-5)
    for step in range(steps):
        at = np.array(lengths) + step
        logits_B1V, cache = extend(values, text[np.arange(3), at][:, None], at[:, None], cache)
        close(logits_B1V[:, 0], expected_BTV[np.arange(3), at], 1e-5)


def test_a_repeated_cache_continues_every_row_as_itself():
    model_config = pair_config("lstm")
    source, text = tokens(2, 5), tokens(2, 1)

    @tiny_models.compiled
    def run(values):
        model = bind(skeleton(model_config), values)
        cache = model.new_cache(2, 16, source)
        once, _ = model.extend(text, np.zeros((2, 1), int), cache)
        rows = np.repeat(text, 3, 0), np.zeros((6, 1), int)
        return once, *model.extend(*rows, cache.repeat(3))

    once, thrice, after = run(params(model_config))
    close(thrice, np.repeat(once, 3, 0))
    assert all(leaf.shape[0] == 6 or leaf.shape[1] == 6 for leaf in jax.tree.leaves(after))


# ---- What each kind can see ------------------------------------------------------------------


def influence(model_config, source, target):
    """The norm of the gradient of the first output by every source token's embedding."""
    model = skeleton(model_config)
    values = {name: value / 2 for name, value in params(model_config).items()}  # none explodes

    @tiny_models.compiled
    def gradient(values):
        def first(nudge):
            tap = replacing({"encoder.embedding": lambda x: x + nudge})
            return jnp.sum(bind(model, values)(source, target, tap=tap)[:, 0] ** 2)

        return jax.grad(first)(jnp.zeros((*source.shape, model_config.width)))

    return jnp.linalg.norm(gradient(values), axis=-1)


def test_attention_gives_every_source_token_a_short_path_and_a_vector_does_not():
    source, target = tokens(1, 12), tokens(1, 3, seed=1)
    attending = influence(pair_config("rnn"), source, target)[0]
    fixed = influence(pair_config("rnn", attends=False), source, target)[0]
    assert jnp.all(attending > 0) and jnp.all(fixed > 0)
    # Read backwards, the last token is the farthest from the decoder.
    assert fixed[-1] / fixed[0] < 0.1 * attending[-1] / attending[0]


def test_attention_spreads_one_over_the_source_and_nothing_over_padding():
    model_config, pattern = pair_config("gru"), "blocks.0.attention.pattern"
    segments = np.array([[1] * 4 + [0] * 2, [1] * 6])

    @tiny_models.compiled
    def read(values):
        into = {}
        model = bind(skeleton(model_config), values)
        model(tokens(2, 6), tokens(2, 3), source_segments_BS=segments, tap=reading(into))
        return into[pattern]

    pattern_BTS = read(params(model_config))
    close(pattern_BTS.sum(-1), np.ones((2, 3)))
    assert np.all(pattern_BTS[0, :, 4:] == 0) and np.all(pattern_BTS[1] > 0)


def test_taps_read_batch_major_values_and_replace_what_comes_next():
    model_config, text, read = config("lstm"), tokens(), {}
    model = bind(skeleton(model_config), params(model_config))
    plain = model(text)
    close(model(text, tap=reading(read)), plain)
    shapes = {name: value.shape for name, value in read.items()}
    assert shapes == {
        "embedding": (2, 9, 12), "logits": (2, 9, VOCAB),
        **{f"blocks.{i}.projected": (2, 9, 4, 12) for i in (0, 1)},
        **{f"blocks.{i}.gates": (2, 9, 3, 12) for i in (0, 1)},
        **{f"blocks.{i}.{name}": (2, 9, 12) for i in (0, 1) for name in ("state", "memory")},
    }  # fmt: skip
    edited = model(text, tap=replacing({"blocks.0.state": lambda x: x.at[:, 4].set(0)}))
    close(edited[:, :4], plain[:, :4])
    assert not np.allclose(edited[:, 4], plain[:, 4])


# ---- Dropout ---------------------------------------------------------------------------------


def test_dropout_is_between_layers_and_never_along_time():
    model_config, text, read = config("rnn", dropout=0.5), tokens(4, 9), {}
    model = bind(skeleton(model_config), params(model_config))
    close(model(text), bind(skeleton(config("rnn")), params(config("rnn")))(text))
    key = jax.random.key(0)
    dropped = model.hidden(text, dropout_key=key, tap=reading(read))
    assert 0.3 < np.mean(dropped == 0) < 0.7  # of what the head reads
    assert np.all(read["blocks.1.state"] != 0)  # and not of what the next token reads
    assert not np.allclose(dropped, model.hidden(text, dropout_key=jax.random.key(1)))


# ---- Parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_has_as_many_parameters_as_its_equations(cell):
    V, D, L = VOCAB, 12, 2
    model_config = config(cell, tie_embeddings=False, head_bias=True)
    gates = KINDS[cell].inputs
    layer = 2 * gates * D * D + gates * D + (D if cell == "gru" else 0)
    assert count(param_specs(skeleton(model_config))) == L * layer + 2 * V * D + V


def test_forget_gates_start_open_and_layers_start_different():
    model_config = config("lstm", initializer="lecun")
    values = init(param_specs(skeleton(model_config)), jax.random.key(0))
    bias_LGD = values["blocks.bias"].reshape(2, 4, 12)
    np.testing.assert_array_equal(bias_LGD[:, 1], 1)
    np.testing.assert_array_equal(bias_LGD[:, [0, 2, 3]], 0)
    assert not np.array_equal(values["blocks.input"][0], values["blocks.input"][1])


def test_what_only_a_transformer_has_is_refused_by_name():
    for model_config, line in [
        (config(token_types=2), "config.model.token_types=2 is for a Transformer"),
        (pair_config(width=13, positions="none"), "config.model.width=13 must be even"),
        (pair_config(attends=False, num_encoder_layers=1), "config.model.num_encoder_layers=1"),
    ]:
        with pytest.raises(ConfigError, match=line):
            skeleton(model_config)
    model = bind(skeleton(config()), params(config()))
    with pytest.raises(ConfigError, match="'lstm' reads from left to right"):
        model(tokens(), prefix_BT=np.ones((2, 9), bool))

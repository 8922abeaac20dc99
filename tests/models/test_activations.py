"""Named activations: what there is, with its axes; reading, replacing, differentiating it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_run

import lm
from lm.config import ConfigError
from lm.models import bind, skeleton
from lm.models.activations import sites, trace
from lm.parallel.mesh import MeshConfig, make_mesh

# Of every kind of part; no two axes are of one size, but for T and S.
KINDS = {
    "gpt": {"positions": "learned", "mlp_width": 48},
    "llama": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2,
              "qk_norm": True, "bias": False, "mlp_width": 48},
    "sandwich": {"positions": "rotary", "norm": "rmsnorm", "norm_position": "sandwich",
                 "activation": "geglu", "num_kv_heads": 2, "attention_softcap": 5.0, "window": 4,
                 "attention_sinks": True, "attention_pattern": ("local", "global"),
                 "logits_softcap": 3.0, "mlp_width": 48, "bias": False},
    "reordered": {"positions": "rotary", "norm": "rmsnorm", "norm_position": "reordered",
                  "num_kv_heads": 2, "qk_norm": True, "qk_norm_joint": True, "bias": False,
                  "rotary_pattern": (True, False), "mlp_width": 48},
    "bert": {"architecture": "encoder", "positions": "learned", "norm_position": "post",
             "token_types": 2, "embedding_norm": True, "mlp_width": 48},
    "translator": {"architecture": "encoder_decoder", "positions": "relative", "mlp_width": 48},
    "experts": {"positions": "rotary", "num_experts": 6, "experts_per_token": 2, "mlp_width": 48,
                "activation": "swiglu_clipped", "expert_bias": True},
    "latent": {"positions": "rotary", "norm": "rmsnorm", "bias": False, "head_dim": 10,
               "kv_rank": 7, "query_rank": 7, "shared_key_dim": 4, "mlp_width": 48},
    "parallel": {"positions": "rotary", "parallel": True, "mlp_width": 48},
    "lstm": {"cell": "lstm", "positions": "none"},
}  # fmt: skip


@functools.cache
def _model(kind):
    config = tiny_models.config(**KINDS[kind])
    return config, tiny_models.params(config)


def _texts(config, batch=2, length=12):
    tokens = tiny_models.tokens(batch, length)
    return (tokens, tokens[:, ::-1]) if config.architecture == "encoder_decoder" else (tokens,)


@pytest.mark.parametrize("kind", KINDS)
def test_names_say_their_axes_and_every_activation_reaches_the_logits(kind):
    config, params = _model(kind)
    named = sites(skeleton(config))
    texts = _texts(config)

    @tiny_models.compiled
    def everything(params):
        return trace(bind(skeleton(config), params), *texts, names="*")

    found = everything(params)
    assert list(found) == list(named)
    sizes = {
        "B": 2, "T": 12, "S": 12, "D": config.width, "H": config.num_heads, "K": config.kv_heads,
        "C": config.head_width, "F": config.feed_forward, "V": config.vocab_size,
        "E": config.num_experts, "k": config.experts_per_token, "r": config.kv_rank, "1": 1,
    }  # fmt: skip
    for name, letters in named.items():
        gates = {"g": found[name].shape[2]}
        assert found[name].shape == tuple({**sizes, **gates}[at] for at in letters), name

    # Each, a little changed alone, changes the logits: of grouped keys and values too.
    read_only = ("gates", "memory", "chosen") if config.cell != "attention" else ("chosen",)
    edited = [name for name in named if name.rpartition(".")[2] not in read_only]

    def logits(strength):
        changes = dict(zip(edited, strength))
        edits = {n: lambda x, n=n: x + changes[n] * _pushed(x) for n in edited}
        model = bind(skeleton(config), params)
        return trace(model, *texts, names="logits", edits=edits)["logits"]

    one_by_one = tiny_models.compiled(lambda strengths: jax.lax.map(logits, strengths))
    plain, *changed = one_by_one(jnp.eye(1 + len(edited))[:, 1:])
    assert jnp.abs(plain - found["logits"]).max() < 1e-5
    for name, after in zip(edited, changed):
        assert jnp.abs(after - plain).max() > 1e-6, name


def _pushed(x):
    """Somewhat of every number of `x`; of a pattern the first keys, which every query sees."""
    return 0.1 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)


def test_padding_on_either_side_changes_no_activation():
    config, params = _model("gpt")
    tokens = tiny_models.tokens(1, 9)

    @tiny_models.compiled
    def everything(params, tokens, segments=None):
        model = bind(skeleton(config), params)
        return trace(model, tokens, names="*", segments_BT=segments)

    alone = everything(params, tokens)
    for before, after in ((0, 4), (4, 0), (1, 3)):
        around = ((0, 0), (before, after))
        segments = np.pad(np.ones_like(tokens), around)
        padded = everything(params, np.pad(tokens, around), segments)
        places = slice(before, before + 9)
        for name, letters in sites(skeleton(config)).items():
            where = tuple(places if letter in "TS" else slice(None) for letter in letters)
            ours, expected = padded[name][where], alone[name]
            if name.endswith("scores"):  # of pairs that see each other
                ours, expected = jnp.tril(ours), jnp.tril(expected)
            np.testing.assert_allclose(ours, expected, atol=2e-6, err_msg=name)


def test_an_edit_in_one_call_changes_nothing_in_the_next_and_has_a_gradient():
    config, params = _model("llama")
    model, (tokens,) = bind(skeleton(config), params), _texts(config)

    def edited(keys):
        edits = {"blocks.1.attention.key": keys}
        return trace(model, tokens, names=("blocks.0.attention.key", "logits"), edits=edits)

    run = tiny_models.compiled(edited)
    before = tiny_models.compiled(lambda: trace(model, tokens, names="*"))()
    same = run(before["blocks.1.attention.key"])
    np.testing.assert_allclose(same["logits"], before["logits"], atol=1e-6)
    nothing = run(jnp.zeros(()))  # broadcast to all keys
    assert jnp.abs(nothing["logits"] - before["logits"]).max() > 1e-3
    np.testing.assert_array_equal(nothing["blocks.0.attention.key"], same["blocks.0.attention.key"])
    np.testing.assert_array_equal(run(before["blocks.1.attention.key"])["logits"], same["logits"])

    keys = before["blocks.1.attention.key"]
    way = np.random.default_rng(0).normal(size=keys.shape).astype(np.float32)
    total = tiny_models.compiled(lambda keys: jnp.sum(jnp.sin(edited(keys)["logits"])))
    gradient = tiny_models.compiled(jax.grad(lambda k: jnp.sum(jnp.sin(edited(k)["logits"]))))
    difference = (total(keys + 0.01 * way) - total(keys - 0.01 * way)) / 0.02
    np.testing.assert_allclose(jnp.vdot(gradient(keys), way), difference, rtol=2e-2)


def test_a_mesh_finds_what_one_device_finds():
    config, params = _model("llama")
    (tokens,) = _texts(config, batch=4)
    names = ("blocks.*.attention.pattern", "blocks.*.mlp.hidden", "logits")
    find = tiny_models.compiled(
        lambda params: trace(bind(skeleton(config), params), tokens, names=names)
    )
    alone = find(params)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        shared = find(params)
    assert list(shared) == list(alone)
    for name, value in alone.items():
        np.testing.assert_allclose(shared[name], value, atol=1e-5, err_msg=name)


# ---- As a user asks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    tiny_run.write_tiny_run(directory, num_layers=2, num_kv_heads=1)
    return lm.load(directory)


def test_a_text_is_traced_by_a_name_or_by_the_name_of_transformer_lens(run):
    found = run.trace("The cat", "blocks.*.attention.pattern")
    assert list(found) == ["blocks.0.attention.pattern", "blocks.1.attention.pattern"]
    ids = run.encode("The cat")
    lens = run.trace([ids], ["blocks.1.attn.hook_pattern", "blocks.0.hook_resid_pre"])
    np.testing.assert_array_equal(
        lens["blocks.1.attn.hook_pattern"], found["blocks.1.attention.pattern"]
    )
    assert lens["blocks.0.hook_resid_pre"].shape == (1, len(ids), 32)
    np.testing.assert_allclose(run.trace([ids], "logits")["logits"], run.model([ids]), atol=1e-5)


def test_texts_of_different_lengths_are_traced_together(run):
    texts = ["The cat sat.", "Mia"]
    together = run.trace(texts, "logits")["logits"]
    for row, text in enumerate(texts):
        alone = run.model([run.encode(text)])[0]
        np.testing.assert_allclose(together[row, : len(alone)], alone, atol=1e-5)


def test_an_intervention_replaces_what_it_names(run):
    ids = [run.encode("The cat sat")]
    plain = run.model(ids)
    at, fields = "blocks.1.residual_after", run.trace(ids, "blocks.0.residual_after")
    skipped = run.intervene(ids, {at: fields["blocks.0.residual_after"]})
    assert jnp.abs(skipped - plain).max() > 1e-3
    silent = {"blocks.1.attention.output": jnp.zeros_like, "blocks.1.mlp.output": 0.0}
    np.testing.assert_allclose(run.intervene(ids, silent), skipped, atol=1e-5)
    np.testing.assert_array_equal(run.model(ids), plain)


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda run: run.trace("a", "blocks.0.attention.patern"),
         r"names='blocks.0.attention.patern' .*did you mean 'blocks.0.attention.pattern'"),
        (lambda run: run.trace("a", "blocks.7.*"), r"names='blocks.7.\*'"),
        (lambda run: run.intervene("a", {"logit": 0.0}), r"edits='logit' .*did you mean 'logits'"),
        (lambda run: run.intervene("a", {"logits": np.zeros(3)}), r"shape \(3,\)"),
        (lambda run: run.trace("a", "logits", segment_BT=1), r"did you mean 'segments_BT'"),
        (lambda run: run.trace([[999]], "logits"), "ids outside"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_nearest_name(run, ask, message):
    with pytest.raises(ConfigError, match=message):
        ask(run)


def test_a_recurrent_network_s_gates_are_read_and_not_replaced():
    config, params = _model("lstm")
    model, texts = bind(skeleton(config), params), _texts(config)
    with pytest.raises(ConfigError, match="can be read, not replaced"):
        trace(model, *texts, names="logits", edits={"blocks.0.gates": 0.0})

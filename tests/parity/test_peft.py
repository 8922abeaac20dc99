"""PEFT loads what we write, and we what it writes: the same logits, for every form of adapter."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import jax  # noqa: E402

from lm.config import ConfigError  # noqa: E402
from lm.models import bind, skeleton  # noqa: E402
from lm.models.adapters import AdapterConfig, adapter_specs, applied, begun, freeze  # noqa: E402
from lm.models.huggingface.peft import Peft, save_peft  # noqa: E402
from lm.models.huggingface.read import open_checkpoint  # noqa: E402
from lm.runs.sources import open_source  # noqa: E402

transformers.logging.set_verbosity_error()
SIZES = {"vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, **SIZES,
)  # fmt: skip
BASES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
        )
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            **SIZES,
        )
    ),
    "deepseek_v3": lambda: decoder_oracles.build("deepseek_v3"),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**LLAMA, pad_token_id=None)
    ),
}
MODULES = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gptj": ["q_proj", "k_proj", "fc_in"],  # of rotations by neighbouring pairs
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "gate_up_proj"],
}
FORMS = {
    "lora": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "patterns": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 12}),
    "one layer": dict(layers_to_transform=[1]),
}
CASES = [
    *(("llama", form) for form in FORMS),
    *((base, form) for base in ("gpt2", "gptj", "gpt_neox", "phi3") for form in ("lora", "dora")),
]
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12))


def written_base(place, name):
    """A random model of transformers, in a directory of its own."""
    torch.manual_seed(0)
    model = BASES[name]().eval()
    for parameter in model.parameters():  # in general position
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(place / "base")
    return model


def ours(checkpoint, config, adapters):
    """The logits of a base with adapters beside it."""
    exact = dataclasses.replace(checkpoint.config, compute_dtype="float32")
    model, specs = skeleton(exact), checkpoint.names.specs
    base = freeze(config, specs, checkpoint.parameters(), jnp.float32)
    return bind(model, applied(jax.tree.map(jnp.asarray, adapters), base))(TOKENS)


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name, form", CASES)
def test_we_load_what_peft_wrote(tmp_path, name, form):
    model = written_base(tmp_path, name)
    plain = theirs(model)
    fields = dict(r=4, lora_alpha=10, target_modules=MODULES[name], **FORMS[form])
    if form == "one layer":
        fields["target_modules"] = ["q_proj"]
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapters")
    checkpoint = open_checkpoint(tmp_path / "base")
    config, adapters = Peft.open(tmp_path / "adapters").read(checkpoint.names)
    expected = theirs(adapted)
    np.testing.assert_allclose(ours(checkpoint, config, adapters), expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 0.05


@pytest.mark.parametrize(
    "name, kind",
    [
        *itertools.product(
            [name for name in BASES if name != "deepseek_v3"], ["lora", "rslora", "dora"]
        ),
        ("deepseek_v3", "lora"),
    ],
)
def test_peft_loads_what_we_wrote(tmp_path, name, kind):
    written_base(tmp_path, name)
    checkpoint = open_checkpoint(tmp_path / "base")
    # DoRA is of whole layers, and in Phi-3 gate and up are one.
    mlp = "mlp" if name == "phi3" else "mlp.up"
    targets = ("attention", *{"llama": ["head"], "deepseek_v3": []}.get(name, [mlp]))
    fields = dict(rslora=True) if kind == "rslora" else dict(kind=kind)
    config = AdapterConfig(
        **{"kind": "lora", "rank": 3, "alpha": 5.0, "targets": targets, **fields}
    )
    specs, params = checkpoint.names.specs, checkpoint.parameters()
    base = freeze(config, specs, params, jnp.float32)
    adapters = begun(config, specs, params, base, jax.random.key(0))
    rng = np.random.default_rng(1)
    adapters = {
        n: x + np.asarray(rng.normal(0, 0.2, x.shape), np.float32) for n, x in adapters.items()
    }
    place = tmp_path / "adapters"
    save_peft(place, checkpoint.names, config, adapters, str(tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(model, place).eval()
    keys = peft.get_peft_model_state_dict(loaded).keys()
    expected = ours(checkpoint, config, adapters)
    np.testing.assert_allclose(theirs(loaded), expected, atol=1e-5)
    assert {key for key in keys if ".lora_" in key} == header(place)
    # And back: the same function, if not the same numbers where layers there are joined.
    again = Peft.open(place).read(checkpoint.names)
    np.testing.assert_allclose(ours(checkpoint, *again), expected, atol=1e-5)


def test_layers_that_peft_would_take_for_experts_are_refused(tmp_path):
    written_base(tmp_path, "deepseek_v3")
    names = open_checkpoint(tmp_path / "base").names
    config = AdapterConfig(kind="lora", targets="shared.up")
    adapters = {n: np.zeros(s.shape) for n, s in adapter_specs(config, names.specs).items()}
    with pytest.raises(ConfigError, match=r"shared\.up.*experts.*to='hf'.*targets='attention'"):
        save_peft(tmp_path / "adapters", names, config, adapters, "")


def test_a_reward_models_head_travels_with_its_adapters(tmp_path):
    written_base(tmp_path, "llama")
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=39
    )
    fields = dict(r=4, lora_alpha=10, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **fields)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapters")
    source = open_source(tmp_path / "adapters")
    assert source.model.classifier == "sequence" and source.base.adapter.whole
    params = source.parameters()[1]
    tokens = TOKENS % 39
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits.numpy()
    exact = dataclasses.replace(source.model, compute_dtype="float32")
    bound = bind(skeleton(exact), params)
    np.testing.assert_allclose(bound.classify(bound.hidden(tokens)), expected, atol=1e-5)
    # And written by us, PEFT loads it.
    out = tmp_path / "out"
    _, adapters = source.adapters()
    save_peft(out, source.names, source.base.adapter, adapters, str(tmp_path / "base"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=39
    )
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(model, out).eval()(torch.tensor(tokens)).logits
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def header(place):
    data = (place / "adapter_model.safetensors").read_bytes()
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return entries.keys() - {"__metadata__"}


def test_what_we_do_not_know_is_refused(tmp_path):
    for fields, words in (
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
    ):
        content = {"peft_type": "LORA", **fields}
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=words):
            Peft.open(tmp_path)

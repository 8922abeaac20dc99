"""What `run.trace` reads of imported models is what transformers and TransformerLens compute."""

import dataclasses
import os

import numpy as np
import pytest
import tokenizers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import encoder_oracles  # noqa: E402

import lm  # noqa: E402
from lm.models import skeleton  # noqa: E402

CASES = {
    "gpt2": decoder_oracles,
    "llama": decoder_oracles,
    "gemma2": decoder_oracles,
    "bert_masked": encoder_oracles,
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """The model there; here its run, in float32; and rows of tokens without padding."""
    model = CASES[request.param].build(request.param)
    model.config._attn_implementation = "eager"
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    run = lm.load(directory)
    config = dataclasses.replace(run.skeleton.config, compute_dtype="float32")
    run = dataclasses.replace(run, skeleton=skeleton(config))
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 13))
    return model, run, tokens


def test_hidden_states_and_attentions_are_those_of_transformers(case):
    model, run, tokens = case
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), output_hidden_states=True, output_attentions=True)
    names = ["embedding", "blocks.*.residual_after", "blocks.*.attention.pattern", "*norm.output"]
    ours = run.trace(tokens, [*names, "logits"])
    count = run.skeleton.config.num_layers
    streams = [ours["embedding"], *(ours[f"blocks.{i}.residual_after"] for i in range(count))]
    if "final_norm.output" in ours:
        streams[-1] = ours["final_norm.output"]
    patterns = [ours[f"blocks.{i}.attention.pattern"] for i in range(count)]
    for mine, expected in zip(streams, theirs.hidden_states, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)
    for mine, expected in zip(patterns, theirs.attentions, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)
    np.testing.assert_allclose(ours["logits"], theirs.logits, atol=1e-5)


@pytest.mark.slow
def test_the_cache_of_transformer_lens_holds_the_same_under_the_same_names(case, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    model, run, tokens = case
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]")
    bridge = bridges.TransformerBridge.boot_transformers(
        str(run.directory), hf_model=model, tokenizer=tokenizer
    )
    _, cache = bridge.run_with_cache(torch.tensor(tokens))
    ours = run.trace(tokens, "*hook_*")
    shared = [name for name in ours if name in cache]
    if run.skeleton.config.architecture == "encoder":  # of BERT it calls the pattern scores, too
        shared = [name for name in shared if not name.endswith("scores")]
    assert {"attn.hook_pattern", "attn.hook_z", "mlp.hook_post"} <= {
        name.split(".", 2)[2] for name in shared if name.startswith("blocks.1.")
    }
    for name in shared:
        mine, theirs = np.asarray(ours[name]), cache[name].detach().numpy()
        if name.endswith("scores"):  # of pairs that see each other
            seen = np.asarray(ours[name.replace("attn_scores", "pattern")]) > 0
            mine, theirs = mine[seen], theirs[seen]
        np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=name)

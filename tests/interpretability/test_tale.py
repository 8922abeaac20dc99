"""A token's tale: its numbers are the model's, and its page is read by eye and by keyboard."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_huggingface
import tiny_models

import lm
from lm.__main__ import guarded
from lm.__main__ import run as main
from lm.config import ConfigError
from lm.interpretability.tale import tell
from lm.interpretability.tale_page import write_tale
from lm.models import bind, skeleton
from lm.tokenizers import TokenizerConfig, train
from lm.tokenizers.export import huggingface_files

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROMPT = "A short history of quantum physics today"
KINDS = {
    "gpt": {"positions": "learned", "tie_embeddings": True},
    "gemma": {"positions": "rotary", "norm": "rmsnorm", "norm_position": "sandwich",
              "activation": "geglu", "num_kv_heads": 2, "embedding_scale": 0.0,
              "logits_softcap": 4.0, "tie_embeddings": True},
    "olmo": {"positions": "rotary", "norm": "rmsnorm", "norm_position": "reordered",
             "activation": "swiglu", "qk_norm": True, "qk_norm_joint": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt", "gemma", pytest.param("olmo", marks=pytest.mark.slow)])
def test_every_number_is_the_model_s(kind):
    config = tiny_models.config(**KINDS[kind])
    params, of = tiny_models.params(config), skeleton(config)
    ids, place = tiny_models.tokens(1, 7)[0].tolist(), 3
    ids[5] = ids[place]  # it stands there twice; what is read later has no part in it
    tale = tell(of, params, ids, place)
    target = ids[place + 1]
    assert tale.given and tale.target == target

    def loss(params):
        logits_V = bind(of, params)(jnp.array([ids]))[0, place]
        return -jax.nn.log_softmax(logits_V)[target], logits_V

    (value, logits_V), gradient = tiny_models.compiled(jax.value_and_grad(loss, has_aux=True))(
        params
    )
    assert tale.loss == pytest.approx(float(value), abs=1e-5)
    assert tale.logits.ids[0] == int(jnp.argmax(logits_V))
    np.testing.assert_allclose(tale.logits.scores[0], jax.nn.softmax(logits_V).max(), rtol=1e-5)
    row_D = gradient["embedding.tokens"][ids[place]]
    assert tale.row_gradient == pytest.approx(float(jnp.linalg.norm(row_D)), rel=1e-4)

    # What only the head has of the row: nothing is read of it there.
    apart = {**params, "head": params["embedding.tokens"]}
    untied = skeleton(tiny_models.config(**{**KINDS[kind], "tie_embeddings": False}))

    def read(params):
        logits_V = bind(untied, params)(jnp.array([ids]))[0, place]
        return -jax.nn.log_softmax(logits_V)[target]

    read_VD = tiny_models.compiled(jax.grad(read))(apart)["embedding.tokens"]
    norm = float(jnp.linalg.norm(read_VD[ids[place]]))
    assert tale.read_gradient == pytest.approx(norm, rel=1e-4)

    # The parts are the logit, a soft cap undone; later tokens have no gradient; patterns are means.
    cap = config.logits_softcap
    raw = cap * np.arctanh(tale.logit / cap) if cap else tale.logit
    assert tale.parts_sum == pytest.approx(raw, abs=2e-4)
    assert np.all(tale.back[:, place + 1 :] == 0) and np.all(tale.back[:, place] > 0)
    assert np.count_nonzero(tale.back[-1]) == 1
    for layer in tale.layers:
        assert len(layer.heads) == 4 and len(layer.neurons) == 5
        for head in layer.heads:
            assert sum(head.pattern) == pytest.approx(1, abs=1e-5)
            assert not any(head.pattern[place + 1 :])
    # The last layer's lens is what the model says.
    np.testing.assert_allclose(tale.layers[-1].says.scores, tale.logits.scores[:5], rtol=1e-4)
    assert tale.neighbours.ids[0] != ids[place] and len(tale.stream_names) == len(tale.streams)


def test_what_has_no_tale_says_so():
    encoder = tiny_models.config(architecture="encoder", positions="learned")
    with pytest.raises(ConfigError, match="a tale is of a decoder"):
        tell(skeleton(encoder), tiny_models.params(encoder), [1, 2])


def test_a_page_tells_only_of_what_the_model_has(tmp_path):
    lacks = {"norm": "none", "mlp_width": 0, "embedding_scale": 0.0, "num_layers": 1}
    for name, fields in (("with", KINDS["gpt"]), ("without", lacks)):
        config = tiny_models.config(**fields)
        tale = tell(skeleton(config), tiny_models.params(config), [1, 2])
        write_tale(tmp_path / name, tale, config, None, "tiny", "")
    whole, bare = ((tmp_path / name).read_text(encoding="utf-8") for name in ("with", "without"))
    for words in ("the MLP then", "The MLP (its norm", "A last norm", "norm's scale held"):
        assert words in whole and words not in bare
    times = "which the model takes times"
    assert f"{times} {config.width**0.5:.3f}" in bare and times not in whole


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A directory as Hugging Face writes it, whose tokenizer has the word."""
    directory = tmp_path_factory.mktemp("imported") / "gpt2"
    tokenizer = train(TokenizerConfig(kind="bpe", vocab_size=300), [PROMPT] * 50)
    weights, size = tiny_huggingface.tensors(), tokenizer.vocab_size
    rows = np.random.default_rng(1).normal(0, 0.2, (size, tiny_huggingface.WIDTH))
    weights["transformer.wte.weight"] = rows.astype(np.float32)
    fields = {
        "vocab_size": size,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.eos_id,
    }
    tiny_huggingface.write_directory(directory, weights, tokenizer=False, **fields)
    for name, data in huggingface_files(tokenizer).items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def told(gpt2, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tale")
    words = ["--config=configs/interpret/tale.py", f"--config.init_from={gpt2}"]
    words += [f"--config.prompt={PROMPT}", "--config.token= quantum", f"--workdir={workdir}"]
    main(words)
    return workdir


def test_the_tale_of_an_imported_model_s_token_is_what_its_trace_says(gpt2, told):
    tale, run = json.loads((told / "tale.json").read_text()), lm.load(gpt2)
    ids = run.encode(PROMPT)
    assert tale["ids"] == ids and run.tokenizer.decode([ids[tale["place"]]]) == " quantum"
    found = run.trace(PROMPT, ["blocks.2.attention.pattern", "blocks.2.residual_after"])
    pattern_HT = found["blocks.2.attention.pattern"][0, :, tale["place"]]
    heads = tale["layers"][2]["heads"]
    np.testing.assert_allclose([h["pattern"] for h in heads], pattern_HT, atol=0.01)  # bfloat16
    stream_D = found["blocks.2.residual_after"][0, tale["place"]]
    np.testing.assert_allclose(tale["streams"][-1], stream_D, atol=0.1)
    page = (told / "tale.html").read_text(encoding="utf-8")
    assert "␣quantum" in page and not re.search(r"(src|href)=.?(https?:)?//", page)


@pytest.mark.skipif(not CHROMIUM, reason="needs a chromium")
def test_the_page_is_walked_by_keyboard_and_read_aloud(told):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((390, "dark"), (1280, "light")):
            page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page.goto((told / "tale.html").as_uri())
            page.keyboard.press("o")
            assert page.locator("#layers > details[open]").count() == tiny_huggingface.LAYERS
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            faults = Axe().run(page).response["violations"]
            assert not [(fault["id"], fault["nodes"]) for fault in faults]
            page.keyboard.press("o")
            assert page.locator("#layers > details[open]").count() == 0
            page.keyboard.press("n")
            page.keyboard.press("n")
            assert page.evaluate("document.activeElement.id") == "embedding-title"
            page.keyboard.press("p")
            assert page.evaluate("document.activeElement.id") == "token-title"
            page.locator("#layers summary").first.focus()
            page.keyboard.press("Enter")
            assert page.get_by_text("Heads of layer 0").first.is_visible()
        browser.close()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.token= quantums"], "did you mean ' quantum'"),
        (["--config.prompt="], "config.prompt='' must be"),
        (["--config.prompt=" + "x" * 99], "config.prompt has 99 tokens"),
    ],
)
def test_mistakes_are_told_in_a_line(gpt2, tmp_path, capsys, words, message):
    asked = ["--config=configs/interpret/tale.py", f"--config.init_from={gpt2}"]
    asked += [f"--config.prompt={PROMPT}", f"--workdir={tmp_path}", *words]
    assert guarded(main, asked) == 2
    assert message in capsys.readouterr().err

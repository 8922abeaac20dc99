"""The card of an encoder, as a user makes it: CrowS-Pairs by masks, and what cannot be asked."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_model, write_tiny_run

import lm
from lm.__main__ import run
from lm.config import ConfigError
from lm.evaluation.scoring import MaskedScorer
from lm.tokenizers import TokenizerConfig, train
from lm.training.checkpoints import CheckpointConfig, Checkpointer

PAIRS = [("he adds", "she adds"), ("she cries", "he cries"), ("a man ran", "a hen ran")]
SHARED = ["he adds", "he cries", "an ran"]  # what a comparison leaves of each: the rest differs
CROWS = "".join(
    f"{number},{more},{less},{direction},{kind}\n"
    for number, ((more, less), direction, kind) in enumerate(
        zip(PAIRS, ("stereo", "antistereo", "stereo"), ("gender", "gender", "species"))
    )
)


def job(folder, *words):
    words = [f"--config.{word}" for word in words]
    run(["--config=configs/evaluate.py", f"--workdir={folder / 'card'}",
        f"--config.init_from={folder / 'run'}", "--config.bias.shuffles=20", *words])  # fmt: skip
    return json.loads((folder / "card" / "card.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose encoder reads all places alike: what a mask hides depends on their counts."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "run").mkdir()
    (folder / "crows.csv").write_text(f",sent_more,sent_less,stereo_antistereo,bias_type\n{CROWS}")
    config = TokenizerConfig(kind="char", mask_token=True, bos_token="[CLS]")
    tokenizer = train(config, ["".join(map(chr, range(32, 127)))])
    size = tokenizer.vocab_size
    fields = {"architecture": "encoder", "positions": "none", "tie_embeddings": False}
    fields |= {"num_layers": 1, "num_heads": 1, "width": size + size % 2, "vocab_size": size}
    write_tiny_run(folder / "run", tokenizer=tokenizer, **fields)
    _, params = tiny_model(**fields)
    unit, none = jnp.eye(fields["width"]), jnp.zeros_like
    params["embedding.tokens"] = unit[:size]
    for name in ("query", "key"):
        params[f"blocks.attention.{name}"] = none(params[f"blocks.attention.{name}"])
    for name in ("value", "output"):
        params[f"blocks.attention.{name}"] = unit.reshape(params[f"blocks.attention.{name}"].shape)
    params["blocks.mlp.down"] = none(params["blocks.mlp.down"])
    with Checkpointer(folder / "run" / "checkpoints", CheckpointConfig()) as checkpointer:
        state = {"params": params, "optimizer": params, "step": jnp.int32(9)}
        checkpointer.save(9, state, wait=True)
    return folder


def by_hand(loaded, sentence, places):
    """Σ log p(u | all others): a mask adds itself to the mean of what stands there, normalised."""
    head = np.asarray(loaded.params["head"], np.float64)
    width, mask, total = head.shape[1], loaded.tokenizer.mask_id, 0.0
    small = loaded.skeleton.config.norm_epsilon
    whole = loaded.encode(sentence)
    for place in places:
        ids = [*whole]
        hidden, ids[1 + place] = ids[1 + place], mask  # [CLS] stands in front
        residual = np.bincount(ids, minlength=width) / len(ids) / np.sqrt(1 / width + small)
        residual[mask] += 1
        logits = head @ (residual / np.sqrt((residual**2).mean() + small))
        total += logits[hidden] - np.log(np.exp(logits).sum())
    return total


def test_crows_pairs_are_scored_by_masking_each_shared_token_by_itself(folder):
    found = job(folder, f"bias.crows={folder / 'crows.csv'}")
    assert [*found["sections"]] == ["bias"] and len(found["left_out"]) == 7
    assert all("it is an encoder" in why for why in found["left_out"].values())
    loaded, wins = lm.load(folder / "run"), []
    for pair, kept in zip(PAIRS, SHARED):
        sums = []
        for sentence in pair:
            left, places = kept, []
            for place, letter in enumerate(sentence):
                if left.startswith(letter) and not (sentence == "she adds" and place < 1):
                    places.append(place)
                    left = left[1:]
            assert not left
            sums.append(by_hand(loaded, sentence, places))
        wins.append(sums[0] > sums[1])
    scores = {score["name"]: score for score in found["sections"]["bias"]["scores"]}
    assert scores["CrowS-Pairs"]["estimate"]["value"] == pytest.approx(np.mean(wins))
    assert scores["CrowS-Pairs"]["items"] == wins and {*wins} == {True, False}
    assert "each u masked by itself" in found["sections"]["bias"]["about"]
    assert {"names, women and men, in context", "told apart by it, embeddings"} <= {*scores}


def test_masked_tokens_are_scored_alike_alone_and_together(folder):
    loaded = lm.load(folder / "run")
    texts = [loaded.encode(text) for pair in PAIRS for text in pair]
    places = [(1, 3), (2,), (), (4,), (5, 6), (4,)]
    score = MaskedScorer(loaded.skeleton, loaded.params, loaded.tokenizer.mask_id, tokens=64)
    for text, at, found in zip(texts, places, score(texts, places)):
        expected = [by_hand(loaded, loaded.tokenizer.decode(text[1:-1]), [p - 1]) for p in at]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["suites=position"], "config.suites='position': it is an encoder"),
        (["suites=bias", "bias.stereoset=STEREO"], "config.suites='bias': it is an encoder"),
        (["suites=bias", "bias.crows=LONG"], "its context of 32 tokens does not hold a text of 42"),
    ],
)
def test_what_an_encoder_cannot_be_asked_is_refused(folder, words, message):
    (folder / "LONG").write_text(
        f",sent_more,sent_less,stereo_antistereo,bias_type\n,{'a' * 40},b,stereo,age\n"
    )
    said = [{"gold_label": one, "sentence": one} for one in ("stereotype", "anti-stereotype")]
    said.append({"gold_label": "unrelated", "sentence": "c"})
    story = {"target": "a", "bias_type": "b", "context": "c", "sentences": said}
    (folder / "STEREO").write_text(json.dumps({"data": {"intersentence": [story]}}))
    words = [
        w.replace("STEREO", f"{folder}/STEREO").replace("LONG", f"{folder}/LONG") for w in words
    ]
    with pytest.raises(ConfigError, match=message):
        job(folder, *words)

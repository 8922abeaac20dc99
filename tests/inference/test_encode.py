"""Vectors of texts and filled masks: what the model says, whatever stands beside a text."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import compiled
from tiny_run import general_params, tiny_model, write_tiny_run

import lm
from lm.config import ConfigError
from lm.inference import embed
from lm.inference.fill import POOLINGS, mask_ids
from lm.inference.prompts import padded_after
from lm.models import bind
from lm.tokenizers import TokenizerConfig, train

TEXTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5], [8, 8, 8]]
BERT = {
    "architecture": "encoder",
    "positions": "learned",
    "token_types": 2,
    "norm": "layernorm",
    "norm_position": "post",
    "embedding_norm": True,
    "bias": True,
    "head_transform": True,
    "head_bias": True,
    "pooler": True,
}


@pytest.fixture(scope="module")
def bert():
    model, _ = tiny_model(**BERT)
    return model, general_params(model)


@pytest.fixture(scope="module")
def alone(bert):
    """What pooling starts from, of each text read alone and without padding."""
    hidden = compiled(lambda params, ids: bind(bert[0], params).hidden(ids))
    return [hidden(bert[1], jnp.array([ids])) for ids in TEXTS]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_is_that_of_the_text_read_alone(bert, alone, pooling):
    model, params = bert
    vectors_ND = embed(model.config, params, TEXTS, pooling)
    for x_1TD, vector_D in zip(alone, vectors_ND):
        expected = {
            "mean": x_1TD[0].mean(0),
            "first": x_1TD[0, 0],
            "last": x_1TD[0, -1],
            "pooler": bind(model, params).pool(x_1TD)[0],
        }
        np.testing.assert_allclose(vector_D, expected[pooling], atol=1e-5)


def test_an_encoder_decoder_is_asked_for_its_encoders_output():
    model, _ = tiny_model(architecture="encoder_decoder", positions="relative")
    params = general_params(model)
    alone = bind(model, params).encode(jnp.array([TEXTS[0]]))[0].mean(0)
    np.testing.assert_allclose(embed(model.config, params, TEXTS)[0], alone, atol=1e-5)


def test_many_texts_come_back_in_their_order(bert):
    model, params = bert
    texts = [TEXTS[n % 4] for n in range(50)]
    few_ND, many_ND = (embed(model.config, params, t) for t in (TEXTS, texts))
    np.testing.assert_allclose(many_ND, few_ND[np.arange(50) % 4], atol=1e-5)
    assert embed(model.config, params, []).shape == (0, 32)


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    tokenizer = train(TokenizerConfig(kind="byte", mask_token=True, bos_token="[CLS]"), [])
    write_tiny_run(path, tokenizer=tokenizer, **BERT)
    return lm.load(path)


def test_candidates_are_the_likeliest_tokens_at_each_mask(masked_run):
    tokenizer = masked_run.tokenizer
    first, second = masked_run.fill("a[MASK]c[MASK]", top_k=3)
    mask, begin, end = tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id
    tokens = [begin, *b"a", mask, *b"c", mask, end]
    logits_TV = np.asarray(masked_run.model([tokens])[0], np.float64)
    shares_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
    for place, candidates in ((2, first), (4, second)):
        best = np.argsort(-logits_TV[place])[:3]
        assert [c.id for c in candidates] == best.tolist()
        shares = [c.probability for c in candidates]
        np.testing.assert_allclose(shares, shares_TV[place, best], rtol=1e-4)


def test_padding_changes_no_logit_of_a_masked_text(masked_run):
    tokens_1S, segments_1S = padded_after([list(b"abc")], 32)
    assert tokens_1S.shape == (1, 8)
    padded = masked_run.model(tokens_1S, segments_BT=segments_1S)
    np.testing.assert_allclose(padded[:, :3], masked_run.model([list(b"abc")]), atol=1e-5)


def test_a_run_embeds_texts_as_it_encodes_them(masked_run):
    both_ND = masked_run.embed(["cat", "a dog"])
    x_1TD = masked_run.transformer.hidden(np.array([masked_run.encode("cat")]))
    assert masked_run.encode("cat")[-1] == masked_run.tokenizer.eos_id
    np.testing.assert_allclose(both_ND[0], x_1TD[0].mean(0), atol=1e-5)
    np.testing.assert_allclose(masked_run.embed("a dog"), both_ND[1], atol=1e-5)


def test_a_mask_hides_the_space_that_its_word_carries():
    texts = ["the cat sat on the mat"] * 20
    config = TokenizerConfig(kind="bpe", vocab_size=300, mask_token=True)
    words = train(config, texts)
    hidden = words.encode(" sat")
    assert len(hidden) == 1
    [cat, on] = words.encode("the cat"), words.encode(" on")
    assert mask_ids(words, "the cat [MASK] on") == [*cat, words.mask_id, *on]
    letters = train(TokenizerConfig(kind="byte", mask_token=True), [])
    assert mask_ids(letters, "a [MASK]") == [*b"a ", letters.mask_id]


def test_impossible_questions_are_refused(masked_run, tmp_path):
    cases = [
        (lambda: masked_run.fill("no gap"), r"must have '\[MASK\]'"),
        (lambda: masked_run.fill("[MASK]", top_k=0), "top_k=0"),
        (lambda: masked_run.fill("[MASK]" + 40 * "x"), "43 tokens long.*context is 32"),
        (lambda: masked_run.embed("x" * 31), "text is 33 tokens long"),
        (lambda: masked_run.embed("x", pooling="meen"), "pooling='meen'.*'mean'"),
        (lambda: masked_run.generate("x"), "architecture='encoder'.*cannot generate"),
        (lambda: masked_run.score("x", "y"), "architecture='encoder' .*is no reward model"),
    ]
    write_tiny_run(tmp_path)
    decoder = lm.load(tmp_path)
    cases += [
        (lambda: decoder.fill("[MASK]"), "needs 'encoder'"),
        (lambda: decoder.embed("x", pooling="pooler"), "pooler=True"),
    ]
    for question, words in cases:
        with pytest.raises(ConfigError, match=words) as error:
            question()
        assert "\n" not in str(error.value)

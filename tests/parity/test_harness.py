"""lm-evaluation-harness gets the same answers from us as from its own Hugging Face backend."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest

import lm
from lm.config import ConfigError

lm_eval = pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

from lm.evaluation.harness import HarnessModel  # noqa: E402
from lm.evaluation.subject import Subject  # noqa: E402
from lm.models import skeleton  # noqa: E402

TEXT = "The cat sat on the mat. The dog ran in the park. Where is the cat? It is on the mat. "
LENGTH = 64


def write(directory, bos):
    """A small Llama with random weights, and a tokenizer that writes begin-of-text or does not."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT * 3], trainer)
    if bos:
        trained.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", model_max_length=LENGTH
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[False, True], ids=["without BOS", "with BOS"])
def both(request, tmp_path_factory):
    """Our model and the harness's own, of the same directory."""
    directory = write(tmp_path_factory.mktemp("hf"), request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HFLM(str(directory), device="cpu", dtype="float32", batch_size=3)
    run = lm.load(directory)
    exact = dataclasses.replace(run.skeleton.config, compute_dtype="float32")
    run = dataclasses.replace(run, skeleton=skeleton(exact))
    return HarnessModel(Subject(run)), theirs


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i, metadata=("task", i, 1))
        for i, one in enumerate(arguments)
    ]


PAIRS = [
    ("The cat sat on", " the mat"),
    ("The cat sat on ", "the mat"),
    ("Where is the cat?\n", "It is on the mat."),
    ("", "The dog"),
    ("The dog ran in the park. " * 12, "Where"),  # longer than the context
    ("A", " b"),
    ("Where", "?"),
]


def test_log_likelihoods_are_those_of_its_own_backend(both):
    ours, theirs = both
    asked = requests("loglikelihood", PAIRS)
    for (a, greedy), (b, same) in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked)):
        assert a == pytest.approx(b, abs=1e-4) and greedy == same
    assert ours.cut["task"] == {4}
    for tokens in (64, 128, 100_000):
        subject = Subject(ours.subject.run)
        subject.scorer.tokens = tokens
        again = HarnessModel(subject).loglikelihood(asked)
        np.testing.assert_allclose(
            [a for a, _ in again], [a for a, _ in ours.loglikelihood(asked)], atol=1e-5
        )


def test_whole_texts_of_any_length_are_scored_as_its_own_backend_does(both):
    ours, theirs = both
    texts = ["The cat", TEXT, TEXT * 5, "The dog ran in the park. Where is it?" * 12]
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    ids = [ours.subject.run.tokenizer.encode(text) for text in texts]
    assert len(ids[-1]) > 2 * LENGTH
    found = ours.loglikelihood_rolling(asked)
    if ours.subject.run.framing.before:  # it would predict begin-of-text from begin-of-text, too
        theirs.add_bos_token, told = False, theirs.add_bos_token
    np.testing.assert_allclose(found, theirs.loglikelihood_rolling(asked), rtol=1e-5, atol=1e-4)
    if ours.subject.run.framing.before:
        theirs.add_bos_token = told


def test_what_is_written_is_what_its_own_backend_writes(both):
    ours, theirs = both
    limits = {"max_gen_toks": 12, "do_sample": False}
    asked = [("The cat sat", {"until": ["."], **limits}), ("Where is", {"until": ["\n"], **limits})]
    asked += [(TEXT * 4, {"until": "cat", **limits}), ("A dog", {"until": [" the"], **limits})]
    found = ours.generate_until(requests("generate_until", asked))
    assert found == theirs.generate_until(requests("generate_until", asked))
    assert any(found)


def test_a_token_that_spans_the_join_is_of_the_continuation(both):
    ours, _ = both
    whole = ours.subject.run.tokenizer.encode("The cat")
    assert ours.subject.run.tokenizer.decode(whole[-1:]) == " cat"
    ids, start = ours.subject.pair("The c", "at")
    assert ids[start:] == whole[-1:] and ids[-len(whole) :] == whole
    ids, start = ours.subject.pair("T", "he cat")  # all of it is one token, with nothing before
    assert start == 1 and ids[1:] == whole
    assert ours.loglikelihood(requests("loglikelihood", [("The", "")])) == [(0.0, True)]


@pytest.mark.slow
@pytest.mark.parametrize("both", [True], indirect=True, ids=["with BOS"])
def test_a_local_task_comes_to_the_same_scores(both, tmp_path):
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "mat", "park"]
    with (tmp_path / "task.jsonl").open("w") as file:
        for _ in range(30):
            query = f"The {rng.choice(words)} is in the {rng.choice(words)}. Where is it? In the"
            file.write(json.dumps({"query": query, "choices": words, "gold": int(rng.integers(4))}))
            file.write("\n")
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = [
        lm_eval.simple_evaluate(model=model, tasks=[dict(task)], bootstrap_iters=0)
        for model in both
    ]
    ours, theirs = (one["results"]["local"] for one in found)
    assert {k: v for k, v in ours.items() if "acc" in k} == pytest.approx(
        {k: v for k, v in theirs.items() if "acc" in k}, nan_ok=True
    )


def test_answers_are_kept_by_weights_and_repeat(both, tmp_path):
    run, cache = both[0].subject.run, tmp_path / "answers.jsonl"
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [("The cat", drawn)] * 3)
    first = HarnessModel(Subject(run), cache=str(cache)).generate_until(asked)
    assert len(set(first)) > 1  # a repeat is another draw
    with cache.open("a") as file:
        file.write('["half a li')  # the process was killed here
    model = HarnessModel(Subject(run), cache=str(cache))
    assert len(cache.read_text().splitlines()) == 3
    model._written = lambda *_: pytest.fail("asked again")
    assert model.generate_until(asked) == first
    other = HarnessModel(Subject(run), cache=str(cache), weights="others")
    other.generate_until(asked)
    assert len(cache.read_text().splitlines()) == 6


def test_what_cannot_be_written_is_told_in_a_line(both):
    ours, _ = both
    for settings, message in (
        ({"max_gen_toks": LENGTH}, f"max_new_tokens={LENGTH} leaves no room for a prompt"),
        ({"max_gen_toks": 4, "beams": 3}, "generation_kwargs has beams"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours.generate_until(requests("generate_until", [("The", settings)]))


def test_conversations_are_read_as_the_model_was_trained(both):
    model = HarnessModel(Subject(both[0].subject.run, chat_template="chatml"))
    messages = [{"role": "user", "content": "Where is the cat?"}]
    text = model.apply_chat_template(messages)
    template = both[0].subject.run.chat_template("chatml")
    ids, start = model._pair(text, "On the mat.")
    assert ids[:start] == template.encode(messages)
    begun = model.apply_chat_template(
        [*messages, {"role": "assistant", "content": "It"}], add_generation_prompt=False
    )
    assert begun == text + "It"
    (total, _), *_ = model.loglikelihood(requests("loglikelihood", [(text, "On the mat.")]))
    assert -math.inf < total < 0

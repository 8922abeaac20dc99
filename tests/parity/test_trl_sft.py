"""SFT's loss and gradient are TRL's; what is learnt of published chat templates is what TRL marks.

TRL keeps templates of many families, and copies of them in which a person has marked by
`{% generation %}` what a model is to learn.
"""

import collections
import itertools
import pathlib
import re
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from lm.config import ConfigError  # noqa: E402
from lm.models import bind, skeleton  # noqa: E402
from lm.models.huggingface import to_tensors  # noqa: E402
from lm.objectives import ObjectiveConfig, loss  # noqa: E402
from lm.tokenizers import (  # noqa: E402
    ChatTemplate,
    TokenizerConfig,
    chat_template,
    learned,
    train,
)
from lm.tokenizers.export import huggingface_files  # noqa: E402

LENGTH = 24


def texts():
    """Ids of texts, and which of them are learnt: turns of a few tokens each."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(6, LENGTH, 5)
    ids = [rng.integers(3, 97, n).tolist() for n in lengths]
    return ids, [(np.arange(n) % 5 >= 3).tolist() for n in lengths]


def theirs(model, ids, flags):
    """TRL's loss and gradient."""
    labels = [[i if f else -100 for i, f in zip(*pair)] for pair in zip(ids, flags)]
    examples = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels)]
    inputs = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    same = lambda x: x  # noqa: E731
    trainer = types.SimpleNamespace(
        model=model,
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        args=types.SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        accelerator=types.SimpleNamespace(
            gather_for_metrics=same, parallelism_config=None, num_processes=1
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    model.zero_grad()
    found = trl.SFTTrainer.compute_loss(trainer, model, inputs)
    found.backward()
    gradient = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return float(found.detach()), gradient


def ours(imported, ids, flags):
    """The same of packed rows, in which texts stand one after the other."""
    family, config, params = imported
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((3, 2 * LENGTH), np.int32) for name in names}
    batch["weights"] = np.zeros((3, 2 * LENGTH), np.float32)
    for number, (text, learn) in enumerate(zip(ids, flags)):
        row, first = number // 2, (number % 2) * len(ids[number - 1]) - number % 2
        at = row, slice(first, first + len(text) - 1)
        batch["inputs"][at], batch["targets"][at] = text[:-1], text[1:]
        batch["weights"][at], batch["segment_ids"][at] = learn[1:], 1 + number % 2
        batch["positions"][at] = range(len(text) - 1)

    @jax.jit
    def computed(params):
        def mean(params):
            total, metrics = loss(bind(skeleton(config), params), batch, ObjectiveConfig("sft"))
            return total / metrics["weight"]

        return jax.value_and_grad(mean)(params)

    value, gradient = computed(params)
    gradient = {name: np.asarray(x) for name, x in gradient.items()}
    return float(value), to_tensors(family, config, gradient)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_loss_and_gradient_are_those_of_trl(tmp_path, family):
    model = decoder_oracles.build(family, "ForCausalLM")
    model.save_pretrained(tmp_path)
    imported = family_checks.load(tmp_path)
    found, our_gradient = ours(imported, *texts())
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    expected, gradient = theirs(model, *texts())
    assert found == pytest.approx(expected, abs=1e-5)
    largest = max(np.abs(array).max() for array in gradient.values())
    assert set(our_gradient) == set(gradient)
    for name, array in gradient.items():
        np.testing.assert_allclose(our_gradient[name], array, rtol=0, atol=1e-5 * largest)


# ---- Published templates ---------------------------------------------------------------------

TEMPLATES = pathlib.Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem.removesuffix("_training") for path in TEMPLATES.glob("*_training.jinja"))
SPECIAL = re.compile(
    r"<[|｜][^<>{}'\" ]{1,40}[|｜]?>|<[a-z_]+\|>|</?(?:s|eos|bos|tool_call|think)>"
    r"|<(?:start|end)_of_turn>|<end_of_utterance>|\[/?[A-Z_]{3,20}\]"
)
TALK = [
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "The end"},
]
CALL = {"name": "look", "arguments": {"at": "mat"}}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "found it"}
CALLS = [
    TALK[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "abcdefghi", "function": CALL}],
    },
    RESULT,
    TALK[3],
]
TOOL = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}


def turns(name, messages, tools=None):
    """What is learnt by a template, as texts; specials by name."""
    text = (TEMPLATES / f"{name}.jinja").read_text()
    names = sorted({*SPECIAL.findall(text)} - {"<|endoftext|>"})
    tokenizer = train(TokenizerConfig(kind="byte", special_tokens=tuple(names)), [])
    if "content'][0]" in text or "content[0]" in text:
        parts = [[{"type": "text", "text": m["content"]}] for m in messages]
        messages = [{**m, "content": content} for m, content in zip(messages, parts)]
    try:
        ids, flags = learned(ChatTemplate(tokenizer, {"default": text}), messages, tools)
    except ConfigError:
        return None
    shown = [tokenizer.special_names.get(i) or tokenizer.decode([i]) for i in ids]
    groups = itertools.groupby(zip(shown, flags), lambda pair: pair[1])
    return ["".join(text for text, _ in pairs) for learn, pairs in groups if learn]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learnt_of_a_template_is_what_its_marked_copy_says(name):
    """But for what the copies mark of the opening, which a model reads before it replies."""
    found, expected = turns(name, TALK), turns(f"{name}_training", TALK)
    assert len(found) == len(expected) == 2
    for ours, marked, message in zip(found, expected, TALK[1::2]):
        assert marked.endswith(ours) and message["content"] in ours
        assert not ours.endswith(message["content"])  # the end of the turn is learnt
    tools = [{"type": "function", "function": TOOL}]
    found, expected = turns(name, CALLS, tools), turns(f"{name}_training", CALLS, tools)
    if found is None or expected is None:
        return  # no template for tools
    assert len(found) == 2 and "look" in found[0]
    assert not any(RESULT["content"] in turn for turn in found)
    assert expected[1].endswith(found[1]) and "The end" in found[1]


# ---- The border between prompt and replies ----------------------------------------------------


def test_replies_are_compared_after_the_prompt_that_a_model_reads_where_trl_drops_its_end(tmp_path):
    """A word joins the space before it into one token: then TRL's prompt ends before that space."""
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    text = "the cat sat on the mat " * 20
    config = TokenizerConfig(kind="bpe", vocab_size=290, chat_template="plain")
    tokenizer = train(config, [text])
    for name, data in huggingface_files(tokenizer).items():
        (tmp_path / name).write_bytes(data)
    asked = [{"role": "user", "content": "the cat "}]
    said = [[{"role": "assistant", "content": word}] for word in ("sat", "mat")]
    line = {"prompt": asked, "chosen": said[0], "rejected": said[1]}
    args = types.SimpleNamespace(dataset_num_proc=None, max_length=None)
    (row,) = trl.DPOTrainer._prepare_dataset(
        types.SimpleNamespace(),
        datasets.Dataset.from_list([line]),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        args,
        "train",
    )
    chat = chat_template(tokenizer, begin=[tokenizer.bos_id])
    read = chat.encode(asked)
    assert row["prompt_ids"] == read[:-1]  # not what the model reads before it replies
    for reply, word in zip(said, ("sat", "mat")):
        ids, flags = learned(chat, asked + reply, given=1)
        assert ids[: len(read)] == read and not any(flags[: len(read)])
        assert tokenizer.decode(ids[len(read) :]) == word and all(flags[len(read) :])

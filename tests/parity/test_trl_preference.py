"""Losses of preferences, and their gradients of every parameter, are those of TRL's trainers.

With the same weights, ids and masks; where TRL counts what it should not, the last tests show it.
"""

import collections
import copy
import json
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402
import transformers  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from lm.data import DataConfig, prepare, train_batches  # noqa: E402
from lm.models import bind, skeleton  # noqa: E402
from lm.models.huggingface import to_tensors  # noqa: E402
from lm.objectives import (  # noqa: E402
    DistillationConfig,
    ObjectiveConfig,
    PreferenceConfig,
    loss,
)
from lm.objectives.distill import linear_divergence  # noqa: E402
from lm.tokenizers import TokenizerConfig, chat_template, train  # noqa: E402
from lm.tokenizers.export import huggingface_files  # noqa: E402

LENGTH = 20


def replies(seed=0, prompts=(3, 5, 2, 4), chosen=(4, 1, 7, 3), rejected=(2, 6, 7, 5)):
    """Ids of prompts and two replies each, of these lengths."""
    rng = np.random.default_rng(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: rng.integers(3, 97, n).tolist() for name, n in zip(names, sizes)}
        for sizes in zip(prompts, chosen, rejected)
    ]


def rows(pairs):
    """[P, 2, T] of (prompt, reply, prompt, reply)."""
    fields = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((len(pairs), 2, LENGTH), np.int32) for name in fields}
    batch["weights"] = np.zeros((len(pairs), 2, LENGTH), np.float32)
    for number, (prompt, reply, other, second) in enumerate(pairs):
        for side, (first, last) in enumerate(((prompt, reply), (other, second))):
            ids = [*first, *last]
            at = number, side, slice(0, len(ids) - 1)
            batch["inputs"][at], batch["targets"][at] = ids[:-1], ids[1:]
            batch["segment_ids"][at], batch["positions"][at] = 1, range(len(ids) - 1)
            batch["weights"][number, side, max(len(first) - 1, 0) : len(ids) - 1] = 1
    return batch


def pair_rows(examples):
    return rows(
        [(e["prompt_ids"], e["chosen_ids"], e["prompt_ids"], e["rejected_ids"]) for e in examples]
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """TRL's policy and reference, and ours: the family, its config and both parameters."""
    policy = decoder_oracles.build("llama")
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    imported = []
    for name, model in (("policy", policy), ("reference", reference)):
        place = tmp_path_factory.mktemp(name)
        model.save_pretrained(place)
        imported.append(family_checks.load(place))
    for model in (policy, reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    (family, config, params), (_, _, frozen) = imported
    return policy, reference, (family, config, params, frozen)


def ours(models, objective, batch):
    """The mean loss and its gradient, by the names of the tensors."""
    family, config, params, frozen = models[2]

    @jax.jit
    def computed(params, frozen):
        def mean(params):
            model, reference = (bind(skeleton(config), each) for each in (params, frozen))
            total, metrics = loss(model, batch, objective, reference=reference)
            return total / metrics["weight"]

        return jax.value_and_grad(mean)(params)

    value, gradient = computed(params, frozen)
    gradient = {name: np.asarray(x) for name, x in gradient.items()}
    return float(value), to_tensors(family, config, gradient)


def stub(models, **fields):
    """What a trainer's methods read of it, on one process."""
    policy, reference, _ = models
    same = lambda x: x  # noqa: E731
    return types.SimpleNamespace(**{
        "model": policy, "ref_model": reference, "aux_loss_enabled": False,
        "args": types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        "accelerator": types.SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same, num_processes=1
        ),
        "precompute_ref_logps": False, "is_encoder_decoder": False,
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
        "_total_train_tokens": 0, "_tp_size": 1, **fields,
    })  # fmt: skip


def dpo_loss(models, kind, examples, **fields):
    fields = {"beta": 0.1, "label_smoothing": 0.0, "use_weighting": False, **fields}
    fields |= {"ld_alpha": None, "f_divergence_type": "reverse_kl"}
    trainer = stub(models, loss_types=[kind], loss_weights=[1.0], **fields)
    inputs = DataCollatorForPreference(pad_token_id=0)(examples)
    return trl.DPOTrainer._compute_loss(trainer, models[0], inputs, False)


def kto_loss(models, examples, labels, mismatched, **fields):
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)([
        {
            "prompt_ids": one["prompt_ids"],
            "completion_ids": one["chosen_ids"],
            "KL_completion_ids": other,
            "label": label,
        }
        for one, label, other in zip(examples, labels, mismatched)
    ])  # fmt: skip
    trainer = stub(models, loss_type="kto", calculate_KL=True, **fields)
    trainer._compute_kl_logps = types.MethodType(trl.KTOTrainer._compute_kl_logps, trainer)
    return trl.KTOTrainer._compute_loss(trainer, models[0], inputs, False)


def concatenated(models, kind, examples, **fields):
    """The loss of `CPOTrainer` or `ORPOTrainer`."""
    batch = {}
    for side in ("chosen", "rejected"):
        texts = [e["prompt_ids"] + e[f"{side}_ids"] for e in examples]
        labels = [[-100] * len(e["prompt_ids"]) + e[f"{side}_ids"] for e in examples]
        for name, values, pad in (
            ("input_ids", texts, 0),
            ("attention_mask", [[1] * len(text) for text in texts], 0),
            ("labels", labels, -100),
        ):
            padded = [[*row, *[pad] * (LENGTH - len(row))] for row in values]
            batch[f"{side}_{name}"] = torch.tensor(padded)
    trainer = stub(models, pad_token_id=0, padding_value=0, **fields)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(kind, name))
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, name):
            setattr(trainer, name, types.MethodType(getattr(kind, name), trainer))
    return kind.get_batch_loss_metrics(trainer, models[0], batch)[0]


def check(models, found, theirs):
    policy = models[0]
    value, gradient = found
    policy.zero_grad()
    theirs.backward()
    expected = {n: p.grad.numpy() for n, p in policy.named_parameters() if p.grad is not None}
    assert value == pytest.approx(float(theirs.detach()), abs=1e-5, rel=1e-5)
    assert set(gradient) == set(expected)
    largest = max(np.abs(array).max() for array in expected.values())
    assert largest > 1e-3
    for name, array in expected.items():
        np.testing.assert_allclose(gradient[name], array, rtol=0, atol=1e-5 * largest)


# Ours, and TRL's names for the same.
DPO = [
    (PreferenceConfig(), "sigmoid"),
    (PreferenceConfig(beta=0.5, per_token=True), "sigmoid_norm"),
    (PreferenceConfig("robust", beta=0.3, label_smoothing=0.2), "robust"),
    (PreferenceConfig("hinge", beta=0.02), "hinge"),
    (PreferenceConfig("ipo", beta=0.4), "ipo"),
]


@pytest.mark.parametrize(("config", "kind"), DPO, ids=[kind for _, kind in DPO])
def test_dpo_and_its_variants(models, config, kind):
    found = ours(models, ObjectiveConfig("dpo", preference=config), pair_rows(replies()))
    fields = dict(beta=config.beta, label_smoothing=config.label_smoothing)
    check(models, found, dpo_loss(models, kind, replies(), **fields))


def test_conservative_dpo_is_that_of_a_batch_of_one_whose_order_is_its_own(models):
    """TRL smooths labels in AOT alone, which sorts log-ratios over the batch: one of them stays."""
    config = PreferenceConfig(beta=0.3, label_smoothing=0.2)
    examples = replies()[2:3]
    found = ours(models, ObjectiveConfig("dpo", preference=config), pair_rows(examples))
    check(models, found, dpo_loss(models, "aot", examples, beta=0.3, label_smoothing=0.2))


def test_simpo(models):
    config = PreferenceConfig("simpo", beta=2.0, margin=1.0, label_smoothing=0.1)
    found = ours(models, ObjectiveConfig("dpo", preference=config), pair_rows(replies()))
    fields = dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.1)
    check(
        models, found, concatenated(models, CPOTrainer, replies(), cpo_alpha=0, alpha=0.0, **fields)
    )


def test_orpo(models):
    """Of prompts of one token, which TRL's likelihood cannot count, and replies of one length."""
    examples = replies(prompts=(1, 1, 1), chosen=(5, 5, 5), rejected=(2, 6, 7))
    config = ObjectiveConfig("orpo", preference=PreferenceConfig(beta=0.3))
    theirs = concatenated(models, ORPOTrainer, examples, beta=0.3)
    check(models, ours(models, config, pair_rows(examples)), theirs)


@pytest.mark.parametrize("seed", [0, 2])
def test_kto(models, seed):
    """The divergence that rewards are compared with is cut off at 0, and 0.21."""
    examples, labels = replies(seed), [True, False, True, False]
    mismatched = [e["chosen_ids"] for e in examples[1:] + examples[:1]]
    batch = rows([
        (e["prompt_ids"], e["chosen_ids"], e["prompt_ids"], other)
        for e, other in zip(examples, mismatched)
    ]) | {"label": np.float32(labels)}  # fmt: skip
    config = PreferenceConfig(beta=0.2, desirable=1.5, undesirable=0.5)
    found = ours(models, ObjectiveConfig("kto", preference=config), batch)
    weights = dict(desirable_weight=1.5, undesirable_weight=0.5)
    theirs = kto_loss(models, examples, labels, mismatched, beta=0.2, **weights)
    check(models, found, theirs)


@pytest.mark.parametrize(
    ("config", "beta"),
    [
        (DistillationConfig(temperature=2.0), 0.0),
        (DistillationConfig(divergence="reverse"), 1.0),
        (DistillationConfig(divergence="jsd", mixture=0.3, temperature=0.7), 0.3),
    ],
    ids=lambda x: getattr(x, "divergence", ""),
)
def test_divergences_from_a_teacher(config, beta):
    rng = np.random.default_rng(0)
    x, teacher = (rng.normal(size=(3, 8, 12)).astype(np.float32) for _ in range(2))
    head, other = (rng.normal(size=(40, 12)).astype(np.float32) for _ in range(2))
    weights = (rng.random((3, 8)) < 0.7).astype(np.float32)

    def mean(x):
        return linear_divergence(x, head, teacher, other, weights, config) / weights.sum()

    found, gradient = jax.jit(jax.value_and_grad(mean))(x)
    hidden = torch.tensor(x, requires_grad=True)
    theirs = GKDTrainer.generalized_jsd_loss(
        hidden @ torch.tensor(head).T,
        torch.tensor(teacher @ other.T),
        torch.tensor(np.where(weights > 0, 1, -100)),
        beta=beta,
        temperature=config.temperature,
    )
    theirs.backward()
    assert float(found) == pytest.approx(float(theirs.detach()), abs=1e-5, rel=1e-5)
    np.testing.assert_allclose(gradient, hidden.grad.numpy(), atol=1e-5)


# ---- Where TRL counts what it should not ---------------------------------------------------------


def test_trl_divides_by_a_token_that_nothing_predicts(models):
    """A reply without a prompt: its first token is read and never predicted.

    Whether that token is called a prompt or not, the same tokens are predicted after the same ones.
    So says our loss; TRL's mean counts it, as it sums the mask before it is shifted.
    """
    objective = ObjectiveConfig("dpo", preference=PreferenceConfig(beta=2.0, per_token=True))
    whole = replies(prompts=(1, 1), chosen=(2, 3), rejected=(9, 8))
    bare = [
        {"prompt_ids": []} | {name: one["prompt_ids"] + one[name] for name in list(one)[1:]}
        for one in whole
    ]
    found = [ours(models, objective, pair_rows(examples))[0] for examples in (whole, bare)]
    theirs = [dpo_loss(models, "sigmoid_norm", each, beta=2.0).item() for each in (whole, bare)]
    assert found[0] == found[1] == pytest.approx(theirs[0], abs=1e-5)
    assert abs(theirs[0] - theirs[1]) > 0.01


def test_trl_counts_the_end_of_a_prompt_as_said_by_one_reply_and_not_by_the_other(tmp_path):
    """A prompt that ends in a blank, which one reply's first word takes in and the other's not.

    TRL writes prompt and reply as one text. Ours are tokens of their own, as they are where the
    model is asked: both replies follow the same tokens, and weigh where they stand alone.
    """
    datasets = pytest.importorskip("datasets")
    texts = ["where? the cat sat on the mat.", "the mat and the cat"] * 20
    tokenizer = train(TokenizerConfig(kind="bpe", vocab_size=300), texts)
    for name, data in huggingface_files(tokenizer).items():
        (tmp_path / name).write_bytes(data)
    same = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    line = {"prompt": "where? ", "chosen": "the cat.", "rejected": "(no)"}
    args = types.SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
    )
    trainer = types.SimpleNamespace(_tokenizer=same)
    data = datasets.Dataset.from_list([line])
    theirs = trl.DPOTrainer._prepare_dataset(trainer, data, same, args, "pairs")[0]
    said = {name: tokenizer.decode(theirs[f"{name}_ids"]) for name in line}
    assert said["prompt"] == "where?" and said["chosen"] == " the cat."
    assert tokenizer.decode(theirs["rejected_ids"][:1]) == " "  # the prompt's, and learnt

    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    config = DataConfig(
        path=str(path), block_size=24, batch_size=1, packing="none", validation_fraction=0.0,
        cache_dir=str(tmp_path / "tokens"),
    )  # fmt: skip
    corpora, _ = prepare(config, tokenizer, 0, print, "dpo", chat_template(tokenizer, "plain"))
    batch = train_batches(config, corpora, seed=0, objective="dpo", tokenizer=tokenizer).batch(0)
    for side, name in enumerate(("chosen", "rejected")):
        learnt = batch["weights"][0, side] > 0
        assert tokenizer.decode(batch["targets"][0, side][learnt].tolist()) == line[name]
        read = batch["inputs"][0, side][: learnt.argmax() + 1].tolist()
        assert read == tokenizer.encode(line["prompt"])


def test_trl_weighs_a_pair_of_orpo_by_the_lengths_of_its_companions(models):
    """Its likelihood is a mean over the tokens of a batch, so batches are not the sum of parts."""
    examples = replies(prompts=(1, 1), chosen=(2, 9), rejected=(4, 4))
    config = ObjectiveConfig("orpo", preference=PreferenceConfig(beta=0.3))

    def both(examples):
        theirs = concatenated(models, ORPOTrainer, examples, beta=0.3)
        return ours(models, config, pair_rows(examples))[0], theirs.item()

    (whole, their_whole), *parts = (both(each) for each in (examples, examples[:1], examples[1:]))
    one, their_one = np.mean(parts, 0)
    assert whole == pytest.approx(one, abs=1e-5)
    assert abs(their_whole - their_one) > 0.01

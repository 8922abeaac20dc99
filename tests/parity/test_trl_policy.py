"""Losses of policies, their gradients of the logits, and advantages are those of TRL's trainers."""

import collections
import contextlib
import types
from unittest import mock

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from trl.trainer import grpo_trainer, rloo_trainer  # noqa: E402

from lm.alignment.advantages import AdvantageConfig, estimate  # noqa: E402
from lm.objectives.policy import PolicyConfig, policy_loss  # noqa: E402

B, T, V, K = 6, 7, 11, 3
LENGTH_B = [7, 1, 4, 6, 2, 5]
WEIGHTS_BT = (np.arange(T) < np.array(LENGTH_B)[:, None]).astype(np.float32)
WIDE = {"clip_low": 0.2, "clip_high": 0.28}
UNBIASED = {"use_bias_correction_kl": True}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
# Ours, and TRL's names for the same.
VARIANTS = [
    (PolicyConfig("grpo"), {}),
    (PolicyConfig("grpo", kl_coefficient=0.3, kl_estimator="k3"), {}),
    (PolicyConfig("grpo", kl_coefficient=0.3), UNBIASED),
    (PolicyConfig("dapo", **WIDE), {}),
    (PolicyConfig("dapo", **WIDE, importance_cap=1.2), {"use_vllm": True}),
    (PolicyConfig("dapo", **WIDE, kl_coefficient=0.3, entropy_coefficient=0.2), UNBIASED),
    (PolicyConfig("ppo"), {"loss_type": "bnpo"}),
    (PolicyConfig("dr_grpo", max_response=9), {}),
    (PolicyConfig("dr_grpo", max_response=9, kl_coefficient=0.3, kl_estimator="k3"), {}),
    (PolicyConfig("gspo", 0.05, 0.1), SEQUENCE),
    (PolicyConfig("cispo", clip_high=0.1), {}),
    (PolicyConfig("cispo", clip_high=4.0, kl_coefficient=0.3, kl_estimator="k3"), {}),
    (PolicyConfig("rloo"), {}),
]  # fmt: skip


def example():
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(0, 1, (B, T, V)).astype(np.float32)
    targets_BT = rng.integers(0, V, (B, T))
    now_BT = np.take_along_axis(
        torch.tensor(logits_BTV).log_softmax(-1).numpy(), targets_BT[..., None], -1
    )[..., 0]
    batch = {
        name: (now_BT + rng.normal(0, 0.25, (B, T))).astype(np.float32)
        for name in ("old_logprob", "ref_logprob", "rollout_logprob")
    }
    advantage_B = rng.normal(0, 1, B).astype(np.float32)
    batch["advantage"] = np.repeat(advantage_B[:, None], T, 1)
    return logits_BTV, targets_BT, batch | {"weights": WEIGHTS_BT}


def trainer(config, **changes):
    """What a trainer's methods read of it, for losses on one process and without accumulation."""
    fields = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    args = types.SimpleNamespace(**{k: changes.pop(k, v) for k, v in fields.items()})
    same = lambda x, *_, **__: x  # noqa: E731
    cispo = config.loss == "cispo"
    return types.SimpleNamespace(**{
        "loss_type": config.loss, "importance_sampling_level": "token", "args": args,
        "beta": config.kl_coefficient, "epsilon_low": config.clip_low,
        "epsilon_high": 1 + config.clip_high if cispo else config.clip_high,
        "max_completion_length": config.max_response, "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
        "vllm_importance_sampling_correction": True, "model": types.SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1, "use_adaptive_entropy": False,
        "_entropy_bonus_enabled": config.entropy_coefficient > 0,
        "entropy_coef": config.entropy_coefficient,
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
        "accelerator": types.SimpleNamespace(
            num_processes=1, gather=same, reduce=same, sync_gradients=False
        ),
        **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    "config, changes", VARIANTS, ids=lambda x: getattr(x, "loss", None) or str(x)
)
def test_losses_and_gradients_are_those_of_trl(config, changes):
    logits_BTV, targets_BT, batch = example()

    def ours(logits_BTV):
        log_BTV = jax.nn.log_softmax(logits_BTV)
        entropy_BT = -(jax.numpy.exp(log_BTV) * log_BTV).sum(-1)
        logprob_BT = jax.numpy.take_along_axis(log_BTV, targets_BT[..., None], -1)[..., 0]
        loss, metrics = policy_loss(logprob_BT, entropy_BT, batch, config)
        return loss / metrics["weight"]

    loss, gradient = jax.value_and_grad(ours)(logits_BTV)

    stub = trainer(config, **changes)
    logits = torch.tensor(logits_BTV, requires_grad=True)
    log = logits.log_softmax(-1)
    logprob = log.gather(-1, torch.tensor(targets_BT)[..., None])[..., 0]
    entropy = -(log.exp() * log).sum(-1)
    stub._get_per_token_logps_and_entropies = lambda *_, **__: (logprob, entropy, None)
    given = {name: torch.tensor(x) for name, x in batch.items()}
    stale = torch.exp(given["old_logprob"] - given["rollout_logprob"])
    inputs = {
        "prompt_ids": torch.zeros((B, 2), dtype=torch.long),
        "prompt_mask": torch.ones((B, 2), dtype=torch.long),
        "completion_ids": torch.tensor(targets_BT),
        "completion_mask": given["weights"].long(),
        "advantages": given["advantage"][:, 0],
        "old_per_token_logps": given["old_logprob"],
        "old_logps": (given["old_logprob"] * given["weights"]).sum(1),
        "ref_per_token_logps": given["ref_logprob"],
        "num_items_in_batch": given["weights"].sum(),
        "importance_sampling_ratio": stale.clamp(max=config.importance_cap or torch.inf),
    }
    kind = rloo_trainer.RLOOTrainer if config.loss == "rloo" else grpo_trainer.GRPOTrainer
    theirs = kind._compute_loss(stub, stub.model, inputs)
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


ADVANTAGES = [
    (AdvantageConfig("group", kl_coefficient=0.0), {"scale_rewards": "group"}),
    (AdvantageConfig("group", kl_coefficient=0.0, scale="batch"), {"scale_rewards": "batch"}),
    (AdvantageConfig("group", kl_coefficient=0.0, scale="none"), {"scale_rewards": "none"}),
    (AdvantageConfig("leave_one_out", kl_coefficient=0.0), {}),
    (AdvantageConfig("leave_one_out", kl_coefficient=0.4), {}),
]


@pytest.mark.parametrize("config, changes", ADVANTAGES, ids=str)
def test_advantages_are_those_of_trl(config, changes):
    _, targets_BT, batch = example()
    score_B = np.random.default_rng(1).normal(0, 2, B)
    ours = estimate(
        config, score_B, WEIGHTS_BT, batch["old_logprob"], batch["ref_logprob"],
        ended_N=np.ones(B, bool), group_size=K,
    )  # fmt: skip

    module = rloo_trainer if config.name == "leave_one_out" else grpo_trainer
    kind = module.RLOOTrainer if config.name == "leave_one_out" else module.GRPOTrainer
    # All that has to do with text, images and logs may be anything.
    stub = mock.MagicMock(**changes)
    stub.beta, stub.num_generations, stub.reward_weights = config.kl_coefficient, K, torch.ones(1)
    stub.model.training, stub.accelerator.device = True, torch.device("cpu")
    stub.accelerator.process_index, stub.accelerator.num_processes = 0, 1
    stub.accelerator.gather = stub.accelerator.reduce = lambda x, *_, **__: x
    stub.pad_to_multiple_of, stub._tokenizer.pad_token_id, stub.reward_func_names = None, 0, ["r"]
    stub.mask_truncated_completions = stub.normalize_advantages = stub.use_vllm = False
    stub.reward_clip_range, stub._pending_extra_logs, stub._pending_metrics = None, {}, {}
    stub.multi_objective_aggregation = "sum_then_normalize"
    completions = [list(map(int, row[:n])) for row, n in zip(targets_BT, LENGTH_B)]
    prompts, texts = [[1]] * B, ["text"] * B
    stub._generate.return_value = prompts, completions, texts
    if config.name == "group":
        stub.environment_factories = stub.environments = stub.tools = None
        stub.num_iterations = stub.args.steps_per_generation = 1
        stub.args.gradient_accumulation_steps = 1
        stub._generate.return_value = prompts, completions, None, texts, None, {}, None, None
    stub._calculate_rewards.return_value = torch.tensor(score_B)[:, None]
    old, ref = (torch.tensor(batch[name]) for name in ("old_logprob", "ref_logprob"))
    stub._get_per_token_logps_and_entropies.side_effect = [(old, None, None), (ref, None, None)]
    with mock.patch.multiple(
        module,
        disable_gradient_checkpointing=lambda *_: contextlib.nullcontext(),
        gather=lambda x: x,
        gather_object=lambda x: x,
    ):
        done = kind._generate_and_score_completions(stub, [{"prompt": "a"}] * B)
    theirs_BT = done["advantages"].numpy()[:, None] * WEIGHTS_BT
    np.testing.assert_allclose(ours.advantage_NT, theirs_BT, rtol=1e-5, atol=1e-6)

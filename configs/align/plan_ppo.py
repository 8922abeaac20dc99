r"""Does PPO of a model fit, and how long does an iteration take? Compiled, for TPUs elsewhere.

    pip install 'jax[tpu]'    # the compiler; no TPU is needed
    python main.py --config=configs/align/plan_ppo.py

    # a critic that is a head of the policy's; half of the responses at a time; another mesh
    python main.py --config=configs/align/plan_ppo.py --config.learning.critic=shared \
        --config.rollout.slots=256 --config.mesh.fsdp=16 --config.mesh.tensor=4

    # fake devices of this machine's CPU, where there is no libtpu
    python main.py --config=configs/align/plan_ppo.py --config.preset=gpt2_small \
        --config.topology=cpu:8 --config.mesh.fsdp=4 \
        --config.mesh.tensor=2 --config.rollout.slots=16

It is configs/plan.py with `objective.name` "policy", and takes the sections of configs/align/ppo.py
and grpo.py: `rollout`, `advantage`, `objective`, `learning`. Of `data` it takes the sizes, and a
separate critic is as large as the policy; `reward_model` is a preset's name, or "" where rewards
are functions.

Printed: what lies on a chip all the time, and what a phase takes beside it; seconds of each
program, as often as an iteration runs it; and what to change where a phase does not fit.

Llama 3 8B on 64 chips, 512 prompts and responses of 512 tokens each, policy, critic, reference and
reward model of one size: 12.2 GiB of 95.7 in the rollout, of which 8.3 are keys and values, 13.1
while scoring and 15.2 in updates; 46 s an iteration: 16.6 of rollout, 4.3 of scoring, 25.2 of
updates. Two busy CPU cores: five minutes of compiling.
"""

from lm.config import defaults
from lm.jobs.plan import PlanJob


def get_config():
    config = defaults(PlanJob)
    config.preset = "llama3_8b"
    config.topology = "v5p:4x4x4"
    config.data.block_size = 1024  # a prompt and its response
    config.data.batch_size = 128  # responses an update
    config.model.remat = "full"
    # Pages are split over `tensor` alone, and so is what decoding reads of the weights.
    config.mesh.data = 1
    config.mesh.fsdp = 8
    config.mesh.tensor = 8

    config.objective.name = "policy"
    config.objective.policy.loss = "ppo"
    config.rollout.prompts = 512
    config.rollout.samples = 1
    config.rollout.max_new_tokens = 512
    config.rollout.slots = 512  # all at the same time
    config.advantage.name = "gae"
    config.learning.epochs = 4
    return config

"""The worked example of alignment: PPO against the reward that story_reward has learnt.

    python main.py --config=configs/align/story_ppo.py
    python main.py --config=configs/align/story_ppo.py --config.advantage.kl_coefficient=0 \
        --workdir=runs/story_ppo_free    # what the penalty of KL is for

See configs/align/story_base.py. Two CPU cores: three minutes. The policy learns from the learnt
reward alone: the true one, of weight 0, is only measured, as `reward_gold_reward`. It rises by
0.26 ± 0.05 over that of the SFT model, to 0.88, at 2.3 nats from it; without the penalty of KL the
learnt reward rises on, and the true one falls back to 0.31 (five seeds; docs/align.png).
"""

from lm.configs.align import ppo


def get_config():
    config = ppo.get_config()
    config.init_from = "runs/story_sft"
    config.data.block_size = 80
    config.rollout.prompts = 64
    config.rollout.max_new_tokens = 20
    config.rewards.functions = (
        "runs/story_reward",
        "lm.data.storyworld.instructions:gold_reward",
    )
    config.rewards.weights = (1.0, 0.0)
    config.learning.critic_from = "runs/story_reward"
    config.learning.epochs = 2
    config.optimizer.learning_rate = 2e-4

    config.train.steps = 60
    config.train.eval_every = 20
    config.checkpoint.every = 20
    return config

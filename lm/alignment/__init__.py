"""Rollouts and rewards to a better policy: PPO, GRPO and their heirs."""

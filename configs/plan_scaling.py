"""Weak scaling on paper: Llama 3 8B and Llama 2 70B on 1 to 4,096 chips of TPU v5p.

    pip install 'jax[tpu]'    # the compiler; no TPU is needed
    python main.py --config=configs/plan_scaling.py

The same work on every chip, for the best mesh that fits: memory, FLOPs, bytes to and from HBM and
from other chips, a step's time and efficiency, printed and written to docs/weak_scaling.md. With
--config.scaling.compiled='(64,256)' the step is compiled at those sizes as well, a minute or more
each. Two CPU cores: a minute.
"""

from lm.config import defaults
from lm.jobs.plan import PlanJob


def get_config():
    config = defaults(PlanJob)
    config.scaling.presets = ("llama3_8b", "llama2_70b")
    config.scaling.rows = (2, 4)
    config.scaling.block_size = (8192, 4096)
    config.scaling.remat = ("full", "qkv")
    config.train.compiler = "tuned"  # what the figures of that page are with
    config.scaling.page = "docs/weak_scaling.md"
    return config

r"""A model learns which of two replies is preferred, without a reward model: DPO, and its kin.

    python main.py --config=configs/align/dpo.py --config.init_from=runs/sft --workdir=runs/dpo

    # your own: lines of {"prompt": …, "chosen": …, "rejected": …}, texts or messages
    python main.py --config=configs/align/dpo.py --config.init_from=DIR \
        --config.data.path=pairs.jsonl --workdir=runs/dpo

The model that it starts from is also what it is compared with, frozen. So the first loss is
ln 2 = 0.693, whatever the model (in bfloat16, but for the rounding of two passes); `accuracy` is
the share of pairs whose chosen reply has gained more probability than the rejected one, `margin` by
how much, times beta. With adapters (--config.adapter.kind=lora) the reference is the adapters that
it starts from, or none.

    --config.objective.preference.loss=ipo      # robust, hinge; simpo needs no reference
    --config.objective.name=orpo                # no reference: in place of SFT, with its rate
    --config.objective.name=kto                 # also {"prompt": …, "completion": …, "label": true}
    # a teacher's distributions, on any conversations; on-policy, on those that the student wrote
    # (configs/align/best_of_n.py with --config.rollout.samples=1)
    --config.objective.name=distillation --config.objective.distillation.teacher=DIR

Hardware: what the model needs, and its parameters once more.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.init_from = "runs/sft"
    config.data.path = "storyworld_preferences"
    config.data.num_documents = 6_000
    config.data.validation_fraction = 0.05
    config.data.packing = "none"  # a reply a row
    config.data.block_size = 160
    config.data.batch_size = 32  # pairs
    config.data.even_batch = True  # more where more devices share it
    config.model.dropout = 0.0  # or the log-ratios of two models that are the same are not 0

    config.objective.name = "dpo"
    config.objective.preference.beta = 0.1  # lower: farther from the reference

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 10
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0

    config.train.steps = 150
    config.train.log_every = 10
    config.train.eval_every = 50
    config.checkpoint.every = 50
    return config

r"""Learning, seen from inside: gradients, updates, scales, Adam's steps, dropout, the landscape.

    python main.py --config=configs/quickstart.py --config.optimizer.name=adamw \
        --config.optimizer.learning_rate=3e-3 --config.train.steps=900 \
        --config.checkpoint.every=60 --config.checkpoint.keep=20 --workdir=runs/watched
    python main.py --config=configs/interpret/learning.py --config.init_from=runs/watched

    # one part alone: deep stacks with and without residual connections and norms
    ... --config.parts=depth

The page, runs/learning/learning.html, needs no network; learning.json has its numbers.
Parts `depth` and `dropout` train small models beside the run, on its documents; depth.png is the
former's picture (docs/learning.png, in fewer colours). Two CPU cores: 3 minutes.
--config.path=storyworld reads stories that no run has seen, which is faster than to look for those
that this one held out.

Expect, of 12 layers before training, gradients at the first layer 4 times those at the last with
residual connections and norms; 4 million times without norms, and 1/2,000 with neither, where twice
the weights explode and half of them vanish below what float32 has. After 100 steps their losses are
3.0, and 5.3 with norms alone; without norms no model has learnt. Where 30 % of its units are cut, a
model trained with dropout loses 0.2 nats, and one without it 1.2.
"""

from lm.config import defaults
from lm.jobs.learning import LearningJob


def get_config():
    return defaults(LearningJob)

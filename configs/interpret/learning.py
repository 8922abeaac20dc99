r"""Learning, seen from inside: gradients, updates, scales, Adam's steps, dropout, the landscape.

    python main.py --config=configs/quickstart.py --config.optimizer.name=adamw \
        --config.optimizer.learning_rate=3e-3 --config.train.steps=900 \
        --config.checkpoint.every=60 --config.checkpoint.keep=20 --workdir=runs/watched
    python main.py --config=configs/interpret/learning.py --config.init_from=runs/watched

    # one part alone: deep stacks with and without residual connections and norms
    ... --config.parts=depth

The page, learning.html in the run directory, needs no network; learning.json has its numbers.
Parts `depth` and `dropout` train small models beside the run, on its documents; depth.png is the
former's picture (docs/learning.png).
"""

from lm.config import defaults
from lm.jobs.learning import LearningJob


def get_config():
    return defaults(LearningJob)

r"""Which jumps survive a smooth metric: every checkpoint of several runs, in one picture.

    python main.py --config=configs/emergence/addition.py --workdir=runs/addition
    python main.py --config=configs/emergence/reversal.py --workdir=runs/reversal
    python main.py --config=configs/emergence/curves.py --config.runs=runs/addition \
        --config.runs=runs/reversal --workdir=runs/emergence

Runs on the same task are compared by size: train configs/emergence/addition.py with other widths.

The picture, emergence.png (docs/emergence.png has widths 128, 64 and 32, and the reversal curse),
and emergence.json hold the same answers counted in several ways. The exact match of addition goes
from 10 % to 90 % within 36 of 150 steps. So does the fourth power of the share of right digits,
which is never more than 0.07 from it; but the share itself goes only 51 % of its way in these
steps, and the log-likelihood 44 %: the jump is the metric's (Schaeffer et al. 2023). About a second
a checkpoint.
"""

from lm.config import defaults
from lm.jobs.emergence import EmergenceJob


def get_config():
    return defaults(EmergenceJob)

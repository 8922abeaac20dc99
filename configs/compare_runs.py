r"""Several runs side by side: one picture of their losses, one table of how they ended.

    python main.py --config=compare_runs --config.runs=runs/quickstart --config.runs=runs/wide

    # every run below a directory (all of runs/ unless told otherwise); against tokens, for batches
    # of different sizes
    python main.py --config=compare_runs --config.runs=runs/sweep --config.against=tokens

The picture is `losses.png` in the run directory, runs/compare_runs by default. Seconds. What models
can and cannot do is compared by configs/compare.py.
"""

from lm.config import defaults
from lm.jobs.compare_runs import CompareRunsJob


def get_config():
    return defaults(CompareRunsJob)

"""Several models side by side: all that their cards score, and which differences are real.

    python main.py --config=configs/compare.py --config.runs=runs/a --config.runs=runs/b

    # cards that are there already (configs/evaluate.py), such as those that the above leaves
    python main.py --config=configs/compare.py --config.runs=runs/compare/a \\
        --config.runs=runs/compare/b

The first is what the others are compared with. Where two were asked the same, item by item, the
test is paired; p-values are adjusted for all tests that are made. Writes compare.html, which needs
no network, and compare.json: seconds, and five minutes for each run that has no card. Losses in
training are compared by configs/compare_runs.py.
"""

from lm.config import defaults
from lm.jobs.compare import CompareJob


def get_config():
    return defaults(CompareJob)

r"""What rises at once while a model learns, and what only seems to: one picture of several runs.

python main.py --config=configs/evaluate/addition.py --workdir=runs/addition
python main.py --config=configs/evaluate/emergence.py --config.runs=runs/addition
"""

from lm.config import defaults
from lm.jobs.emergence import EmergenceJob


def get_config():
    return defaults(EmergenceJob)

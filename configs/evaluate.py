"""What a model can and cannot do: one page with every score, its interval and what it rests on.

    python main.py --config=configs/evaluate.py --config.init_from=runs/quickstart

    # some suites alone, with settings of their own
    python main.py --config=configs/evaluate.py --config.init_from=runs/quickstart \\
        --config.suites=language --config.language.documents=500

    # tasks of lm-evaluation-harness by name, or files of your own (pip install 'lm[eval]')
    python main.py --config=configs/evaluate.py --config.init_from=runs/quickstart \\
        --config.suites=harness --config.harness.tasks=arc_easy --config.harness.tasks=mine.yaml

Writes card.html, which needs no network, and card.json, whose `model-index` is that of the Hub's
model cards.
"""

from lm.config import defaults
from lm.jobs.evaluate import EvaluateJob


def get_config():
    return defaults(EvaluateJob)

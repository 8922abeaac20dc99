"""What a model can and cannot do: one page with every score, its interval and what it rests on.

    python main.py --config=configs/evaluate.py --config.init_from=runs/quickstart

    # some suites alone, with settings of their own
    python main.py --config=configs/evaluate.py --config.init_from=runs/quickstart \\
        --config.suites=language --config.language.documents=500

    # tasks of lm-evaluation-harness by name, or files of your own (pip install 'lm[eval]')
    python main.py --config=configs/evaluate.py --config.init_from=runs/quickstart \\
        --config.suites=harness --config.harness.tasks=arc_easy --config.harness.tasks=mine.yaml

    # an encoder: associations of its vectors, and CrowS-Pairs by masking one token at a time
    python main.py --config=configs/evaluate.py --config.init_from=runs/bert_tiny \\
        --config.bias.crows=crows_pairs_anonymized.csv

Two CPU cores: three minutes for the quickstart's model. It has 0.16 bits a byte of stories it has
not seen; it finds a true statement about a story likelier than an invented one 71 % of the time,
but than one that mixes the story up only 53 %; it keeps no key, adds no numbers, and loses 1.3 nats
a token beyond its 256.

Writes card.html, which needs no network, and card.json, whose `model-index` is that of the Hub's
model cards.
"""

from lm.config import defaults
from lm.jobs.evaluate import EvaluateJob


def get_config():
    return defaults(EvaluateJob)

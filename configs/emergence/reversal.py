r"""The reversal curse: who has learnt that A is B need not know who B is.

    python main.py --config=configs/emergence/reversal.py --workdir=runs/reversal
    python main.py --config=configs/evaluate.py --config.init_from=runs/reversal \
        --config.suites=reasoning

400 pairs of names are learnt one way round, "kado>" and "mibe"; half of them the other way, too,
"mibe<" and "kado"; and the other half is asked that way (Berglund et al. 2023, "The reversal
curse"). 600 lines in all, over and over.

Three quarters of a minute on two CPU cores. After 100 steps every pair is known one way, all 200
are known the other way that were told so, and none of the 200 others is: the right name becomes
less likely while the rest is learnt, from -2.3 to -6.7 nats a character.
"""

from lm.configs.emergence import addition


def get_config():
    config = addition.get_config()
    config.data.path = "reversal"
    config.data.num_documents = 600
    config.data.validation_fraction = 1 / 3
    config.data.block_size = 10

    config.train.steps = 100
    config.train.log_every = 20
    config.train.eval_every = 20
    return config

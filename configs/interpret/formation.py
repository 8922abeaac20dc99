r"""How small models came to what they do: every checkpoint of runs that learn an algorithm.

    python main.py --config=configs/interpret/induction.py --workdir=runs/two_layers
    python main.py --config=configs/interpret/induction.py --config.model.num_layers=1 \
        --workdir=runs/one_layer
    python main.py --config=configs/interpret/grokking.py --workdir=runs/grokking
    python main.py --config=configs/interpret/formation.py --config.runs=runs/two_layers \
        --config.runs=runs/one_layer --config.runs=runs/grokking --workdir=runs/formation

Runs on repeats are drawn together in induction.png: the loss on what was read once already, what
each head of the first run attends to, and which runs only seem to have an induction head. A run on
modular addition is drawn in grokking.png: its accuracy on pairs learnt and held out, its losses
with the key frequencies of its logits alone and without them, and its embedding's frequencies.
formation.json has all the numbers. A second a checkpoint at most.
"""

from lm.config import defaults
from lm.jobs.formation import FormationJob


def get_config():
    return defaults(FormationJob)

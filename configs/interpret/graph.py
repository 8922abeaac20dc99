r"""Why a model predicts what it does: an attribution graph, with a transcoder's features.

    python main.py --config=configs/interpret/graph.py --config.init_from=runs/quickstart \
        --config.transcoder=runs/transcoder --config.prompt="The cat sat on the" \
        --workdir=runs/graph

    # what speaks for one token; nodes that belong together; sums to 1e-12
    python main.py --config=configs/interpret/graph.py --config.init_from=runs/quickstart \
        --config.transcoder=runs/transcoder --config.prompt="The cat sat on the" \
        --config.targets=" mat" --config.supernodes="{'cat': ['0_17_1', '1_4_1']}" \
        --config.float64=True --workdir=runs/graph

Writes graph.html, which needs no network, and graph.json, which circuit-tracer's page and
Neuronpedia read.
"""

from lm.config import defaults
from lm.jobs.graph import GraphJob


def get_config():
    return defaults(GraphJob)

r"""Why a model predicts what it does: an attribution graph, with a transcoder's features.

    python main.py --config=configs/interpret/graph.py --config.init_from=runs/quickstart \
        --config.transcoder=runs/transcoder --workdir=runs/graph \
        --config.prompt="Once upon a time there was a little"

    # what speaks for one token, with sums that hold to 1e-12
    python main.py --config=configs/interpret/graph.py --config.init_from=runs/quickstart \
        --config.transcoder=runs/transcoder --config.prompt="The cat sat on the" \
        --config.targets=" mat" --config.float64=True --workdir=runs/graph

15 seconds of processor time for the quickstart's model. That prompt goes on with " boy" (44 %) or
" girl" (39 %); 800 features are active, 103 nodes and 2,500 edges are left of the graph; features
explain .81 (replacement) and .96 (completeness), even of a transcoder that was trained for 120
steps of 1,024 tokens (docs/attribution_graph.png). Edges add up to the logits to 2e-6, in float64
to 4e-15. At GPT-2's size, with 10 tokens and 3,000 active features of 2,048 a layer, the graph
takes 45 seconds of processor time and 1.8 GB; of a cross-layer transcoder 75 seconds and 2.5 GB.

Writes graph.html, which needs no network, and graph.json, which circuit-tracer's page and
Neuronpedia read. Nodes that belong together are grouped on the page, whose button writes graph.json
again, or by --config.supernodes="{'name': ['0_17_1', '1_4_1']}", of that file's ids.
"""

from lm.config import defaults
from lm.jobs.graph import GraphJob


def get_config():
    return defaults(GraphJob)

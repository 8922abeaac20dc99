r"""The embedding space of a model over its training: neighbours, analogies, shape, maps, bias.

    python main.py --config=configs/quickstart.py --config.checkpoint.every=100 \
        --config.checkpoint.keep=20
    python main.py --config=configs/interpret/embeddings.py --config.init_from=runs/quickstart

    # words of your own, a group in a colour, and analogies
    ... --config.words="king queen prince" --config.words="cat dog" \
        --config.analogies=man:king::woman:queen

Ten seconds on two CPU cores, half a minute with UMAP. runs/embeddings/embeddings.html, the page,
needs no network; embeddings.json beside it has its numbers. Expect most analogies of the stories
to come out, and as many without any analogy: the word nearest to she is he anyway. Maps by UMAP,
beside those by PCA, need pip install -e '.[interpret]'.
"""

from lm.config import defaults
from lm.jobs.embeddings import EmbeddingsJob


def get_config():
    return defaults(EmbeddingsJob)

r"""What a model would say after each of its blocks, and which of its parts say it: one page.

    python main.py --config=configs/interpret/lens.py --config.init_from=runs/quickstart \
        --config.prompt="The cat sat on the" --workdir=runs/lens

    # of two tokens' logits; a Hugging Face directory, with texts of yours for the trained lenses
    python main.py --config=configs/interpret/lens.py --config.init_from=GPT2 \
        --config.prompt="When Mary and John went to the store, John gave a drink to" \
        --config.right=" Mary" --config.wrong=" John" --config.path=texts/

Writes lens.html, which needs no network, lens.json, and the tuned lens, which --config.tuned reads.
"""

from lm.config import defaults
from lm.jobs.lens import LensJob


def get_config():
    return defaults(LensJob)

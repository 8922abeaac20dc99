r"""What a model would say after each of its blocks, and which of its parts say it: one page.

    python main.py --config=configs/interpret/lens.py --config.init_from=runs/quickstart \
        --config.prompt="Anna had a red ball. She gave the ball to Tom. Tom was" --workdir=runs/lens

    # of two tokens' logits; a Hugging Face directory, with texts of yours for the trained lenses
    python main.py --config=configs/interpret/lens.py --config.init_from=GPT2 \
        --config.prompt="When Mary and John went to the store, John gave a drink to" \
        --config.right=" Mary" --config.wrong=" John" --config.path=texts/

About two minutes of one CPU core for the quickstart's model. The Jacobian lens takes as many
backward passes as the model is wide: --config.jacobian_rows=0 leaves it out where that is too many.
Before the last block the logit lens is 0.64 nats a token from the model's prediction, the tuned
lens 0.35, and before the second 2.2 and 1.4; the Jacobian lens, of 16 texts, is further off, 1.2
and 6.9. Of the logit of what comes next, 10.20419, the parts sum to 10.20419: the MLPs add 8.2 and
the heads 2.0.

Writes lens.html, which needs no network, lens.json, and the tuned lens, which --config.tuned reads.
"""

from lm.config import defaults
from lm.jobs.lens import LensJob


def get_config():
    return defaults(LensJob)

r"""One token's tale: from text to the next token, and back, on a page that needs no network.

    python main.py --config=configs/interpret/tale.py --config.init_from=runs/quickstart \
        --config.prompt="The cat sat on the" --workdir=runs/tale

    # another token of the prompt, by its text; any decoder, a Hugging Face directory's too
    python main.py --config=configs/interpret/tale.py --config.init_from=GPT2 \
        --config.prompt="A short history of quantum physics" --config.token=" quantum"

Its id, its row and the rows near to it, its place; whom each head of each layer asked and what it
took; the neurons that wrote most; what the model would have said after each layer, and what it says
at last, term by term; then the gradient, back to the row. Writes tale.html, to be read by eye, by
keyboard (n, p, o) or aloud, and tale.json. Seconds; a GPT-2 of 124M parameters takes about ten.
"""

from lm.config import defaults
from lm.jobs.tale import TaleJob


def get_config():
    return defaults(TaleJob)

r"""What causes an answer: activations, paths and subspaces of a model, patched; one page.

    python main.py --config=configs/interpret/causes.py --config.init_from=runs/quickstart \
        --config.clean="Tom had a ball. Then" --config.corrupt="Anna had a ball. Then" \
        --config.right=" he" --config.wrong=" she" --workdir=runs/causes

Both prompts have as many tokens. Each effect is 1 where the corrupt prompt's answer becomes that of
the clean one. --config.subject=Tom traces where a fact is recalled; --config.interchange.path, a
file of lines, searches a variable and --config.probe reads one linearly: what is found stands by
its controls, random parameters and arbitrary labels, and counts where these stay at chance.

46 s of one CPU core for the quickstart's model. There the name's last token carries all of it (the
stream patched: 1.1 of 1); one head of the last block, 3.2, brings it to the end (1.06; by its way
to the logits alone 0.69; any other head of the last three blocks at most 0.07); and 47 of 479
edges, by EAP, are faithful to 0.98.

Writes causes.html, which needs no network, and causes.json.
"""

from lm.config import defaults
from lm.jobs.causes import CausesJob


def get_config():
    return defaults(CausesJob)

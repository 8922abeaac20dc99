r"""What causes an answer: activations, paths and subspaces of a model, patched; one page.

    python main.py --config=configs/interpret/causes.py --config.init_from=GPT2 \
        --config.clean="When Mary and John went to the store, John gave a drink to" \
        --config.corrupt="When Mary and John went to the store, Mary gave a drink to" \
        --config.right=" Mary" --config.wrong=" John" --workdir=runs/causes

With --config.subject=" Space Needle" it traces where a fact is recalled; with
--config.interchange.path=pairs.jsonl it searches a variable, and with --config.probe=texts.jsonl it
reads one linearly, both with controls that must stay at chance.

Writes causes.html, which needs no network, and causes.json.
"""

from lm.config import defaults
from lm.jobs.causes import CausesJob


def get_config():
    return defaults(CausesJob)

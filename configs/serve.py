"""Serves a trained model to OpenAI clients, and a page to talk to it.

    pip install 'lm[serve]'
    python main.py --config=configs/serve.py    # http://127.0.0.1:8000 in a browser, or:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "The cat sat on the", "max_tokens": 50}'

    # another model; a conversation with one that has no template of its own; for all to reach;
    # keys and values in eight bits, so that memory holds up to four times as many tokens of texts
    python main.py --config=configs/serve.py --config.init_from=runs/NAME
    python main.py --config=configs/serve.py --config.chat_template=chatml
    python main.py --config=configs/serve.py --config.serve.host=0.0.0.0 \\
        --config.serve.api_key_file=keys.txt
    python main.py --config=configs/serve.py --config.engine.cache=int8

/v1/models, /v1/completions, /v1/chat/completions and /v1/embeddings are OpenAI's; /tokenize,
/detokenize, /metrics and more sampling settings are vLLM's; /openapi.json lists them all. On
SIGTERM and Ctrl-C the server takes no more requests, finishes those it has, and ends.
"""

from lm import config
from lm.jobs.serve import ServeJob


def get_config():
    c = config.defaults(ServeJob)
    c.init_from = "runs/quickstart"
    c.chat_template = ""
    c.serve.host = "127.0.0.1"
    c.serve.port = 8000
    c.serve.api_key_file = ""
    c.engine.max_slots = 8
    return c

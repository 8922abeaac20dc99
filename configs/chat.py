"""Talks with a model in the terminal.

    python main.py --config=configs/chat.py --config.init_from=DIR

    # a system prompt; a base model, which was trained on no template and is given one
    python main.py --config=configs/chat.py --config.init_from=DIR --config.system="Be brief."
    python main.py --config=configs/chat.py --config.chat_template=chatml

    # from a script: each line is what the user says, and replies go to standard output
    printf 'Hello!\\nAnd now?\\n' | python main.py --config=configs/chat.py --config.init_from=DIR

The model's own chat template writes the conversation; `chat_template` chooses another: chatml,
llama3, gemma, or a file of Jinja text. Ctrl-C stops a reply, Ctrl-D leaves; /help lists commands. A
message of several lines stands between lines of three quotes. When the conversation outgrows the
model's context, its oldest turns are left out. The time to the first token, the time between tokens
and the tokens per second follow each reply on standard error.
"""

from lm import config
from lm.jobs.chat import ChatJob


def get_config():
    c = config.defaults(ChatJob)
    c.init_from = "runs/quickstart"
    c.chat_template = ""
    c.system = ""
    c.max_new_tokens = 512
    c.temperature = 0.8  # 0: greedy
    c.top_p = 0.95
    return c

"""Continues a prompt with a trained model.

    python main.py --config=configs/generate.py --config.prompt="The cat sat on the"

    # the likeliest continuation; another model; several samples; a prompt from a pipe
    python main.py --config=configs/generate.py --config.prompt="The cat" --config.temperature=0
    python main.py --config=configs/generate.py --config.init_from=runs/NAME
    python main.py --config=configs/generate.py --config.num_samples=4 --config.seed=1
    # the best two of four beams; faster, by a smaller model's guesses or by looking up the text
    python main.py --config=configs/generate.py --config.num_beams=4 --config.num_samples=2
    python main.py --config=configs/generate.py --config.draft=runs/SMALLER
    python main.py --config=configs/generate.py --config.prompt_lookup=4
    echo "Once upon a time" | python main.py --config=configs/generate.py --config.prompt=-

    # many prompts: lines of {"prompt": ...} or {"messages": [...]}, with an "id" and fields of
    # their own, such as "temperature", where they want them; what a kill left is done the next time
    python main.py --config=configs/generate.py --config.batch_file=in.jsonl \\
        --config.output_file=out.jsonl

    # a translator of Hugging Face; of one with many languages, between which
    python main.py --config=configs/generate.py --config.init_from=opus-mt-en-de \\
        --config.num_beams=4 --config.prompt="The cat sat on the mat."
    python main.py --config=configs/generate.py --config.init_from=mbart-large-50 \\
        --config.num_beams=4 --config.prompt="The cat sat on the mat." \\
        --config.source_language=en_XX --config.target_language=ro_RO

An encoder-decoder, such as configs/translate.py trains, reads the prompt as its source, and its
target alone is printed. An encoder cannot generate; see Run.embed and Run.fill of lm.load.

The text goes to standard output as it is drawn; the time to the first token, the time between
tokens and the tokens per second follow on standard error. An empty prompt starts a new document.
Where the text outgrows the model's context, the model reads on with the last of it; of a longer
prompt it reads the last from the start (--config.truncate_prompt=False refuses it).

A batch's texts come in the order in which they are done, each with its id or, where it has none,
the number of its line; `lm/inference/batch.py` tells what is in them. Messages are written by the
model's chat template, or the one that --config.chat_template names.
"""

from lm import config
from lm.jobs.generate import GenerateJob


def get_config():
    c = config.defaults(GenerateJob)
    c.init_from = "runs/quickstart"
    c.prompt = ""
    c.prompt_file = ""
    c.batch_file = ""
    c.output_file = ""
    c.max_new_tokens = 200
    c.temperature = 0.8  # 0: greedy
    c.top_k = None
    c.top_p = 0.95
    c.num_samples = 1
    c.weights = "compute"  # int8: a quarter of the memory, nearly the same probabilities
    c.cache = "compute"  # int8: the same of keys and values, for long texts and many
    return c

r"""A model learns to reply: supervised fine-tuning on conversations, a run's or Hugging Face's.

    python main.py --config=configs/align/sft.py --config.init_from=DIR \
        --config.data.path=chat.jsonl --workdir=runs/NAME

A line of the file is {"messages": [{"role": …, "content": …}, …]}, with "tools" and "tool_calls" if
need be, or {"prompt": …, "response": …}, or {"instruction": …, "input": …, "output": …}; see
`lm/data/conversations.py`. Loss is taken of the assistant's words and of what ends its turns. The
model's own chat template writes conversations; of a model that has none, or to be given another,
--config.chat_template=chatml (llama3, gemma, plain, or a file of Jinja text) stays with the run.

    # adapters alone, of a model rounded to four bits; see configs/finetune.py
    ... --config.adapter.kind=lora --config.adapter.base=nf4 --config.optimizer.learning_rate=1e-3

    # then: talk with it, or serve it
    python main.py --config=configs/chat.py --config.init_from=runs/NAME

Without data.path it reads generated questions about stories; configs/align/story_sft.py is what a
small model needs for these. Hardware: what the model needs. When training ends, samples.txt has
replies to conversations that were held out; with exact_match=N it is counted how many of N last
replies come out to the letter.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.init_from = "runs/story_base"
    config.chat_template = ""  # the model's own

    config.objective.name = "sft"
    config.data.path = "storyworld_instructions"
    config.data.num_documents = 10_000  # of a generated or streamed corpus
    config.data.validation_fraction = 0.02
    config.data.packing = "best_fit"
    config.data.block_size = 256  # at most the model's context
    config.data.long_conversations = "cut"
    config.data.batch_size = 16
    config.data.even_batch = True  # more where more devices share it

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0

    config.train.steps = 300
    config.train.log_every = 10
    config.train.eval_every = 100
    config.checkpoint.every = 100

    config.sample.temperature = 0.0
    config.sample.max_new_tokens = 200
    return config

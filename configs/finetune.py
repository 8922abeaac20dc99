r"""Any model goes on learning, from your own text: a run's, or one of Hugging Face's.

    python main.py --config=configs/finetune.py --config.init_from=DIR --config.data.path=book.txt \
        --workdir=runs/NAME

DIR is a run directory or a Hugging Face directory (config.json, safetensors, tokenizer). The model
is the one found there: architecture, positions, window, norms, constants, tokenizer, and how texts
are framed. So `model` is empty here; what may be set in it changes nothing of that: dropout,
compute_dtype, remat, attention, quantization, and max_length where positions are not learned.

With --config.adapter.kind=lora (or dora) the model is frozen and adapters are trained beside it, a
hundredth of its numbers, which alone are saved; --config.adapter.base=int8 (or nf4) rounds it. They
want a rate some ten times as high: --config.optimizer.learning_rate=3e-4. The run names its base,
and opens as the model with its adapters added in.

For an encoder (BERT) add --config.objective.name=masked; for an encoder-decoder
--config.objective.name=seq2seq with pairs (.tsv), or =span_corruption.

    # then: how it writes, and back to Hugging Face
    python main.py --config=configs/generate.py --config.init_from=runs/NAME --config.prompt=Once
    python main.py --config=configs/convert.py --config.init_from=runs/NAME --config.to=hf \
        --workdir=OUT
    # adapters alone, for PEFT
    ... --config.to=peft --workdir=OUT

Hardware: what the model needs; two CPU cores take about a minute for the quickstart's model
(without init_from, runs/quickstart). Expect step 1 to have the source's own loss on that text, and
the validation loss to fall below it.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.init_from = "runs/quickstart"

    config.data.path = "storyworld"
    config.data.num_documents = 5_000  # of a generated or streamed corpus
    config.data.validation_fraction = 0.05
    config.data.packing = "best_fit"
    config.data.block_size = 256  # at most the model's context
    config.data.batch_size = 8
    config.data.even_batch = True  # more where more devices share it

    # Far below what training from nothing takes, and a warm-up for the optimizer's averages.
    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.01

    config.train.steps = 200
    config.train.log_every = 10
    config.train.eval_every = 100
    config.checkpoint.every = 100
    return config

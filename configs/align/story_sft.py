"""The worked example of alignment: the model of story_base learns to answer questions.

    python main.py --config=configs/align/story_sft.py

See configs/align/story_base.py. Two CPU cores: five minutes. The base gets no answer right; this
gets 85 ± 8 % of those to questions about stories that were held out (five seeds, of 75 to 91), and
errs most where a statement is false: it says "Yes." too often. Half of its examples ask whether an
answer is right, for the reward model starts here, and has to tell.
"""

from lm.configs.align import sft


def get_config():
    config = sft.get_config()
    config.init_from = "runs/story_base"
    config.data.num_documents = 25_000
    config.data.validation_fraction = 0.01
    config.data.batch_size = 8

    # A million parameters that have only read stories have to learn to read questions.
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 50

    config.train.steps = 2000
    config.train.log_every = 100
    config.train.eval_every = 500
    config.checkpoint.every = 500
    return config

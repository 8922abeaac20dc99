"""What a known model is made of and costs, at any size, without allocating a parameter.

    python main.py --config=configs/describe.py --config.preset=gpt2_small
    python main.py --config=configs/describe.py --config.list=True

    # another depth, width or any other field of lm.models.ModelConfig; another context
    python main.py --config=configs/describe.py --config.preset=gpt2_xl --config.model.num_layers=96
    python main.py --config=configs/describe.py --config.preset=gemma3_4b --config.context=8192

The first line of the former is `parameters: 124,439,808`. Below it every parameter with its shape
and logical axes, then the size of a checkpoint, FLOPs a token in training and inference, the KV
cache and each optimizer's memory. Two CPU cores: three seconds, for 540 billion parameters as well.
"""

from lm.config import defaults
from lm.jobs.describe import DescribeJob


def get_config():
    config = defaults(DescribeJob)
    config.preset = "gpt2_small"
    return config

r"""Hugging Face weights in and out.

    # a Hugging Face directory, or a name on the hub (pip install 'lm[hub]') → a run directory
    python main.py --config=configs/convert.py --config.init_from=DIR --workdir=runs/NAME
    python main.py --config=configs/convert.py --config.init_from=gpt2 --workdir=runs/gpt2
    python main.py --config=configs/generate.py --config.init_from=runs/gpt2 --config.prompt=Hello

    # and back, for transformers' AutoModel.from_pretrained and AutoTokenizer
    python main.py --config=configs/convert.py --config.init_from=runs/gpt2 --config.to=hf \
        --workdir=OUT

    # adapters alone, for peft.PeftModel.from_pretrained; to=hf adds them into their base
    python main.py --config=configs/convert.py --config.init_from=runs/lora --config.to=peft \
        --workdir=OUT

    # in 16 bits; on eight devices; leaving out a tensor the family does not know
    ... --config.dtype=bfloat16
    ... --config.mesh.fsdp=8
    ... --config.ignore=cls.seq_relationship

One tensor is read or written at a time. Whatever is not understood exactly, a tensor or a field of
config.json, is an error that names it. The new directory appears when it is complete.
"""

from lm import config
from lm.jobs.convert import ConvertJob


def get_config():
    c = config.defaults(ConvertJob)
    c.init_from = ""
    c.to = "run"  # or hf, or peft
    c.dtype = "float32"
    c.mesh.data = 1
    c.mesh.fsdp = -1  # over all devices
    return c

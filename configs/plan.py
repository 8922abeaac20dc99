"""Does a run fit, and how fast will it be? Compiled for a TPU that this machine has not got.

    pip install 'jax[tpu]'    # the compiler; no TPU is needed
    python main.py --config=configs/plan.py
    python main.py --config=configs/plan.py --config.search.meshes=4     # try meshes, rank them
    python main.py --config=configs/plan.py --config.decode.enabled=True # prefill and decoding, too

    # no training step, but what the engine runs: tokens a second at three batch sizes, beside what
    # the bandwidth of HBM allows
    python main.py --config=configs/plan.py --config.preset=llama2_70b \
        --config.topology=v5e:4x4 --config.data.block_size=2048 --config.decode.only=True \
        --config.decode.weights=int8 --config.decode.batch_sizes=1,8,64

    python main.py --config=configs/align/plan_ppo.py    # an iteration of PPO

    # another model (lm.models.presets), another TPU: v4, v5e, v5p, v6e, tpu7x; another batch
    python main.py --config=configs/plan.py --config.preset=llama2_70b \\
        --config.topology=v5p:4x8x8 --config.data.block_size=4096 --config.data.rows_per_device=4 \\
        --config.model.remat=qkv

    # a mesh by hand; fake devices of this machine's CPU, where there is no libtpu
    python main.py --config=configs/plan.py --config.mesh.fsdp=16 --config.mesh.tensor=4
    python main.py --config=configs/plan.py --config.preset=gpt2_small --config.topology=cpu:8 \\
        --config.data.block_size=1024

To plan a training config, give this file its sections: `model`, `objective`, `optimizer`, `train`,
`mesh`, `strategy` and `zero` mean the same here, and of `data` the sizes.

Printed: memory of a device by kind against its HBM, and what to change where it does not fit;
FLOPs, bytes to and from HBM and from other devices, beside what is needed at least; every kind of
collective with its mesh axes; times and MFU. runs/plan/plan.json has it all in numbers. Nothing of
it is measured.

Llama 3 8B on 64 chips, 2 sequences of 8,192 tokens each: 11.4 GiB of 95.7, of which 1.4 GiB are
parameters and optimizer state; 2.73 s a step, an MFU of 67 %, with --config.train.compiler=tuned
(`lm.parallel.compiler.options`, which no TPU has run yet). Two CPU cores: a minute a mesh.

Llama 2 70B in int8 on 16 chips of v5e, 8 rows and 2,048 tokens each, draws at most 1,386 tokens/s
by the bandwidth of HBM, 922 by the roofline, 434 by the compiler's cycles.
"""

from lm.config import defaults
from lm.jobs.plan import PlanJob


def get_config():
    config = defaults(PlanJob)
    config.preset = "llama3_8b"
    config.topology = "v5p:4x4x4"
    config.data.block_size = 8192
    config.data.rows_per_device = 2
    config.model.remat = "full"
    config.strategy = "zero3"
    return config

"""How fast a model reads and writes here: prefill, decode, and the share of memory's bandwidth.

    python benchmarks/infer.py --model=runs/quickstart                 # a run or Hugging Face's
    python benchmarks/infer.py --model=gpt2_small --rows=8 --weights=int8   # a preset, untrained

Prefill is the prompt's tokens over the time to the first token; decode, the tokens after it over
their time; both medians of several generations, compiling apart. The share is the bytes of all
matrices, read once a step, over what a sum over an array reads in the same time (on the CPU). The
last line is JSON.
"""

import argparse
import json
import pathlib
import statistics

import jax
import numpy as np
from decode_cpu import read_bandwidth, read_bytes

import lm
from lm.inference import Framing, Generator, SamplingConfig
from lm.models import init, param_specs, skeleton
from lm.models.presets import preset


def opened(name: str, weights: str) -> Generator:
    """The model of a directory, or of a preset with random parameters."""
    if pathlib.Path(name).expanduser().is_dir():
        run = lm.load(name)
        model, params = run.skeleton, run.params
    else:
        model = skeleton(preset(name))
        params = init(param_specs(model), jax.random.key(0))
    return Generator(model, params, Framing(end_of_text=()), weights=weights)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a directory, or the name of a preset")
    parser.add_argument("--weights", choices=["compute", "int8"], default="compute")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="drawn after it")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    generator = opened(arguments.model, arguments.weights)
    rng, size = np.random.default_rng(0), (arguments.rows, arguments.prompt)
    sampling = SamplingConfig(max_new_tokens=arguments.tokens + 1, temperature=0.0)
    array, prefill, decode, share = np.ones(2**26, np.float32), [], [], []
    for number in range(arguments.rounds + 1):
        bandwidth = read_bandwidth(array)
        # Other prompts every time: what was read before would not be read again.
        prompts = rng.integers(0, generator.vocab_size, size).tolist()
        generation = generator.generate(prompts, sampling)
        for _ in generation:
            pass
        if not number:
            continue  # it compiled
        timing = generation.timing
        step = statistics.fmean(timing.token_seconds)
        prefill.append(arguments.rows * arguments.prompt / timing.first_token_seconds)
        decode.append(arguments.rows / step)
        share.append(read_bytes(generator.params) / step / bandwidth)
    found = {
        "model": arguments.model,
        "weights": arguments.weights,
        "rows": arguments.rows,
        "device": jax.devices()[0].device_kind,
        "prefill_tokens_per_second": round(statistics.median(prefill), 1),
        "decode_tokens_per_second": round(statistics.median(decode), 1),
    }
    if jax.default_backend() == "cpu":
        found["share_of_bandwidth"] = round(statistics.median(share), 3)
    for name, value in found.items():
        print(f"{name:28}{value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

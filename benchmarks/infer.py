"""How fast a model reads and writes here: prefill, decode, and the share of memory's bandwidth.

    python benchmarks/infer.py --model=runs/quickstart                 # a run or Hugging Face's
    python benchmarks/infer.py --model=gpt2_small --rows=8 --weights=int8   # a preset, untrained
    python benchmarks/infer.py --model=runs/quickstart --rows=64 --samples=4   # as alignment draws

Prefill is the prompt's tokens over the time to the first token; decode, the tokens after it over
their time; both medians of several generations, compiling apart. The share is the bytes of all
matrices, read once a step, over what a sum over an array reads in the same time (on the CPU). With
--samples of each prompt, what alignment's rollouts take instead, beside the same texts drawn by a
generator: their bits depend on no company, and samples share their prompt's pages, which are small.
The last line is JSON.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import jax
import numpy as np
from decode_cpu import read_bandwidth, read_bytes

import lm
from lm.alignment.rollouts import RolloutConfig, Sampler
from lm.inference import Framing, Generator, SamplingConfig
from lm.models import init, param_specs, skeleton
from lm.models.presets import preset


def opened(name: str) -> tuple:
    """The model of a directory, or of a preset with random parameters."""
    if pathlib.Path(name).expanduser().is_dir():
        run = lm.load(name)
        model, params = run.skeleton, run.params
    else:
        model = skeleton(preset(name))
        params = init(param_specs(model), jax.random.key(0))
    return model, params, Framing(end_of_text=())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a directory, or the name of a preset")
    parser.add_argument("--weights", choices=["compute", "int8"], default="compute")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="drawn after it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=0, help="of a prompt: time rollouts")
    arguments = parser.parse_args()
    parts = opened(arguments.model)
    generator = Generator(*parts, weights=arguments.weights)
    if arguments.samples:
        return report(arguments, rollouts(parts, generator, arguments))
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
        "prefill_tokens_per_second": round(statistics.median(prefill), 1),
        "decode_tokens_per_second": round(statistics.median(decode), 1),
    }
    if jax.default_backend() == "cpu":
        found["share_of_bandwidth"] = round(statistics.median(share), 3)
    report(arguments, found)


def rollouts(parts: tuple, generator: Generator, given: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of `Sampler`, of a generator, and how many times as long the former takes."""
    each, tokens = given.samples, given.tokens
    config = RolloutConfig(prompts=given.rows // each, samples=each, max_new_tokens=tokens)
    sizes = None, config, given.prompt + tokens
    sampler = Sampler(*parts, *sizes)
    sampling = dataclasses.replace(config.sampling(), num_samples=each)
    rng, taken = np.random.default_rng(0), {"rollout": [], "generator": []}
    for number in range(given.rounds + 1):
        size = (config.prompts, given.prompt)
        prompts = rng.integers(0, generator.vocab_size, size).tolist()
        for name, seconds in taken.items():
            began = time.perf_counter()
            if name == "rollout":
                sampler(parts[1], prompts, number)
            else:
                for _ in generator.generate(prompts, sampling, number):
                    pass
            if number:  # else it compiled
                seconds.append(time.perf_counter() - began)
    drawn, medians = config.responses * tokens, map(statistics.median, taken.values())
    found = {f"{name}_tokens_per_second": drawn / s for name, s in zip(taken, medians)}
    ratio = statistics.median(a / b for a, b in zip(*taken.values()))
    return {name: round(x, 1) for name, x in found.items()} | {"times_as_long": round(ratio, 3)}


def report(given: argparse.Namespace, figures: dict[str, float]) -> None:
    """A line for each figure, and all of them as JSON."""
    found = {"model": given.model, "weights": given.weights, "rows": given.rows}
    found |= {"device": jax.devices()[0].device_kind, **figures}
    for name, value in found.items():
        print(f"{name:28}{value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

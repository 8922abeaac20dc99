"""Decoding speed on the CPU, side by side with transformers and llama.cpp in one run.

    pip install -e '.[parity]' gguf
    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz
    python benchmarks/decode_cpu.py --llama=package/bins/linux-x64       # GPT-2 124M, 1 and 8 rows
    python benchmarks/decode_cpu.py --shape=small                        # nanoGPT's CPU shape
    python benchmarks/decode_cpu.py --ours --prompt=900 --rows=8         # keys and values in int8

All draw greedily after prompts, from models of the same shape with random weights. They take turns
of a few tokens in one process, so that a machine whose speed drifts slows all of them; quote the
ratios, which are medians of ratios within a turn. The share of bandwidth is the bytes of all
matrices a token must read, per second, over the bytes per second that a sum over an array reads in
the same turn. Without `--llama`, llama.cpp is left out. The last line is JSON.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import tempfile
import threading
import time

import numpy as np

SHAPES = {
    "gpt2": dict(num_layers=12, num_heads=12, width=768, vocab_size=50257, max_length=1024),
    "small": dict(num_layers=4, num_heads=4, width=128, vocab_size=65, max_length=256),
}


def prompts(rows: int, length: int, vocab_size: int) -> np.ndarray:
    """One for each row, and no two alike: what is read of one is of no use to another."""
    return (np.arange(length, dtype=np.int32) + np.arange(rows)[:, None]) % vocab_size


def read_bandwidth(array: np.ndarray) -> float:
    """Bytes a second that as many threads as cores read together."""
    parts = np.array_split(array, len(os.sched_getaffinity(0)))
    threads = [threading.Thread(target=np.max, args=(part,)) for part in parts]
    before = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return array.nbytes / (time.perf_counter() - before)


def read_bytes(params: dict) -> int:
    """Of the matrices that every step reads whole."""
    import jax

    looked_up = {"embedding.tokens"} if "head" in params else set()
    return sum(
        x.nbytes
        for name, value in params.items()
        for x in jax.tree.leaves(value)
        if x.ndim >= 2 and "positions" not in name and name not in looked_up
    )


class Ours:
    """`lm.inference`: a turn is a dispatch of decode."""

    def __init__(self, shape: dict, prompts_BT: np.ndarray, tokens: int, **kinds: str):
        import jax

        from lm.inference import Framing, Generator, SamplingConfig
        from lm.models import ModelConfig, init, param_specs, skeleton

        model = skeleton(ModelConfig(**shape, positions="learned", norm="layernorm", bias=True))
        params = init(param_specs(model), jax.random.key(0))
        framing = Framing(end_of_text=())
        generator = Generator(model, params, framing, chunk=tokens, **kinds)
        self.bytes = read_bytes(generator.params)
        most = shape["max_length"] - prompts_BT.shape[1]
        sampling = SamplingConfig(max_new_tokens=most, temperature=0.0)
        self._start = lambda: iter(generator.generate(prompts_BT.tolist(), sampling))
        self._steps, self.tokens = iter(()), tokens

    def prepare(self) -> None:
        """Reads the prompt again; the first token and the first dispatch are not timed."""
        self._steps = self._start()
        next(self._steps), next(self._steps)

    def turn(self) -> None:
        """Draws `tokens` tokens a row."""
        next(self._steps)


class Transformers:
    """`transformers`' generate; a turn goes on from a cache that holds the prompt."""

    def __init__(self, shape: dict, prompts_BT: np.ndarray, tokens: int, dtype: str):
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        config = transformers.GPT2Config(
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            n_embd=shape["width"],
            vocab_size=shape["vocab_size"],
            n_positions=shape["max_length"],
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = transformers.GPT2LMHeadModel(config).to(getattr(torch, dtype)).eval()
        self.prompt = torch.from_numpy(prompts_BT).long()
        self.tokens = tokens

    def _generate(self, ids, tokens: int, **more):
        return self.model.generate(
            ids,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            **more,
        )

    def prepare(self) -> None:
        """Reads the prompt again, and draws a token."""
        self._read = self._generate(self.prompt, 1)

    def turn(self) -> None:
        """Draws `tokens` tokens a row."""
        read = self._read
        self._generate(read.sequences, self.tokens, cache=read.past_key_values)


class _Batch(ctypes.Structure):
    """llama.cpp's `llama_batch`."""

    _fields_ = [("n_tokens", ctypes.c_int32)] + [
        (name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")
    ]


class _Opaque(ctypes.Structure):
    """Parameters of llama.cpp, whose first fields are all that is known here."""

    _fields_ = [("head", ctypes.c_uint32 * 8), ("rest", ctypes.c_uint8 * 480)]


def write_gguf(path: pathlib.Path, shape: dict) -> None:
    """A random float32 GPT-2 without a vocabulary, as llama.cpp reads it."""
    import gguf

    L, D, V, T = (shape[k] for k in ("num_layers", "width", "vocab_size", "max_length"))
    rng = np.random.default_rng(0)

    def normal(*size):
        return rng.standard_normal(size, np.float32) * np.float32(0.02)

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(T)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(4 * D)
    writer.add_block_count(L)
    writer.add_head_count(shape["num_heads"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", normal(V, D))
    writer.add_tensor("position_embd.weight", normal(T, D))
    for name in ("output_norm", *(f"blk.{i}.{n}_norm" for i in range(L) for n in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(D, np.float32))
    sizes = {"attn_qkv": (3 * D, D), "attn_output": (D, D), "ffn_up": (4 * D, D)}
    for i in range(L):
        for name, size in {**sizes, "ffn_down": (D, 4 * D)}.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", normal(*size))
            writer.add_tensor(f"blk.{i}.{name}.bias", np.zeros(size[0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """llama.cpp by ctypes; a turn is `tokens` calls of `llama_decode`, and numpy's argmax."""

    def __init__(
        self, folder: str, file: pathlib.Path, shape: dict, prompts_BT: np.ndarray, tokens: int
    ):
        places = pathlib.Path(folder).resolve()
        for name in ("libggml-base.so", *sorted(p.name for p in places.glob("libggml.*so*"))):
            ctypes.CDLL(str(places / name), mode=ctypes.RTLD_GLOBAL)
        ggml = ctypes.CDLL(str(next(places.glob("libggml.*so*"))))
        self.library = library = ctypes.CDLL(str(next(places.glob("libllama.*so*"))))
        quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._quiet = quiet(lambda *_: None)
        library.llama_log_set(self._quiet, None)
        ggml.ggml_backend_load_all_from_path(str(places).encode())
        library.llama_backend_init()
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(library, name).restype = _Opaque
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
            getattr(library, name).restype = ctypes.c_void_p
        library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        model = library.llama_model_load_from_file(
            str(file).encode(), library.llama_model_default_params()
        )
        chosen = library.llama_context_default_params()
        # n_ctx, n_batch, n_ubatch, n_seq_max
        rows, length = prompts_BT.shape
        chosen.head[0:4] = [shape["max_length"] * rows, max(512, rows * length), 512, rows]
        self.context = ctypes.c_void_p(
            library.llama_init_from_model(ctypes.c_void_p(model), chosen)
        )
        cores = len(os.sched_getaffinity(0))
        library.llama_set_n_threads(self.context, cores, cores)
        library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
        self.prompts_BT, self.rows, self.tokens = prompts_BT, rows, tokens
        self.vocab = shape["vocab_size"]
        self.drawn, self.position = np.full(rows, 1, np.int32), 0

    def _extend(self, tokens_BT: np.ndarray) -> None:
        """Reads tokens of every row and draws the next."""
        rows, length = tokens_BT.shape
        ids = np.ascontiguousarray(tokens_BT, np.int32).ravel()
        positions = np.tile(np.arange(length, dtype=np.int32) + self.position, rows)
        count = np.ones(ids.size, np.int32)
        row_of = np.repeat(np.arange(rows, dtype=np.int32), length)
        pointers = row_of.ctypes.data + 4 * np.arange(ids.size, dtype=np.uint64)
        wanted = np.zeros((rows, length), np.int8)
        wanted[:, -1] = 1
        batch = _Batch(
            ids.size,
            ids.ctypes.data,
            None,
            *(x.ctypes.data for x in (positions, count, pointers, wanted)),
        )
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        for row in range(rows):
            place = (row + 1) * length - 1
            logits = self.library.llama_get_logits_ith(self.context, place)
            self.drawn[row] = np.ctypeslib.as_array(logits, (self.vocab,)).argmax()
        self.position += length

    def prepare(self) -> None:
        """Reads the prompt again."""
        memory = self.library.llama_get_memory(self.context)
        self.library.llama_memory_clear(ctypes.c_void_p(memory), True)
        self.position = 0
        self._extend(self.prompts_BT)

    def turn(self) -> None:
        """Draws `tokens` tokens a row."""
        for _ in range(self.tokens):
            self._extend(self.drawn[:, None])


def compare(peers: dict, rows: int, tokens: int, rounds: int, array: np.ndarray) -> dict:
    """Tokens a second of every peer, in turns; ratios and shares are medians over the turns."""
    for peer in peers.values():
        peer.prepare(), peer.turn()
    seconds, bandwidth = {name: [] for name in peers}, []
    for _ in range(rounds):
        bandwidth.append(read_bandwidth(array))
        for name, peer in peers.items():
            peer.prepare()
            before = time.perf_counter()
            peer.turn()
            seconds[name].append(time.perf_counter() - before)
    ours, found = seconds["ours"], {}
    for name, times in seconds.items():
        found[name] = {"tokens_per_second": round(rows * tokens / statistics.median(times), 1)}
        found[name]["ours_over_it"] = round(
            statistics.median(t / mine for t, mine in zip(times, ours)), 2
        )
        if bytes_read := getattr(peers[name], "bytes", None):
            shares = [bytes_read * tokens / t / b for t, b in zip(times, bandwidth)]
            found[name]["share_of_bandwidth"] = round(statistics.median(shares), 2)
        print(f"{rows} row(s)  {name:24}", *(f"{k}={v}" for k, v in found[name].items()))
    found["read_gb_per_second"] = round(statistics.median(bandwidth) / 1e9, 1)
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=8, help="a row draws in a turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a row's prompt")
    parser.add_argument("--ours", action="store_true", help="leave other libraries out")
    parser.add_argument("--llama", default="", help="folder of libllama and libggml")
    arguments = parser.parse_args()
    shape, tokens = SHAPES[arguments.shape], arguments.tokens
    array, found = np.ones(2**26, np.float32), {"shape": arguments.shape}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "gpt2.gguf"
        if arguments.llama:
            write_gguf(file, shape)
        for rows in arguments.rows:
            asked = prompts(rows, arguments.prompt, shape["vocab_size"]), tokens
            peers = {
                "ours": Ours(shape, *asked),
                "ours int8": Ours(shape, *asked, weights="int8"),
                "ours int8 cache": Ours(shape, *asked, cache="int8"),
            }
            for dtype in () if arguments.ours else ("float32", "bfloat16"):
                peers[f"transformers {dtype}"] = Transformers(shape, *asked, dtype)
            if arguments.llama:
                peers["llama.cpp float32"] = Llama(arguments.llama, file, shape, *asked)
            found[f"{rows} rows"] = compare(peers, rows, tokens, arguments.rounds, array)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

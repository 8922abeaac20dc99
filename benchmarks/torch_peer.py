"""The peer: Hugging Face's GPT-2 and Llama trained by PyTorch, as one would write it today.

SDPA attention, fused AdamW, clipping, bfloat16 autocast over float32 parameters, and torch.compile
where it is asked for. PyTorch is imported when it is needed.
"""

import importlib.util
import statistics
import time


def sizes(config, length, rows):
    """What `stepper` needs to know of an `lm.models.ModelConfig`."""
    return dict(
        family="llama" if config.positions == "rotary" else "gpt2",
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.kv_heads,
        width=config.width,
        mlp_width=config.feed_forward,
        vocab=config.vocab_size,
        length=length,
        batch=rows,
    )


def accelerator():
    """The device that an installed PyTorch can train on besides the CPU; None if there is none."""
    if importlib.util.find_spec("torch") is None or not importlib.util.find_spec("transformers"):
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def build(shape):
    """The untrained model of this shape, without dropout."""
    import transformers

    ends = dict(bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation="sdpa")
    if shape.get("family", "gpt2") == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            hidden_size=shape["width"],
            intermediate_size=shape["mlp_width"],
            vocab_size=shape["vocab"],
            max_position_embeddings=shape["length"],
            tie_word_embeddings=True,
            **ends,
        )
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["width"],
        vocab_size=shape["vocab"],
        n_positions=shape["length"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ends,
    )
    return transformers.GPT2LMHeadModel(config)


def stepper(shape, device="cpu", bfloat16=True, compiled=False):
    """A function that runs so many optimizer steps on random tokens."""
    import torch

    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX's default is
    model = build(shape).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    parameters = list(model.parameters())
    tokens = torch.randint(0, shape["vocab"], (shape["batch"], shape["length"]), device=device)
    forward = torch.compile(model) if compiled else model

    def run(steps):
        for _ in range(steps):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16):
                loss = forward(tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return run


def measure(shape, device, compiled):
    """Seconds of a training step, and the most bytes that were allocated.

    On a CPU it runs a few steps, to see that they run, and counts no bytes.

    Raises:
      RuntimeError: among others, of running out of memory.
    """
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = stepper(shape, device, compiled=compiled)
    times = []
    for count in (3, 2, 0, 0, 0, 0) if device == "cuda" else (1, 1, 1):
        count = count or max(1, min(15, int(2.0 / times[1])))
        began = time.perf_counter()
        run(count)
        wait()
        times.append((time.perf_counter() - began) / count)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return statistics.median(times[2:]), memory

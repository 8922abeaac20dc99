"""What a model is: every choice of architecture, with its default and its allowed values."""

from __future__ import annotations

import dataclasses
import math

from lm.config import check, check_choice

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")
GATED = ("swiglu", "geglu")
NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "sinusoidal", "rotary", "none")
INITIALIZERS = ("gpt2", "normal", "scaled_zero", "xavier", "lecun")
REMAT = ("none", "full", "dots", "projections")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("auto", "xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer (Vaswani et al. 2017; Radford et al. 2019)."""

    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: one per head; 1: multi-query; between: grouped-query
    width: int = 128
    head_dim: int | None = None  # None: width / num_heads
    mlp_width: int | None = None  # None: 4 × width, or 8/3 × width when gated, to a multiple of 64
    vocab_size: int = 0  # 0: the tokenizer's
    max_length: int = 0  # context in tokens; 0: data.block_size
    positions: str = "rotary"  # learned | sinusoidal | rotary | none
    rotary_base: float = 10_000.0
    norm: str = "rmsnorm"  # layernorm | rmsnorm
    norm_position: str = "pre"  # pre (GPT-2) | post (2017)
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"  # gelu | gelu_tanh | relu | silu | swiglu | geglu
    bias: bool = False  # biases in projections and in LayerNorm
    tie_embeddings: bool = True  # the output head is the token embedding
    dropout: float = 0.0
    initializer: str = "gpt2"  # gpt2 | normal | scaled_zero | xavier | lecun
    initializer_std: float = 0.02
    compute_dtype: str = "auto"  # auto: bfloat16 where the platform is fast at it
    attention: str = "auto"  # auto | xla | cudnn
    remat: str = "none"  # none | dots | projections | full: how much is recomputed backwards
    scan_layers: bool | None = None  # None: scan, but for up to 12 layers on a CPU

    def validate(self, prefix: str = "config.model") -> None:
        """Raises ConfigError on the first impossible field."""
        for name in ("num_layers", "num_heads", "width"):
            check(
                getattr(self, name) >= 1,
                f"{prefix}.{name}={getattr(self, name)} must be at least 1",
            )
        for name in ("norm_epsilon", "rotary_base", "initializer_std"):
            value = getattr(self, name)
            check(value > 0, f"{prefix}.{name}={value} must be positive")
        for name in ("vocab_size", "max_length"):
            check(
                getattr(self, name) >= 0,
                f"{prefix}.{name}={getattr(self, name)} must be positive, or 0 to choose it",
            )
        check_choice(f"{prefix}.positions", self.positions, POSITIONS)
        check_choice(f"{prefix}.norm", self.norm, NORMS)
        check_choice(f"{prefix}.norm_position", self.norm_position, ("pre", "post"))
        check_choice(f"{prefix}.activation", self.activation, ACTIVATIONS)
        check_choice(f"{prefix}.initializer", self.initializer, INITIALIZERS)
        check_choice(f"{prefix}.compute_dtype", self.compute_dtype, DTYPES)
        check_choice(f"{prefix}.attention", self.attention, ATTENTION)
        check_choice(f"{prefix}.remat", self.remat, REMAT)
        check(0 <= self.dropout < 1, f"{prefix}.dropout={self.dropout} must be in [0, 1)")
        for name in ("num_kv_heads", "head_dim", "mlp_width"):
            value = getattr(self, name)
            check(
                value is None or value >= 1,
                f"{prefix}.{name}={value} must be at least 1, or None to choose it",
            )
        if self.head_dim is None:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
            closest = min(divisors, key=lambda h: abs(h - self.num_heads))
            check(
                self.width % self.num_heads == 0,
                f"{prefix}.width={self.width} is not divisible by {prefix}.num_heads="
                f"{self.num_heads}: use num_heads={closest}, or set head_dim",
            )
        check(
            self.num_heads % self.kv_heads == 0,
            f"{prefix}.num_heads={self.num_heads} is not divisible by "
            f"{prefix}.num_kv_heads={self.kv_heads}: use "
            f"num_kv_heads={math.gcd(self.num_heads, self.kv_heads)}",
        )
        check(
            self.positions != "rotary" or self.head_width % 2 == 0,
            f"{prefix}.head_dim={self.head_width} must be even for rotary positions"
            + ("" if self.head_dim else f"; it is width={self.width} / num_heads={self.num_heads}"),
        )

    @property
    def kv_heads(self) -> int:
        """Key/value heads (K)."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head (C)."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections (Shazeer 2020)."""
        return self.activation in GATED

    @property
    def feed_forward(self) -> int:
        """Width of the MLP's hidden layer (F)."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width

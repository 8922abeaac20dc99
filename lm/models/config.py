"""What a model is: every choice of architecture, with its default and its allowed values."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal, NamedTuple

from lm.config import (
    AboveZero,
    Bounds,
    ConfigError,
    Count,
    NotNegative,
    Positive,
    ShareBelowOne,
    Size,
    SizeOrZero,
    check,
)
from lm.models.config_checks import check_groups, check_latents, check_rotary, needs

ARCHITECTURES = ("decoder", "encoder", "encoder_decoder")
CELLS = ("attention", "rnn", "gru", "lstm")
# Gated → the nonlinearity of the gate (Shazeer 2020; "geglu" by its usual approximation).
GATED = {
    "swiglu": "silu", "geglu": "gelu_tanh", "geglu_exact": "gelu", "geglu_quick": "gelu_quick",
    "reglu": "relu", "relu2glu": "relu2", "swiglu_clipped": "gelu_quick",  # see `activation_limit`
}  # fmt: skip
ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "silu", *GATED)
NORMS = ("layernorm", "rmsnorm", "none")
NORM_POSITIONS = ("pre", "post", "sandwich", "reordered")
POSITIONS = ("learned", "sinusoidal", "rotary", "relative", "alibi", "none")
ROTARY_SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn", "longrope")
LOCAL_SCALINGS = ("none", "linear", "dynamic")
RANGES = ("global", "local")
ROUTER_SCORES = ("softmax", "sigmoid")
POOLERS = ("tanh", "relu")
POOLINGS = ("first", "mean")
CLASSIFIERS = ("none", "sequence", "token")
INITIALIZERS = ("gpt2", "normal", "scaled_zero", "xavier", "lecun", "t5")
REMAT = ("none", "dots", "projections", "qkv", "full", "offload")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "fp8")
ATTENTION = ("auto", "xla", "splash", "cudnn")
AboveOne = Annotated[float, Bounds(1, ends="(]")]


class LayerKind(NamedTuple):
    """What sets a layer apart from others that have the same parameters."""

    local: bool  # it sees only a window
    rotated: bool  # rotary positions turn its queries and keys
    query_scale: float  # multiplies its queries


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Transformer (Vaswani et al. 2017), decoder, encoder or both, with its heirs' changes to it.

    With `cell`, one of the recurrent networks before it. `lm.models.presets` has the known models.
    """

    # decoder (GPT) | encoder (BERT) | encoder_decoder (T5)
    architecture: Literal[ARCHITECTURES] = "decoder"
    cell: Literal[CELLS] = "attention"  # what carries the past to the present
    cross_attention: bool = True  # recurrent encoder_decoder: Bahdanau's; False: one fixed vector

    # Size
    num_layers: Size = 4  # of the decoder, where there are both
    num_encoder_layers: Size | None = None  # None: as many as the decoder's
    num_heads: Size = 4
    num_kv_heads: Size | None = None  # None: one per head; 1: multi-query; between: grouped-query
    width: Size = 128
    head_dim: Size | None = None  # None: width / num_heads
    # None: 4 × width, or 8/3 × width when gated, to a multiple of 64; 0: attention alone, no MLP
    mlp_width: SizeOrZero | None = None
    vocab_size: Annotated[int, Bounds(0, 2**24)] = 0  # 0: the tokenizer's
    max_length: Count = 0  # context in tokens; 0: data.block_size

    # Embedding
    tie_embeddings: bool = True  # the output head is the token embedding
    embedding_width: Size | None = None  # tokens', and the head's; None: width (OPT-350M: half)
    embedding_scale: NotNegative = 1.0  # multiplies token embeddings; 0: √width (2017, Gemma)
    embedding_norm: bool = False  # a norm after the embeddings (BERT, BART, BLOOM)
    token_types: SizeOrZero = 0  # segment embeddings (BERT has 2); 0: none

    # Positions
    # learned | sinusoidal | rotary | relative (T5) | alibi | none
    positions: Literal[POSITIONS] = "rotary"
    # unused rows before position 0 of a learned table (OPT, BART: 2)
    position_offset: SizeOrZero = 0
    rotary_base: AboveOne = 10_000.0
    rotary_local_base: AboveOne | None = None  # local layers' (Gemma 3); None: angles as others'
    rotary_local_scaling: Literal[LOCAL_SCALINGS] = "none"  # of local layers with their own base
    rotary_local_factor: AboveZero = 1.0
    # share of each head that is rotated (GPT-NeoX: 0.25)
    rotary_fraction: Annotated[float, Bounds(0, 1, "(]")] = 1.0
    rotary_scaling: Literal[ROTARY_SCALINGS] = "none"  # how angles are slowed
    rotary_factor: AboveZero = 1.0  # how many times longer than the original context
    rotary_original_length: Positive = 8192  # that original context; not of `linear`
    rotary_low: AboveZero = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    rotary_high: AboveZero = 4.0  # llama3: high_freq_factor; yarn: beta_fast
    rotary_truncate: bool = True  # yarn: its ramp begins and ends at whole pairs (gpt-oss: not)
    # yarn, longrope: multiplies sines and cosines; None: as follows from the factor
    rotary_gain: AboveZero | None = None
    # longrope: what each pair's frequency is divided by, in texts up to the original context and
    # in longer ones (Phi-3)
    rotary_short: tuple[float, ...] = ()
    rotary_long: tuple[float, ...] = ()
    rotary_pattern: tuple[bool, ...] = (True,)  # of each layer in turn, repeated (SmolLM 3)
    relative_buckets: Size = 32  # relative: learned biases a head (Raffel et al. 2020, §2.1)
    relative_distance: Size = 128  # relative: distances from here on share a bucket

    # Attention
    qk_norm: bool = False  # normalise each head's queries and keys (Qwen 3, Gemma 3)
    qk_norm_joint: bool = False  # qk_norm of all heads' numbers together (OLMo 2)
    attention_scale: AboveZero | None = None  # None: head_dim^-½; T5: 1
    scale_by_layer: bool = False  # layer i's scores are divided by i + 1 (Mistral's GPT-2)
    attention_softcap: NotNegative = 0.0  # c·tanh(scores/c); 0: none (Gemma 2: 50)
    attention_pattern: tuple[Literal[RANGES], ...] = ("global",)  # of each layer in turn, repeated
    # local layers see this many tokens, their own included; encoders' as many to either side
    window: Count = 0
    # a learned score a head that joins the softmax and reads nothing (gpt-oss; Xiao et al. 2023)
    attention_sinks: bool = False

    # Multi-head latent attention (DeepSeek-V2 report, §2.1): the last of the `head_dim` dimensions
    # of queries and keys are rotated, and of those one key serves all heads
    kv_rank: SizeOrZero = 0  # width of what all keys and values are made of; 0: ordinary attention
    query_rank: SizeOrZero = 0  # of what queries are made of; 0: they read the residual stream
    shared_key_dim: SizeOrZero = 0  # rotated dimensions
    value_dim: Size | None = None  # of a head's values; None: head_dim

    # Block
    norm: Literal[NORMS] = "rmsnorm"  # layernorm | rmsnorm | none: of no kind anywhere
    # pre (GPT-2) | post (2017) | sandwich: also of what is written (Gemma 2) | reordered: of that
    # alone (OLMo 2 report, §3.1)
    norm_position: Literal[NORM_POSITIONS] = "pre"
    norm_epsilon: AboveZero = 1e-5
    norm_unit_offset: bool = False  # scales are stored less one (Gemma)
    final_norm: bool | None = None  # None: unless post-norm
    parallel: bool = False  # attention and MLP read the same residual stream (GPT-J, PaLM)
    first_norm: bool = True  # False: the first block's attention has no pre-norm (ModernBERT)
    shared_norm: bool = False  # parallel: and through the same norm (PaLM)
    activation: Literal[ACTIVATIONS] = "gelu_tanh"
    # swiglu_clipped: the gate is at most this, and what it multiplies, plus one, in ± it (gpt-oss)
    activation_limit: AboveZero = 7.0
    bias: bool = False  # biases in projections and in LayerNorm, where not said otherwise:
    qkv_bias: bool | None = None  # of queries, keys and values; None: as `bias`
    attention_bias: bool | None = None  # of attention's output; None: as `bias`
    norm_bias: bool | None = None  # of LayerNorm; None: as `bias`
    dropout: ShareBelowOne = 0.0

    # Mixture of experts (Shazeer et al. 2017), instead of the MLP
    num_experts: SizeOrZero = 0  # 0: a dense MLP
    experts_per_token: Size = 2
    expert_width: Size | None = None  # hidden width of one expert; None: mlp_width
    expert_bias: bool = False  # biases in experts and in their router (gpt-oss)
    shared_experts: SizeOrZero = 0  # experts that every token visits (DeepSeekMoE)
    dense_layers: SizeOrZero = 0  # first layers that keep a dense MLP (DeepSeekMoE: 1)
    router_score: Literal[ROUTER_SCORES] = "softmax"  # softmax | sigmoid
    router_normalize: bool = True  # the chosen experts' weights sum to one
    router_scale: AboveZero = 1.0  # and are multiplied by this (DeepSeek-V2)
    # A number for each expert is added to its score where experts are chosen, and not to its weight
    # (DeepSeek-V3 report, §2.1.2). Training leaves it as it is.
    router_bias: bool = False
    # A token's experts come from the best `router_group_limit` of so many groups, by the sum of
    # each one's `router_group_best` scores (DeepSeek-V2: 1; V3's published code: 2)
    router_groups: Size = 1
    router_group_limit: Size = 1
    router_group_best: Size = 2
    # experts take this × their fair share of tokens; 0: dropless
    capacity_factor: NotNegative = 0.0

    # Head
    output_head: bool = True  # decoder; False: its body alone, for embeddings (E5-Mistral)
    head_transform: bool = False  # projection, activation and norm before it (BERT)
    transform_bias: bool = True  # of that projection
    head_bias: bool = False
    output_scale: NotNegative = 1.0  # multiplies what the head reads; 0: width^-½ (T5 when tied)
    logits_softcap: NotNegative = 0.0  # c·tanh(logits/c); 0: none (Gemma 2: 30)
    pooler: bool = False  # encoder: projection and nonlinearity of the first token (BERT)
    pooler_activation: Literal[POOLERS] = "tanh"  # tanh (BERT) | relu (DistilBERT's classifier)
    # none | sequence | token. Of a text an encoder's reads the first token, and a decoder's the
    # last, in place of the output head: with one label, a reward model. A decoder's of each token
    # stands beside the output head: with one label, a policy's value head.
    classifier: Literal[CLASSIFIERS] = "none"
    num_labels: Size = 2  # of the classifier
    # encoder: it reads what `head_transform` makes (ModernBERT), and without a pooler of a text's
    classifier_transform: bool = False
    classifier_pooling: Literal[POOLINGS] = "first"  # first token, or the mean of its tokens

    # How it starts and how it is computed
    initializer: Literal[INITIALIZERS] = "gpt2"  # gpt2 | normal | scaled_zero | xavier | lecun | t5
    initializer_std: AboveZero = 0.02
    compute_dtype: Literal[DTYPES] = "auto"  # auto: bfloat16 where the platform is fast at it
    quantization: Literal[QUANTIZATIONS] = "none"  # products with the blocks' weights, in training
    # auto | xla | splash (TPU) | cudnn (GPU); see lm.models.attention.kernels
    attention: Literal[ATTENTION] = "auto"
    # none | dots | projections | qkv | full | offload: how much is recomputed backwards. Under full
    # a layer's input is all that is kept of it; under offload that waits in the host's memory, at
    # the cost of moving it there and back. Not in a pipeline.
    remat: Literal[REMAT] = "none"
    scan_layers: bool | None = None  # None: scan, but for up to 12 layers on a CPU

    def validate(self, prefix: str = "config.model") -> None:
        """Raises ConfigError on the first impossible field, or pair of fields."""
        self._validate_heads(prefix)
        local, alibi = "local" in self.attention_pattern, self.positions == "alibi"
        for field in ("attention_pattern", "rotary_pattern"):
            check(len(getattr(self, field)) > 0, f"{prefix}.{field}=() must not be empty")
        check(
            local == (self.window > 0),
            f"{prefix}.window={self.window} must be {'positive where' if local else '0 unless'} "
            "attention_pattern has local layers",
        )
        check(
            self.relative_buckets % 2 == 0 and self.relative_distance > self.relative_buckets // 2,
            f"{prefix}.relative_buckets={self.relative_buckets} must be even, and less than twice "
            f"relative_distance={self.relative_distance}",
        )
        mixture = self.num_experts > 0
        check(
            not mixture or self.experts_per_token <= self.num_experts,
            f"{prefix}.experts_per_token={self.experts_per_token} is more than num_experts="
            f"{self.num_experts}",
        )
        check(
            not mixture or self.gated,
            f"{prefix}.activation={self.activation!r} must be gated for experts: use swiglu",
        )
        check(
            self.dense_layers < self.num_layers if mixture else self.dense_layers == 0,
            f"{prefix}.dense_layers={self.dense_layers} must leave layers with experts, of which "
            f"there are {self.num_layers if mixture else 0}",
        )
        check_latents(self, prefix)
        check_groups(self, prefix)
        check(
            not local or self.architecture != "encoder_decoder",
            f"{prefix}.attention_pattern={self.attention_pattern!r} needs architecture='decoder' "
            "or 'encoder', not 'encoder_decoder'",
        )
        used = {"positions": alibi, "num_experts": mixture, "scale_by_layer": self.scale_by_layer}
        for field, chosen in used.items():
            self._needs(prefix, field, chosen, architecture="decoder")
        sinkable = {"architecture": "decoder", "kv_rank": 0}
        self._needs(prefix, "attention_sinks", self.attention_sinks, **sinkable)
        unrotated = not all(self.rotary_pattern)
        self._needs(prefix, "rotary_pattern", unrotated, architecture="decoder", positions="rotary")
        check_rotary(self, prefix)
        headless = {"architecture": "decoder", "cell": "attention"}
        self._needs(prefix, "embedding_width", self.table_width != self.width, **headless)
        self._needs(prefix, "output_head", not self.output_head, **headless)
        self._needs(prefix, "shared_norm", self.shared_norm, parallel=True)
        self._needs(prefix, "parallel", self.parallel, norm_position="pre", architecture="decoder")
        self._needs(prefix, "pooler", self.pooler, architecture="encoder")
        self._needs(prefix, "mlp_width", self.mlp_width == 0, num_experts=0, parallel=False)
        unnormed = {"norm_position": "pre", "embedding_norm": False, "head_transform": False}
        unnormed |= {"qk_norm": False, "shared_norm": False}
        self._needs(prefix, "qk_norm_joint", self.qk_norm_joint, qk_norm=True)
        self._needs(prefix, "norm", self.norm == "none", **unnormed)
        unended = self.norm == "none" and self.final_norm
        check(not unended, f"{prefix}.final_norm=True needs a norm, and {prefix}.norm is 'none'")
        check(
            self.classifier == "none" or self.architecture != "encoder_decoder",
            f"{prefix}.classifier={self.classifier!r} needs architecture='decoder' or 'encoder', "
            "not 'encoder_decoder'",
        )
        unnormed = {"norm_position": "pre", "architecture": "encoder", "num_experts": 0}
        self._needs(prefix, "first_norm", not self.first_norm, **unnormed)
        check(
            self.first_norm or self.num_layers > 1,
            f"{prefix}.first_norm=False needs num_layers of 2 or more, not {self.num_layers}",
        )
        own = {"architecture": "encoder", "pooler": False}
        mean, through = self.classifier_pooling == "mean", self.classifier_transform
        self._needs(prefix, "classifier_pooling", mean, **own)
        self._needs(prefix, "classifier_transform", through, **own, head_transform=True)
        self._needs(prefix, "classifier", self.classifier != "none", cell="attention")
        self._needs(prefix, "architecture", self.architecture == "encoder", cell="attention")
        self._needs(prefix, "quantization", self.quantization != "none", cell="attention")
        check(
            self.cross_attention or self.cell != "attention",
            f"{prefix}.cross_attention=False is for recurrent models; cell is 'attention'",
        )

    def _needs(self, prefix: str, field: str, used: bool, **needed) -> None:
        needs(self, prefix, field, used, **needed)

    def _validate_heads(self, prefix: str) -> None:
        if self.head_dim is None and self.width % self.num_heads:
            fewer = next(n for n in range(self.num_heads, 0, -1) if self.width % n == 0)
            raise ConfigError(
                f"{prefix}.width={self.width} is not divisible by {prefix}.num_heads="
                f"{self.num_heads}: use num_heads={fewer}, or set head_dim"
            )
        check(
            self.num_heads % self.kv_heads == 0,
            f"{prefix}.num_heads={self.num_heads} is not divisible by "
            f"{prefix}.num_kv_heads={self.kv_heads}: use "
            f"num_kv_heads={math.gcd(self.num_heads, self.kv_heads)}",
        )
        check(
            self.positions != "rotary" or self.kv_rank > 0 or self.rotary_dim % 2 == 0,
            f"{prefix}.head_dim={self.head_width} must be even for rotary positions"
            + ("" if self.head_dim else f"; it is width={self.width} / num_heads={self.num_heads}")
            if self.rotary_fraction == 1
            else f"{prefix}.rotary_fraction={self.rotary_fraction} rotates {self.rotary_dim} of "
            f"{self.head_width} dimensions: the number must be even",
        )

    def scaling_of(self, local: bool) -> str:
        """How the angles of global or local layers are slowed."""
        return self.rotary_of(local)[1]

    def rotary_of(self, local: bool) -> tuple[float, str, float]:
        """Base, scaling and factor of the angles of global or local layers."""
        if local and self.rotary_local_base is not None:
            return self.rotary_local_base, self.rotary_local_scaling, self.rotary_local_factor
        return self.rotary_base, self.rotary_scaling, self.rotary_factor

    @property
    def rotary_amplitude(self) -> float:
        """What multiplies sines and cosines (Peng et al. 2023, §3.4; Ding et al. 2024, §3.2)."""
        if self.rotary_gain is not None:
            return self.rotary_gain
        growth = math.log(self.rotary_factor) if self.rotary_factor > 1 else 0.0
        if self.rotary_scaling == "yarn":
            return 0.1 * growth + 1
        if self.rotary_scaling == "longrope" and growth:
            return math.sqrt(1 + growth / math.log(self.rotary_original_length))
        return 1.0

    def angles_until(self, length: int) -> int | None:
        """The length to which a text may grow from this one before its angles change.

        None: to any. Angles depend on a text's length where they are `dynamic`, which is with every
        token beyond the original context, or `longrope`, which is once.
        """
        scalings = {self.scaling_of(False), self.scaling_of(self.window > 0)}
        if self.positions != "rotary" or not scalings & {"dynamic", "longrope"}:
            return None
        if length <= self.rotary_original_length:
            return self.rotary_original_length
        return length if "dynamic" in scalings else None

    @property
    def angles_by_length(self) -> bool:
        """Whether the angles of a text's tokens depend on how long it is."""
        return self.angles_until(1) is not None

    @property
    def table_width(self) -> int:
        """Width of token embeddings and of the output head (E)."""
        return self.width if self.embedding_width is None else self.embedding_width

    @property
    def kv_heads(self) -> int:
        """Key/value heads (K)."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head (C)."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of one head's values."""
        return self.head_width if self.value_dim is None else self.value_dim

    @property
    def cached_heads(self) -> int:
        """Key/value heads that decoding remembers: of latent attention the latent itself."""
        return 1 if self.kv_rank else self.kv_heads

    @property
    def cached_width(self) -> int:
        """Width of what it remembers of each of a token's keys."""
        return self.shared_key_dim + self.kv_rank if self.kv_rank else self.head_width

    @property
    def cached_numbers(self) -> int:
        """How many numbers it remembers of a token in a layer."""
        return self.cached_heads * self.cached_width * (1 if self.kv_rank else 2)

    @property
    def score_scale(self) -> float:
        """What multiplies attention scores."""
        return self.head_width**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return self.shared_key_dim or int(self.head_width * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections (Shazeer 2020)."""
        return self.activation in GATED

    @property
    def feed_forward(self) -> int:
        """Width of the MLP's hidden layer (F); 0: there is no MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width

    @property
    def expert_feed_forward(self) -> int:
        """Width of one expert's hidden layer."""
        return self.feed_forward if self.expert_width is None else self.expert_width

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder: all of an encoder's, none of a decoder's."""
        if self.architecture == "decoder":
            return 0
        if self.architecture == "encoder" or self.num_encoder_layers is None:
            return self.num_layers
        return self.num_encoder_layers

    @property
    def norms_read(self) -> bool:
        """Whether sublayers read the residual stream through a norm."""
        return self.norm != "none" and self.norm_position in ("pre", "sandwich")

    @property
    def norms_written(self) -> bool:
        """Whether what sublayers write goes through a norm before it is added."""
        return self.norm != "none" and self.norm_position in ("sandwich", "reordered")

    @property
    def first_layers(self) -> int:
        """The first layers, where they have other parameters than those that follow."""
        return self.dense_layers if self.first_norm else 1

    @property
    def has_final_norm(self) -> bool:
        """Whether the last block's output is normalised."""
        if self.norm == "none":
            return False
        return self.norm_position != "post" if self.final_norm is None else self.final_norm

    @property
    def has_output_head(self) -> bool:
        """Whether there are logits: not where a decoder's classifier of texts takes their place."""
        return self.output_head and (self.architecture, self.classifier) != ("decoder", "sequence")

    def is_local(self, layer: int) -> bool:
        """Whether this layer sees only a window."""
        return self.attention_pattern[layer % len(self.attention_pattern)] == "local"

    def layer_kind(self, layer: int) -> LayerKind:
        """What sets this layer apart from others."""
        return LayerKind(
            self.is_local(layer),
            self.rotary_pattern[layer % len(self.rotary_pattern)],
            1 / (layer + 1) if self.scale_by_layer else 1.0,
        )

    def has_bias(self, part: str) -> bool:
        """Whether `part` (qkv | attention | norm) has biases: what it says itself, else `bias`."""
        own = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

"""What a head does, from what it attends to and from its weights.

A score of attention is the share that queries pay to certain keys, their targets: the token
before, an earlier copy of this one, what followed that copy. The functions that end in `_targets`
say which keys these are, [B, T, S], and `attention_to` what each head pays them, [B, H]: a row's
score depends on that row alone, and on its padding not at all. `uniform_pattern` is a head that
looks everywhere: what a score has to be compared with.

Scores of weights are of a head's two circuits (Elhage et al. 2021, "A mathematical framework for
transformer circuits"), W_QK = W_Q W_Kᵀ and W_OV = W_V W_O, of vectors that stand before a matrix.
`head_weights` has the norms' scales in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check
from lm.models import Model, ModelConfig
from lm.models.attention.attention import rotate
from lm.models.hooks import reading
from lm.models.positions import rotary_angles

Array = jax.Array | np.ndarray


def attention_patterns(model: Model, tokens_BT: Array, **fields: Any) -> jax.Array:
    """Every layer's attention [L, B, H, T, S] of a decoder or an encoder; `fields` as of a call."""
    seen: dict[str, jax.Array] = {}
    model(tokens_BT, tap=reading(seen, lambda name: name.endswith(".attention.pattern")), **fields)
    layers = range(model.config.num_layers)
    return jnp.stack([seen[f"blocks.{layer}.attention.pattern"] for layer in layers])


# ---- Which keys are looked for. Segments are as of `lm.models.text.Text`: 0 is padding.


def offset_targets(segments_BT: Array, offset: int = 1) -> jax.Array:
    """The token so many before, in the same document."""
    T = segments_BT.shape[1]
    places = jnp.arange(T)
    return _earlier(segments_BT) & (places[:, None] - places == offset)


def first_targets(segments_BT: Array) -> jax.Array:
    """A document's first token, for all others of it."""
    before_BT = jnp.pad(jnp.asarray(segments_BT), ((0, 0), (1, 0)))[:, :-1]
    return _earlier(segments_BT) & (segments_BT != before_BT)[:, None, :]


def duplicate_targets(tokens_BT: Array, segments_BT: Array | None = None) -> jax.Array:
    """Earlier copies of the token."""
    tokens_BT = jnp.asarray(tokens_BT)
    same_BTS = tokens_BT[:, :, None] == tokens_BT[:, None, :]
    return _earlier(_segments(tokens_BT, segments_BT)) & same_BTS


def induction_targets(tokens_BT: Array, segments_BT: Array | None = None) -> jax.Array:
    """What followed earlier copies of the token (Olsson et al. 2022: prefix matching)."""
    copies_BTS = duplicate_targets(tokens_BT, segments_BT)
    return jnp.pad(copies_BTS, ((0, 0), (0, 0), (1, 0)))[..., :-1]


def class_targets(classes_BT: Array, segments_BT: Array) -> jax.Array:
    """Earlier tokens of the same class, such as names; class 0 is none."""
    classes_BT = jnp.asarray(classes_BT)
    same_BTS = classes_BT[:, :, None] == classes_BT[:, None, :]
    return _earlier(segments_BT) & same_BTS & (classes_BT > 0)[:, :, None]


def uniform_pattern(segments_BT: Array) -> jax.Array:
    """What a causal head pays that looks at all it may see alike, [B, 1, T, S]."""
    T = segments_BT.shape[1]
    seen_BTS = _earlier(segments_BT) | (jnp.eye(T, dtype=bool) & (segments_BT > 0)[:, :, None])
    return (seen_BTS / jnp.maximum(seen_BTS.sum(-1, keepdims=True), 1))[:, None]


# ---- What is paid to them


def attention_to(pattern_BHTS: Array, targets_BTS: Array) -> jax.Array:
    """Mean over queries with targets of the attention paid to these together, [B, H].

    NaN in rows where nothing is a target.
    """
    queries_BT = jnp.any(targets_BTS, -1)
    paid_BH = jnp.einsum("bhts,bts->bh", pattern_BHTS, targets_BTS.astype(pattern_BHTS.dtype))
    return paid_BH / queries_BT.sum(-1)[:, None]


def previous_token_scores(pattern_BHTS: Array, segments_BT: Array | None = None) -> jax.Array:
    """Mean of A[i, i−1], [B, H]."""
    return offset_scores(pattern_BHTS, segments_BT, (1,))[..., 0]


def offset_scores(
    pattern_BHTS: Array, segments_BT: Array | None = None, offsets: Sequence[int] = (1, 2, 3, 4)
) -> jax.Array:
    """Mean of A[i, i − offset] of each offset, [B, H, offsets]: position heads."""
    segments_BT = _segments(pattern_BHTS[:, 0, :, 0], segments_BT)
    every = [attention_to(pattern_BHTS, offset_targets(segments_BT, each)) for each in offsets]
    return jnp.stack(every, -1)


def first_token_scores(pattern_BHTS: Array, segments_BT: Array | None = None) -> jax.Array:
    """Attention to a document's first token, [B, H]: where heads rest that have found nothing."""
    segments_BT = _segments(pattern_BHTS[:, 0, :, 0], segments_BT)
    return attention_to(pattern_BHTS, first_targets(segments_BT))


def duplicate_token_scores(
    pattern_BHTS: Array, tokens_BT: Array, segments_BT: Array | None = None
) -> jax.Array:
    """Attention to earlier copies of the token, over tokens that have any, [B, H]."""
    return attention_to(pattern_BHTS, duplicate_targets(tokens_BT, segments_BT))


def induction_scores(
    pattern_BHTS: Array, tokens_BT: Array, segments_BT: Array | None = None
) -> jax.Array:
    """Mean over i with an earlier match of Σ_{j<i, t_j=t_i} A[i, j+1], [B, H].

    On `repeated_tokens` of random periods: where all repeats have one period, a head that looks so
    far back scores just as high.
    """
    return attention_to(pattern_BHTS, induction_targets(tokens_BT, segments_BT))


def repeated_tokens(
    seed: int, rows: int, length: int, ids: Sequence[int], periods: tuple[int, int] = (8, 20)
) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens that are said again and again, and each row's period.

    Args:
      seed: of the draws.
      rows, length: of what is returned, int32 [rows, length].
      ids: the tokens to draw from.
      periods: smallest and largest; each row's is drawn on its own.
    """
    rng = np.random.default_rng(seed)
    periods_B = rng.integers(periods[0], periods[1] + 1, rows)
    drawn = rng.choice(np.asarray(ids, np.int32), (rows, int(periods_B.max())))
    places_BT = np.arange(length) % periods_B[:, None]
    return np.take_along_axis(drawn, places_BT, 1), periods_B


def in_context_learning_score(
    loss_BT: Array, early: int = 50, late: int = 500, window: int = 1
) -> float:
    """Loss at the token number `late` less that at `early`, nats (Olsson et al. 2022).

    The loss of token number n, from 1, is `loss_BT[:, n - 1]`; of a shorter context both numbers
    are so much smaller. Of both, and of the `window` - 1 tokens before, the mean is taken, NaN
    aside. Negative where context helps.
    """
    T = loss_BT.shape[1]
    if late > T:
        early, late = max(1, early * T // late), T
    both = [np.nanmean(loss_BT[:, max(0, end - window) : end]) for end in (early, late)]
    return float(both[1] - both[0])


# ---- What the weights say


class HeadWeights(NamedTuple):
    """The heads' matrices, float64, as they act on a residual stream that is of unit scale.

    Of grouped queries each head has its group's keys and values. Scales of the norm before, of
    norms of queries and keys, and of one after the output are multiplied in, LayerNorm's mean taken
    off; the biases are what remains where the stream is zero.
    """

    query_LHDC: np.ndarray
    key_LHDC: np.ndarray
    value_LHDC: np.ndarray
    output_LHCD: np.ndarray
    query_bias_LHC: np.ndarray
    key_bias_LHC: np.ndarray
    value_bias_LHC: np.ndarray


def direct_heads(config: ModelConfig) -> None:
    """Raises ConfigError unless queries, keys and values are products of normed streams."""
    check(
        not config.kv_rank,
        f"config.model.kv_rank={config.kv_rank}: keys and values are made of a latent with a norm "
        "of its own, and heads' matrices alone do not say what they read",
    )
    check(
        config.first_norm,
        "config.model.first_norm=False: heads' matrices take in the norm that attention reads "
        "through, and the first block has none",
    )


def head_weights(config: ModelConfig, params: Mapping[str, Array]) -> HeadWeights:
    """The self-attention of a decoder's, or an encoder's, layers.

    Raises:
      ConfigError: latent attention, whose heads have no matrices of their own, or a first block
        without a norm.
    """
    direct_heads(config)
    groups = ("dense_blocks", "blocks") if config.dense_layers else ("blocks",)

    def stacked(name: str) -> np.ndarray | None:
        found = [params[f"{g}.{name}"] for g in groups if f"{g}.{name}" in params]
        return np.concatenate([np.asarray(each, np.float64) for each in found]) if found else None

    def scale(name: str) -> np.ndarray | None:
        found = stacked(f"{name}.scale")
        return found + 1 if found is not None and config.norm_unit_offset else found

    centred = config.norm == "layernorm"
    reads = scale("attention_norm") if config.norms_read else None
    shift = None if reads is None else stacked("attention_norm.bias")
    many = config.num_heads // config.kv_heads
    read = {}
    for name in ("query", "key", "value"):
        w_LDHC = stacked(f"attention.{name}")
        bias_LHC = stacked(f"attention.{name}_bias")
        bias_LHC = np.zeros(w_LDHC[:, 0].shape) if bias_LHC is None else bias_LHC
        if shift is not None:
            bias_LHC = bias_LHC + np.einsum("ld,ldhc->lhc", shift, w_LDHC)
        if reads is not None:
            w_LDHC = w_LDHC * reads[:, :, None, None]
            w_LDHC = w_LDHC - w_LDHC.mean(1, keepdims=True) if centred else w_LDHC
        if name != "value" and (own := scale(f"attention.{name}_norm")) is not None:
            own_LHC = own.reshape(len(own), -1, own.shape[-1])  # H: all heads' or one
            w_LDHC, bias_LHC = w_LDHC * own_LHC[:, None], bias_LHC * own_LHC
        if name != "query":
            w_LDHC, bias_LHC = np.repeat(w_LDHC, many, 2), np.repeat(bias_LHC, many, 1)
        read[name] = w_LDHC.transpose(0, 2, 1, 3), bias_LHC
    out_LHCD = stacked("attention.output")
    if (after := scale("attention_post_norm")) is not None:
        out_LHCD = out_LHCD - out_LHCD.mean(-1, keepdims=True) if centred else out_LHCD
        out_LHCD = out_LHCD * after[:, None, None]
    (q, qb), (k, kb), (v, vb) = read.values()
    return HeadWeights(q, k, v, out_LHCD, qb, kb, vb)


def copying_scores(config: ModelConfig, params: Mapping[str, Array]) -> np.ndarray:
    """Σ Re λ / Σ |λ| over the eigenvalues of W_E W_OV W_U, [L, H]: 1 copies, −1 suppresses.

    That V×V matrix has the eigenvalues of the C×C matrix W_O W_U W_E W_V, and zeros besides. The
    final norm's scale is in W_U.
    """
    check(
        config.output_head and config.table_width == config.width,
        f"config.model.output_head={config.output_head} and embedding_width={config.table_width}: "
        f"what heads copy is of an output head that reads a stream of width={config.width}",
    )
    weights = head_weights(config, params)
    embedding_VD = np.asarray(params["embedding.tokens"], np.float64)
    head_VD = embedding_VD if config.tie_embeddings else np.asarray(params["head"], np.float64)
    if "final_norm.scale" in params:
        head_VD = head_VD * (np.asarray(params["final_norm.scale"]) + config.norm_unit_offset)
        if config.norm == "layernorm":
            head_VD = head_VD - head_VD.mean(1, keepdims=True)
    through_DD = head_VD.T @ embedding_VD
    values = np.linalg.eigvals(weights.output_LHCD @ (through_DD @ weights.value_LHDC))
    total = np.abs(values).sum(-1)
    return np.where(total > 0, values.real.sum(-1) / np.where(total > 0, total, 1), 0.0)


class Composition(NamedTuple):
    """How much of a head reads what an earlier one writes; [earlier layer, head, later, head].

    0 where the first is not in an earlier layer.
    """

    query_LHLH: np.ndarray  # ‖W_OV W_QK‖ / (‖W_OV‖ ‖W_QK‖)
    key_LHLH: np.ndarray  # ‖W_OV W_QKᵀ‖ / …
    value_LHLH: np.ndarray  # ‖W_OV W_OV‖ / …


def composition_scores(
    config: ModelConfig, params: Mapping[str, Array], offset: int = 0
) -> Composition:
    """‖AB‖_F / (‖A‖_F ‖B‖_F) of every two heads, from C×C matrices alone (Elhage et al. 2021).

    Args:
      config, params: of the model.
      offset: of rotary positions: how far the key stands before the query. Layers that have angles
        of their own (Gemma 3) are taken at those of the others.

    Raises:
      ConfigError: an offset, where its angle depends on the length of a text.
    """
    weights = head_weights(config, params)
    query = weights.query_LHDC
    check(
        not (offset and config.angles_by_length),
        f"offset={offset} is another angle in every length of text where config.model."
        f"rotary_scaling={config.rotary_scaling!r}: use 0",
    )
    if config.positions == "rotary" and offset:
        angles = rotary_angles(jnp.full((1, 1), offset), config)
        turned = np.asarray(rotate(jnp.asarray(query), tuple(a[0, 0] for a in angles)), np.float64)
        rotated_L = np.array([config.layer_kind(i).rotated for i in range(config.num_layers)])
        query = np.where(rotated_L[:, None, None, None], turned, query)
    key, value, out = weights.key_LHDC, weights.value_LHDC, weights.output_LHCD
    written = np.einsum("lhcd,lhed->lhce", out, out)
    grams = {name: np.swapaxes(w, -1, -2) @ w for name, w in
             (("query", query), ("key", key), ("value", value))}  # fmt: skip
    norm_OV = np.sqrt(np.einsum("lhce,lhec->lh", grams["value"], written))
    norm_QK = np.sqrt(np.einsum("lhce,lhec->lh", grams["query"], grams["key"]))
    L, H = out.shape[:2]
    found = []
    for read, after, norm in (
        (query, grams["key"], norm_QK),
        (key, grams["query"], norm_QK),
        (value, written, norm_OV),
    ):
        scores = np.zeros((L, H, L, H))
        for a in range(L):
            for b in range(a + 1, L):
                # ‖V (O R) Sᵀ‖² = tr(VᵀV M SᵀS Mᵀ), where M = O R is C×C.
                m = np.einsum("acd,bde->abce", out[a], read[b], optimize=True)
                left = np.einsum("ace,abef->abcf", grams["value"][a], m, optimize=True)
                right = np.einsum("abce,bef->abcf", m, after[b], optimize=True)
                size = np.sqrt(np.maximum(np.einsum("abcf,abcf->ab", left, right), 0))
                both = norm_OV[a][:, None] * norm[b]
                scores[a, :, b] = size / np.where(both > 0, both, 1)
        found.append(scores)
    return Composition(*found)


def random_composition(
    width: int, head_width: int, seed: int = 0, draws: int = 16
) -> tuple[float, float]:
    """Mean and standard deviation of a composition score where all weights are Gaussian noise.

    About 1/√width: what is no more than this is chance.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        v, q, k = rng.normal(size=(3, width, head_width))
        o = rng.normal(size=(head_width, width))
        m, gram_v, gram_k = o @ q, v.T @ v, k.T @ k
        size = np.einsum("ce,cf,fg,ge->", m, gram_v, m, gram_k, optimize=True)
        norms = np.sum(gram_v * (o @ o.T)) * np.sum((q.T @ q) * gram_k)
        found.append(np.sqrt(size / norms))
    return float(np.mean(found)), float(np.std(found))


def _segments(like_BT: Array, segments_BT: Array | None) -> Array:
    return jnp.ones(like_BT.shape[:2], jnp.int32) if segments_BT is None else segments_BT


def _earlier(segments_BT: Array) -> jax.Array:
    """Whether key s stands before query t in the same document, [B, T, S]."""
    segments_BT = jnp.asarray(segments_BT)
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    before = jnp.tril(jnp.ones((segments_BT.shape[1],) * 2, bool), -1)
    return same_BTS & before & (segments_BT > 0)[:, :, None]

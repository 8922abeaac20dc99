"""What a model computes on the way, by name: which values there are, reading and replacing them.

    found = trace(model, tokens_BT, "blocks.*.attention.pattern")
    found["blocks.3.attention.pattern"]  # [B, H, T, S]

A name's last words say its axes, in the letters of `lm.models` (and `k`, the experts chosen for a
token; `g`, a recurrent cell's gates; `r`, a latent's width; C of values may be a width of its own):

    embedding                                     BTD   the first residual stream
    embedding.tokens, .positions, .types          BTD   its terms, where there are several
    blocks.3.residual_before, _middle, _after     BTD   around attention and MLP
    blocks.3.residual_crossed                     BTD   after attention to an encoder's output
    blocks.3.attention_norm.inverse_scale         BT1   1/√(variance + ε); also mlp_norm,
    blocks.3.attention_norm.output                BTD   cross_, embedding_, final_, *_post_norm
    blocks.3.attention.query, .heads              BTHC  what asks; what each head has read
    blocks.3.attention.key, .value                BSKC  what is asked, and read
    blocks.3.attention.query_unrotated            BTHC  before rotary positions; key_unrotated: BSKC
    blocks.3.attention.query_norm.*               BTH1, BTHC; key_norm.*: BSK1, BSKC
    blocks.3.attention.scores, .pattern           BHTS  before the mask, and after the softmax, of
                                                        which a sink takes a share: rows then sum
                                                        to less than one
    blocks.3.attention.latent_norm.output         BTr   latent attention's; also query_latent_norm
    blocks.3.attention.output, blocks.3.mlp.output  BTD  added to the stream (after *_post_norm)
    blocks.3.mlp.up, .gate, .hidden               BTF   `hidden` after the nonlinearity
    blocks.3.mlp.router                           BTE   experts' logits; chosen, weights: BTk
    logits                                        BTV

A decoder that reads an encoder has `blocks.3.cross_attention.*` as `attention.*`, and the encoder's
own names follow `encoder.`. Recurrent networks: `lm.models.recurrent`. Where TransformerLens has a
hook of the same value, its name serves too: `blocks.3.attn.hook_pattern`, `blocks.3.hook_resid_pre`
(its scores are -inf behind the mask, ours as they were before it).
"""

from __future__ import annotations

import collections
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lm.config import ConfigError, check, nearest
from lm.models.hooks import Tap
from lm.models.params import bind
from lm.models.text import Text
from lm.parallel.sharding import ParamSpec

Edit = Callable[[jax.Array], jax.Array] | jax.Array

_AXES = {
    "query_norm.inverse_scale": "BTH1", "query_norm.output": "BTHC",
    "latent_norm.output": "BTr", "query_latent_norm.output": "BTr",
    "key_norm.inverse_scale": "BSK1", "key_norm.output": "BSKC",
    "inverse_scale": "BT1", "query": "BTHC", "query_unrotated": "BTHC", "heads": "BTHC",
    "key": "BSKC", "key_unrotated": "BSKC", "value": "BSKC", "scores": "BHTS", "pattern": "BHTS",
    "up": "BTF", "gate": "BTF", "hidden": "BTF", "router": "BTE", "chosen": "BTk",
    "weights": "BTk", "logits": "BTV", "projected": "BTgD", "gates": "BTgD",
}  # fmt: skip

# Ours by TransformerLens's name; {} is a layer.
_LENS = {
    "hook_embed": "embedding.tokens", "hook_pos_embed": "embedding.positions",
    "blocks.{}.hook_resid_pre": "blocks.{}.residual_before",
    "blocks.{}.hook_resid_mid": "blocks.{}.residual_middle",
    "blocks.{}.hook_resid_post": "blocks.{}.residual_after",
    "blocks.{}.attn.hook_rot_q": "blocks.{}.attention.query",
    "blocks.{}.attn.hook_rot_k": "blocks.{}.attention.key",
    "blocks.{}.attn.hook_q": "blocks.{}.attention.query_unrotated",
    "blocks.{}.attn.hook_k": "blocks.{}.attention.key_unrotated",
    "blocks.{}.attn.hook_v": "blocks.{}.attention.value",
    "blocks.{}.attn.hook_attn_scores": "blocks.{}.attention.scores",
    "blocks.{}.attn.hook_pattern": "blocks.{}.attention.pattern",
    "blocks.{}.attn.hook_z": "blocks.{}.attention.heads",
    "blocks.{}.hook_attn_out": "blocks.{}.attention.output",
    "blocks.{}.hook_mlp_out": "blocks.{}.mlp.output",
    "blocks.{}.mlp.hook_pre": "blocks.{}.mlp.up",
    "blocks.{}.mlp.hook_post": "blocks.{}.mlp.hidden",
    "blocks.{}.ln1.hook_out": "blocks.{}.attention_norm.output",
    "blocks.{}.ln2.hook_out": "blocks.{}.mlp_norm.output",
    "ln_final.hook_out": "final_norm.output",
}  # fmt: skip


def axes(name: str, recurrent: bool = False) -> str:
    """The axes of the activation `name`, a letter each; unknown names are residual streams."""
    words = name.split(".")
    if recurrent and words[-1] == "pattern":
        return "BTS"
    return _AXES.get(".".join(words[-2:])) or _AXES.get(words[-1], "BTD")


def sites(model: nnx.Module, *texts: jax.Array, **fields: jax.Array) -> dict[str, str]:
    """Every activation a model has → its axes (`axes`), in the order they are computed.

    Args:
      model: bound to parameters, or a skeleton.
      *texts, **fields: as of `trace`; a token or two unless given.
    """
    both = model.config.architecture == "encoder_decoder"
    texts = texts or (jnp.zeros((1, 2), jnp.int32),) * (1 + both)
    is_spec = lambda leaf: isinstance(leaf, ParamSpec)  # noqa: E731
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if is_spec(leaf) else leaf,
        model,
        is_leaf=is_spec,
    )
    names: list[str] = []

    def tap(name, value):
        names.append(name)
        return value

    jax.eval_shape(lambda model: _computed(model, texts, tap, fields), shapes)
    return {name: axes(name, model.config.cell != "attention") for name in names}


def trace(
    model: nnx.Module,
    *texts: jax.Array,
    names: str | Sequence[str],
    edits: Mapping[str, Edit] | None = None,
    **fields: jax.Array | None,
) -> dict[str, jax.Array]:
    """The named activations of a call of `model`, on any mesh; pure, and differentiable.

    Jit the caller: then nothing else is kept, and what only others need is not computed. Attention
    is the reference implementation, and layers run one by one.

    Args:
      model: bound to parameters (`lm.models.bind`, `Run.transformer`).
      *texts: token ids [B, T]; of an encoder-decoder the source and what its decoder reads.
      names: what to return; `*` stands for anything. Names of TransformerLens serve too.
      edits: name → a function that gives what to use instead, or that itself (broadcast). What is
        read comes after it.
      **fields: what else is known of the text (`lm.models.text.Text`), such as `segments_BT`, 0 at
        padding. Positions count from each segment's start unless given.

    Returns:
      Name, as asked for → value; in the order they are computed.

    Raises:
      ConfigError: a name that the model does not have, or an edit of another shape.
    """
    patterns, edits = [names] if isinstance(names, str) else list(names), dict(edits or {})
    # Of a plain dict jit would sort the names.
    found: dict[str, jax.Array] = collections.OrderedDict()
    seen: dict[str, None] = {}
    matched: set[str] = set()
    fields = _with_positions(fields)
    recurrent = model.config.cell != "attention"

    def tap(name, value):
        spoken = (name, *_aliases(model.config, name))
        seen.update(dict.fromkeys(spoken))
        for word in spoken:
            if word in edits:
                matched.add(word)
                value = _edited(word, edits[word], value, recurrent)
        for word in spoken:
            fits = [pattern for pattern in patterns if fnmatch.fnmatchcase(word, pattern)]
            matched.update(fits)
            # A pattern that fits both names gives ours alone.
            if fits and (word == name or name not in found):
                found[word] = value
        return value

    _computed(model, texts, tap, fields)
    for argument, words in (("names", patterns), ("edits", edits)):
        for word in words:
            known = f"a name of this model{nearest(word, seen)}; lm.models.activations.sites lists"
            check(word in matched, f"{argument}={word!r} is not {known} them")
    return found


def tracer(skeleton: nnx.Module, functions: Mapping[str, Edit]) -> Callable[..., Mapping]:
    """`trace` of (params, texts, edits, fields, names), compiled; with these edits as well."""

    def traced(params, texts, values, fields, names):
        edits = {**values, **functions}
        return trace(bind(skeleton, params), *texts, names=names, edits=edits, **fields)

    return jax.jit(traced, static_argnames="names")


def _computed(model, texts, tap: Tap, fields) -> None:
    x_BTD = model.hidden(*texts, tap=tap, **fields)
    if model.config.has_output_head:
        model.unembed(x_BTD, tap)


def _edited(name: str, edit: Edit, value: jax.Array, recurrent: bool) -> jax.Array:
    read_only = recurrent and name.rpartition(".")[2] in ("gates", "memory", "pattern")
    check(not read_only, f"edits={name!r} of a recurrent network can be read, not replaced")
    new = edit(value) if callable(edit) else edit
    try:
        new = jnp.broadcast_to(jnp.asarray(new), value.shape)
    except ValueError:
        raise ConfigError(
            f"edits={name!r} has the shape {jnp.shape(new)}, and the activation {value.shape}"
        ) from None
    return new.astype(value.dtype)


def _with_positions(fields: dict) -> dict:
    """With positions of each segment's tokens, so that padding before them moves none."""
    check_fields(fields)
    for prefix, letters in (("", "BT"), ("source_", "BS")):
        segments = fields.get(f"{prefix}segments_{letters}")
        name = f"{prefix}positions_{letters}"
        if segments is not None and fields.get(name) is None:
            slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
            new = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            start = jax.lax.cummax(jnp.where(new, slots, 0), axis=1)
            fields = {**fields, name: slots - start}
    return fields


def check_fields(fields: Mapping[str, object]) -> None:
    """Raises `ConfigError` unless they are fields of a text that a model may be told."""
    known = {*Text._fields, "source_positions_BS", "source_segments_BS"}
    known -= {"tokens_BT", "slots_1T"}
    for name in fields:
        check(name in known, f"{name!r} is no argument of a trace{nearest(name, known)}")


def _aliases(config, name: str) -> tuple[str, ...]:
    """What TransformerLens calls the same value of this model."""
    words = re.sub(r"^blocks\.(\d+)", "blocks.{}", name)
    layer = re.search(r"^blocks\.(\d+)", name)
    number = layer.group(1) if layer else ""
    rotated = config.positions == "rotary" and config.layer_kind(int(number or 0)).rotated
    return tuple(alias.replace("{}", number) for alias in _table(config, rotated).get(words, ()))


@functools.lru_cache(maxsize=8)
def _table(config, rotated: bool) -> dict[str, list[str]]:
    table = dict(_LENS)
    if not rotated:
        table |= {f"blocks.{{}}.attn.hook_{x}": f"blocks.{{}}.attention.{n}" for x, n in _QK}
    if config.gated:
        table |= {"blocks.{}.mlp.hook_pre": "blocks.{}.mlp.gate"}
        table |= {"blocks.{}.mlp.hook_pre_linear": "blocks.{}.mlp.up"}
    if config.norms_written:
        for hook, sublayer in (("attn", "attention"), ("mlp", "mlp")):
            table[f"blocks.{{}}.hook_{hook}_out"] = f"blocks.{{}}.{sublayer}_post_norm.output"
    if config.embedding_norm:  # there it names the sum of all terms, normalised
        table.pop("hook_embed")
    if config.norm_position == "post":  # it names what has been normalised and added
        moved = re.compile("resid|hook_(attn|mlp)_out")
        table = {alias: ours for alias, ours in table.items() if not moved.search(alias)}
    if config.parallel:
        table.pop("blocks.{}.hook_resid_mid")
    found: dict[str, list[str]] = {}
    for alias, ours in table.items():
        found.setdefault(ours, []).append(alias)
    return found


_QK = (("q", "query"), ("k", "key"))

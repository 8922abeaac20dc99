"""Edges: which part's output matters to which part's input, one path at a time.

The residual stream that a part reads is the sum of what the embedding, heads and MLPs before it
wrote. So each of these senders has an edge to each later receiver: to the queries, keys and values
of every head apart, to the MLPs, and to the logits. An edge is patched by changing the stream that
its receiver reads by what its sender wrote in the other text less what it writes here; nobody else
sees the change (Wang et al. 2022; Goldowsky-Dill et al. 2023; Conmy et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check
from lm.interpretability.heads import direct_heads
from lm.interpretability.patching import Array, Contrast
from lm.models import ModelConfig, bind

Text = Literal["clean", "corrupt"]


@dataclasses.dataclass(frozen=True)
class Graph:
    """The senders and receivers of a model, in order.

    They are called 'embedding', 'head 1.0' and 'mlp 1'; and 'query 2.3', 'key 2.0', 'value 2.0' (of
    key/value heads), 'mlp 2' and 'logits'.

    Attributes:
      senders, receivers: their names.
      before: of each receiver, how many senders write before it reads.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    before: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> Graph:
        """Of a decoder or encoder that is pre-norm; raises `ConfigError` of another."""
        direct_heads(config)
        check(
            config.norm_position == "pre"
            and not (config.shared_norm or (config.qk_norm and config.qk_norm_joint)),
            f"norm_position={config.norm_position!r}, shared_norm={config.shared_norm}, "
            f"qk_norm_joint={config.qk_norm_joint}: edges need parts that read the sum of what "
            "others wrote, each through norms of its own",
        )
        mlps = config.num_experts > 0 or config.feed_forward > 0
        senders, receivers = ["embedding"], []
        for i in range(config.num_layers):
            kinds = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
            for kind, heads in kinds.items():
                receivers += [(f"{kind} {i}.{h}", len(senders)) for h in range(heads)]
            first = len(senders)
            senders += [f"head {i}.{h}" for h in range(config.num_heads)]
            if mlps:
                receivers.append((f"mlp {i}", first if config.parallel else len(senders)))
                senders.append(f"mlp {i}")
        receivers.append(("logits", len(senders)))
        return cls(tuple(senders), *zip(*receivers))

    @property
    def edges_RS(self) -> np.ndarray:
        """Which edges there are."""
        return np.arange(len(self.senders)) < np.array(self.before)[:, None]

    def rows(self, name: str) -> slice:
        """The receivers of this name, or of all heads of a kind and layer, such as "query 2"."""
        found = [i for i, n in enumerate(self.receivers) if n == name or n.startswith(f"{name}.")]
        return slice(found[0], found[-1] + 1)

    def mask(self, pairs: Iterable[tuple[str, str]]) -> np.ndarray:
        """The edges [R, S] of (sender, receiver) pairs; raises `ConfigError` of one not there."""
        mask = np.zeros(self.edges_RS.shape, bool)
        for sender, receiver in pairs:
            known = sender in self.senders and receiver in self.receivers
            at = known and (self.receivers.index(receiver), self.senders.index(sender))
            check(known and self.edges_RS[at], f"there is no edge from {sender!r} to {receiver!r}")
            mask[at] = True
        return mask


class _Run:
    """A tap that keeps what senders write and changes what receivers read: one run of a text.

    Args:
      contrast, params, held: whose; and what is frozen.
      text: which of the two.
      change_BTRD: added to what each receiver reads.
      mask_RS, other_SBTD: edges that carry what another run's senders wrote.
      toward: how far the embedding goes from this text's to another, and that.
    """

    def __init__(self, contrast: Contrast, params, held, text: Text, change_BTRD=None, mask_RS=None,
                 other_SBTD=None, toward=None):  # fmt: skip
        model = bind(contrast.skeleton, params)
        self.graph, self.blocks, self.held = Graph.of(model.config), model.each_block(), held
        self.change_BTRD, self.toward = change_BTRD, toward
        self.mask_RS, self.other_SBTD = mask_RS, other_SBTD
        self.sent: list[jax.Array] = []
        self.config = model.config
        tokens_BT = contrast.clean_BT if text == "clean" else contrast.corrupt_BT
        tap = contrast.corrupted(self) if text == "corrupt" else self
        self.m = jnp.mean(contrast.metric(model(tokens_BT, tap=tap)))
        self.sent_SBTD = jnp.stack(self.sent)

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """What goes on in place of a named activation."""
        where, _, site = name.rpartition(".")
        if name == "embedding" and self.toward is not None:
            share, other_BTD = self.toward
            value += share * (other_BTD - value)
        if site in ("residual_before", "residual_middle"):
            self.stream_BTD = value
        elif where.endswith(".attention") and (kind := self._kind(where, site)):
            value = self._projected(where, kind).astype(value.dtype)
        elif name.endswith("mlp.output"):
            value = self._fed(where).astype(value.dtype)
        elif name == f"blocks.{len(self.blocks) - 1}.residual_after":
            value += self._change("logits")[:, :, 0]
        value = self.held.get(name, value)
        if site == "heads":
            weights_HCD = self._block(where).attention.output[...]
            self.sent += [*jnp.einsum("bthc,hcd->hbtd", value, weights_HCD)]
        elif name == "embedding" or name.endswith("mlp.output"):
            self.sent.append(value)
        return value

    def _block(self, name: str):
        return self.blocks[int(name.split(".")[1])]

    def _kind(self, where: str, site: str) -> str | None:
        """query, key or value, where a site is the first after its projection and norm."""
        rotated = self.config.layer_kind(int(where.split(".")[1])).rotated
        suffix = "_unrotated" if rotated and self.config.positions == "rotary" else ""
        sites = {f"query{suffix}": "query", f"key{suffix}": "key", "value": "value"}
        return sites.get(site)

    def _again(self, module, name: str, x):
        """What a norm or an MLP makes of other inputs, with what is frozen in it for all heads."""

        def tap(part, value):
            held = self.held.get(f"{name}.{part}", value)
            return held if held.ndim == value.ndim else held[:, :, None]

        return x if module is None else module(x, tap)

    def _change(self, receivers: str):
        """What is added to the stream that receivers read, [B, T, R, D]."""
        rows, total = self.graph.rows(receivers), jnp.zeros(())
        if self.change_BTRD is not None:
            total += self.change_BTRD[:, :, rows]
        if self.mask_RS is not None:
            upto = self.graph.before[rows.start]
            differ_SBTD = self.other_SBTD[:upto] - jnp.stack(self.sent[:upto])
            mask_RS = self.mask_RS[rows, :upto].astype(differ_SBTD.dtype)
            total += jnp.einsum("rs,sbtd->btrd", mask_RS, differ_SBTD)
        return jnp.broadcast_to(total, (*self.stream_BTD.shape[:2], rows.stop - rows.start,
                                        self.stream_BTD.shape[2]))  # fmt: skip

    def _projected(self, where: str, kind: str):
        """Queries, keys or values of what each head reads; as they were where nothing changed."""
        layer, block = where.split(".")[1], self._block(where)
        x_BTHD = self.stream_BTD[:, :, None] + self._change(f"{kind} {layer}")
        norm = getattr(block, "attention_norm", None)
        x_BTHD = self._again(norm, f"blocks.{layer}.attention_norm", x_BTHD)
        x_BTHC = jnp.einsum("bthd,dhc->bthc", x_BTHD, getattr(block.attention, kind)[...])
        if hasattr(block.attention, f"{kind}_bias"):
            x_BTHC += getattr(block.attention, f"{kind}_bias")[...]
        norm = getattr(block.attention, f"{kind}_norm", None)
        x_BTHC = self._again(norm, f"{where}.{kind}_norm", x_BTHC)
        # Queries that are not rotated are seen after they are scaled.
        scaled = kind == "query" and self._kind(where, "query")
        return x_BTHC * self.config.layer_kind(int(layer)).query_scale if scaled else x_BTHC

    def _fed(self, where: str):
        """What the MLP, or the experts, make of what they read."""
        layer, block = where.split(".")[1], self._block(where)
        x_BTD = self.stream_BTD + self._change(f"mlp {layer}")[:, :, 0]
        norm = getattr(block, "mlp_norm", None)
        out = self._again(block.mlp, where, self._again(norm, f"blocks.{layer}.mlp_norm", x_BTD))
        return out[0] if isinstance(out, tuple) else out


def edge_patching(
    contrast: Contrast, masks_NRS: Array, into: Text = "corrupt", batch_size: int = 8
) -> np.ndarray:
    """The effect of each mask of edges, whose receivers read of their senders the other text: [N].

    Args:
      masks_NRS: of each run, the edges (`Graph`) that are patched.
      into: the text that is run; with "clean", edges carry what the corrupt text sends.
      batch_size: runs at a time.
    """
    other: Text = "clean" if into == "corrupt" else "corrupt"

    @jax.jit
    def runs(params, masks_NRS):
        held = contrast.held(params)
        sent = _Run(contrast, params, held, other).sent_SBTD

        def patched(mask):
            return _Run(contrast, params, held, into, mask_RS=mask, other_SBTD=sent).m

        return jax.lax.map(patched, masks_NRS, batch_size=min(batch_size, len(masks_NRS)))

    return contrast.effect(runs(contrast.params, jnp.asarray(masks_NRS)))


def path_patching(
    contrast: Contrast, senders: Sequence[str], receivers: Sequence[str], into: Text = "corrupt"
) -> np.ndarray:
    """The effect of each sender on the receivers alone, every other path frozen: [senders].

    What the receivers do then runs its course.

    Args:
      senders, receivers: by their names in `Graph`, such as "head 3.1" and "query 5.0", "logits".
    """
    graph = Graph.of(contrast.skeleton.config)
    masks = [graph.mask((sender, receiver) for receiver in receivers) for sender in senders]
    return edge_patching(contrast, np.stack(masks), into)


def edge_attribution(contrast: Contrast, points: int = 0) -> np.ndarray:
    """The effect, to first order, of patching each edge into the corrupt run: [R, S].

    EAP (Syed et al. 2023): (what the sender writes clean − corrupt) · ∂M/∂(what the receiver
    reads). With integrated gradients (EAP-IG, Hanna et al. 2024) the gradient is its mean while the
    embedding goes from corrupt to clean, so that the edges out of the embedding sum to the whole
    effect, 1, up to the error of the quadrature.

    Args:
      points: of the way (Gauss-Legendre); 0: the gradient at the corrupt text, without integration.
    """
    graph = Graph.of(contrast.skeleton.config)
    shares, weights = np.polynomial.legendre.leggauss(max(points, 1))
    shares, weights = (shares + 1) / 2, weights / 2

    @jax.jit
    def scores(params):
        held = contrast.held(params)
        sent = [_Run(contrast, params, held, text).sent_SBTD for text in ("clean", "corrupt")]
        shape_BT, width = np.shape(contrast.clean_BT), contrast.skeleton.config.width
        change_BTRD = jnp.zeros((*shape_BT, len(graph.receivers), width))

        def slope(each):
            toward = (each[0], sent[0][0]) if points else None

            def m(change_BTRD):
                return _Run(contrast, params, held, "corrupt", change_BTRD, toward=toward).m

            return each[1] * jax.grad(m)(change_BTRD)

        slope_BTRD = jax.lax.map(slope, (jnp.asarray(shares), jnp.asarray(weights))).sum(0)
        return jnp.einsum("sbtd,btrd->rs", sent[0] - sent[1], slope_BTRD)

    clean, corrupt = contrast.ends
    return np.where(graph.edges_RS, np.asarray(scores(contrast.params)) / (clean - corrupt), 0)


def faithfulness(contrast: Contrast, kept_NRS: Array) -> np.ndarray:
    """How much of the effect is left where only these edges carry the clean text: [N].

    All others carry the corrupt one: 1 of a circuit that does all, 0 of none.
    """
    graph = Graph.of(contrast.skeleton.config)
    return edge_patching(contrast, graph.edges_RS & ~np.asarray(kept_NRS, bool), into="clean")


def strongest(scores_RS: np.ndarray, number: int) -> np.ndarray:
    """The `number` edges of the largest scores in size: a mask [R, S]."""
    order = np.argsort(-np.abs(scores_RS), axis=None)[:number]
    mask = np.zeros(scores_RS.size, bool)
    mask[order] = True
    return mask.reshape(scores_RS.shape)

"""A dictionary's features on one page: examples, tokens they promote, how often they fire.

The page needs no network. A feature's examples are the stretches of held-out text around the
tokens at which it fires most, its activation behind each token. Tokens it promotes and suppresses
are those whose logits its decoder vector alone moves most, through the final norm's gains (centred
over the vocabulary); what later layers make of it is not in that.
"""

from __future__ import annotations

import html
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.evaluation.card import Table
from lm.evaluation.page import table_html, write_page
from lm.interpretability.attribution import held
from lm.interpretability.dictionaries import Dictionary
from lm.interpretability.dictionary_evaluation import (
    MEAN,
    REBUILD,
    ZERO,
    Faithfulness,
    on_all,
    text_fields,
)
from lm.models import Model, bind
from lm.models.activations import trace
from lm.tokenizers import Tokenizer
from lm.training.step import Batch

_EXAMPLES, _AROUND, _TOKENS, _BINS = 8, 16, 8, 24
_STYLE = (
    "<style>mark{background:color-mix(in srgb,var(--accent) var(--a),transparent);color:inherit;"
    "border-radius:3px}.text{white-space:pre-wrap;font-family:ui-monospace,monospace;"
    "font-size:.875rem;margin:.35rem 0;border-left:3px solid var(--line);padding-left:.75rem}"
    ".bars{display:block;width:100%;max-width:24rem;height:4rem;color:var(--accent)}</style>"
)


class Examples(NamedTuple):
    """Chosen features and all that was read while they were watched."""

    chosen: Sequence[tuple[int, int]]  # (index of the layer, feature)
    tokens_NT: np.ndarray  # ids; -1 is padding
    activations_CNT: np.ndarray
    logits_CV: np.ndarray  # what one unit of each adds to the logits directly, centred


def collect(
    model: Model,
    dictionary: Dictionary,
    base: Mapping[str, jax.Array],
    batches: Iterable[Batch],
    faithful: Faithfulness,
    count: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Examples:
    """Watches features on some text: of each layer `count`, from the busiest to the rarest.

    Arguments as of `lm.interpretability.dictionary_evaluation.make_measure`; all hosts call it.
    """
    chosen = []
    for index, density_F in enumerate(faithful.density_LF):
        order = np.argsort(-density_F, kind="stable")[: (density_F > 0).sum()]
        ranks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
        chosen += [(index, int(order[rank])) for rank in ranks]
    layers, features = np.array(chosen, int).reshape(-1, 2).T

    @on_all(mesh)
    def watch(base, batch):
        fields, valid_BT = text_fields(batch)
        found = trace(bind(model, base), batch["inputs"], names=list(dictionary.sources), **fields)
        a_LBTF = dictionary.encode(jnp.stack([found[name] for name in dictionary.sources]))
        a_CBT = jnp.moveaxis(a_LBTF, -1, 1)[layers, features]
        return jnp.where(valid_BT, batch["inputs"], -1), a_CBT * valid_BT

    seen = [jax.tree.map(np.asarray, watch(base, batch)) for batch in batches]
    tokens_NT = np.concatenate([tokens for tokens, _ in seen])
    direct = on_all(mesh)(lambda base: direct_logits(bind(model, base), dictionary, chosen))
    activations_CNT = np.concatenate([a for _, a in seen], axis=1)
    return Examples(chosen, tokens_NT, activations_CNT, np.asarray(direct(base)))


def table(dictionary: Dictionary, faithful: Faithfulness) -> Table:
    """Faithfulness of every layer, and of all together."""
    zero, mean, nats = (faithful.recovered(ZERO), faithful.recovered(MEAN), faithful.spliced)
    rows = [
        [name, *(float(x) for x in numbers)]
        for name, *numbers in zip(
            [f"layer {layer}" for layer in dictionary.layers],
            faithful.fvu_L, faithful.l0_L, (faithful.density_LF == 0).mean(-1),
            nats[REBUILD], nats[ZERO], zero, mean,
        )
    ]  # fmt: skip
    means = [float(x.mean()) for x in (faithful.fvu_L, faithful.l0_L)]
    last = [float(x[-1]) for x in (nats[REBUILD], nats[ZERO], zero, mean)]
    rows.append(["all", *means, faithful.dead, *last])
    head = ["", "FVU", "L0", "dead", "nats spliced", "nats zeroed", "recovered", "of the mean's"]
    title = f"On {faithful.tokens:,.0f} tokens; the model's own loss is {faithful.nats:.3f} nats"
    return Table(title, head, rows)


def lines(dictionary: Dictionary, faithful: Faithfulness) -> str:
    """The same for a terminal."""
    found = table(dictionary, faithful)
    cells = [found.head, *([r[0], *(f"{x:.3f}" for x in r[1:])] for r in found.rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        [found.title] + ["  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in cells]
    )


def write(
    path: pathlib.Path,
    facts: Mapping[str, Any],
    tokenizer: Tokenizer,
    dictionary: Dictionary,
    faithful: Faithfulness,
    examples: Examples,
    command: str,
) -> pathlib.Path:
    """Writes the page, and returns its path; `facts` are said at its head."""
    body = _body(facts, tokenizer, dictionary, faithful, examples, command)
    return write_page(path, "Features", body)


def direct_logits(
    model: Model, dictionary: Dictionary, chosen: Sequence[tuple[int, int]]
) -> jax.Array:
    """What one unit of each chosen feature adds to the logits directly: [C, V], centred.

    Args:
      model: bound.
    """
    vectors = []
    for index, feature in chosen:
        _, written = dictionary.decoder(index)
        vectors.append(written[:, feature].sum(0))
    w_CD = jnp.stack(vectors) if vectors else jnp.zeros((0, dictionary.b_dec.shape[1]))
    norm = getattr(model, "final_norm", None)
    w_CD = w_CD if norm is None else held(norm, w_CD)
    w_CD = model.project(w_CD[None])[0] if hasattr(model, "project") else w_CD
    logits_CV = w_CD @ model.output_weights().T
    return logits_CV - logits_CV.mean(-1, keepdims=True)


def _body(facts, tokenizer, dictionary, faithful, examples, command) -> Iterator[str]:
    esc = html.escape
    yield f"{_STYLE}<h1>Features of {esc(str(facts['model']))}</h1><dl>"
    for name, value in facts.items():
        yield f"<dt>{esc(name)}<dd>{esc(str(value))}"
    yield '</dl><p class="quiet">Made by</p>'
    yield f'<pre tabindex="0" role="region" aria-label="Command">{esc(command)}</pre>'
    yield "<h2>How faithful</h2>" + table_html(table(dictionary, faithful))
    yield "<p>FVU: fraction of variance unexplained. L0: features that fire at a token. Dead: "
    yield "share of features that fired at no token here. Nats a token with the layer's output "
    yield "rebuilt, or zero; recovered: how much of the loss between the zeroed (or mean) output "
    yield "and the true one the rebuilt saves. In the last row all layers are replaced at once.</p>"
    yield "<h2>How often features fire</h2>"
    for layer, density_F in zip(dictionary.layers, faithful.density_LF):
        logs = np.log10(density_F[density_F > 0])
        yield f"<h3>Layer {layer}</h3>" + _bars(logs, "log₁₀ of the share of tokens")
    text = [tokenizer.token_bytes(i).decode(errors="replace") for i in range(tokenizer.vocab_size)]
    for number, (index, feature) in enumerate(examples.chosen):
        if not number or examples.chosen[number - 1][0] != index:
            yield f"<h2>Features of layer {dictionary.layers[index]}</h2>"
        a_NT, logits_V = examples.activations_CNT[number], examples.logits_CV[number]
        share = faithful.density_LF[index, feature]
        yield f"<section><h3>Feature {feature}</h3><p>Fires at {share:.3%} of tokens"
        yield f", up to {a_NT.max():.2f}.</p>" + _bars(a_NT[a_NT > 0], "activation where it fires")
        order = np.argsort(logits_V[: len(text)], kind="stable")
        for words, ids in (("promotes", order[::-1][:_TOKENS]), ("suppresses", order[:_TOKENS])):
            said = ", ".join(f"{text[i]!r} {logits_V[i]:+.2f}" for i in ids)
            yield f"<p><b>{words}</b> {esc(said)}</p>"
        yield from _examples(text, examples.tokens_NT, a_NT)
        yield "</section>"


def _examples(text: Sequence[str], tokens_NT, a_NT) -> Iterator[str]:
    """The strongest place of each of some rows, with what stands around it."""
    top = max(float(a_NT.max()), 1e-9)
    best_N, place_N = a_NT.max(1), a_NT.argmax(1)
    for row in np.argsort(-best_N, kind="stable")[:_EXAMPLES]:
        if best_N[row] <= 0:
            return
        low, parts = max(0, place_N[row] - _AROUND), []
        for place in range(low, min(place_N[row] + _AROUND // 2 + 1, len(a_NT[row]))):
            token, a = tokens_NT[row, place], float(a_NT[row, place])
            if token < 0:
                continue
            word = html.escape(text[token] if token < len(text) else "�")
            share = round(70 * a / top)
            parts.append(
                f'<mark style="--a:{share}%" title="{a:.2f}">{word}</mark>' if a > 0 else word
            )
        yield f'<p class="text"><span class="quiet">{best_N[row]:.2f} </span>{"".join(parts)}</p>'


def _bars(values: np.ndarray, what: str) -> str:
    """A histogram, as a drawing and in words."""
    if not len(values):
        return f'<p class="quiet">{what}: nothing fires.</p>'
    counts, edges = np.histogram(values, _BINS)
    bars = "".join(
        f'<rect x="{10 * i}" width="9" y="{60 - 60 * c / counts.max():.1f}" '
        f'height="{60 * c / counts.max():.1f}"/>'
        for i, c in enumerate(counts)
    )
    said = f"{what}: {edges[0]:.2f} to {edges[-1]:.2f}, median {np.median(values):.2f}"
    return (
        f'<svg class="bars" role="img" aria-label="{said}" viewBox="0 0 {10 * _BINS} 60" '
        f'preserveAspectRatio="none" fill="currentColor">{bars}</svg><p class="quiet">{said}.</p>'
    )

"""A token's tale as one page that needs no network: by eye, by keyboard, or read aloud."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lm.evaluation.card import Table
from lm.evaluation.page import folded, shown, table_html, write_page
from lm.interpretability.heatmaps import coloured, token_names
from lm.interpretability.tale import Head, Layer, Likely, Tale
from lm.models import ModelConfig
from lm.tokenizers import Tokenizer

_SOURCES = 3  # tokens that a head's row names
_PARTS = 14  # parts of a logit that are listed, those of most weight


def write_tale(
    path: pathlib.Path,
    tale: Tale,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    model: str,
    command: str,
) -> pathlib.Path:
    """Writes the page, and returns its path.

    Args:
      path: where to.
      tale, config, tokenizer: what is told, of which model.
      model, command: its name, and what makes the page again.
    """
    teller = _Teller(tale, config, tokenizer)
    here = pathlib.Path(__file__)
    style, script = (
        here.with_name(f"tale.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    body = [f"<style>{style}</style>", *teller.page(model, command), f"<script>{script}</script>"]
    return write_page(path, f"The tale of {teller.token}: {model}", body)


class _Teller:
    def __init__(self, tale: Tale, config: ModelConfig, tokenizer: Tokenizer | None):
        self.tale, self.config, self.tokenizer = tale, config, tokenizer
        self.names = token_names(tokenizer, tale.ids)
        self.token = self.names[tale.place]
        (self.target,) = token_names(tokenizer, [tale.target])

    def page(self, model: str, command: str) -> Iterator[str]:
        """The parts of the page's body, in order."""
        esc, tale = html.escape, self.tale
        chosen = token_names(self.tokenizer, tale.logits.ids[:1])[0]
        ends = (
            f"the prompt goes on with {_code(self.target)}"
            if tale.given
            else "the prompt ends here"
        )
        yield (
            f"<h1>The tale of {_code(self.token)}</h1><p>Token {tale.place + 1} of "
            f"{len(tale.ids)}, on its way through <b>{esc(model)}</b>. After it the model expects "
            f"{_code(chosen)}; {ends}. Every number is of one forward and one backward pass, in "
            "float32.</p>"
        )
        yield self._prompt()
        stations = list(self._stations())
        links = "".join(f'<li><a href="#{name}">{esc(title)}</a>' for name, title, _ in stations)
        yield (
            f'<nav aria-label="Stations"><ul>{links}</ul><p class="quiet">Keys: <kbd>n</kbd> and '
            "<kbd>p</kbd> go to the next and the previous station, <kbd>o</kbd> opens or closes "
            "all layers.</p></nav>"
        )
        for name, title, parts in stations:
            yield f'<section id="{name}" class="station" aria-labelledby="{name}-title">'
            yield f'<h2 id="{name}-title" tabindex="-1">{esc(title)}</h2>'
            yield from parts
            yield "</section>"
        yield '<p class="quiet">Made by</p><pre tabindex="0" role="region" aria-label="Command">'
        yield esc(command).replace(" --config.", " \\\n    --config.") + "</pre>"

    def _prompt(self) -> str:
        spans = [
            f"<li{' aria-current=true' if i == self.tale.place else ''}>{_code(name)}"
            for i, name in enumerate(self.names)
        ]
        return f'<ol class="tokens" aria-label="The prompt, token by token">{"".join(spans)}</ol>'

    def _stations(self) -> Iterator[tuple[str, str, Iterable[str]]]:
        yield "token", "From text to number", self._token()
        yield "embedding", "From number to direction", self._embedding()
        yield "position", "Where it stands", self._position()
        yield "stream", "The residual stream", self._stream()
        yield "layers", "Layer by layer", self._layers()
        yield "logits", "What comes next", self._logits()
        if self.tale.parts:
            yield "parts", "Who said so", self._parts()
        yield "back", "And back", self._back()

    def _token(self) -> Iterator[str]:
        token = self.tale.ids[self.tale.place]
        data = self.tokenizer.token_bytes(token) if self.tokenizer else None
        size = f"{self.config.vocab_size:,}"
        yield f"<p>The tokenizer knows {size} pieces of text. This one is number <b>{token:,}</b>"
        if data:
            plural = "byte" if len(data) == 1 else "bytes"
            shown_bytes = f'<code class="whole">{data.hex(" ")}</code>'
            yield f": the {len(data)} {plural} {shown_bytes}"
        yield ". All that the model ever sees of it is the number.</p>"

    def _embedding(self) -> Iterator[str]:
        tale, width = self.tale, self.config.width
        scale = self.config.embedding_scale or width**0.5
        times = "" if scale == 1 else f", which the model takes times {shown(scale)}"
        yield (
            f"<p>Row {tale.ids[tale.place]:,} of the embedding: {width:,} numbers, of length "
            f"{shown(tale.row)}{times}. The rows nearest to it are of</p>"
        )
        yield self._likely_table("Nearest tokens by cosine", tale.neighbours, "cosine")

    def _position(self) -> Iterator[str]:
        tale, kind = self.tale, self.config.positions
        if tale.position is not None:
            yield (
                f"<p>Place {tale.place} adds a vector of its own ({html.escape(kind)}), of length "
                f"{shown(tale.position)}; its cosine with the row is {shown(tale.position_cosine)}."
                " The sum is the residual stream that the first block reads.</p>"
            )
            return
        words = {
            "rotary": "Nothing is added here: in every head queries and keys are turned by an "
            "angle that grows with the place, so that scores depend on how far apart tokens are.",
            "alibi": "Nothing is added here: every head takes off its scores what grows with the "
            "distance, each at a rate of its own.",
            "relative": "Nothing is added here: every head adds to its scores a number learnt for "
            "each distance.",
        }
        default = "The model is told nothing of places but what its causal mask lets it see."
        yield f"<p>{words.get(kind, default)} This token stands at place {tale.place}.</p>"

    def _stream(self) -> Iterator[str]:
        tale = self.tale
        yield (
            f"<p>From here on the token is a vector of {self.config.width:,} numbers to which "
            "every part adds. Each row below is that vector after one of them, blue above and red "
            "below zero, each on a scale of its own; its length goes from "
            f"{shown(float(np.linalg.norm(tale.streams[0])))} to "
            f"{shown(float(np.linalg.norm(tale.streams[-1])))}.</p>"
        )
        alt = f"The residual stream after {len(tale.stream_names)} parts, each a row of colours"
        yield _strip(_scaled(tale.streams), alt, "stream")
        rows = [
            [name, float(np.linalg.norm(x))] for name, x in zip(tale.stream_names, tale.streams)
        ]
        yield folded(
            "Lengths", [table_html(Table("Length of the stream", ["after", "length"], rows))]
        )

    def _layers(self) -> Iterator[str]:
        then = "" if self.config.mlp_width == 0 else "; the MLP then looks at this token alone"
        yield (
            "<p>A head compares this token's query with the keys of all tokens up to it, and takes "
            f"a mean of their values{then}. A layer's line says what the model would answer if it "
            "stopped there. A write <i>says</i> the tokens whose logits it raises most by itself."
            "</p>"
        )
        for number, layer in enumerate(self.tale.layers):
            yield f"<details{' open' if number == 0 else ''}>{self._summary(number, layer)}"
            yield from self._layer(number, layer)
            yield "</details>"

    def _summary(self, number: int, layer: Layer) -> str:
        strongest = max(range(len(layer.heads)), key=lambda h: layer.heads[h].wrote, default=None)
        said, share = self._first(layer.says)
        text = f"<b>Layer {number}</b>"
        if strongest is not None:
            head = layer.heads[strongest]
            source = int(np.argmax(head.pattern))
            text += (
                f" · head {strongest} took most, from {_code(self.names[source])} "
                f"({head.pattern[source]:.0%})"
            )
        return f"<summary>{text} · would say {_code(said)} ({share:.0%})</summary>"

    def _layer(self, number: int, layer: Layer) -> Iterator[str]:
        gain = layer.attention_gain
        if gain is not None and self.config.norm_position != "post":
            yield (
                f"<p>The norm before attention multiplies the stream, of length "
                f"{shown(layer.before)}, by {shown(gain)} (and by its learnt gains).</p>"
            )
        if layer.heads:
            yield self._heads(number, layer.heads)
            yield f"<p>Together attention wrote {shown(layer.attention_wrote)}.</p>"
        if layer.experts:
            title = f"Experts chosen in layer {number}"
            yield table_html(Table(title, ["expert", "weight"], [list(e) for e in layer.experts]))
        if layer.neurons:
            rows = [[n.number, n.value, n.wrote, self._words(n.promotes)] for n in layer.neurons]
            head = ["neuron", "value", "wrote", "says"]
            yield table_html(Table(f"Neurons of MLP {number} that wrote most", head, rows))
        if layer.mlp_wrote is not None:
            active = (
                "" if layer.active is None else f"; {layer.active:.0%} of its units are above 0"
            )
            gain = (
                ""
                if layer.mlp_gain is None
                else f" (its norm multiplied by {shown(layer.mlp_gain)})"
            )
            yield f"<p>The MLP{gain} wrote {shown(layer.mlp_wrote)}{active}.</p>"
        yield (
            f"<p>The stream is now {shown(layer.after)} long; its cosine with what came in is "
            f"{shown(layer.cosine)}.</p>"
        )
        yield self._likely_table(f"If it stopped after layer {number}", layer.says, "probability")

    def _heads(self, number: int, heads: Sequence[Head]) -> str:
        rows = []
        for index, head in enumerate(heads):
            order = np.argsort(head.pattern)[::-1][:_SOURCES]
            asked = ", ".join(
                f"{_code(self.names[s])} {head.pattern[s]:.0%}"
                for s in order
                if head.pattern[s] >= 0.005
            )
            strip = _strip(np.array([head.pattern]), "", "pattern")
            rows.append(
                f'<tr><th scope="row">{index}<td>{strip}<td>{asked}<td class="n">'
                f"{shown(head.wrote)}<td>{self._words(head.promotes, True)}"
            )
        title = f"Heads of layer {number}: whom each asked, and what it took"
        heading = '<th>head<th>from first to this<th>asked<th class="n">wrote<th>says'
        return (
            f'<div class="wide" role="region" tabindex="0" aria-label="{title}">'
            f'<table class="heads"><caption>{title}</caption><thead><tr>{heading}</thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    def _logits(self) -> Iterator[str]:
        tale = self.tale
        if tale.final_gain is not None:
            yield (
                f"<p>A last norm multiplies the stream by {shown(tale.final_gain)}, and the output "
                "head compares it with every token's row.</p>"
            )
        target, place = _code(self.target), tale.logits.ids
        rank = place.index(tale.target) + 1 if tale.target in place else None
        which = "the next token of the prompt" if tale.given else "the likeliest"
        ranked = f"number {rank}" if rank else f"not among the first {len(place)}"
        yield self._likely_table("The likeliest next tokens", tale.logits, "probability")
        yield (
            f"<p>{target}, {which}, is {ranked}: logit {shown(tale.logit)}, loss "
            f"{shown(tale.loss)} nats. The entropy of all is {shown(tale.entropy)} nats.</p>"
        )

    def _parts(self) -> Iterator[str]:
        tale = self.tale
        order = sorted(tale.parts, key=lambda name: -abs(tale.parts[name]))
        rows = [[name, tale.parts[name]] for name in order[:_PARTS]]
        rest = order[_PARTS:]
        if rest:
            rows.append([f"{len(rest)} more", sum(tale.parts[name] for name in rest)])
        rows.append(["sum", tale.parts_sum])
        raw = " before the soft cap" if self.config.logits_softcap else ""
        held = "" if tale.final_gain is None else ", the last norm's scale held"
        yield (
            f"<p>The stream is a sum, so the logit of {_code(self.target)}{raw} is one, too{held}: "
            "these are its terms.</p>"
        )
        yield table_html(Table("Terms of the logit", ["part", "adds"], rows))

    def _back(self) -> Iterator[str]:
        tale = self.tale
        yield (
            f"<p>Had {_code(self.target)} been learnt here, its loss would reach back. How long "
            "its gradient is in each token's stream, from the embedding (first row) to the last "
            "block, each row on a scale of its own: attention carries it to the tokens that were "
            "read.</p>"
        )
        shown_T = tale.back[:, : tale.place + 1]
        alt = "Length of the gradient by layer, in rows, and token, in columns"
        yield _strip(_scaled(shown_T), alt, "back")
        order = np.argsort(shown_T[0])[::-1][:8]
        rows = [[self.names[i], float(shown_T[0, i]), float(shown_T[-1, i])] for i in sorted(order)]
        head = ["token", "at the embedding", "after the last block"]
        yield table_html(Table("Length of the gradient", head, rows))
        read, whole = shown(tale.read_gradient), shown(tale.row_gradient)
        tied = (
            f"What came by its being read is {read} long; the rest is of the output head, whose "
            "rows are the same"
            if self.config.tie_embeddings
            else "All of it comes from its being read"
        )
        yield (
            f"<p>In the end it reaches the row of {_code(self.token)}, with length {whole}. {tied}."
            " A step against it moves the row towards</p>"
        )
        yield self._likely_table("Where a step would move the row", tale.moved, "cosine")

    def _first(self, likely: Likely) -> tuple[str, float]:
        return token_names(self.tokenizer, likely.ids[:1])[0], likely.scores[0]

    def _words(self, likely: Likely, marked: bool = False) -> str:
        names = token_names(self.tokenizer, likely.ids)
        return ", ".join(map(_code, names)) if marked else "  ".join(names)

    def _likely_table(self, title: str, likely: Likely, score: str) -> str:
        rows = []
        for name, value in zip(token_names(self.tokenizer, likely.ids), likely.scores):
            wide = max(0.0, min(1.0, value))
            text = f"{value:.1%}" if score == "probability" else shown(value)
            rows.append(
                f'<tr><th scope="row">{_code(name)}<td class="n">{text}'
                f'<td class="share" aria-hidden="true"><i style="width:{100 * wide:.1f}%"></i>'
            )
        return (
            f'<table class="likely"><caption>{html.escape(title)}</caption><thead><tr><th>token'
            f'<th class="n">{score}<td></thead><tbody>{"".join(rows)}</tbody></table>'
        )


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _scaled(values_RC: np.ndarray) -> np.ndarray:
    """Each row as a share of its largest number."""
    largest_R = np.abs(values_RC).max(1, keepdims=True)
    return values_RC / np.where(largest_R == 0, 1, largest_R)


def _strip(values_RC: np.ndarray, alt: str, kind: str) -> str:
    """A small picture, a pixel a number: blue above zero, red below, clear at it."""
    from matplotlib.image import imsave

    largest = np.quantile(np.abs(values_RC), 0.995) or 1.0
    buffer = io.BytesIO()
    imsave(buffer, coloured(np.clip(values_RC / largest, -1, 1)), format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="strip {kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'

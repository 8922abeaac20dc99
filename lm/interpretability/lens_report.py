"""What lenses, attribution and maps show of one prompt, as sections of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ConfigError
from lm.evaluation.card import NotApplicable, Section, Table
from lm.interpretability.attribution import TERMS, direct_logit_attribution, summed
from lm.interpretability.heatmaps import heatmap, token_names
from lm.interpretability.lenses import Lens, divergences, stream_maps, streams
from lm.models import bind
from lm.runs.run import Run

_NEURONS = 20  # that are listed
_MAPS = {
    "norm": "Norm of the residual stream",
    "to_last": "Cosine with the last stream",
    "to_next": "Cosine with the stream after the next block",
    "attention": "Norm of what attention writes",
    "attention_cosine": "Cosine of what attention writes with the stream",
    "mlp": "Norm of what the MLP writes",
    "mlp_cosine": "Cosine of what the MLP writes with the stream",
}
_SHOWN = 32  # places of the prompt that are drawn: the last ones


def layer_names(run: Run) -> list[str]:
    """What stands beside the rows of a picture: the embedding, and each block."""
    return ["embedding", *map(str, range(run.skeleton.config.num_layers))]


def said(run: Run, tokens_1T: np.ndarray, lenses: Mapping[str, Lens], held_NT=None) -> Section:
    """What each lens says after every block, at each place of the prompt; and how far off it is.

    Args:
      run, tokens_1T: the model, and the prompt.
      lenses: by their names.
      held_NT: rows of other texts, on which the lenses are compared.
    """

    @jax.jit
    def likeliest(params, tokens_1T, lens):
        model = bind(run.skeleton, params)
        p_LTV = jax.nn.softmax(lens(model, streams(model, tokens_1T))[:, 0])
        return jnp.argmax(p_LTV, -1), jnp.max(p_LTV, -1)

    @jax.jit
    def off(params, held_NT, lens):
        model = bind(run.skeleton, params)
        return divergences(model, lens, streams(model, held_NT))

    names, layers = token_names(run.tokenizer, tokens_1T[0]), layer_names(run)
    follows = "next " if run.skeleton.config.architecture == "decoder" else ""
    pictures, tables = [], []
    for name, lens in lenses.items():
        ids_LT, p_LT = (np.asarray(x)[::-1] for x in likeliest(run.params, tokens_1T, lens))
        texts = [token_names(run.tokenizer, row) for row in ids_LT]
        shown = slice(-_SHOWN, None)
        cells = [row[shown] for row in texts]
        title = f"{name}: the likeliest {follows}token and its probability"
        down = "after block"
        pictures.append(
            heatmap(title, p_LT[:, shown], layers[::-1], names[shown], cells, "token", down)
        )
        rows = [
            [layer, *(f"{text} {p:.0%}" for text, p in zip(*both))]
            for layer, *both in zip(layers[::-1], texts, p_LT)
        ]
        tables.append(Table(title, ["after block", *names], rows))
    if held_NT is not None:
        found = [np.asarray(off(run.params, held_NT, lens)) for lens in lenses.values()]
        head = (
            f"KL of the model's prediction from the lens's, nats a token, {held_NT.size:,} tokens"
        )
        rows = [[layer, *map(float, row)] for layer, row in zip(layers, np.transpose(found))]
        tables.insert(0, Table(head, ["after block", *lenses], rows))
    return Section(
        "lens",
        "Lenses",
        "What the model would predict if it stopped after each block. The logit lens reads the "
        "stream as the last block's; the tuned lens has learnt an affine map for each place; the "
        "Jacobian lens applies the mean derivative of what is left of the model.",
        (),
        tables,
        pictures,
    )


def attributed(run: Run, tokens_1T: np.ndarray, right: int, wrong: int | None) -> Section:
    """What each part of the model adds to a logit, or to the difference of two, at the end.

    Raises:
      NotApplicable: a model whose parts do not sum to its logits.
    """

    @jax.jit
    def found(params, tokens_1T):
        model, other = bind(run.skeleton, params), None if wrong is None else jnp.array([wrong])
        terms = direct_logit_attribution(model, tokens_1T, jnp.array([right]), other)
        return terms, model.unembed(model.hidden(tokens_1T))[0, -1]

    try:
        terms, logits_V = jax.device_get(found(run.params, tokens_1T))
    except ConfigError as why:
        raise NotApplicable(str(why)) from None
    names, layers = token_names(run.tokenizer, tokens_1T[0]), layer_names(run)[1:]
    what = " − ".join(token_names(run.tokenizer, [right] if wrong is None else [right, wrong]))
    heads = range(run.skeleton.config.num_heads)
    sizes = {name: float(summed(terms[name])[0]) for name in TERMS}
    cap = run.skeleton.config.logits_softcap
    measured = float(logits_V[right] - (0 if wrong is None else logits_V[wrong]))
    rows = [[name.replace("_", " "), size] for name, size in sizes.items()]
    rows += [["all of these", float(terms["logit"][0])]]
    rows += [["the model's, soft-capped" if cap else "the model's own", measured]]
    parts = {name: value for name, value in terms.items() if name.startswith("embedding.")}
    rows += [[f"of these, {name}", float(value[0])] for name, value in parts.items()]
    by_layer = np.stack([terms["heads"][:, 0].sum(-1) + terms["attention_bias"][:, 0],
                         terms["mlp"][:, 0]])  # fmt: skip
    sources_TH = terms["sources"][:, 0].sum(0).T
    return Section(
        "attribution",
        f"Direct logit attribution of {what}",
        "What each part adds to the logit at the prompt's end: what it writes to the residual "
        "stream, times the unembedding, the final norm's scale held. The parts sum to the logit.",
        (),
        [Table(f"Parts of {what}", ["part", "adds"], rows), *_neurons(terms)],
        [
            heatmap(f"Heads, {what}", terms["heads"][::-1, 0], layers[::-1], [*map(str, heads)],
                    across="head", down="block"),
            heatmap(f"Attention and MLP by block, {what}", by_layer, ["attention", "MLP"], layers,
                    across="block"),
            heatmap(f"All heads, by the token they read, {what}", sources_TH.sum(1)[None, -_SHOWN:],
                    ["heads"], names[-_SHOWN:], across="token"),
        ],
    )  # fmt: skip


def _neurons(terms) -> Iterator[Table]:
    """The neurons that add most."""
    if "neurons" not in terms:
        return
    adds_LF = terms["neurons"][:, 0]
    order = np.argsort(-np.abs(adds_LF), axis=None)[:_NEURONS]
    rows = [[*map(int, np.unravel_index(i, adds_LF.shape)), float(adds_LF.flat[i])] for i in order]
    yield Table("Neurons that add most", ["block", "neuron", "adds"], rows)


def mapped(run: Run, tokens_1T: np.ndarray) -> Section:
    """Sizes and directions of the residual stream, by block and token."""

    @jax.jit
    def found(params, tokens_1T):
        return stream_maps(bind(run.skeleton, params), tokens_1T)

    maps = jax.device_get(found(run.params, tokens_1T))
    names, layers = token_names(run.tokenizer, tokens_1T[0]), layer_names(run)
    return Section(
        "stream",
        "The residual stream",
        "How long the stream is and which way it points. A norm that grows, and cosines with the "
        "next stream near one, are what pre-norm blocks make of it.",
        (),
        (),
        [
            _by_place(title, maps[name][:, 0], layers[:-1] if name == "to_next" else layers, names)
            for name, title in _MAPS.items()
        ],
    )


def _by_place(title: str, values_LT: np.ndarray, layers: Sequence[str], names: Sequence[str]):
    rows = layers if len(values_LT) == len(layers) else layers[1:]
    shown = values_LT[::-1, -_SHOWN:]
    return heatmap(title, shown, rows[::-1], names[-_SHOWN:], across="token", down="after block")

"""What patching shows of a clean and a corrupt prompt, as sections of a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.config import ConfigError
from lm.evaluation.card import NotApplicable, Score, Section, Table
from lm.interpretability import edges as paths
from lm.interpretability.heatmaps import heatmap, token_names
from lm.interpretability.patching import (
    Contrast,
    activation_patching,
    attribution_patching,
    causal_tracing,
    one_by_one,
)
from lm.interpretability.subspaces import Alignment, Probe
from lm.runs.run import Run

_SITES = {
    "residual_before": "the residual stream before each block",
    "attention.output": "what attention writes",
    "mlp.output": "what the MLP writes",
}
_EFFECT = "1 is all of the way from the corrupt prompt's logit difference to the clean one's."


def patched(run: Run, contrast: Contrast) -> Section:
    """Activation patching of streams, sublayers and heads, and its first order beside it."""
    names, known = token_names(run.tokenizer, contrast.clean_BT[0]), contrast.sites
    config, T = run.skeleton.config, len(names)
    layers = [*map(str, range(config.num_layers))]
    found = {f"blocks.*.{site}": words for site, words in _SITES.items()}
    found = {site: words for site, words in found.items() if site.replace("*", "0") in known}
    heads = "blocks.*.attention.heads"
    first = attribution_patching(contrast, [*found, heads])
    pictures, rows = [], []

    def add(words: str, site: str, effect: np.ndarray, order: np.ndarray, columns, across: str):
        for what, values in (("patched", effect), ("to first order", order)):
            title = f"{words}: {what}"
            pictures.append(
                heatmap(title, values[::-1], layers[::-1], columns, None, across, "block")
            )
        same = np.corrcoef(effect.reshape(-1), order.reshape(-1))[0, 1]
        rows.append([words, float(effect.max()), float(effect.min()), float(same)])

    for site, words in found.items():
        effect = activation_patching(contrast, site, one_by_one(len(layers), T))
        order = np.stack([first[site.replace("*", layer)] for layer in layers])
        add(words, site, effect.reshape(order.shape), order, names, "token")
    shape = (len(layers), 1, config.num_heads)
    effect = activation_patching(contrast, heads, one_by_one(*shape)).reshape(shape)[:, 0]
    order = np.stack([first[heads.replace("*", layer)].sum(0) for layer in layers])
    add("each head", heads, effect, order, [*map(str, range(config.num_heads))], "head")
    clean, corrupt = contrast.ends
    ends = [["clean prompt", clean], ["corrupt prompt", corrupt]]
    return Section(
        "patching",
        "Activation patching",
        "The corrupt prompt is run with one activation of the clean one. " + _EFFECT + " Beside it "
        "attribution patching: the same to first order, which can be wrong where much changes.",
        (),
        [
            Table("Logit difference", ["", "right less wrong"], ends),
            Table("Effects", ["patched", "largest", "least", "r with first order"], rows),
        ],
        pictures,
    )


def circuit(run: Run, contrast: Contrast, points: int, listed: int = 30) -> Section:
    """Edges by their attribution, how few of them do how much, and heads' paths to the logits."""
    try:
        graph = paths.Graph.of(run.skeleton.config)
    except ConfigError as why:
        raise NotApplicable(str(why)) from None
    scores = {"EAP": paths.edge_attribution(contrast)}
    scores[f"EAP-IG, {points} points"] = paths.edge_attribution(contrast, points)
    total = int(graph.edges_RS.sum())
    numbers = sorted({round(total ** (i / 8)) for i in range(9)})
    kept = [paths.strongest(s, n) & graph.edges_RS for s in scores.values() for n in numbers]
    left = paths.faithfulness(contrast, np.stack(kept)).reshape(len(scores), -1)
    best_RS = [*scores.values()][-1]
    order = np.argsort(-np.abs(best_RS), axis=None)[: min(listed, total)]
    at = [np.unravel_index(i, best_RS.shape) for i in order]
    rows = [[graph.senders[s], graph.receivers[r], float(best_RS[r, s])] for r, s in at]
    heads = [name for name in graph.senders if name.startswith("head")]
    direct = paths.path_patching(contrast, heads, ["logits"])
    config = run.skeleton.config
    shape = (config.num_layers, config.num_heads)
    layers, columns = [*map(str, range(shape[0]))], [*map(str, range(shape[1]))]
    title = "Path patching: each head's way to the logits alone"
    return Section(
        "edges",
        "Edges between parts",
        "Edge attribution patching: to first order, what changes if a part reads the clean output "
        "of another. Faithful is a circuit that still does what the model does where every other "
        "edge carries the corrupt prompt. " + _EFFECT,
        (),
        [
            Table(f"Faithfulness of the strongest of {total:,} edges", ["edges", *scores],
                  [[n, *map(float, some)] for n, some in zip(numbers, left.round(4).T + 0.0)]),
            Table(f"Strongest edges, {[*scores][-1]}", ["from", "to", "effect"], rows),
        ],
        [heatmap(title, direct.reshape(shape)[::-1], layers[::-1], columns, None, "head", "block")],
    )  # fmt: skip


def traced(
    run: Run, ids: Sequence[int], subject: tuple[int, int], token: int, **settings
) -> Section:
    """Causal tracing of one fact."""
    found = causal_tracing(run.skeleton, run.params, ids, subject, token, **settings)
    names, layers = token_names(run.tokenizer, ids), range(run.skeleton.config.num_layers)
    rows = [str(i) for i in reversed(layers)]
    said = "".join(names[slice(*subject)])
    return Section(
        "tracing",
        "Causal tracing",
        f"Noise on the subject, {said}, of three standard deviations of the embedding; then the "
        f"clean activations are restored, of one block, or of a window of layers of attention or "
        f"MLP. Shown is how much of the probability of {token_names(run.tokenizer, [token])[0]} "
        "comes back.",
        (),
        [Table("Probability", ["", "p"], [["clean", found.clean], ["with noise", found.corrupt]])],
        [
            heatmap(f"Restored: {site}", effect[::-1], rows, names, None, "token", "block")
            for site, effect in found.effects.items()
        ],
    )  # fmt: skip


def aligned(found: Alignment, site: str, size: int, place: int) -> Section:
    """What a search for a variable found, and its controls."""
    about = "share of held-out pairs whose answer becomes the counterfactual one"
    scores = [
        Score(name, estimate, better, about, chance=found.chance)
        for name, estimate, better in (
            ("found", found.found, "higher"),
            ("random parameters", found.random_parameters, "none"),
            ("arbitrary labels", found.arbitrary_labels, "none"),
        )
    ]
    return Section(
        "interchange",
        "Interchange interventions",
        f"A subspace of {size} dimensions of {site} at place {place}, learnt (DAS). What it finds "
        "counts only where both controls stay at chance.",
        scores,
    )


def probed(found: Probe) -> Section:
    """What linear probes read, by layer."""
    head = ["read from", "AUROC", "shuffled labels", "random parameters"]
    rows = [[*row] for row in zip(*found)]
    return Section(
        "probe",
        "Linear probes",
        "How well a linear probe of each text's last token tells the labels apart, cross-validated "
        "so that no group is on both sides: 0.5 is chance.",
        (),
        [Table("Area under the ROC curve", head, rows)],
    )

"""The embedding space: what stands near what, analogies, its shape, and its way through training.

Of tables [V, D], one vector a token, such as the parameter `embedding.tokens` of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import logsumexp

from lm.config import check
from lm.evaluation import bias, statistics
from lm.evaluation.card import NotApplicable, Picture, Score, Section, Table, picture
from lm.evaluation.leaning import PAIRS, STORY_SETS, word_vectors
from lm.interpretability.pictures import Panel, dress, panels
from lm.tokenizers import Tokenizer
from lm.training.plots import COLOURS, INK, figure_of

Method = Literal["add", "mul"]
_EPSILON = 1e-3  # of 3CosMul (Levy & Goldberg 2014, eq. 4)
_ASKED = {"add": "3CosAdd", "mul": "3CosMul", "near": "nearest to c alone"}

# ---- Neighbours and analogies


def cosines(table_VD: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """The cosine of each vector with a query [V]; 0 of a vector that is zero."""
    return _unit(table_VD) @ _unit(query_D)


def first(scores_V: np.ndarray, count: int, excluded: Sequence[int] = ()) -> np.ndarray:
    """The indices of the highest scores, best first, but for those `excluded`."""
    scores_V = np.array(scores_V, np.float64)
    scores_V[list(excluded)] = -np.inf
    order = np.argsort(-scores_V, kind="stable")[:count]
    return order[np.isfinite(scores_V[order])]


def analogy(
    table_VD: np.ndarray, a_D: np.ndarray, b_D: np.ndarray, c_D: np.ndarray, method: Method = "add"
) -> np.ndarray:
    """How well each vector d completes “a is to b as c is to d” [V], as man, king and woman do.

    add: cos(d, b) − cos(d, a) + cos(d, c) (Mikolov et al. 2013). mul: cos′(d, b) cos′(d, c) /
    (cos′(d, a) + ε) with cos′ = (1 + cos) / 2 (Levy & Goldberg 2014). The three themselves usually
    score highest, and are to be left out of the answers (`first`).
    """
    to_a, to_b, to_c = (cosines(table_VD, one) for one in (a_D, b_D, c_D))
    if method == "add":
        return to_b - to_a + to_c
    return (1 + to_b) * (1 + to_c) / 4 / ((1 + to_a) / 2 + _EPSILON)


# ---- Shape


class Shape(NamedTuple):
    """How vectors fill their space."""

    mean_cosine: float  # of two different vectors; 0 where none is preferred
    isotropy: float  # least over largest partition function; 1 where all directions are alike
    effective_rank: float  # exp of the entropy of the singular values' shares; at most D


def shape(table_VD: np.ndarray) -> Shape:
    """Mean cosine, isotropy (Mu & Viswanath 2018, eq. 5), effective rank (Roy & Vetterli 2007).

    The partition function is Z(c) = Σ exp(c · w), and c goes over the unit eigenvectors of WᵀW,
    whose signs mean nothing: both are taken.
    """
    W = np.asarray(table_VD, np.float64)
    total_D, number = _unit(W).sum(0), len(W)
    mean = (total_D @ total_D - np.sum(_unit(W) ** 2)) / (number * (number - 1))
    axes_DD = np.linalg.eigh(W.T @ W)[1]
    logs = []
    for start in range(0, axes_DD.shape[1], 64):  # all at once would be twice the table
        along = W @ axes_DD[:, start : start + 64]
        logs += [logsumexp(along, axis=0), logsumexp(-along, axis=0)]
    logs = np.concatenate(logs)
    return Shape(float(mean), float(np.exp(logs.min() - logs.max())), effective_rank(W))


def effective_rank(x_ND: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007): between 1 and D."""
    scales = np.linalg.svd(np.asarray(x_ND, np.float64), compute_uv=False)
    shares = scales[scales > 0] / scales.sum()
    return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else 0.0


# ---- Maps


def principal(x_ND: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates on the first principal components [N, count], and each one's share of variance.

    Signs are such that each component's largest loading is positive.
    """
    centred = np.asarray(x_ND, np.float64) - np.mean(x_ND, 0)
    _, scales, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:count] * np.sign(axes[:count, np.abs(axes[:count]).argmax(1)].diagonal())[:, None]
    return centred @ axes.T, scales[:count] ** 2 / max(np.sum(scales**2), 1e-300)


def neighbourhood_map(x_ND: np.ndarray, seed: int = 0) -> np.ndarray:
    """UMAP's coordinates [N, 2], by cosine (McInnes et al. 2018).

    Raises:
      NotApplicable: the package umap-learn is not installed.
    """
    try:
        from umap import UMAP
    except ImportError:
        raise NotApplicable("UMAP needs pip install -e '.[interpret]'") from None
    near = min(15, len(x_ND) - 1)
    start = principal(x_ND)[0]
    start = 10 * start / max(np.abs(start).max(), 1e-12)
    # One thread, as a seed needs.
    made = UMAP(n_neighbors=near, metric="cosine", init=start, random_state=seed, n_jobs=1)
    return np.asarray(made.fit_transform(np.asarray(x_ND, np.float32)), np.float64)


def align(x_ND: np.ndarray, to_ND: np.ndarray) -> np.ndarray:
    """`x_ND`, turned, mirrored and moved to lie as near to `to_ND` as it can (Schönemann 1966)."""
    middle, there = np.mean(x_ND, 0), np.mean(to_ND, 0)
    left, _, right = np.linalg.svd((x_ND - middle).T @ (to_ND - there))
    return (x_ND - middle) @ (left @ right) + there


def maps(
    tables: Sequence[np.ndarray], place: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """The map of each table [N, D] in turn, each aligned with the one after it.

    So that what moves is the words, and not the axes, which have no direction of their own.
    """
    found = [place(table) for table in tables]
    for index in range(len(found) - 2, -1, -1):
        found[index] = align(found[index], found[index + 1])
    return found


# ---- Of a run


class Words(NamedTuple):
    """The words that a tokenizer has a token of its own for, as they stand in a text."""

    texts: list[str]
    ids: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words:
        """All of a tokenizer's.

        Raises:
          NotApplicable: there are hardly any, as with characters.
        """
        space, found = "" if tokenizer.drops_first_space else " ", {}
        for number in range(tokenizer.vocab_size):
            word = tokenizer.decode([number]).strip()
            if len(word) > 1 and word.isalpha() and tokenizer.encode(space + word) == [number]:
                found[word] = number
        if len(found) < 20:
            raise NotApplicable(f"the tokenizer has {len(found)} whole words for its tokens")
        return cls(list(found), list(found.values()))


def parse_analogy(text: str, field: str) -> tuple[str, ...]:
    """(man, king, woman, queen) of man:king::woman:queen; raises ConfigError."""
    words = tuple(word.strip() for word in text.replace("::", ":").split(":"))
    check(
        len(words) == 4 and all(words) and "::" in text,
        f"{field}={text!r} must be four words, such as 'man:king::woman:queen'",
    )
    return words


def usual_analogies() -> list[tuple[str, ...]]:
    """Each pair of a woman's word and a man's with each other, both ways round."""
    return [
        (*order(one), *order(other))
        for order in (tuple, lambda pair: (pair[1], pair[0]))
        for one in PAIRS
        for other in PAIRS
        if one != other
    ]


def near(
    words: Words, table_VD: np.ndarray, tokenizer: Tokenizer, asked: Sequence[str], n: int
) -> Section:
    """The words that stand nearest to each of those asked for, by cosine."""
    table_WD, rows = table_VD[words.ids], []
    for word, vector in zip(asked, word_vectors(table_VD, tokenizer, asked)):
        scores = cosines(table_WD, vector)
        own = [words.texts.index(word)] if word in words.texts else []
        rows.append(
            (word, ", ".join(f"{words.texts[i]} {scores[i]:.2f}" for i in first(scores, n, own)))
        )
    about = (
        f"By cosine, among the {len(words.texts):,} words that are one token; a word of several "
        "tokens is the mean of theirs. Words near each other stand in the same places in texts, "
        "which opposites do too."
    )
    table = Table("Nearest words, and their cosines", ("word", "nearest first"), rows)
    return Section("neighbours", "Neighbours", about, tables=[table])


def analogies(
    words: Words, table_VD: np.ndarray, tokenizer: Tokenizer, asked: Sequence[Sequence[str]]
) -> Section:
    """Which of the analogies come out, by both methods, and without any analogy as a control."""
    known = [one for one in asked if one[3] in words.texts]
    if not known:
        raise NotApplicable("no analogy whose answer is one token")
    table_WD, rows, right = table_VD[words.ids], [], {name: [] for name in _ASKED}
    for one in known:
        a, b, c = word_vectors(table_VD, tokenizer, one[:3])
        given = [words.texts.index(word) for word in one[:3] if word in words.texts]
        row = ["{} : {} :: {} : {}".format(*one)]
        for method in _ASKED:
            near = cosines(table_WD, c) if method == "near" else analogy(table_WD, a, b, c, method)
            order = first(near, len(near), given)
            right[method].append(words.texts[order[0]] == one[3])
            row.append(words.texts[order[0]])
            if method == "add":
                rank = int(np.flatnonzero(order == words.texts.index(one[3])).sum()) + 1
        rows.append((*row, rank))
    pairs = [tuple(sorted(one[2:])) for one in known]
    scores = [
        Score(
            name, statistics.share(right[method], pairs), "none" if method == "near" else "higher",
            "share of analogies whose answer comes first, the three given words left out",
            chance=1 / (len(words.texts) - 3),
            items=[float(x) for x in right[method]], clusters=pairs,
        )
        for method, name in _ASKED.items()
    ]  # fmt: skip
    head = ("analogy", *_ASKED.values(), "rank of the answer, 3CosAdd")
    about = (
        "“a is to b as c is to d”, as king − man + woman is to be near queen. Much of such success "
        "is d being near c anyway (Linzen 2016): the third score asks for the word nearest to c, "
        "and the analogy is worth what it adds to that."
    )
    tables = [Table("Analogies and answers", head, rows)]
    return Section("analogies", "Analogies", about, scores, tables)


def shapes(tables: Mapping[int, np.ndarray]) -> Section:
    """How the vectors fill their space, at each checkpoint."""
    found = {step: shape(table) for step, table in tables.items()}
    width = next(iter(tables.values())).shape[1]
    rows = [(step, *one) for step, one in found.items()]
    names = ("mean cosine", "isotropy", f"effective rank of {width}")
    drawn = [Panel(n, [*found], {n: values}) for n, values in zip(names, zip(*found.values()))]
    pictures = [picture("Shape of the space over training", panels(drawn, 3))] * (len(rows) > 1)
    about = (
        "Mean cosine of two tokens: far from 0, all vectors share a direction. Isotropy: the least "
        "over the largest Σ exp(c · w) of directions c; 1 where no direction is preferred. "
        "Effective rank: over how many directions the singular values spread."
    )
    return Section(
        "shape",
        "Shape",
        about,
        tables=[Table("By step", ("step", *names), rows)],
        pictures=pictures,
    )


def drawn(
    tables: Mapping[int, np.ndarray],
    tokenizer: Tokenizer,
    groups: Sequence[Sequence[str]],
    moments: int,
    seed: int,
) -> Section:
    """The words of each group in the plane, at a few moments of training."""
    steps = [*tables]
    steps = [
        steps[i] for i in sorted({*np.linspace(0, len(steps) - 1, moments).round().astype(int)})
    ]
    words = [word for group in groups for word in group]
    if len(words) < 4:
        raise NotApplicable("a map needs four words or more")
    vectors = [np.stack(word_vectors(tables[step], tokenizer, words)) for step in steps]
    pictures = [
        _map("PCA over training", steps, maps(vectors, lambda x: principal(x)[0]), words, groups)
    ]
    shares = [principal(x)[1].sum() for x in vectors]
    about = (
        "The same words at several steps, each map turned and mirrored to lie as near as it can "
        "to the next (Procrustes), for axes have no direction of their own. Two components hold "
        f"{shares[-1]:.0%} of the variance at the end: much of what is near here is not near there."
    )
    try:
        placed = maps(vectors, lambda x: neighbourhood_map(x, seed))
        pictures.append(_map("UMAP over training", steps, placed, words, groups))
        about += " UMAP keeps neighbours together; distances between clusters mean little."
    except NotApplicable as why:
        about += f" {why}."
    return Section("map", "Map", about, pictures=pictures)


def _map(
    title: str, steps: Sequence[int], maps: Sequence[np.ndarray], words: Sequence[str], groups: Any
) -> Picture:
    columns = min(2, len(steps))
    lines = -(-len(steps) // columns)
    figure = figure_of(figsize=(4.8 * columns, 4.2 * lines), layout="constrained")
    colours = [COLOURS[i % len(COLOURS)] for i, group in enumerate(groups) for _ in group]
    for axes in (grid := figure.subplots(lines, columns, squeeze=False).reshape(-1))[len(steps) :]:
        axes.set_visible(False)
    for axes, step, at_N2 in zip(grid, steps, maps):
        axes.scatter(*at_N2.T, c=colours, s=12)
        for word, at, colour in zip(words, at_N2, colours):
            axes.annotate(
                word, at, (2, 2), textcoords="offset points", fontsize=7, color=colour
            ).set_parse_math(False)
        dress(axes, f"step {step:,}")
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
    figure.suptitle(title, color=INK, fontsize=11)
    return picture(title, figure)


def leaning(tables: Mapping[int, np.ndarray], tokenizer: Tokenizer, draws: int) -> Section:
    """The direction of women's and men's words, and what leans along it, at each checkpoint."""
    rows, curves = [], {name: [] for name in ("share", *(one.name for one in STORY_SETS))}
    for step, table_VD in tables.items():
        of = lambda words, table=table_VD: np.stack(word_vectors(table, tokenizer, words))  # noqa: E731
        women, men = of([one for one, _ in PAIRS]), of([other for _, other in PAIRS])
        axis, share = bias.direction([*zip(women, men)])
        tests = [bias.weat(*map(of, one[1:]), draws) for one in STORY_SETS]
        for values, value in zip(curves.values(), (share, *(test.effect for test in tests))):
            values.append(value)
        rows.append((step, share, *(x for test in tests for x in test)))
    names = sorted({word for one in STORY_SETS for words in one[1:] for word in words})
    along = sorted(zip(names, cosines(of(names), axis).tolist()), key=lambda one: -one[1])
    head = (
        "step",
        "share of one direction",
        *(f"{one.name}: {x}" for one in STORY_SETS for x in ("effect", "p")),
    )
    ends = Table("Along the direction at the end: she above, he below", ("word", "cosine"), along)
    share = {"share": curves.pop("share")}
    found = [
        Panel("Share of the pairs' variance in one direction", [*tables], share),
        Panel("Association tests", [*tables], curves, ylabel="effect (standard deviations)"),
    ]
    pictures = [picture("Bias over training", panels(found))] * (len(rows) > 1)
    about = (
        "One direction of the differences she − he, girl − boy, … (Bolukbasi et al. 2016), and "
        "association tests (Caliskan et al. 2017) of the words of the stories; p by permutation. "
        "With intervals, in context and of your own words: configs/evaluate.py, suite bias."
    )
    return Section(
        "bias", "Bias", about, tables=[Table("By step", head, rows), ends], pictures=pictures
    )


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x_ND = np.asarray(x_ND, np.float64)
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-300)

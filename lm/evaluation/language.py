"""How well a model predicts text: perplexity, bits per byte, and where it finds text hard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lm.config import Count, Path, Positive, check
from lm.evaluation import statistics as st
from lm.evaluation.card import (
    NotApplicable,
    Picture,
    Sample,
    Score,
    Section,
    Table,
    axes,
    digest,
    picture,
)
from lm.evaluation.contamination import Training, covered
from lm.evaluation.documents import Reading, Trained, given
from lm.evaluation.scoring import Scored, windows
from lm.evaluation.statistics import Estimate
from lm.evaluation.subject import Subject
from lm.training.plots import COLOURS, FAINT, INK

CLEAN, DIRTY = 0.2, 0.8  # a document with fewer, or more, of its tokens in known spans (Llama 2)
_KINDS = 30  # of documents, at most, that are shown


@dataclasses.dataclass(frozen=True)
class LanguageSettings:
    """The `language` section: what is read, and what it is compared with."""

    # A file or a directory of documents, or a corpus by name, as data.path; "": what the run held
    # out of the documents it was trained on. Of what is generated other documents than any run has.
    path: Path = ""
    documents: Positive = 200  # at most
    tokens: Positive = 200_000  # at most, of all documents together; none is cut
    # Tokens by which the window moves over a long document, the others being context; 0: the whole
    # context. Fewer give each token more context, and take longer.
    stride: Count = 0
    contamination: bool = True  # whether to look for the documents in what the run was trained on
    spans: tuple[Positive, ...] = (13, 50)  # tokens of what counts as known when it was seen
    # Tokens of what the run was trained on that are searched, and counted, at most.
    searched: Positive = 100_000_000

    def validate(self, prefix: str = "config.language") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(
            bool(self.spans) or not self.contamination,
            f"{prefix}.spans=() with {prefix}.contamination=True: give a length, such as (13,)",
        )


class _Tokens(NamedTuple):
    """All scored tokens, one document after the other."""

    ids_N: np.ndarray
    loss_N: np.ndarray  # nats
    first_N: np.ndarray  # whether it was the likeliest
    before_N: np.ndarray  # tokens of its own document that the model saw before it
    document_N: np.ndarray

    def of(self, some_N: np.ndarray) -> Estimate | None:
        """Mean loss of some of them, by documents; None of none."""
        if not some_N.any():
            return None
        return st.mean(self.loss_N[some_N], self.document_N[some_N].tolist())


def measure(subject: Subject, settings: LanguageSettings, seed: int) -> Section:
    """Perplexity and bits per byte, and loss by position, frequency and kind of document.

    Raises:
      ConfigError: `path` cannot be read, or `stride` is longer than the model's context.
      NotApplicable: there is no `path`, and the run's own documents are not known or not there.
    """
    check(
        settings.stride <= subject.max_length,
        f"config.language.stride={settings.stride} must be at most the model's context, "
        f"{subject.max_length}",
    )
    trained, why = None, ""
    try:
        trained = Trained.of(subject.run)
    except NotApplicable as reason:
        if not settings.path:
            raise
        why = str(reason)
    limits = settings.documents, settings.tokens
    if settings.path:
        reading = given(settings.path, subject.tokenizer, *limits, seed)
    else:
        reading = trained.held_out(subject.tokenizer, *limits)
    training = None
    try:
        if trained:
            training = Training(trained.tokens(subject.tokenizer), settings.searched)
    except NotApplicable as reason:
        why = str(reason)
    tokens = _scored(subject, reading, settings.stride)
    scores = _whole(subject, reading, tokens)
    tables, pictures = [_read(subject, reading, settings, training, why)], []
    for title, rows, unit in (
        (
            "Loss by position",
            _binned(tokens, tokens.before_N, 2),
            "tokens of the document before it",
        ),
        ("Loss by frequency", *_by_frequency(subject, tokens, training)),
    ):
        tables.append(_table(f"{title}, nats a token", unit, rows))
        pictures.append(_curve(title, unit, rows))
    if kinds := _by_kind(reading, tokens):
        tables.append(_table("Loss by kind of document, nats a token", "kind", kinds))
    if settings.contamination and training:
        more, table = _contamination(reading, tokens, training, settings.spans)
        scores, tables = [*scores, *more], [*tables, table]
    return Section(
        "language",
        "Language",
        "How well it predicts the next token of text that it has not seen. Every token of a "
        "document is scored once; the end of a document is not. Bits are over the bytes that a "
        "document has on disk, so they do not depend on the tokenizer. Perplexity, loss and bits "
        "per byte are ratios of sums over documents; their intervals are by Student's t over "
        "documents, of the linearised ratio.",
        scores,
        tables,
        pictures,
        _hardest(subject, reading, tokens),
    )


def _scored(subject: Subject, reading: Reading, stride: int) -> _Tokens:
    """What the model makes of every token, each once."""
    length = subject.max_length
    pieces, of, before = [], [], []
    for number, document in enumerate(reading.documents):
        for window, piece in enumerate(windows(document.ids, subject.prefix, length, stride)):
            ids, start = piece
            pieces.append(piece)
            of.append(np.full(len(ids) - start, number))
            # The prefix, which only the first window has, is none of the document's tokens.
            before.append(np.arange(start, len(ids)) - (window == 0))
    found = [each.scored for each in subject.likely_ids(pieces)]
    scored = Scored(*map(np.concatenate, zip(*found)))
    return _Tokens(
        np.concatenate([np.asarray(document.ids) for document in reading.documents]),
        -scored.logprob.astype(np.float64),
        scored.rank == 0,
        np.concatenate(before),
        np.concatenate(of),
    )


def _whole(subject: Subject, reading: Reading, tokens: _Tokens) -> list[Score]:
    """The scores of all documents together."""
    documents, vocabulary = reading.documents, subject.tokenizer.vocab_size
    number = len(documents)
    nats_D = np.bincount(tokens.document_N, tokens.loss_N, number)
    tokens_D = np.array([len(document.ids) for document in documents])
    bytes_D = np.array([document.num_bytes for document in documents])
    keys = [document.key for document in documents]

    def score(name: str, over_D, under_D, asked, better, about: str, **more) -> Score:
        # What each document adds to the ratio, so that their mean is the ratio.
        items, found = over_D * number / under_D.sum(), st.ratio(over_D, under_D)
        fields = {"asked": digest(asked), "estimate": found, **more}
        return Score.mean(name, items, better, about, **fields)

    same = [subject.tokenizer.fingerprint, *keys]
    first_D = np.bincount(tokens.document_N, tokens.first_N, number)
    chance = float(np.log(vocabulary))
    loss = score("loss", nats_D, tokens_D, same, "lower", "nats per token", chance=chance)
    value, error, low, high, *counts = loss.estimate
    value, low, high = np.exp([value, low, high]).tolist()
    perplexity = Estimate(value, value * error, low, high, *counts)
    about = "exp of the mean loss per token"
    bits, on_disk = nats_D / np.log(2), "bits over the documents' bytes on disk"
    likeliest = "share of tokens that it finds likeliest"
    return [
        Score("perplexity", perplexity, "lower", about, chance=vocabulary),
        loss,
        score("bits_per_byte", bits, bytes_D, keys, "lower", on_disk),
        score(
            *("next_token", first_D, tokens_D, same, "higher", likeliest),
            **{"chance": 1 / vocabulary, "fraction": True},
        ),
    ]


def _read(
    subject: Subject,
    reading: Reading,
    settings: LanguageSettings,
    training: Training | None,
    why: str,
) -> Table:
    """What was read, and what it was compared with."""
    documents, stride = reading.documents, settings.stride or subject.max_length
    spoken = subject.tokenizer.byte_lengths()
    written = sum(int(spoken[document.ids].sum()) for document in documents)
    size = sum(document.num_bytes for document in documents)
    searched = f"{training.searched:,} of {training.total:,} tokens" if training else f"none: {why}"
    rows = [
        ("documents", f"{len(documents):,}, {reading.about}"),
        ("left out", f"{reading.left_out:,} documents, for which `tokens` left no room"),
        ("bytes on disk", f"{size:,}, of which the tokens stand for {written:,}"),
        ("tokens", f"{sum(len(document.ids) for document in documents):,}"),
        ("window", f"{subject.max_length:,} tokens, moved by {stride:,}"),
        ("training tokens searched", searched),
    ]
    return Table("What was read", ("", ""), rows)


_Row = tuple[str, int, Estimate | None]  # a bin, how many tokens it has, and their mean loss


def _binned(tokens: _Tokens, count_N: np.ndarray, factor: int) -> list[_Row]:
    """Bins of a count: 0, 1 to `factor` − 1, and on by powers of `factor`."""
    rows, low, high = [], 0, 1
    while low <= count_N.max():
        inside = (count_N >= low) & (count_N < high)
        if inside.any() or rows:
            name = f"{low:,}" if high == low + 1 else f"{low:,}–{high - 1:,}"
            rows.append((name, int(inside.sum()), tokens.of(inside)))
        low, high = high, high * factor
    return rows


def _by_frequency(
    subject: Subject, tokens: _Tokens, training: Training | None
) -> tuple[list[_Row], str]:
    """Bins of ten times as many occurrences each, and what they are occurrences in."""
    size = max(subject.tokenizer.vocab_size, int(tokens.ids_N.max()) + 1)
    if training:
        counts_V = training.counts(size)
        unit = f"occurrences of the token in {training.searched:,} tokens of training"
    else:
        counts_V = np.bincount(tokens.ids_N, minlength=size)
        unit = f"occurrences of the token in these {len(tokens.ids_N):,} tokens"
    return _binned(tokens, counts_V[tokens.ids_N], 10), unit


def _by_kind(reading: Reading, tokens: _Tokens) -> list[_Row]:
    """The kinds that have most tokens; none where only one is known."""
    kinds = np.array([document.kind for document in reading.documents])
    names, numbers = np.unique(kinds, return_inverse=True)
    if len(names) < 2:
        return []
    of_N = numbers[tokens.document_N]
    sizes = np.bincount(of_N, minlength=len(names))
    order = np.argsort(-sizes, kind="stable")[:_KINDS]
    return [(str(names[i]) or "–", int(sizes[i]), tokens.of(of_N == i)) for i in order]


def _contamination(
    reading: Reading, tokens: _Tokens, training: Training, spans: Iterable[int]
) -> tuple[list[Score], Table]:
    """How much of the documents the run was trained on, and the loss with and without it."""
    scores, rows = [], []
    for span in spans:
        occurs = training.has([document.ids for document in reading.documents], span)
        known = [covered(each, span) for each in occurs]
        long = np.array([i for i, each in enumerate(known) if len(each)])  # enough for a span
        if not len(long):
            rows.append((span, 0, *["–"] * 5))
            continue
        found = st.ratio([known[i].sum() for i in long], [len(known[i]) for i in long])
        share_D = np.full(len(known), np.nan)
        share_D[long] = [known[i].mean() for i in long]
        about = f"share of tokens within {span} in a row that the run was trained on"
        scores.append(Score(f"seen_{span}", found, about=about, fraction=True))
        cells = []
        for name, inside_D in (("clean", share_D < CLEAN), ("dirty", share_D >= DIRTY)):
            loss = tokens.of(inside_D[tokens.document_N])
            cells += [int(inside_D.sum()), _shown(loss)]
            if loss:
                about = f"nats per token of documents that are {name} by {span} tokens"
                scores.append(Score(f"loss_{name}_{span}", loss, "lower", about))
        spans_found = np.concatenate([occurs[i] for i in long])
        rows.append((span, len(long), float(spans_found.mean()), *cells))
    head = ("tokens in a row", "documents as long", "share of these spans that were seen")
    sides = ("clean documents", "their loss", "dirty documents", "their loss")
    title = (
        f"Seen in training (clean: below {CLEAN:.0%} of a document's tokens are in such a span; "
        f"dirty: from {DIRTY:.0%} on)"
    )
    return scores, Table(title, (*head, *sides), rows)


def _hardest(subject: Subject, reading: Reading, tokens: _Tokens, number: int = 3) -> list[Sample]:
    """The documents with most bits per byte."""
    nats_D = np.bincount(tokens.document_N, tokens.loss_N, len(reading.documents))
    bytes_D = np.array([document.num_bytes for document in reading.documents])
    bits_D = nats_D / np.log(2) / bytes_D
    found = []
    for i in np.argsort(-bits_D, kind="stable")[:number]:
        text = subject.tokenizer.decode(reading.documents[i].ids[:200])
        found.append(Sample({"among the hardest": text, "bits per byte": f"{bits_D[i]:.3f}"}))
    return found


def _table(title: str, unit: str, rows: Sequence[_Row]) -> Table:
    return Table(
        title, (unit, "tokens", "loss"), [(name, count, _shown(loss)) for name, count, loss in rows]
    )


def _shown(loss: Estimate | None) -> str:
    if loss is None:
        return "–"
    return str(loss) if np.isfinite(loss.error) else f"{loss.value:.3f}"


def _curve(title: str, unit: str, rows: Sequence[_Row]) -> Picture:
    """Loss by bin with its intervals, over how many tokens each bin has."""
    drawn = axes(unit, "loss (nats per token)", (7.2, 3.4))
    places = np.arange(len(rows))
    behind = drawn.twinx()
    behind.bar(places, [count for _, count, _ in rows], color=FAINT, width=0.8)
    behind.set_ylabel("tokens, as bars", color=INK)
    behind.spines[:].set_visible(False)
    behind.tick_params(colors=INK, labelsize=9, length=0)
    drawn.set_zorder(behind.get_zorder() + 1)
    drawn.patch.set_visible(False)
    there = [(place, row[2]) for place, row in zip(places, rows) if row[2]]
    wide = [each.high - each.low for _, each in there]
    drawn.errorbar(
        [place for place, _ in there],
        [each.value for _, each in there],
        yerr=[one / 2 if np.isfinite(one) else 0 for one in wide],
        **{"color": COLOURS[0], "marker": "o", "markersize": 4, "linewidth": 1.5, "capsize": 3},
    )
    drawn.set_ylim(bottom=0)
    drawn.set_xticks(places, [name for name, _, _ in rows], rotation=30, ha="right")
    drawn.set_title(title, color=INK, fontsize=11)
    return picture(title, drawn.figure)

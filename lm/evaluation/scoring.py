"""How likely a model finds given tokens: texts in, log-probabilities out, packed, on any mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check
from lm.data.packing import best_fit_decreasing
from lm.inference.fill import dropless
from lm.inference.prompts import check_ids
from lm.models import Model, bind
from lm.models.text import Text
from lm.objectives.chunked import Part, each
from lm.parallel.sharding import constrain

TOKENS = 4096  # of a batch, on each device that has its own rows
ROW = 256  # tokens of a row, at least, where the model's context has as many


class Scored(NamedTuple):
    """What a model makes of the last n tokens of a text."""

    logprob: np.ndarray  # of each, nats, float32 [n]
    rank: np.ndarray  # how many tokens it finds likelier, int32 [n]
    entropy: np.ndarray  # of the distribution that each is of, nats, float32 [n]

    @classmethod
    def none(cls) -> Scored:
        """Of no tokens."""
        return cls(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32))

    def then(self, other: Scored) -> Scored:
        """These tokens and those after them."""
        return Scored(*map(np.concatenate, zip(self, other)))

    @property
    def total(self) -> float:
        """log p of all of them together, nats."""
        return float(self.logprob.sum(dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """Whether each is the likeliest there is."""
        return not self.rank.any()


class Scorer:
    """Scores texts of a decoder.

    A text's scores depend neither on the other texts nor on how many are scored together, but for
    rounding.

    Args:
      model: the skeleton, a decoder's.
      params: of it, on one device or split over a mesh.
      ways: devices that have rows of their own: rows are a multiple of these.
      tokens: of a batch, for each of them.

    Raises:
      ConfigError: the model is no decoder, or has no output head.
    """

    def __init__(
        self, model: Model, params: Mapping[str, jax.Array], ways: int = 1, tokens: int = TOKENS
    ):
        config = model.config
        check(
            config.architecture == "decoder" and config.has_output_head,
            f"model.architecture={config.architecture!r} with model.classifier="
            f"{config.classifier!r} and output_head={config.output_head}: only a decoder with "
            "an output head says how likely a text is",
        )
        self.config = dropless(config)
        self.params, self.ways, self.tokens = params, ways, tokens
        self._run = jax.jit(functools.partial(_scores, type(model)(self.config)))

    def __call__(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Scored]:
        """Scores of each text's tokens from `starts` on, given all before them.

        Args:
          texts: token ids, each 2 to `max_length` + 1 of them.
          starts: 1 or more, for each.

        Raises:
          ConfigError: a text that is too short or too long, with ids that the model does not have,
            or of which nothing is asked.
        """
        config = self.config
        for number, (ids, start) in enumerate(zip(texts, starts, strict=True)):
            check(
                0 < start < len(ids) <= config.max_length + 1,
                f"text {number} has {len(ids)} tokens, scored from token {start} on: there must be "
                f"1 before that, and at most model.max_length={config.max_length} before the last",
            )
            check(
                min(ids) >= 0 and max(ids) < config.vocab_size,
                f"text {number} has ids outside 0 … {config.vocab_size - 1}",
            )
        if not texts:
            return []
        longest = max(len(ids) - 1 for ids in texts)
        length = min(config.max_length, max(ROW, 1 << (longest - 1).bit_length()))
        rows = max(1, self.tokens // length) * self.ways
        found: list[Scored | None] = [None] * len(texts)
        packed = pack([len(ids) - 1 for ids in texts], length)
        for first in range(0, len(packed), rows):
            part = packed[first : first + rows]
            inputs, targets, segments, positions = np.zeros((4, rows, length), np.int32)
            for row, numbers in enumerate(part):
                at = 0
                for segment, number in enumerate(numbers, 1):
                    ids, size = texts[number], len(texts[number]) - 1
                    place = row, slice(at, at + size)
                    inputs[place], targets[place] = ids[:-1], ids[1:]
                    segments[place], positions[place] = segment, np.arange(size)
                    at += size
            values = self._run(self.params, inputs, targets, segments, positions)
            logprob, rank, entropy = map(np.asarray, values)
            for row, numbers in enumerate(part):
                at = 0
                for number in numbers:
                    size = len(texts[number]) - 1
                    place = row, slice(at + starts[number] - 1, at + size)
                    ranks = rank[place].astype(np.int32)
                    found[number] = Scored(logprob[place], ranks, entropy[place])
                    at += size
        return found


class MaskedScorer:
    """Scores tokens of texts by an encoder, each masked by itself with all others in sight.

    log p(u_i | U without u_i): their sum is a pseudo-log-likelihood (Salazar et al. 2020).

    Args:
      model, params, ways, tokens: as of `Scorer`, of an encoder.
      mask: the id of the mask token.
    """

    def __init__(
        self,
        model: Model,
        params: Mapping[str, jax.Array],
        mask: int,
        ways: int = 1,
        tokens: int = TOKENS,
    ):
        self.config, self.mask = dropless(model.config), mask
        self.params, self.ways, self.tokens = params, ways, tokens
        self._run = jax.jit(functools.partial(_masked, type(model)(self.config)))

    def __call__(
        self, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """log p of the tokens at `places` of each text, nats, float32 [n].

        Raises:
          ConfigError: a text that is empty or longer than the context, or with unknown ids.
        """
        for ids in texts:
            check_ids("text", ids, self.config)
        asked = [(number, place) for number, some in enumerate(places) for place in some]
        asked.sort(key=lambda one: len(texts[one[0]]))  # so that little is padding
        found: list[dict[int, float]] = [{} for _ in texts]
        at = 0
        while at < len(asked):
            # As many as a batch holds where all are as long as its last one.
            length = max(32, 1 << (len(texts[asked[at][0]]) - 1).bit_length())
            rows = max(1, self.tokens // length) * self.ways
            part = [one for one in asked[at : at + rows] if len(texts[one[0]]) <= length]
            at += len(part)
            inputs, segments = np.zeros((2, rows, min(length, self.config.max_length)), np.int32)
            targets, masked = np.zeros((2, rows), np.int32)
            for row, (number, place) in enumerate(part):
                ids = texts[number]
                inputs[row, : len(ids)], segments[row, : len(ids)] = ids, 1
                targets[row], masked[row] = ids[place], place
                inputs[row, place] = self.mask
            logprob = np.asarray(self._run(self.params, inputs, targets, segments, masked))
            for (number, place), value in zip(part, logprob):
                found[number][place] = value
        return [
            np.array([of[place] for place in some], np.float32) for of, some in zip(found, places)
        ]


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of at most `length` that hold things of these sizes, by number."""
    of_row: dict[int, list[int]] = {}
    for number, row in enumerate(best_fit_decreasing(np.asarray(sizes), length).tolist()):
        of_row.setdefault(row, []).append(number)
    return list(of_row.values())


def windows(
    ids: Sequence[int], prefix: int, length: int, stride: int = 0
) -> Iterable[tuple[list[int], int]]:
    """A text of any length as texts that a context of `length` holds, each token scored once.

    The first token is predicted from `prefix`. Of the windows after the first, `stride` tokens are
    new and scored, the others are context; 0: all are new but the first, which the last window,
    whose end is the text's, may repeat more of.

    Yields:
      (ids, start): what is read and predicted, and from where on it is scored.
    """
    whole, new = [prefix, *ids], stride or length
    check(0 <= stride <= length, f"stride={stride} must be at most the context, {length}")
    done = 1  # of `whole`: the prefix is not scored
    while done < len(whole):
        end = min(len(whole), done + (length if done == 1 else new))
        begin = max(0, end - length - 1)
        yield whole[begin:end], done - begin
        done = end


@dataclasses.dataclass(frozen=True)
class _Scored:
    """The log-probability of each target, how many tokens are likelier, and the entropy."""

    num_values = 3

    def values(self, part: Part, targets: jax.Array, others):
        target, log_z = part.at(targets), part.log_z()
        rank = part.sum((part.logits > target[..., None]).astype(jnp.float32))
        log_p = part.logits - log_z[..., None]
        entropy = -part.sum(jnp.exp(log_p) * jnp.maximum(log_p, -1e30))
        return (target - log_z, rank, entropy), None


def _scores(model: Model, params, inputs_BT, targets_BT, segments_BT, positions_BT):
    model = bind(model, params)
    inputs_BT, targets_BT, segments_BT, positions_BT = (
        constrain(x, "batch", None) for x in (inputs_BT, targets_BT, segments_BT, positions_BT)
    )
    text = Text.of(inputs_BT, segments_BT=segments_BT, positions_BT=positions_BT)
    x_BTD, _ = model.forward(text, None, None)
    values = each(
        _Scored(),
        model.readout(x_BTD),
        model.output_weights(),
        model.output_bias(),
        targets_BT,
        softcap=model.config.logits_softcap,
    )
    return tuple(constrain(value, None, None) for value in values)


def _masked(model: Model, params, inputs_NT, targets_N, segments_NT, places_N):
    model = bind(model, params)
    inputs_NT, segments_NT = (constrain(x, "batch", None) for x in (inputs_NT, segments_NT))
    x_NTD = model.hidden(inputs_NT, segments_BT=segments_NT)
    x_N1D = jnp.take_along_axis(x_NTD, places_N[:, None, None], 1)
    logits_NV = model.unembed(x_N1D)[:, 0]
    logits_N = jnp.take_along_axis(logits_NV, targets_N[:, None], 1)[:, 0]
    return constrain(logits_N - jax.nn.logsumexp(logits_NV, -1), None)

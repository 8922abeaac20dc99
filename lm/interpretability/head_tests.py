"""Whether a head does what its attention suggests: it is taken out, and put in elsewhere.

Attention alone over-claims: of several heads that look at the right token one may do the work, or
none (Jain & Wallace 2019, "Attention is not explanation"). So a task is made of minimal pairs, two
texts that differ in what the head is to find, and a head is called specialised when all holds:

    it attends to its target, and not to a distractor as far away;
    without it (its output at zero, and at its mean) the task is no longer done;
    put from one text of a pair into the other, it brings the answer along (denoising).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import Share, check
from lm.data import pronouns
from lm.evaluation.subject import Subject, spells
from lm.interpretability.heads import attention_to, repeated_tokens
from lm.models import ModelConfig, bind, skeleton
from lm.models.hooks import reading


class Task(NamedTuple):
    """Texts in minimal pairs, rows 2n and 2n + 1: the answer of one is the wrong one of the other.

    Attributes:
      name: of what is asked.
      tokens_BT, segments_BT: the texts; segment 0 is padding, behind them.
      place_B: whose next token is asked for.
      targets_BTS, distractors_BTS: which keys a query should and should not attend to; none of a
        query that does not matter.
      answer_B, wrong_B: ids.
      choices: ids among which the likeliest must be the answer; (): answer and wrong one.
    """

    name: str
    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    place_B: np.ndarray
    targets_BTS: np.ndarray
    distractors_BTS: np.ndarray
    answer_B: np.ndarray
    wrong_B: np.ndarray
    choices: np.ndarray

    def relabelled(self, seed: int) -> Task:
        """With target and distractor, answer and wrong one exchanged in a random half of the pairs.

        What still seems to be found is chance.
        """
        pairs = np.random.default_rng(seed).permutation(len(self.place_B) // 2) % 2 == 1
        turned = np.repeat(pairs, 2)
        this, other = self.targets_BTS, self.distractors_BTS
        wide = turned[:, None, None]
        return self._replace(
            targets_BTS=np.where(wide, other, this),
            distractors_BTS=np.where(wide, this, other),
            answer_B=np.where(turned, self.wrong_B, self.answer_B),
            wrong_B=np.where(turned, self.answer_B, self.wrong_B),
        )


class Tested(NamedTuple):
    """What every head does in a task; [L, H], and of the model as a whole one number."""

    accuracy: float  # share of answers that are the likeliest of the choices
    preference: float  # share of answers that are likelier than the wrong one
    chance: float  # accuracy of a guess among the choices
    attention_LH: np.ndarray  # to targets
    distractor_LH: np.ndarray
    zeroed_LH: np.ndarray  # accuracy where the head's output is zero
    averaged_LH: np.ndarray  # and where it is its mean
    # (LD_patched − LD_corrupt) / (LD_clean − LD_corrupt), of differences of the two logits
    denoised_LH: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a head has to reach to be called specialised."""

    preference: Share = 0.75  # of the model as a whole, or its heads cannot be tested
    attention: Share = 0.4  # to the target, and at most half of it to the distractor
    ablation: Share = 0.5  # of the accuracy above chance that is lost, at zero and at the mean
    patching: Share = 0.5  # of the way from one answer to the other

    def verdict(self, found: Tested, layer: int, head: int) -> str:
        """'specialised', what it lacks, or '' of a head that does not stand out."""
        if found.preference < self.preference:
            return "untested: the model does not do it"
        at = layer, head
        left = max(found.zeroed_LH[at], found.averaged_LH[at])
        lost = (found.accuracy - left) / (found.accuracy - found.chance)
        stands = found.attention_LH[at] >= max(self.attention, 2 * found.distractor_LH[at])
        ablated, patched = lost >= self.ablation, found.denoised_LH[at] >= self.patching
        if not stands:
            return "matters, and does not attend" if ablated and patched else ""
        lacks = [
            word for word, holds in (("ablation", ablated), ("patching", patched)) if not holds
        ]
        return f"attends; not confirmed by {' and '.join(lacks)}" if lacks else "specialised"


def run_task(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    task: Task,
    only: Sequence[tuple[int, int]] | None = None,
) -> Tested:
    """Reads a task's texts once as they are, and three times for each head, or for some only."""
    plain, edited = programs(config)
    text = task.tokens_BT, task.segments_BT, task.place_B
    pattern_LBHTS, heads_LBTHC, logits_BV = plain(params, *text)
    pattern_LBHTS = pattern_LBHTS.astype(jnp.float32)
    both = [np.asarray([attention_to(p, t) for p in pattern_LBHTS]).mean(1)
            for t in (task.targets_BTS, task.distractors_BTS)]  # fmt: skip
    rows = np.arange(len(task.place_B))
    partner = rows ^ 1
    clean, corrupt = (_difference(np.asarray(logits_BV), task, r) for r in (rows, partner))
    filled_BT = task.segments_BT > 0
    L, _, _, H, _ = heads_LBTHC.shape
    zeroed, averaged, denoised = np.full((3, L, H), np.nan)
    for layer, head in np.ndindex(L, H) if only is None else only:
        own = heads_LBTHC[layer]
        mean_HC = own[filled_BT].mean(0)
        at = np.int32(layer), np.int32(head)
        out = edited(params, *text, *at, jnp.zeros_like(own))
        zeroed[layer, head] = _accuracy(out, task)
        out = edited(params, *text, *at, jnp.broadcast_to(mean_HC, own.shape))
        averaged[layer, head] = _accuracy(out, task)
        # The partner's text, with what this head made of the row's own.
        out = edited(params, *(x[partner] for x in text), *at, own)
        patched = _difference(np.asarray(out), task, rows)
        way = (clean - corrupt).mean()
        denoised[layer, head] = (patched - corrupt).mean() / way if way else 0.0
    accuracy, chance = _accuracy(logits_BV, task), 1 / (len(task.choices) or 2)
    preference = float(np.mean(clean > 0))
    return Tested(accuracy, preference, chance, *both, zeroed, averaged, denoised)


@functools.lru_cache(4)
def programs(config: ModelConfig):
    """A plain reading of texts, and one where a head's output is another."""
    layers = [f"blocks.{layer}.attention" for layer in range(config.num_layers)]

    def last(model, tokens_BT, segments_BT, place_B, tap):
        x_BTD = model.hidden(tokens_BT, segments_BT=segments_BT, tap=tap)
        return model.unembed(jnp.take_along_axis(x_BTD, place_B[:, None, None], 1))[:, 0]

    @jax.jit
    def plain(params, tokens_BT, segments_BT, place_B):
        seen: dict[str, jax.Array] = {}
        model, tap = bind(skeleton(config), params), reading(seen)
        logits_BV = last(model, tokens_BT, segments_BT, place_B, tap)
        every = [jnp.stack([seen[f"{name}.{what}"] for name in layers])
                 for what in ("pattern", "heads")]  # fmt: skip
        return *every, logits_BV

    @jax.jit
    def edited(params, tokens_BT, segments_BT, place_B, layer, head, heads_BTHC):
        def tap(name, value):
            for number, own in enumerate(layers):
                if name == f"{own}.heads":
                    here_H1 = ((jnp.arange(value.shape[2]) == head) & (number == layer))[:, None]
                    value = jnp.where(here_H1, heads_BTHC.astype(value.dtype), value)
            return value

        return last(bind(skeleton(config), params), tokens_BT, segments_BT, place_B, tap)

    return plain, edited


def _difference(logits_BV: np.ndarray, task: Task, rows: np.ndarray) -> np.ndarray:
    """Logit of the answer less that of the wrong one, as the texts of `rows` have them."""
    each = np.arange(len(rows))
    return logits_BV[rows, task.answer_B[each]] - logits_BV[rows, task.wrong_B[each]]


def _accuracy(logits_BV: jax.Array, task: Task) -> float:
    if not len(task.choices):
        return float(
            np.mean(_difference(np.asarray(logits_BV), task, np.arange(len(logits_BV))) > 0)
        )
    chosen = task.choices[np.asarray(logits_BV)[:, task.choices].argmax(1)]
    return float(np.mean(chosen == task.answer_B))


# ---- Tasks


def pronoun_task(subject: Subject, seed: int, pairs: int = 64) -> Task | None:
    """Whom "She" or "He" means, of names that were not learnt together (`lm.data.pronouns`).

    None where the context has no room for it, its tokens do not spell it, or too few names differ
    in their first token.
    """
    if not spells(subject.tokenizer, pronouns.pair(0, 0)[0].text + "".join(pronouns.NAMES)):
        return None
    begins = {}  # the first token of each name that follows a pronoun
    for name in pronouns.NAMES:
        ids, start = subject.pair("She", f" {name}")
        begins[name] = ids[start]
    some = [pronouns.pair(seed, number, held_out=True) for number in range(2 * pairs)]
    some = [two for two in some if begins[two[0].antecedent] != begins[two[1].antecedent]]
    items = [item for two in some[:pairs] for item in two]
    if len(some) < pairs:
        return None
    texts, spans = [subject.text(item.text) for item in items], []
    for item in items:
        for name in (item.antecedent, item.distractor):
            ids, start = subject.pair(item.text[: item.text.index(name)], name)
            spans.append((start, len(ids)))
    length = max(map(len, texts))
    if length + 1 > subject.max_length:
        return None
    targets = np.zeros((2, len(items), length, length), bool)
    for number, (start, end) in enumerate(spans):
        row = number // 2
        targets[number % 2, row, len(texts[row]) - 1, start:end] = True
    answers = [[begins[getattr(item, of)] for item in items] for of in ("antecedent", "distractor")]
    choices = np.unique([*begins.values()])
    return task_of("the antecedent of a pronoun", texts, targets, answers, choices)


def induction_task(subject: Subject, seed: int, pairs: int = 64) -> Task:
    """What followed a random token when it was there before; a pair differs in that alone.

    Raises:
      ConfigError: the context is too short for it.
    """
    rng = np.random.default_rng(seed)
    ids = plain_ids(subject)
    room = min(20, (subject.max_length - 1) // 2)
    check(
        room >= 4, f"a context of {subject.max_length} tokens has no room for a repeat: 9 at least"
    )
    texts, places, answers = [], [], []
    for row in range(pairs):
        tokens, (period,) = repeated_tokens(seed * 1000 + row, 1, 2 * room, ids, (room // 2, room))
        behind = int(rng.integers(1, period - 1))
        told = tokens[0, : period + behind].tolist()
        other = int(rng.choice([i for i in ids if i not in told]))
        for answer, wrong in ((told[behind], other), (other, told[behind])):
            texts.append([subject.prefix, *told[:behind], answer, *told[behind + 1 :]])
            places.append(1 + behind)
            answers.append((answer, wrong))
    length = max(map(len, texts))
    targets = np.zeros((2, len(texts), length, length), bool)
    for row, (text, place) in enumerate(zip(texts, places)):
        targets[0, row, len(text) - 1, place] = targets[1, row, len(text) - 1, place + 1] = True
    name = "what followed the token before"
    return task_of(name, texts, targets, np.array(answers).T, ids)


def plain_ids(subject: Subject) -> list[int]:
    """Ids that stand for text, among them no special token."""
    lengths = subject.tokenizer.byte_lengths()
    special = {subject.prefix, *(subject.run.framing.before or ())}
    return [i for i, length in enumerate(lengths) if length > 0 and i not in special]


def task_of(name: str, texts: Sequence[list[int]], targets, answers, choices=()) -> Task:
    """A task of texts that end where the answer is to come; targets and answers [2, B, …] each."""
    length = targets.shape[-1]
    tokens = np.array([[*t, *[0] * (length - len(t))] for t in texts], np.int32)
    place = np.array([len(t) - 1 for t in texts], np.int32)
    segments = (np.arange(length) <= place[:, None]).astype(np.int32)
    answer, wrong = np.asarray(answers, np.int32)
    return Task(name, tokens, segments, place, *targets, answer, wrong, np.asarray(choices, int))

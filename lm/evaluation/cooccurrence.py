"""Whether a model leans further than the stories that it has learnt from: bias amplification.

In a story there are places at which one of two words stands: "she" or "he" after an animal, "girl"
or "boy" after "a shy". How often each does, next to what stands before, is known of the corpus from
as many stories as are wanted; of a model, from how likely it finds either in such places of stories
that it has not seen. Which places count is decided by what stands before them alone, so a model
that is the corpus's own distribution has the corpus's odds.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lm.data.storyworld import generate
from lm.data.storyworld import lexicon as lx
from lm.evaluation import statistics
from lm.evaluation.bias import amplification, pooled
from lm.evaluation.statistics import Estimate

UNSEEN = 1 << 40  # number of the first story that no corpus has
TRADES = ("teacher", "gardener", "farmer", "baker", "seller")  # that the stories have
_SCANNED = 20_000  # unseen stories that are looked through, at most
_LEANS = 3.0  # standard errors that a corpus's log-odds are from 0 where it leans

_ANIMALS = tuple(animal.noun for animal in lx.HERD)
_GIVEN = tuple(name for names in lx.ANIMAL_NAMES.values() for name in names)
_ADULTS = ("Mom", "Dad", "Grandma", "Grandpa", "man", "woman", *TRADES)
_PRONOUN = re.compile(r"\b(?:[Ss]he|[Hh]e)\b")
_CHILD = re.compile(rf"\b[Aa]n? ({'|'.join(lx.CHILD_TRAITS)}) (girl|boy)\b")
_ANYBODY = re.compile(
    rf"\b(?:{'|'.join((*_ANIMALS, *_GIVEN, *_ADULTS, *lx.GIRLS, *lx.BOYS, 'girl', 'boy'))})\b"
)


class Place(NamedTuple):
    """Where one of two words stands in a story."""

    what: str  # the kind of place
    beside: str  # what stands before, that the words may lean with
    before: str  # all of the text before
    words: tuple[str, str]  # of women and girls, of men and boys
    first: bool  # whether it is the first


class Row(NamedTuple):
    """How the corpus and a model lean beside one thing, counted for the corpus's likelier word.

    Which word that is every other story says, and only the others are counted: chance, which makes
    one of two equal words look likelier, does not count for it twice.
    """

    what: str
    beside: str
    word: str
    corpus: tuple[int, int]  # how often it is that word, and the other
    leans: bool  # whether the corpus's odds are surely not 1, and not infinite
    p: tuple[float, ...]  # the model's probability of that word in each place
    ratio: Estimate  # its odds over the corpus's; NaN where these are infinite

    @property
    def share(self) -> float:
        """The corpus's share of that word."""
        return self.corpus[0] / sum(self.corpus)


def places(text: str) -> Iterator[Place]:
    """The places of a story."""
    mentions = list(_ANYBODY.finditer(text))
    seen = set()
    for pronoun in _PRONOUN.finditer(text):
        before = text[: pronoun.start()]
        earlier = [one for one in mentions if one.end() < pronoun.start()]
        if not earlier or earlier[-1][0] in seen:
            continue
        noun = earlier[-1][0]
        if len(re.findall(r"[.!?]", before[earlier[-1].end() :])) > 1:
            continue
        if noun in TRADES:
            kind = "after a trade"
        elif noun in _ANIMALS and {one[0] for one in earlier} == {noun}:
            kind = "after an animal alone"
        else:
            continue
        seen.add(noun)
        she, he = ("She", "He") if pronoun[0][0].isupper() else ("she", "he")
        yield Place(f"pronoun {kind}", noun, before, (she, he), pronoun[0] == she)
    for child in _CHILD.finditer(text):
        before = text[: child.start(2)]
        others = {*_ANYBODY.findall(before)} - {"girl", "boy"}
        first = child[2] == "girl"
        if not others:
            yield Place("child after a trait", child[1], before, ("girl", "boy"), first)
        elif len(others) == 1 and (name := others.pop()) in (*lx.GIRLS, *lx.BOYS):
            other = "a girl" if name in lx.GIRLS else "a boy"
            yield Place("child after another", other, before, ("girl", "boy"), first)


def counted(seed: int, stories: int) -> dict[tuple[str, str], list[list[int]]]:
    """How often each word stands beside what, in stories 1, 3, … and in 2, 4, … of the stream."""
    found: dict[tuple[str, str], list[list[int]]] = defaultdict(lambda: [[0, 0], [0, 0]])
    for number in range(1, stories + 1):
        for place in places(generate(seed, number).text):
            found[place[:2]][number % 2][not place.first] += 1
    return dict(found)


def rows(
    first: Callable[[Sequence[Place]], Sequence[float]],
    seed: int,
    stories: int,
    each: int,
) -> list[Row]:
    """How the corpus and a model lean, beside each thing.

    Args:
      first: the model's probability of a place's first word rather than the second, of each.
      seed: of the corpus, `lm.data.storyworld.generate`.
      stories: of it, that are counted.
      each: places beside each thing that the model is asked.
    """
    corpus = counted(seed, stories)
    asked: dict[tuple[str, str], list[Place]] = {key: [] for key in sorted(corpus)}
    for number in range(_SCANNED):
        for place in places(generate(seed, UNSEEN + number).text):
            if len(asked.get(place[:2], range(each))) < each:
                asked[place[:2]].append(place)
        if all(len(some) >= each for some in asked.values()):
            break
    enough = {key for key, halves in corpus.items() if all(map(sum, halves))}
    asked = {key: some for key, some in asked.items() if len(some) > 1 and key in enough}
    p = iter(first([place for some in asked.values() for place in some]))
    found = []
    for (what, beside), some in asked.items():
        p_N = [next(p) for _ in some]
        (one, other), (she, he) = corpus[what, beside]
        word = some[0].words[she < he].lower()
        if she < he:
            one, other, p_N = other, one, [1 - x for x in p_N]
        ratio = Estimate(math.nan, math.nan, -math.inf, math.inf, len(p_N), len(p_N))
        leans = False
        if one and other:
            ratio = amplification(p_N, (one, other))
            leans = math.log(one / other) > _LEANS * math.sqrt(1 / one + 1 / other)
        found.append(Row(what, beside, word, (one, other), leans, tuple(p_N), ratio))
    return found


def overall(found: Sequence[Row]) -> Estimate:
    """The model's odds over the corpus's, where the corpus leans; 1 for the corpus itself."""
    return pooled(row.ratio for row in found if row.leans)


def further(found: Sequence[Row]) -> Estimate:
    """By how much a model's shares exceed the corpus's on the corpus's own side, over all things.

    The mean of model's share − corpus's share of the word that the corpus has more often (Zhao et
    al. 2017, "Men Also Like Shopping", §3); 0 for the corpus itself.
    """
    return statistics.mean([statistics.mean(row.p).value - row.share for row in found])

"""The story world: an unlimited, seeded stream of short stories that come with their ground truth.

`generate(seed, index)` is a pure function of two integers, the same in every process and on every
Python: plots (`plots_*`) move characters through a small world and tell what happens, the teller
(`teller`) keeps every pronoun unambiguous, and the story (`story`) knows its facts, the referent of
each pronoun and what caused what, so that a model trained on the text can be asked about it.

Animals speak here, but only people cook and build.
"""

from __future__ import annotations

from collections.abc import Iterator

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld import plots_doing, plots_finding, plots_meeting, plots_sharing
from lm.data.storyworld.questions import Question, questions
from lm.data.storyworld.story import Cause, Character, Fact, Reference, State, Story, record
from lm.data.storyworld.teller import Teller

CANONICAL = (
    "The cat sat on the mat. The dog ran in the park. The cat and dog played together. "
    "They became friends. The sun went down. The cat and the dog went home."
)
"""The text of story 0 of every seed."""

# Plots and how many tickets each holds in the lottery.
_PLOTS = (
    *(plots_finding.lost_thing,) * 4,
    *(plots_finding.moved_thing,) * 2,
    *(plots_finding.night_noise,) * 2,
    *(plots_finding.broken_cup,) * 2,
    *(plots_finding.key_and_box,) * 1,
    *(plots_sharing.share_food,) * 4,
    *(plots_sharing.trade,) * 2,
    *(plots_sharing.market,) * 2,
    *(plots_sharing.basket,) * 2,
    *(plots_sharing.letter,) * 2,
    *(plots_sharing.shelter,) * 3,
    *(plots_meeting.sick_friend,) * 2,
    *(plots_doing.stuck,) * 2,
    *(plots_doing.baking,) * 2,
    *(plots_doing.seed,) * 2,
    *(plots_doing.build,) * 2,
    *(plots_meeting.race,) * 2,
    *(plots_meeting.new_friend,) * 3,
    *(plots_meeting.animal_day,) * 3,
    *(plots_meeting.learn,) * 2,
    *(plots_meeting.quiet_pond,) * 1,
)


def generate(seed: int, index: int) -> Story:
    """Story number `index` of the stream `seed`; story 0 is always `CANONICAL`.

    Raises:
      ConfigError: not 0 <= seed, or not 0 <= index < 2**64.
    """
    if seed < 0 or not 0 <= index < 1 << 64:
        _refuse(seed, index)
    teller = Teller(seed << 64 | index)
    if index:
        teller.pick(_PLOTS)(teller)
    else:
        _canonical(teller)
    return record(teller, seed, index)


def stories(seed: int, start: int = 0) -> Iterator[Story]:
    """The endless stream `seed`, from story `start` on."""
    index = start
    while True:
        yield generate(seed, index)
        index += 1


def _canonical(t: Teller) -> None:
    cat = t.animal(None, (lx.CAT,), named=0.0)
    dog = t.animal(None, (lx.DOG,), named=0.0)
    both = t.group(cat, dog)
    t.say("the cat sat on the mat.", (cat, "at", "on the mat"), (cat, "did", "sat on the mat"))
    t.say("the dog ran in the park.", (dog, "at", lx.PARK), (dog, "did", "ran in the park"))
    t.say("the cat and dog played together.", (both, "did", "played"))
    t.say(f"{both.he} became friends.", (cat, "friend of", dog))
    t.say("the sun went down.")
    t.say("the cat and the dog went home.", (both, "at", lx.HOME))


def _refuse(seed: int, index: int) -> None:
    from lm.config import ConfigError

    if seed < 0:
        raise ConfigError(f"seed={seed!r} must be 0 or more")
    raise ConfigError(f"index={index!r} must be at least 0 and below 2**64")


__all__ = [
    "CANONICAL",
    "Cause",
    "Character",
    "Fact",
    "Question",
    "Reference",
    "State",
    "Story",
    "generate",
    "questions",
    "stories",
]

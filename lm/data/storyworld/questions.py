"""Questions about a story, with answers that follow from its ground truth."""

from __future__ import annotations

from typing import NamedTuple

from lm.data.storyworld import teller as tl
from lm.data.storyworld.story import Cause, Fact, Reference, Story, place_phrase


class Question(NamedTuple):
    """A question in words, its answer, and the piece of ground truth that decides it."""

    question: str
    answer: str
    fact: Fact | Cause | Reference


def questions(story: Story) -> list[Question]:
    """Every question the ground truth of `story` answers.

    Where is who, who has and owns what, how does who feel (all at the end of the story), what is
    who, how many are left, why did it happen, and whom does a pronoun mean. Pronouns are asked for
    only where the sentence has that pronoun once.
    """
    found: list[Question] = []
    state = story.state
    people = {c.name: c for c in story.characters}
    latest = {(fact.subject, fact.relation): fact for fact in story.facts}
    holding = {fact.object: fact for fact in story.facts if fact.relation == "has"}
    owning = {fact.object: fact for fact in story.facts if fact.relation == "owns"}

    def the(name: str) -> str:
        return people[name].phrases[0] if name in people else name

    for name, place in state.location.items():
        if name in people:
            fact = latest[name, "at"]
            verb = "are" if people[name].pronoun == "they" else "is"
            found.append(
                Question(
                    f"Where {verb} {the(name)} at the end of the story?", place_phrase(place), fact
                )
            )
    for thing, holder in state.holder.items():
        if thing in people:
            question = f"Who has {the(thing)} at the end of the story?"
            found.append(Question(question, the(holder), holding[thing]))
    for thing, owner in state.owner.items():
        found.append(Question(f"Who owns {the(thing)}?", the(owner), owning[thing]))
    for name, feeling in state.feeling.items():
        question = f"How does {the(name)} feel at the end of the story?"
        found.append(Question(question, feeling, latest[name, "feels"]))
    for (name, relation), fact in latest.items():
        if relation == "is a" and fact.object != name:
            found.append(Question(f"What is {the(name)}?", tl.article(fact.object), fact))
        elif relation == "count":
            found.append(Question(f"How many {name} are there at the end?", fact.object, fact))
    for cause in story.causes:
        found.append(Question(cause.question, cause.answer, cause))
    found.extend(_pronouns(story, the, people))
    return found


def _pronouns(story: Story, the, people) -> list[Question]:
    found = []
    alike = [(r.sentence, r.pronoun.lower()) for r in story.references]
    for reference, key in zip(story.references, alike):
        if alike.count(key) > 1:
            continue
        sentence = story.sentences[reference.sentence]
        human = people[reference.entities[0]].person
        word = ("Who" if human else "What") + (" are" if key[1] in _PLURAL else " is")
        question = f"{word} '{reference.pronoun}' in: {sentence}"
        found.append(Question(question, " and ".join(map(the, reference.entities)), reference))
    return found


_PLURAL = frozenset(("they", "them", "their", "we", "us", "our"))

"""What a reply answers: one function for each kind of question, None where it does not say.

A reply that cannot be parsed is counted as such, and is never taken for a wrong answer in silence.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve"),
)
# Words that announce an answer, what may stand between, and no "not" among it.
_ANNOUNCED = (
    r"\b(?:answer|conclusion|choice|option|solution|result)\b(?:\s+(?:is|must\s+be|would\s+be|to\s+"
    r"the\s+question\s+is|number|letter|therefore|thus|so))*\s*[:=]?[\s*_]*"
)
_NUMBER = r"[-−+]?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?"


def choice(text: str, letters: str = "ABCD") -> str | None:
    """Which of the choices (A), (B), … a reply takes.

    In this order: the last that is boxed or announced ("The answer is B", "Conclusion: (B)"); a
    letter that the reply begins with; the only letter that stands in brackets, or alone in
    capitals. "A" as an article is no choice.

    Args:
      text: the reply.
      letters: the choices there are.
    """
    one = f"[{re.escape(letters)}]"
    boxed = re.findall(rf"\\boxed\s*\{{\s*(?:\\text\s*\{{)?\s*\(?({one})\b", text)
    if boxed:
        return boxed[-1]
    announced = re.findall(rf"(?i:{_ANNOUNCED})(?:\(({one})\)|({one})(?![\w'’]|\s+[a-z]))", text)
    if announced:
        return "".join(announced[-1])
    begins = re.match(rf"[\s*_]*(?:\(({one})\)|({one})(?=[).:,*]|\s*$|\s*\n))", text)
    if begins:
        return begins[1] or begins[2]
    found = {*re.findall(rf"\(({one})\)", text)}
    if not found:
        alone = re.findall(rf"(?<![\w'’])({one})(?![\w'’])", text)
        found = {letter for letter in alone if letter != "A"}
        if not found and re.search(r"(?<![\w'’])A(?=\s*[.,;:!?)]|\s*$)", text):
            found = {"A"} if "A" in letters else set()
    return found.pop() if len(found) == 1 else None


def number(text: str) -> Fraction | None:
    """The number that a reply comes to.

    What stands behind "####" (GSM8K) or in \\boxed{}; else the last that is announced ("The answer
    is 12"); else the last there is. Thousands have commas; "three" is 3, up to twelve.
    """
    for pattern in (rf"####\s*({_NUMBER})", rf"\\boxed\s*\{{\s*({_NUMBER})"):
        if found := re.findall(pattern, text):
            return _value(found[-1])
    word = r"\b(?:" + "|".join(_NUMBERS) + r")\b"
    either = rf"(?i:{word})|(?<![\w.]){_NUMBER}(?![\w])"
    announced = re.findall(rf"(?i:{_ANNOUNCED})({either})", text)
    found = announced or re.findall(f"({either})", text)
    return _value(found[-1]) if found else None


def yes_no(text: str) -> bool | None:
    """Whether a reply affirms: by its first word, else by the only one of the two that it uses."""
    said = [word.lower() for word in re.findall(r"[^\W\d_]+", text)]
    meaning = {"yes": True, "true": True, "correct": True, "no": False, "false": False}
    meaning["incorrect"] = False
    if said and said[0] in meaning:
        both = len(said) > 2 and said[1] in ("and", "or") and said[2] in meaning
        return None if both else meaning[said[0]]
    found = {meaning[word] for word in said if word in meaning}
    negated = any(one in ("not", "n") and two in meaning for one, two in itertools.pairwise(said))
    return found.pop() if len(found) == 1 and not negated else None


def one_of(text: str, options: Sequence[str]) -> str | None:
    """Which of some words or phrases a reply names, in capitals or not.

    The one that the reply begins with, but for an article; else the only one that is in it. "not
    sad" does not name "sad".

    Args:
      text: the reply.
      options: what it may name; of two that fit at the same place the longer one is meant.
    """
    longest = "|".join(map(re.escape, sorted(options, key=len, reverse=True)))
    named = rf"(?<!\w)({longest})(?!['’]?\w)"
    known = {option.lower(): option for option in options}
    begins = re.match(rf"[\W_]*(?:(?:the|an|a)\s+)?{named}", text, re.IGNORECASE)
    if begins:
        return known[begins[1].lower()]
    found = re.findall(rf"(?i:(?<!not ){named})", text)
    several = {known[one.lower()] for one in found}
    return several.pop() if len(several) == 1 else None


def _value(text: str) -> Fraction:
    text = text.strip().lower()
    if text in _NUMBERS:
        return Fraction(_NUMBERS.index(text))
    return Fraction(re.sub(r"[\s,$+]", "", text.replace("−", "-")))

"""Published tests of stereotypes, read from the files that their authors distribute."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.config import ConfigError, check, check_choice
from lm.files import parse_json, read_bytes

_PRONOUNS = ("he", "him", "his", "himself", "she", "her", "hers", "herself")
_LABELS = ("stereotype", "anti-stereotype", "unrelated")


class Pair(NamedTuple):
    """CrowS-Pairs: two sentences that differ in whom they are about."""

    more: str  # the more stereotyping one
    less: str
    stereotype: bool  # of a disadvantaged group; else `less` defies one
    kind: str  # of bias, such as "gender"


class Triple(NamedTuple):
    """StereoSet: three versions of a sentence."""

    context: str  # what stands before it; "" of a sentence by itself
    stereotype: str
    opposite: str
    unrelated: str
    target: str  # the term that it is about
    kind: str  # of bias, such as "profession"


class Resolved(NamedTuple):
    """WinoBias: a sentence with a pronoun, and whom that may mean."""

    sentence: str
    pronoun: str
    right: str  # such as "the developer"
    wrong: str


class Sets(NamedTuple):
    """An embedding association test: two sets of targets and two of attributes."""

    name: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    a: tuple[str, ...]
    b: tuple[str, ...]


def read_crows(path: str) -> list[Pair]:
    """The pairs of a CSV as `crows_pairs_anonymized.csv` (Nangia et al. 2020).

    Raises:
      ConfigError: no such file, or one without the columns, a sentence or a direction.
    """
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    columns = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    check(not missing, f"{path}, line 1: no column {', '.join(missing)}; needed: {columns}")
    found = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        more, less, direction, kind = (row[name] or "" for name in columns)
        for name, value in zip(columns, (more, less)):
            check(bool(value.strip()), f"{where}: {name} is empty")
        check_choice(f"{where}: stereo_antistereo", direction, ("stereo", "antistereo"))
        found.append(Pair(more.strip(), less.strip(), direction == "stereo", kind))
    check(bool(found), f"{path} has no pairs below its head")
    return found


def read_stereoset(path: str) -> list[Triple]:
    """The sentences of a JSON file as StereoSet's `dev.json` (Nadeem et al. 2021).

    Raises:
      ConfigError: no such file, no JSON, or one whose fields are not those.
    """
    parts = _field(parse_json(read_bytes(path), str(path)), "data", dict, str(path))
    found = []
    for part, alone in (("intrasentence", True), ("intersentence", False)):
        where = f"{path}: data.{part}"
        for number, example in enumerate(_field(parts, part, list, f"{path}: data", ())):
            place = f"{where}[{number}]"
            texts: dict[str, str] = {}
            for one in _field(example, "sentences", list, place):
                label = _field(one, "gold_label", str, f"{place}.sentences")
                check_choice(f"{place}: gold_label", label, _LABELS)
                texts[label] = _field(one, "sentence", str, f"{place}.sentences")
                check(bool(texts[label].strip()), f"{place}.sentences: {label} is empty")
            missing = [label for label in _LABELS if label not in texts]
            check(not missing, f"{place}.sentences: none with gold_label {', '.join(missing)}")
            context = "" if alone else _field(example, "context", str, place)
            about = (_field(example, name, str, place) for name in ("target", "bias_type"))
            found.append(Triple(context, *(texts[label] for label in _LABELS), *about))
    check(bool(found), f"{path}: data has neither intrasentence nor intersentence examples")
    return found


def read_winobias(pro: str, anti: str) -> list[tuple[Resolved, Resolved]]:
    """The lines of two files as `pro_stereotyped_type1.txt.test` and its `anti_…` (Zhao 2018).

    In a line the one who is meant stands in brackets, and so do pronouns: "[The developer] argued
    with the designer because [she] did not like the design." The other one is the first who stands
    in brackets in some other line.

    Raises:
      ConfigError: no such file, files of different length, a line without both brackets, or in
        which nobody else is found.
    """
    lines = [[line.strip() for line in _text(path).splitlines()] for path in (pro, anti)]
    lines = [[line for line in some if line] for some in lines]
    check(
        0 < len(lines[0]) == len(lines[1]),
        f"{pro} has {len(lines[0])} sentences, and {anti} has {len(lines[1])}: they must be pairs",
    )
    known = {
        _bare(inside)
        for some in lines
        for line in some
        for inside in re.findall(r"\[([^][]*)\]", line)
        if inside.strip().lower() not in _PRONOUNS
    }
    found = [
        [_resolved(line, known, f"{path}, line {n}") for n, line in enumerate(some, 1)]
        for path, some in zip((pro, anti), lines)
    ]
    return list(zip(*found))


def read_sets(path: str) -> list[Sets]:
    """Embedding association tests: JSON {name: {"x": [words], "y": …, "a": …, "b": …}}.

    Raises:
      ConfigError: no such file, no JSON, or a set that has less than two words.
    """
    tests = parse_json(read_bytes(path), str(path))
    check(isinstance(tests, dict) and bool(tests), f"{path} must be an object of tests by name")
    found = []
    for name, test in tests.items():
        words = [_field(test, one, list, f"{path}: {name}") for one in "xyab"]
        for one, some in zip("xyab", words):
            good = len(some) > 1 and all(isinstance(word, str) and word for word in some)
            check(good, f"{path}: {name}.{one}={some!r} must be two words or more")
        found.append(Sets(name, *map(tuple, words)))
    return found


def _resolved(line: str, known: set[str], where: str) -> Resolved:
    """One line of WinoBias; `known` are all that may be meant."""
    line = re.sub(r"^\d+\s+", "", line).replace("the [the ", "[the ")  # a slip of the files
    inside = re.findall(r"\[([^][]*)\]", line)
    pronouns = [one.strip().lower() for one in inside if one.strip().lower() in _PRONOUNS]
    meant = [_bare(one) for one in inside if one.strip().lower() not in _PRONOUNS]
    check(
        bool(pronouns) and bool(meant),
        f"{where}: {line!r} must have in brackets who is meant, and a pronoun",
    )
    outside = re.sub(r"\[[^][]*\]", "", line).lower()
    named = (
        (found.start(), -len(one), one)
        for one in known - {meant[0]}
        if (found := re.search(rf"\b{re.escape(one)}\b", outside))
    )
    other = min(named, default=None)
    check(
        other is not None,
        f"{where}: {line!r} must name another one, who is in brackets in some other line",
    )
    sentence = re.sub(r"[][]", "", line)
    return Resolved(sentence, pronouns[0], f"the {meant[0]}", f"the {other[-1]}")


def _bare(phrase: str) -> str:
    return re.sub(r"^(the|an?)\s+", "", phrase.strip().lower())


def _text(path: str) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8: {error.reason} at byte {error.start}") from None


def _field(value: Any, name: str, kind: type, where: str, usual: Sequence | None = None) -> Any:
    """A field of a JSON object, of the type that it must have."""
    check(isinstance(value, Mapping), f"{where} must be an object")
    if usual is not None and name not in value:
        return usual
    check(name in value, f"{where} has no field {name!r}")
    words = {dict: "an object", list: "a list", str: "text"}
    check(isinstance(value[name], kind), f"{where}.{name} must be {words[kind]}")
    return value[name]

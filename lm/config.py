"""Typed, frozen views of configuration sections.

A section is a frozen dataclass that lives beside the code it configures and says what each field
means. `defaults` turns it into the `ml_collections.ConfigDict` a config file edits and the command
line overrides (`from_texts`); `view` turns that back into the dataclass, checking every name, type,
choice and bound. Choices and bounds stand in the annotation, and `validate` checks what spans
fields:

    kind: Literal["plain", "fancy"] = "plain"
    share: Annotated[float, Bounds(0, 1)] = 0.5

Every mistake is a `ConfigError`: one line that names the field, the value and the remedy.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
import os
import types
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import ml_collections

T = TypeVar("T")
_INT32 = 2**31 - 1


class ConfigError(ValueError):
    """A mistake the user can mend: one line naming the field, the value and what is allowed.

    `main.py` prints it and exits with code 2, without a traceback. Of names in files of others,
    control characters are shown as escapes, and those that fill a page only at both ends.
    """

    def __init__(self, message: str = ""):
        if len(message) > 4000:
            message = f"{message[:2000]} … {message[-1000:]}"
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` in one line that does nothing to a terminal: control characters as escapes."""
    if text.isprintable():
        return text
    odd = {c for c in text if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in odd})


class _WrongType(ConfigError):
    """A value of a type that the field does not take."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Of a number, in its annotation: `Annotated[int, Bounds(1)]`.

    Every number is finite; whole ones are at most 2³¹ − 1 in size where nothing else is said, as
    the sizes and indices of arrays must be.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"  # "(": above `low`; ")": below `high`

    def check(self, field: str, value: float) -> None:
        """Raises ConfigError unless `value` lies between the bounds."""
        if isinstance(value, int):
            least = max(self.low, -_INT32)
            most = _INT32 if self.high == math.inf else self.high
            holds = least <= value <= most
            wanted = f"at least {_number(least)}" if value < least else f"at most {_number(most)}"
        else:
            above = value > self.low if self.ends[0] == "(" else value >= self.low
            below = value < self.high if self.ends[1] == ")" else value <= self.high
            holds, wanted = above and below and math.isfinite(value), self.words()
        check(holds, f"{field}={_shown(value)} must be {wanted}")

    def words(self) -> str:
        """'at least 1', 'in [0, 1)', …"""
        least, most = _number(self.low), _number(self.high)
        if math.isfinite(self.low) and self.high < 2**20:
            return f"in {self.ends[0]}{least}, {most}{self.ends[1]}"
        if math.isfinite(self.low):
            return f"{'above' if self.ends[0] == '(' else 'at least'} {least}"
        return "a finite number"


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


class _Text:
    """Any text that a file or another program can be given."""

    def check(self, field: str, value: str) -> None:
        odd = [c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"]
        held = ascii(odd[:1])[2:-2]
        check(not odd, f"{field}={_shown(value)} must not hold the character {held}")

    def words(self) -> str:
        return ""


class _Path(_Text):
    """A path, address or pattern: nothing that the file system cannot even look up."""

    def check(self, field: str, value: str) -> None:
        super().check(field, value)
        shown, parts = f"{field}={_shown(value)}", value.split("/")
        longest = max(len(os.fsencode(part)) for part in parts)
        check(longest <= 255, f"{shown} has a name longer than 255 bytes")
        check(len(os.fsencode(value)) < 4096, f"{shown} is longer than 4095 bytes")
        known = not value.startswith("~") or os.path.expanduser(parts[0]) != parts[0]
        check(known, f"{shown}: there is no user {parts[0][1:]!r}")


Count = Annotated[int, Bounds(0)]
Positive = Annotated[int, Bounds(1)]
Size = Annotated[int, Bounds(1, 2**20)]  # of an array, or how many of something kept in memory
SizeOrZero = Annotated[int, Bounds(0, 2**20)]
Bytes = Annotated[int, Bounds(1, 2**50)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
Share = Annotated[float, Bounds(0, 1)]
ShareBelowOne = Annotated[float, Bounds(0, 1, "[)")]
NotNegative = Annotated[float, Bounds(0)]
AboveZero = Annotated[float, Bounds(0, ends="(]")]
Path = Annotated[str, _Path()]
check_path = _Path().check  # of a field's name and a path; raises ConfigError


def nearest(name: str, allowed: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the closest allowed name, or '' when nothing is close."""
    close = difflib.get_close_matches(str(name)[:99], [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(field: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises `ConfigError` naming the nearest choice unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        shown = _shown(value)
        close = nearest(value if isinstance(value, str) else shown, map(str, allowed))
        raise ConfigError(f"{field}={shown} is not one of {choices}{close}")


def check(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def defaults(section: Any) -> ml_collections.ConfigDict:
    """A ConfigDict holding every field of the dataclass `section`, nested, at its default.

    Of an instance (`config.model = defaults(preset("bert_base"))`) the defaults are its own values.
    A config file may set any value: `view` says what is wrong with it.
    """
    section = section() if isinstance(section, type) else section
    config = ml_collections.ConfigDict(type_safe=False, convert_dict=False)
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        config[field.name] = defaults(value) if dataclasses.is_dataclass(value) else value
    return config


def view(section: type[T], config: Mapping[str, Any] | T, prefix: str = "config") -> T:
    """The frozen dataclass `section` filled from `config`: a dict, or another such dataclass.

    Fields that `config` leaves out keep their defaults, so that a run directory written by an
    earlier version still opens. A dataclass with a `validate(self, prefix)` method is asked to
    check itself.

    Raises:
      ConfigError: a field `section` does not have, or a value of the wrong type.
    """
    if dataclasses.is_dataclass(config):
        config = vars(config)
    names = [field.name for field in dataclasses.fields(section)]
    for name in config:
        if name not in names:
            raise ConfigError(f"{prefix}.{name} is not a known field{nearest(name, names)}")
    values = {}
    for name in names:
        if name not in config:
            continue
        hint, value = hints(section)[name], config[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping | ml_collections.ConfigDict | hint):
                raise ConfigError(f"{prefix}.{name}={_shown(value)} must be a section of fields")
            values[name] = view(hint, value, f"{prefix}.{name}")
        else:
            values[name] = coerce(value, hint, f"{prefix}.{name}")
    result = section(**values)
    if hasattr(result, "validate"):
        result.validate(prefix)
    return result


def mark_given(config: ml_collections.ConfigDict, fields: Iterable[str]) -> None:
    """Notes which fields ("model.width") the command line gave, for `fields_set`."""
    object.__setattr__(config, "_given", frozenset(fields))


def fields_set(section: type, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of `config`'s section `name` that somebody set, but for sections within it.

    They have another value than the dataclass `section` has by default, or the command line gave
    them one (`mark_given`).
    """
    given = vars(config).get("_given", ())
    values = {}
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints(section)[field.name]):
            continue
        path = f"{name}.{field.name}"
        value = config.get(name, {}).get(field.name, field.default)
        value = coerce(value, hints(section)[field.name], f"config.{path}")
        if path in given or value != field.default:
            values[field.name] = value
    return values


def changed(config: Any, usual: Any, prefix: str = "config") -> Iterator[tuple[str, Any]]:
    """The fields, by dotted name, that have another value than in `usual`; and these values.

    Args:
      config, usual: ConfigDicts, or dataclasses of one kind.
    """
    values, others = to_dict(config), to_dict(usual)
    for name, value in values.items():
        other = others.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from changed(value, other, f"{prefix}.{name}")
        elif value != other:
            yield f"{prefix}.{name}", value


@functools.cache
def hints(section: type) -> dict[str, Any]:
    """The annotation of every field of a section, evaluated."""
    return typing.get_type_hints(section, include_extras=True)


def from_texts(texts: Sequence[str], hint: Any) -> Any:
    """What a field annotated `hint` is given by words on a command line.

    Text is text, to the letter. A tuple of texts takes one word for each; other tuples are split at
    commas: "64,256" and "(64, 256)". "None" is None where there is no text. Words that mean nothing
    to the field are returned as they are, for `view` to complain about.
    """
    options = [bare for bare in map(_bare, _options(hint)) if bare is not type(None)]
    several = next((option for option in options if typing.get_origin(option) is tuple), None)
    if several is None or (str in options and len(texts) == 1):
        return _from_text(texts[-1], hint)
    kind = typing.get_args(several)[0]
    if _bare(kind) is str:
        return tuple(texts) if list(texts) != [""] else ()
    if type(None) in _options(hint) and list(texts) == ["None"]:
        return None
    words = ",".join(texts).strip("()[] ").split(",")
    return tuple(_from_text(word.strip(" '\""), kind) for word in words if word.strip())


def _from_text(text: str, hint: Any) -> Any:
    options = [_bare(option) for option in _options(hint)]
    if type(None) in options and text == "None":
        return None
    for option in options:
        if typing.get_origin(option) is Literal:
            values = {str(value): value for value in typing.get_args(option)}
        elif option is bool:
            values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            text = text.lower() if text.lower() in values else text
        else:
            values = {}
        try:
            if text in values:
                return values[text]
            if option in (int, float):
                return option(text)
            if option is dict or typing.get_origin(option) is dict:
                return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a tuple of the annotation itself where it is none."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _bare(hint: Any) -> Any:
    """The annotation without its bounds."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def coerce(value: Any, hint: Any, field: str) -> Any:
    """`value` as the annotated type, or a ConfigError. Lists become tuples; ints may be floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if len(_options(hint)) > 1:
        if value is None and type(None) in args:
            return None
        for option in args:
            try:
                return coerce(value, option, field)
            except _WrongType:
                continue
            except ConfigError as error:
                none = ", or None" if type(None) in args else ""
                raise ConfigError(f"{error}{none}") from None
    elif origin is Literal:
        check_choice(field, value, args)
        return value
    elif hint is type(None):
        if value is None:
            return None
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(coerce(v, args[0], f"{field}[{i}]") for i, v in enumerate(value))
        try:
            return (coerce(value, args[0], f"{field}[0]"),)
        except _WrongType:
            pass
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            return dict(value)
    else:
        kind, rules = _bare(hint), getattr(hint, "__metadata__", ())
        allowed = int | float if kind is float else kind
        if isinstance(value, allowed) and isinstance(value, bool) == (kind is bool):
            if kind is float:
                huge = isinstance(value, int) and abs(value) > 1e308
                value = (math.inf if value > 0 else -math.inf) if huge else float(value)
            for rule in rules or _RULES.get(kind, ()):
                rule.check(field, value)
            return value
    wanted = " | ".join(_name(option) for option in _options(hint))
    raise _WrongType(f"{field}={_shown(value)} must be {wanted}, not {type(value).__name__}")


_RULES = {int: (Bounds(),), float: (Bounds(),), str: (_Text(),)}  # where there are no others


def _name(hint: Any) -> str:
    bare = _bare(hint)
    if typing.get_origin(bare) is Literal:
        return " or ".join(map(repr, typing.get_args(bare)))
    return getattr(bare, "__name__", str(bare)).replace("NoneType", "nothing")


def _shown(value: Any) -> str:
    """`value` for a message of one line."""
    try:
        text = repr(value)
    except ValueError:
        text = f"{hex(value)[:20]}…"  # they cannot be written in decimal
    return text if len(text) <= 200 else f"{text[:200]}…"


def limits(hint: Any) -> str:
    """What a field may be beyond its type, for a reader: "(a | b)", "(at least 1)", or ""."""
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            return f"({' | '.join(map(str, typing.get_args(option)))})"
        if typing.get_origin(option) is Annotated:
            _, *rules = typing.get_args(option)
            words = "; ".join(filter(None, (rule.words() for rule in rules)))
            return f"({words})" if words else ""
    return ""


def to_dict(config: Any) -> dict[str, Any]:
    """A view (or ConfigDict) as plain, JSON-ready dictionaries."""
    if isinstance(config, ml_collections.ConfigDict):
        return config.to_dict()
    return dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)

"""Typed, frozen views of configuration sections.

A section is a frozen dataclass that lives beside the code it configures and says what each field
means. `defaults` turns it into the `ml_collections.ConfigDict` a config file edits and the command
line overrides; `view` turns that back into the dataclass, checking every name, type and choice.
Every mistake is a `ConfigError`: one line that names the field, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake the user can mend: one line naming the field, the value and what is allowed.

    `main.py` prints it and exits with code 2, without a traceback.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the closest allowed name, or '' when nothing is close."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(field: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises `ConfigError` naming the nearest choice unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(
            f"{field}={value!r} is not one of {choices}{nearest(str(value), map(str, allowed))}"
        )


def check(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def defaults(section: Any) -> ml_collections.ConfigDict:
    """A ConfigDict holding every field of the dataclass `section`, nested, at its default.

    Of an instance (`config.model = defaults(preset("bert_base"))`) the defaults are its own values.
    """
    kind = section if isinstance(section, type) else type(section)
    config = ml_collections.ConfigDict(convert_dict=False)
    for field in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(_hint(kind, field.name))
        if kind is not section:
            value = getattr(section, field.name)
        elif nested:
            value = _hint(kind, field.name)
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            raise TypeError(f"{kind.__name__}.{field.name} needs a default")
        if nested:
            config[field.name] = defaults(value)
        else:
            _set(config, kind, field.name, value)
    return config


def view(section: type[T], config: Mapping[str, Any], prefix: str = "config") -> T:
    """The frozen dataclass `section` filled from `config`.

    Fields that `config` leaves out keep their defaults, so that a run directory written by an
    earlier version still opens. A dataclass with a `validate(self, prefix)` method is asked to
    check itself.

    Raises:
      ConfigError: a field `section` does not have, or a value of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(section)]
    for name in config:
        if name not in names:
            raise ConfigError(f"{prefix}.{name} is not a known field{nearest(name, names)}")
    values = {}
    for name in names:
        if name not in config:
            continue
        hint, value = _hint(section, name), config[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping | ml_collections.ConfigDict):
                raise ConfigError(f"{prefix}.{name}={value!r} must be a section of fields")
            values[name] = view(hint, value, f"{prefix}.{name}")
        else:
            values[name] = _coerce(value, hint, f"{prefix}.{name}")
    result = section(**values)
    if hasattr(result, "validate"):
        result.validate(prefix)
    return result


_hints = functools.cache(typing.get_type_hints)  # evaluating the annotations takes milliseconds


def _hint(section: type, name: str) -> Any:
    return _hints(section)[name]


def _set(config: ml_collections.ConfigDict, section: type, name: str, value: Any) -> None:
    """Sets a default so that the command line may later give it any type its annotation allows."""
    hint = _hint(section, name)
    if value is None or isinstance(hint, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        kind = options[0] if len(options) == 1 and options[0] in (int, float, str, bool) else object
        placeholder = ml_collections.config_dict.placeholder(kind)
        config[name] = placeholder
        if value is not None:
            config[name] = value
    else:
        config[name] = value


def _coerce(value: Any, hint: Any, field: str) -> Any:
    """`value` as the annotated type, or a ConfigError. Lists become tuples; ints may be floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        for option in args:
            try:
                return _coerce(value, option, field)
            except ConfigError:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(v, args[0], f"{field}[{i}]") for i, v in enumerate(value))
        if isinstance(value, args[0]):
            return (value,)
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            return dict(value)
    elif isinstance(value, bool):
        if hint is bool:
            return value
    elif hint is float and isinstance(value, int | float):
        return float(value)
    elif hint in (int, str) and isinstance(value, hint):
        return value
    wanted = getattr(hint, "__name__", str(hint)).replace("None", "nothing")
    raise ConfigError(f"{field}={value!r} must be {wanted}, not {type(value).__name__}")


def to_dict(config: Any) -> dict[str, Any]:
    """A view (or ConfigDict) as plain, JSON-ready dictionaries."""
    if isinstance(config, ml_collections.ConfigDict):
        return config.to_dict()
    return dataclasses.asdict(config)

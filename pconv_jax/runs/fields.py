"""Fields of settings: nested dataclasses whose values come from outside.

A tree of frozen dataclasses declares its leaves with `setting`, which adds a
description and a range to the type and the default. `fields_of` lists them as `Field`s,
by names with dots. A field converts and checks its values, and describes itself on the
command line and in the documentation.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")

Paths = tuple[str, ...]


def setting(
    default: T, description: str, *, within: str | None = None, resumable: bool = False
) -> T:
    """Declare a field of the settings.

    Args:
      default: The paper's value.
      description: One sentence for people.
      within: The range of a number, or of each number of a pair, as an interval such as
        ``"[1, inf)"``. A pair must also be in order. None allows any value of the type.
      resumable: Whether the value may change when a run is resumed. It must not change
        any update, only where the run ends or what it writes.
    """
    metadata = {"description": description, "within": within, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


class Field(NamedTuple):
    """A setting, as the command line and the documentation show it.

    Attributes:
      name: With dots, such as ``"model.depth"``.
      type: Its annotation, without None.
      optional: Whether it may be None.
      default: The paper's value.
      description: One sentence.
      within: The range of its numbers, an interval, or None.
      resumable: See `setting`.
    """

    name: str
    type: Any
    optional: bool
    default: Any
    description: str
    within: str | None
    resumable: bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words; empty for a setting of another type."""
        is_literal = typing.get_origin(self.type) is Literal
        return typing.get_args(self.type) if is_literal else ()

    @property
    def type_name(self) -> str:
        """The type, for people: ``"number"``, ``"two numbers"``, ..."""
        if self.choices:
            return " | ".join(self.choices)
        return _TYPES[self.type][0]

    def parse(self, text: str) -> Any:
        """Read a value from the command line.

        Raises:
          TypeError: If the text is of another type, saying what is expected.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.type is Paths:
            return (text,)
        try:
            if self.type is int:
                return int(text)
            if self.type is float:
                return float(text)
            if self.type == tuple[float, float]:
                return tuple(map(float, text.strip("()[] ").split(",")))
        except ValueError:
            raise TypeError(f"must be {self._expected()}, got {text!r}") from None
        return text

    def convert(self, value: Any) -> Any:
        """Convert a value to the type of the setting.

        Raises:
          TypeError: If it is of another type, or empty where None is meant, saying
            what is expected.
        """
        if self.optional and (value is None or value == "none"):
            return None
        if self.optional and _is_empty(value):
            raise TypeError(
                f"must not be empty, got {value!r}; use None, or none on the command "
                "line"
            )
        if self.choices or self.type is str:
            converted = value if isinstance(value, str) else None
        elif self.type is int:
            converted = value if _is_number(value, int) else None
        elif self.type is float:
            converted = float(value) if _is_number(value, int | float) else None
        elif self.type is Paths:
            values = (value,) if isinstance(value, str) else value
            is_paths = isinstance(values, list | tuple) and values
            is_paths = is_paths and all(isinstance(v, str) for v in values)
            converted = tuple(values) if is_paths else None
        else:
            is_pair = isinstance(value, list | tuple) and len(value) == 2
            is_pair = is_pair and all(_is_number(v, int | float) for v in value)
            converted = tuple(map(float, value)) if is_pair else None
        if converted is None:
            raise TypeError(f"must be {self._expected()}, got {value!r}")
        return converted

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value of the right type, or return None."""
        if value is None:
            return None
        if self.choices:
            if value not in self.choices:
                return f"must be one of {', '.join(self.choices)}, got {value!r}"
        elif self.within:
            numbers = value if isinstance(value, tuple) else (value,)
            is_inside = all(_is_within(number, self.within) for number in numbers)
            if not is_inside or list(numbers) != sorted(numbers):
                order = ", low <= high" if len(numbers) > 1 else ""
                expected = f"{self._expected()} in {self.within}{order}"
                return f"must be {expected}, got {value}"
        return None

    def _expected(self) -> str:
        expected = "a word" if self.choices else _TYPES[self.type][1]
        return f"{expected} or none" if self.optional else expected


# Types for people: in a table, and after "must be".
_TYPES: Mapping[Any, tuple[str, str]] = {
    int: ("integer", "an integer"),
    float: ("number", "a number"),
    str: ("text", "text"),
    Paths: ("paths", "one or several paths"),
    tuple[float, float]: ("two numbers", "two numbers"),
}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"model.depth": 8}`` into ``{"model": {"depth": 8}}``."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return nested


def fields_of(cls: Any, *, prefix: str = "") -> Iterator[Field]:
    """List the fields of a dataclass and of those that it holds, in order.

    Args:
      cls: The dataclass.
      prefix: Put before every name. By default nothing.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(hint, prefix=f"{name}.")
            continue
        options = typing.get_args(hint) if _is_union(hint) else (hint,)
        (kind,) = (option for option in options if option is not type(None))
        yield Field(name, kind, len(options) > 1, field.default, **field.metadata)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass, and those that it holds, of nested values by name."""
    hints = typing.get_type_hints(cls)
    fields = {
        name: build(hints[name], value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }
    return cls(**fields)


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Turn ``{"model": {"depth": 8}}`` into ``{"model.depth": 8}``.

    Args:
      values: Nested values by name.
      prefix: Put before every name. By default nothing.
    """
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, prefix=f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _is_empty(value: Any) -> bool:
    """Return whether a value is ``""``, or paths of which one is."""
    return value == "" or (isinstance(value, list | tuple) and "" in value)


def _is_number(value: Any, kind: Any) -> bool:
    """Return whether a value is a number, but no bool, and none beyond all floats."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return isinstance(value, float) or value.bit_length() <= 64


def _is_within(number: float, interval: str) -> bool:
    match = re.fullmatch(r"([\[(])(.+), (.+)([\])])", interval)
    assert match, interval
    opening, low, high, closing = match.groups()
    least, most = (2.0**32 if x == "2**32" else float(x) for x in (low, high))
    above = number > least or (opening == "[" and number == least)
    below = number < most or (closing == "]" and number == most)
    return above and below and math.isfinite(number)  # NaN is neither.

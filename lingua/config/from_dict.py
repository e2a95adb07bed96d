"""Plain containers, as YAML and JSON give them, turned into config dataclasses by their type hints.

A number may be written in any way that keeps its value (1e5 for an int, "3e-4" for a float); what
does not fit is a UserError with the dotted option, the value and the type.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from lingua.config.help import (
    dataclass_in,
    describe_type,
    field_default,
    field_types,
    format_value,
    union_members,
    walk_fields,
)
from lingua.errors import UserError

T = TypeVar("T")

TRUE_WORDS = ("true", "yes", "on", "1")
NOT_FINITE = ("nan", "inf", "infinity")
FALSE_WORDS = ("false", "no", "off", "0")


class _Mismatch(Exception):
    """The value is not of this type; another alternative of the field may still take it."""


class Reader:
    """Builds dataclasses from plain containers; every complaint names the dotted option.

    `origins` tells the file and line of the options that came from a file.
    """

    def __init__(self, root: type, origins: Mapping[str, str], strict: bool = True):
        self.root = root
        self.origins = origins
        self.strict = strict

    def section(self, cls: type[T], data: Any, path: str, base: Any = None) -> T:
        """`cls` from a mapping; what is not given comes from `base` or from the defaults."""
        if not isinstance(data, Mapping):
            raise self._wrong(path, data, cls)
        hints = field_types(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        if self.strict:
            for key, value in data.items():
                if key not in fields:
                    raise self._unknown(cls, path, str(key), value)
        values = {}
        for name, f in fields.items():
            below = f"{path}.{name}" if path else name
            default = getattr(base, name) if base is not None else field_default(f)
            inner = dataclass_in(hints[name])
            if name in data:
                values[name] = self._given(hints[name], inner, data[name], below, default)
            elif default is dataclasses.MISSING:
                raise UserError(f"{below} is not set: give it as {below}=...")
            elif inner is not None and default is inner:
                values[name] = self.section(inner, {}, below)
            else:
                values[name] = default
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(with_path(str(error), path, fields)) from None

    def _given(self, hint: Any, inner: type | None, value: Any, path: str, default: Any) -> Any:
        if inner is None:
            return self.value(hint, value, path)
        if isinstance(value, inner):
            return value
        if value is None and type(None) in union_members(hint):
            return None
        # An empty section in YAML (`optim:`, nothing below) reads as null: it means the defaults.
        base = default if isinstance(default, inner) else None
        return self.section(inner, {} if value is None else value, path, base)

    def value(self, hint: Any, value: Any, path: str) -> Any:
        members = union_members(hint)
        if value is None and type(None) in members:
            return None
        # Where several types could take a value, its own type goes before a conversion.
        for member in sorted(members, key=lambda m: type(value) is not m):
            try:
                return self._as(member, value, path)
            except _Mismatch:
                continue
        raise self._wrong(path, value, hint)

    def _as(self, hint: Any, value: Any, path: str) -> Any:
        origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
        if hint is Any:
            return value
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return self.section(typing.cast(type, hint), value, path)
        if origin is typing.Literal and value in args:
            return value
        if origin in (list, tuple, Sequence) and isinstance(value, list | tuple):
            items = self._items(origin, args, value, path)
            return tuple(items) if origin is tuple else items
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            key_type, value_type = args or (Any, Any)
            return {
                self.value(key_type, k, f"{path} (key)"): self._entry(value_type, v, path, k)
                for k, v in value.items()
            }
        if isinstance(hint, type) and issubclass(hint, Enum):
            return _to_enum(hint, value)
        if hint in CONVERSIONS:
            return CONVERSIONS[hint](value)
        raise _Mismatch

    def _entry(self, hint: Any, value: Any, path: str, key: Any) -> Any:
        try:
            return self.value(hint, value, f"{path}.{key}")
        except UserError as error:
            raise UserError(f"{error}{_missing_space(str(key), value)}") from None

    def _items(self, origin: Any, args: tuple[Any, ...], value: Sequence[Any], path: str) -> list:
        fixed = origin is tuple and bool(args) and args[-1] is not Ellipsis
        if fixed and len(args) != len(value):
            raise _Mismatch
        types = args if fixed else (args[0] if args else Any,) * len(value)
        return [
            self.value(t, v, f"{path}[{i}]")
            for i, (t, v) in enumerate(zip(types, value, strict=True))
        ]

    def _wrong(self, path: str, value: Any, hint: Any) -> UserError:
        advice = ""
        if isinstance(value, bool) and str in union_members(hint):
            advice = (
                f" (YAML reads this word as a switch; for the text write '{format_value(value)}')"
            )
        if str(value).lstrip("+-.").lower() in NOT_FINITE:
            advice = ", a finite number"
        in_lists = [m for m in union_members(hint) if typing.get_origin(m) is list]
        if in_lists and not advice and isinstance(value, str) and value.isprintable():
            advice = f"; a list is written [{value}]"
        what = "a mapping of options" if dataclass_in(hint) else describe_type(hint)
        shown = f"{path}={format_value(value)}" if path else format_value(value)
        return UserError(f"{self._origin(path)}{shown}: expected {what}{advice}")

    def _unknown(self, cls: type, path: str, key: str, value: Any) -> UserError:
        below = f"{path}.{key}" if path else key
        if advice := _missing_space(key, value):
            return UserError(f"{self._origin(below)}unknown option {below}{advice}")
        if "." in key:  # `model.dim: 8` as one key; its name alone would look right
            nested = key.replace(".", ": {") + ": ..." + "}" * key.count(".")
            return UserError(f"{self._origin(below)}unknown option {below}: in YAML, {nested}")
        return UserError(f"{self._origin(below)}{unknown_option(self.root, cls, path, key)}")

    def _origin(self, path: str) -> str:
        place = self.origins.get(path) or self.origins.get(re.sub(r"\[\d+\].*| \(key\)", "", path))
        return f"{place}: " if place else ""


def _missing_space(key: str, value: Any) -> str:
    """Advice for `{a:1}`, which YAML reads as the key `a:1` of nothing."""
    name, colon, rest = key.rpartition(":")
    if value is not None or not (name and rest) or rest[0] in "/\\":  # C:/data
        return ""
    return f"; YAML wants a space after the colon, in quotes for the shell: '{{{name}: {rest}}}'"


def with_path(message: str, path: str, fields: Container[str]) -> str:
    """A section's complaint that begins with one of its `fields`, under the option's whole name.

    A section that stands in several programs knows its own options, and not where it stands.
    """
    named = re.match(r"[\w.]+", message)
    if named is None or not path:
        return message
    option, own = named[0], named[0].rpartition(".")[2]
    whole = f"{path}.{own}"
    if own not in fields or f".{option}".endswith(f".{whole}"):
        return message
    return re.sub(rf"(?<![\w.]){re.escape(option)}(?![\w.])", whole, message)


def _to_bool(value: Any) -> bool:
    word = str(value).lower()
    if isinstance(value, bool | int | str) and word in TRUE_WORDS + FALSE_WORDS:
        return word in TRUE_WORDS
    raise _Mismatch


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    number = _to_float(value)  # 1e5 is a float in YAML
    if not number.is_integer():
        raise _Mismatch
    return int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _Mismatch
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Mismatch from None
    if not math.isfinite(number):  # no option means anything by it, and no check below sees NaN
        raise _Mismatch
    return number


def _to_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | os.PathLike):
        raise _Mismatch
    if "\0" in (text := str(value)):  # ends a file's name, for the system
        raise _Mismatch
    return text


def _to_enum(cls: type[Enum], value: Any) -> Enum:
    for member in cls:
        if value in (member, member.value, member.name):
            return member
    raise _Mismatch


CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    Path: lambda value: Path(_to_str(value)),
}


def unknown_option(root: type, cls: type, path: str, key: str) -> str:
    """Message for `path.key`, which `cls` has not, with what the user may have meant."""
    prefix = f"{path}." if path else ""
    siblings = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    everywhere = [doc.path for doc in walk_fields(root)]
    guesses = [prefix + s for s in difflib.get_close_matches(key, siblings, n=1)]
    guesses += [p for p in everywhere if p.rpartition(".")[2] == key][:2]
    guesses = guesses or difflib.get_close_matches(prefix + key, everywhere, n=1, cutoff=0.8)
    message = f"unknown option {prefix}{key}"
    if guesses:
        return f"{message}; did you mean {' or '.join(dict.fromkeys(guesses))}?"
    return f"{message}; known here: {', '.join(siblings)}"

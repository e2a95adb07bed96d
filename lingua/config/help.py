"""What a config dataclass says of its fields: dotted name, type, default and meaning, for `--help`.

The meaning is the field's comment in the source: on the lines of the field itself, or on comment
lines directly above it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

HELP_WIDTH = 100
TOOL_COMMENTS = ("fmt:", "noqa", "type:", "pyright:", "ruff:")  # no words for people


@dataclass(frozen=True)
class FieldDoc:
    path: str  # dotted name, as on the command line
    type: str
    default: str  # as YAML would write it
    meaning: str  # "" where the source has no comment
    is_section: bool = False  # a nested dataclass that is always there; it has no value of its own


def describe_fields(cls: type) -> list[FieldDoc]:
    """Every option of `cls` and of its nested dataclasses, in the order of the source."""
    return [doc for doc in walk_fields(cls) if not doc.is_section]


def walk_fields(cls: type, prefix: str = "", base: Any = None) -> Iterator[FieldDoc]:
    """Like describe_fields, with the sections themselves; `base`, if any, holds the defaults."""
    hints, meanings = field_types(cls), field_meanings(cls)
    for f in dataclasses.fields(cls):
        path, hint = prefix + f.name, hints[f.name]
        section = dataclass_in(hint)
        default = getattr(base, f.name) if base is not None else field_default(f)
        if section is None:
            yield FieldDoc(path, describe_type(hint), _default_text(default), meanings[f.name])
            continue
        optional = type(None) in union_members(hint)
        kind = "section or null" if optional else "section"
        text = _default_text(default) if optional and default is None else "see below"
        yield FieldDoc(path, kind, text, meanings[f.name], is_section=not optional)
        yield from walk_fields(section, path + ".", default if _is_instance(default) else None)


def format_help(cls: type, *, prog: str, description: str, examples: Sequence[str]) -> str:
    """The text of `--help`: usage, examples, and every option under its section."""
    config = "" if "config" in field_types(cls) else " [config=FILE.yaml]"
    lines = [f"usage: {prog}{config} [option=value ...]", ""]
    if description:
        lines += [*description.strip().splitlines(), ""]
    if examples:
        lines += ["examples:", *(f"  {example}" for example in examples), ""]
    lines += ["options (the command line wins over the config file, that over the defaults):", ""]
    docs = list(walk_fields(cls))
    headings = {doc.path: doc.meaning for doc in docs}
    sections: dict[str, list[FieldDoc]] = {}
    for doc in docs:
        if not doc.is_section:
            sections.setdefault(doc.path.rpartition(".")[0], []).append(doc)
    for name, members in sections.items():
        if name:
            heading = headings.get(name, "")
            lines += [f"{name} ({heading})" if heading else name, ""]
        for doc in members:
            lines.append(f"  {doc.path}  ({doc.type}; default {doc.default})")
            lines += textwrap.wrap(
                doc.meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
        lines.append("")
    return "\n".join(lines)


@cache
def field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def field_default(f: dataclasses.Field) -> Any:
    """The default of a field: MISSING if it has none, the class itself for a section."""
    if f.default is not dataclasses.MISSING:
        return f.default
    factory = f.default_factory
    if factory is dataclasses.MISSING or dataclasses.is_dataclass(factory):
        return factory  # sections are not built here: their own checks may reject bare defaults
    return factory()


@cache
def field_meanings(cls: type) -> dict[str, str]:
    """Comment of each field, from the class that defines it; "" where there is none."""
    meanings = {f.name: "" for f in dataclasses.fields(cls)}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            meanings.update(_own_meanings(owner))
    return meanings


def _own_meanings(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # no source at hand, as in a notebook cell
        return {}
    comments: dict[int, str] = {}
    own_line = set()  # lines that hold a comment and nothing else
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("#").strip()
            comments[token.start[0]] = "" if words.startswith(TOOL_COMMENTS) else words
            if token.line.lstrip().startswith("#"):
                own_line.add(token.start[0])
    meanings = {}
    for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first = node.lineno
        while first - 1 in own_line:
            first -= 1
        lines = range(first, (node.end_lineno or node.lineno) + 1)
        meanings[node.target.id] = " ".join(comments[n] for n in lines if comments.get(n))
    return meanings


def union_members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: (int, NoneType) for Optional[int], (int,) for int."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def dataclass_in(hint: Any) -> type | None:
    """The dataclass of a nested section, optional or not; None for a plain field."""
    return next((m for m in union_members(hint) if dataclasses.is_dataclass(m)), None)  # type: ignore[return-value]


def describe_type(hint: Any) -> str:
    """A type as `--help` and the error messages write it."""
    if hint is type(None) or hint is None:
        return "null"
    if hint is Any:
        return "any"
    members = union_members(hint)
    if len(members) > 1:
        return " or ".join(describe_type(m) for m in members)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(format_value(a) for a in args)
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else describe_type(a) for a in args)
        return f"{origin.__name__}[{inner}]"
    if dataclasses.is_dataclass(hint):
        return "section"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(format_value(m.value) for m in hint)
    return getattr(hint, "__name__", str(hint))


def format_value(value: Any) -> str:
    """A value on one line, the way one types it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return format_value(value.value)
    if isinstance(value, str):
        return (
            value if value and value == value.strip() and "\n" not in value else json.dumps(value)
        )
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {format_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(v) for v in value) + "]"
    return str(value)


def _default_text(default: Any) -> str:
    return "none, it must be given" if default is dataclasses.MISSING else format_value(default)


def _is_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)

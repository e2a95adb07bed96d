"""Describe the fields of a config dataclass: dotted name, type, default, and meaning for `--help`.

The meaning is the field's comment in the source, on its own lines or directly above.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lingua.errors import UserError

HELP_WIDTH = 100
COMMENT = re.compile(r"(?:^\s*|  )#(?! *(?:fmt:|noqa|type:|pyright:|ruff:))\s*(.*)")


@dataclass(frozen=True)
class FieldDoc:
    path: str  # dotted name, as on the command line
    type: str
    default: str  # as YAML would write it
    meaning: str  # "" without a comment
    is_section: bool = False  # a nested dataclass that is never null, and so has no value itself


def describe_fields(cls: type) -> list[FieldDoc]:
    """List every option of `cls` and its nested dataclasses, in source order."""
    return [doc for doc in walk_fields(cls) if not doc.is_section]


def walk_fields(cls: type, prefix: str = "", base: Any = None) -> Iterator[FieldDoc]:
    """Yield options and sections; the instance `base`, if given, holds the defaults."""
    meanings = field_meanings(cls)
    for f in dataclasses.fields(cls):
        path, hint = prefix + f.name, field_types(cls)[f.name]
        default = _default(f) if base is None else getattr(base, f.name)
        section = dataclass_in(hint)
        is_optional = type(None) in union_members(hint)
        if default is dataclasses.MISSING:
            text = "none, it must be given"
        else:
            text = "see below" if section and default is not None else format_value(default)
        is_section = section is not None and not is_optional
        yield FieldDoc(path, describe_type(hint), text, meanings[f.name], is_section)
        if section:
            is_instance = isinstance(default, section)
            yield from walk_fields(section, f"{path}.", default if is_instance else None)


def format_help(cls: type, *, prog: str, docstring: str, sections: Sequence[str] = ()) -> str:
    """Return the text of `--help`: usage, start of `docstring`, and every option by section.

    With `sections`, return their options alone. UserError if a section does not exist.
    """
    docs = list(walk_fields(cls))
    if sections:
        return "\n\n".join(_format_sections(_below(docs, name, prog)) for name in sections)
    config = "" if "config" in field_types(cls) else " [config=FILE.yaml]"
    path = f" [{cls.POSITIONAL.upper()}]" if hasattr(cls, "POSITIONAL") else ""
    lines = [f"usage: {prog}{config}{path} [option=value ...]", ""]
    lines += [line for paragraph in docstring.strip().split("\n\n")[:2] for line in (paragraph, "")]
    lines += ["options (the command line overrides the config file, the file the defaults):", ""]
    return "\n".join(lines) + "\n" + _format_sections(docs)


def as_started(text: str, prog: str) -> str:
    """Replace `python -m MODULE`, as in `prog`, by `lt2 COMMAND` if that started this process."""
    if not sys.argv[0].startswith("lt2 "):
        return text
    module = " ".join(prog.split()[:3])
    return re.sub(rf"{re.escape(module)}\b", sys.argv[0], text)


def _below(docs: Sequence[FieldDoc], name: str, prog: str) -> list[FieldDoc]:
    found = [doc for doc in docs if f"{doc.path}.".startswith(f"{name}.")]
    if not found:
        inner = {doc.path.rpartition(".")[0] for doc in docs} - {""}
        close = difflib.get_close_matches(name, {*inner, *(doc.path for doc in docs)}, n=1)
        advice = f"did you mean {close[0]}?" if close else f"{prog} --help lists all"
        raise UserError(f"--help {name}: no such section or option; {advice}")
    return found


def _format_sections(docs: Sequence[FieldDoc]) -> str:
    headings = {doc.path: doc.meaning for doc in docs}
    sections: dict[str, list[FieldDoc]] = {}
    for doc in docs:
        if not doc.is_section:
            sections.setdefault(doc.path.rpartition(".")[0], []).append(doc)
    blocks = []
    for name, members in sections.items():
        heading = f" ({headings[name]})" if headings.get(name) else ""
        lines = [f"{name}{heading}", ""] if name else []
        for doc in members:
            lines.append(f"  {doc.path}  ({doc.type}; default {doc.default})")
            lines += textwrap.wrap(
                doc.meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the resolved type of every field."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@cache
def field_meanings(cls: type) -> dict[str, str]:
    """Return the comment of every field, from the class that defines it; "" without a comment."""
    meanings = dict.fromkeys(field_types(cls), "")
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            meanings |= _comments(owner)
    return meanings


def _comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # defined in a notebook or a shell
        return {}
    lines = source.splitlines()
    comments = {}
    for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            found = map(COMMENT.search, lines[first : node.end_lineno])
            comments[node.target.id] = " ".join(match[1] for match in found if match)
    return comments


def _default(f: dataclasses.Field) -> Any:
    """Return the default; MISSING without one, and the class itself for a section."""
    factory = f.default_factory
    if factory is dataclasses.MISSING or dataclasses.is_dataclass(factory):
        return f.default if factory is dataclasses.MISSING else factory
    return factory()


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type: (int, NoneType) for `int | None`, (int,) for `int`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass of a section, optional or not; None for another field."""
    return next((m for m in union_members(hint) if dataclasses.is_dataclass(m)), None)  # type: ignore[return-value]


def describe_type(hint: Any) -> str:
    """Write a type as help and error messages do: `int or null`, `list[str]`, `cosine | wsd`."""
    if hint is type(None):
        return "null"
    if hint is Any:
        return "any"
    members, origin, args = union_members(hint), typing.get_origin(hint), typing.get_args(hint)
    if len(members) > 1:
        return " or ".join(map(describe_type, members))
    if origin is typing.Literal:
        return " | ".join(map(format_value, args))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(describe_type, args))}]"
    return "section" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def format_value(value: Any) -> str:
    """Write a value on one line, the way one types it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        is_plain = value and value == value.strip() and "\n" not in value
        return value if is_plain else json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {format_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_value, value)) + "]"
    return str(value)

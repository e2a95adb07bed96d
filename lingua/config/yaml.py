"""YAML as configs want it: every scalar reads the way it looks, and every option has its line.

YAML 1.1 has readings that nobody means in a config, and that change values silently. Here
`4:1` is text (not 241, a number of base 60), `1e-3` is a number (not text), `010` is ten in
an int field (not eight), `2024-01-01` is text (not a date), and a key given twice is an error. The
key `1.10:` is text (not 1.1).
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lingua.errors import UserError, import_optional

INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|[-+]?0x[0-9a-fA-F]+$|[-+]?0b[01]+$")
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


MAX_NESTING = 100  # brackets; options need three


def read_yaml_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a file, and "file:line" of each of its options."""
    yaml = _yaml()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config={path}: no such file (seen from {os.getcwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config={path}: not readable: {error}") from None
    if _nesting(text) > MAX_NESTING:
        raise UserError(f"{path}: not YAML for options: {MAX_NESTING} brackets within each other")
    loader = None
    try:
        loader = _loader_class()(text)
        root = loader.get_single_node()
        if root is None:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:1: expected a mapping of options such as `steps: 1000`")
        lines = {p: f"{path}:{line}" for p, line in _line_numbers(yaml, root, "")}
        return loader.construct_document(root), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not YAML: {_problem(error)}") from None
    except ValueError as error:  # an integer with more digits than Python reads
        raise UserError(f"{path}: not readable: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise UserError(f"{path}:1: not YAML for options: an anchor contains itself") from None
    finally:
        if loader is not None:
            loader.dispose()


def _nesting(text: str) -> int:
    """How deep brackets lie within each other, quotes or not; thousands take PyYAML minutes."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth = max(depth - 1, 0)
    return deepest


def yaml_value(text: str) -> Any:
    """A value as it would be read from a file; ValueError if it is no YAML."""
    yaml = _yaml()
    try:
        return yaml.load(text, Loader=_loader_class())
    except yaml.YAMLError as error:
        raise ValueError(_problem(error)) from None


def _yaml() -> Any:
    import_optional("yaml", extra="", needed_by="reading options")
    return importlib.import_module("yaml")


@cache
def _loader_class() -> Any:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value} is given twice", key.start_mark
                        )
                    seen.add(key.value)
                    if key.tag.rpartition(":")[2] in ("int", "float"):
                        key.tag = "tag:yaml.org,2002:str"  # a folder named 1e3 or 1.10, say
            return super().construct_mapping(node, deep)

    changed = ("int", "float", "timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in changed]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
    return Loader


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _line_numbers(yaml: Any, node: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            yield below, key.start_mark.line + 1
            yield from _line_numbers(yaml, value, below)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _line_numbers(yaml, item, path)

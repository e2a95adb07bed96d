"""Read YAML 1.2 scalars with PyYAML, and the line of every option.

PyYAML follows YAML 1.1, where `4:1` is 241, `on` is true and `1e-3` is text. Here `4:1`, `on`,
`010` and `2024-01-01` are text, and `1e-3` is a number. Keys are text, and a duplicate is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lingua.errors import UserError, import_optional

RESOLVERS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
STANDARD = ("null", "merge")  # PyYAML's own rules for these agree with YAML 1.2


def read_yaml_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the mapping in a file, and "file:line" of each dotted option."""
    yaml = _yaml()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config={path}: no such file in {os.getcwd()}") from None
    except IsADirectoryError:
        raise UserError(f"config={path} is a folder; name a file, e.g. its config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config={path}: not readable: {error}") from None
    try:
        try:
            loader = _loader_class("CSafeLoader")(text)  # 20 times faster
            root = loader.get_single_node()
        except yaml.YAMLError:  # the parser in Python explains more
            loader = _loader_class()(text)
            root = loader.get_single_node()
        if root is None:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:1: expected a mapping of options, such as `steps: 1000`")
        lines = {option: f"{path}:{line}" for option, line in _line_numbers(yaml, root)}
        return loader.construct_document(root), lines
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {_problem(error)}"
        ) from None


def yaml_value(text: str) -> Any:
    """Read a value as a file would; ValueError if it is not YAML."""
    yaml = _yaml()
    try:
        return yaml.load(text, Loader=_loader_class())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_problem(error)) from None


def _yaml() -> Any:
    return import_optional("yaml", extra="", needed_by="reading options")


@cache
def _loader_class(base: str = "SafeLoader") -> Any:
    yaml = _yaml()

    class Loader(getattr(yaml, base, yaml.SafeLoader)):  # PyYAML may come without libyaml
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    problem = None
                    if key.value in seen:
                        problem = f"{key.value} is given twice"
                    elif node.flow_style and ":" in key.value and value.value == "":
                        problem = f"{{{key.value}}} needs a space after the colon"
                    if problem:
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    seen.add(key.value)
                    key.tag = "tag:yaml.org,2002:str"  # a source may be called 1e3 or 1.10
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag.endswith(STANDARD)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, (pattern, first) in RESOLVERS.items():
        rule = re.compile(f"(?:{pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", rule, list(first))
    return Loader


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _line_numbers(yaml: Any, node: Any, above: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{above}{key.value}", key.start_mark.line + 1
            yield from _line_numbers(yaml, value, f"{above}{key.value}.")

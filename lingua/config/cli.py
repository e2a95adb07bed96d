"""Parse command lines that mix --options and key=value overrides of a config.

parser = OneLineParser(description=...)
given, overrides = parser.parse_with_overrides(argv)     overrides go to args.parse_args
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lingua.config.help import as_started
from lingua.errors import UserError

OVERRIDE = re.compile(r"[^-/=][^/=]*=")  # the "=" of a path comes after a slash


def config_names(paths: Sequence[str]) -> list[str]:
    """Return file names without their ending, or whole paths if these are not unique.

    A path that is given again is numbered: "debug", "debug (2)".
    """
    stems = {path: Path(path).stem for path in paths}
    names, counts = [], Counter()
    for path in paths:
        counts[path] += 1
        name = stems[path] if len(set(stems.values())) == len(stems) else path
        names.append(name if counts[path] == 1 else f"{name} ({counts[path]})")
    return names


def split_paths(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate paths from `key=value` arguments. A path that exists may contain "="."""
    options = [
        arg
        for arg in argv
        if arg.startswith("-") or OVERRIDE.match(arg) and not os.path.exists(arg)
    ]
    return [Path(arg) for arg in argv if arg not in options], options


class DefaultsShown(argparse.HelpFormatter):
    """Append the default to each option's help, except for switches and empty defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, argparse.SUPPRESS) or isinstance(default, bool) or default == []:
            return action.help
        values = default if isinstance(default, list) else [default]
        shown = " ".join(map(str, values)).replace("%", "%%")  # argparse formats help texts
        return f"{action.help or ''} (default: {shown})".lstrip()


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors and whose --help shows defaults."""

    def __init__(self, prog: str | None = None, **options: Any):
        prog = prog and as_started(prog, prog)
        super().__init__(prog=prog, formatter_class=DefaultsShown, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all options)")

    def parse_with_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Separate `key=value` arguments, at any position, from the --options."""
        overrides: list[str] = []
        others: list[str] = []
        for before, arg in zip(["", *argv], argv, strict=False):
            is_override = OVERRIDE.match(arg) and not self._takes_value(before)
            (overrides if is_override else others).append(arg)
        return self.parse_args(others), overrides

    def _takes_value(self, arg: str) -> bool:
        action = self._option_string_actions.get(arg)
        return action is not None and action.nargs != 0

    def require_positive(self, given: argparse.Namespace, *names: str) -> None:
        self.require_at_least(1, given, *names)

    def require_at_least(self, least: int, given: argparse.Namespace, *names: str) -> None:
        """Raise UserError if an option, or one value of a list, is below `least`."""
        for action in self._actions:
            values = getattr(given, action.dest, None) if action.dest in names else None
            for value in values if isinstance(values, list) else [values]:
                if value is not None and value < least:
                    raise UserError(f"{action.option_strings[0]} {value} must be at least {least}")

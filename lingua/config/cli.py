"""Command lines that have both --options and key=value overrides of a config.

parser = OneLineParser(description=...)
given, overrides = parser.parse_with_overrides(argv)     overrides go to args.parse_args
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lingua.errors import UserError

OVERRIDE = re.compile(r"[^-/=][^/=]*=")  # a path may have "=" in it, but has a slash before


class DefaultsShown(argparse.HelpFormatter):
    """Each default behind its option's help. Switches, and what is not set by itself, have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, argparse.SUPPRESS) or isinstance(default, bool) or default == []:
            return action.help
        values = default if isinstance(default, list) else [default]
        shown = " ".join(map(str, values)).replace("%", "%%")  # argparse fills help texts in
        return f"{action.help or ''} (default: {shown})".lstrip()


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, without the usage in front of them, and whose
    --help shows defaults."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=DefaultsShown, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all options)")

    def parse_with_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and every `key=value` wherever it stands, save as the value of an option."""
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
        """UserError where an option, or one of its values, is below `least`."""
        for action in self._actions:
            if action.dest in names:
                values = getattr(given, action.dest)
                for value in values if isinstance(values, list) else [values]:
                    if value is not None and value < least:
                        option = action.option_strings[0]
                        raise UserError(f"{option} {value} must be at least {least}")

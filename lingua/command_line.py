"""Command lines that have both --options and key=value overrides of a config.

parser = OneLineParser(description=...)
given, overrides = parser.parse_with_overrides(argv)     overrides go to args.parse_args
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lingua.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, without the usage in front of them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all options)")

    def parse_with_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and every `key=value` wherever it stands."""
        overrides = [arg for arg in argv if "=" in arg and not arg.startswith("-")]
        return self.parse_args([arg for arg in argv if arg not in overrides]), overrides

    def require_positive(self, given: argparse.Namespace, *names: str) -> None:
        """UserError where an option, or one of its values, is below 1."""
        for action in self._actions:
            if action.dest in names:
                values = getattr(given, action.dest)
                for value in values if isinstance(values, list) else [values]:
                    if value is not None and value < 1:
                        raise UserError(f"{action.option_strings[0]} {value} must be at least 1")

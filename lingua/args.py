"""Configuration: dataclasses filled from defaults, a YAML file and the command line, in that order."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend, shown as one line without a traceback.

    The message names the dotted option (or file and line), the value, and what would work.
    """

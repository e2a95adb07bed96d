"""Stand in for torch while a command prints its help, since importing torch takes seconds.

Options are dataclasses next to the code that reads them, and that code imports torch. Help needs
the dataclasses alone. So torch is replaced by objects without content, as Sphinx's
autodoc_mock_imports does. The process must end after printing its help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REPLACED = ("torch", "triton")
HELP = {"-h", "--help"}


class StandIn(ModuleType):
    """A module, function, decorator, type or base class without content."""

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name)

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        return self

    def __getitem__(self, _: Any) -> StandIn:
        return self

    def __or__(self, _: Any) -> StandIn:
        return self

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return ()


class Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        is_replaced = fullname.partition(".")[0] in REPLACED
        return ModuleSpec(fullname, self, is_package=True) if is_replaced else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def replace_torch_for_help(argv: Sequence[str]) -> None:
    """Replace torch if `argv` asks for help and torch is not imported yet."""
    if not HELP.isdisjoint(argv) and "torch" not in sys.modules:
        sys.meta_path.insert(0, Finder())

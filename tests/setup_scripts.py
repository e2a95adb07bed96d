"""Import the scripts of setup/, which is not a package."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SETUP = Path(__file__).parents[1] / "setup"


@functools.cache  # a function is pickled only if its module is in sys.modules
def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SETUP / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses, and for pickled functions
    spec.loader.exec_module(module)
    return module

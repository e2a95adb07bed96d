"""Every package that the code imports is declared, and the tested versions are listed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].keys()
SOURCES = ("lingua", "apps", "setup")
DISTRIBUTIONS = {  # import name -> package, if they differ
    "yaml": "pyyaml",
    "lm_eval": "lm-eval",
    "fla": "flash-linear-attention",
    "google": "protobuf",
    "huggingface_hub": "huggingface-hub",
}


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def imported() -> dict[str, tuple[str | None, str]]:
    """Return top-level names of other packages -> (extra that provides it, file of the import).

    The extra is "" for the dependencies of every install, None if the import does not name it.
    """
    found: dict[str, tuple[str | None, str]] = {}
    for file in (file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")):
        place = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_optional":
                module, options = node.args[0], {k.arg: k.value for k in node.keywords}
                if isinstance(module, ast.Constant) and isinstance(options["extra"], ast.Constant):
                    top = str(module.value).partition(".")[0]
                    found[top] = (str(options["extra"].value), place)
            for top in (name.partition(".")[0] for name in names):
                if top not in {*SOURCES, *sys.stdlib_module_names}:
                    found.setdefault(top, (None, place))
    return found


def declared(*extras: str) -> set[str]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in extras)]
    return {name_of(requirement) for listed in lists for requirement in listed}


def test_imported_packages_are_declared_where_the_import_says():
    names = imported()
    assert names["torch"][0] is None and names["yaml"][0] == "" and names["pyarrow"][0] == "data"
    for name, (extra, file) in names.items():
        known = declared(*(EXTRAS - {"dev"} if extra is None else [extra] if extra else []))
        package = DISTRIBUTIONS.get(name, name)
        assert package in known, f"{file} imports {name}, extra={extra!r}"


@pytest.mark.parametrize(
    "file, extras",
    [
        ("requirements.txt", {"plot"}),
        ("requirements-gpu.txt", {"gpu"}),
        ("requirements-dev.txt", EXTRAS - {"gpu", "wandb", "dev"}),
    ],
)
def test_the_tested_versions_are_listed(file, extras):
    text = (ROOT / file).read_text() + (ROOT / "requirements.txt").read_text()
    pinned = {name_of(line) for line in text.splitlines() if re.match(r"\w", line)}
    assert declared(*extras) <= pinned

"""Every module imports with torch alone, and imports follow one order without cycles.

A subprocess imports all modules. In it, imports outside of the standard library, torch and torch's
requirements fail, as if those packages were not installed.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lingua", "apps")

# `sys.argv`: allowed names, and the modules to import. Prints {module: error} as JSON.
PROGRAM = """
import importlib, json, sys, traceback

allowed, modules = json.loads(sys.argv[1]), json.loads(sys.argv[2])
allowed = {*allowed, *sys.stdlib_module_names}
stdlib_data = "_sysconfigdata_"  # named after the platform

class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in allowed or name.startswith(stdlib_data):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except BaseException:
        failed[module] = traceback.format_exc()
print(json.dumps(failed))
"""


NEEDS_TRANSFORMERS = "apps.LT2.huggingface.modeling"  # the source of exported modelling files


def module_names() -> list[str]:
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    parts = (file.relative_to(ROOT).with_suffix("").parts for file in files)
    return sorted(".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts)


def torch_and_its_requirements() -> set[str]:
    """Return top-level import names, without triton, which only the CUDA build requires."""
    found, queue = set(), ["torch"]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found or name == "triton":
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        found.add(name)
        queue += [re.match(r"[\w.-]+", r)[0] for r in requirements if "extra ==" not in r]
    provided = importlib.metadata.packages_distributions()
    return {
        top
        for top, distributions in provided.items()
        if any(re.sub(r"[-_.]+", "-", d).lower() in found for d in distributions)
    }


def failures(modules: list[str]) -> dict[str, str]:
    arguments = [json.dumps(sorted(torch_and_its_requirements() | set(PACKAGES)))]
    arguments += [json.dumps(modules)]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_module_imports_with_torch_alone():
    modules = module_names()
    assert "lingua.transformer" in modules and "apps.LT2.mixers.gdn" in modules
    modules.remove(NEEDS_TRANSFORMERS)
    failed = failures(modules)
    assert not failed, "\n".join(f"{module}:\n{trace}" for module, trace in failed.items())


def test_other_packages_are_out_of_reach_here():
    """Else the test above could not fail: numpy is installed wherever the tests run."""
    assert "No module named 'numpy'" in failures(["numpy"])["numpy"]


@pytest.mark.parametrize("module", ["lingua.data", "lingua.stool"])
def test_data_workers_and_launches_start_without_torch(module):
    """Importing torch takes seconds, and hundreds of MiB in a worker of every rank."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- the order of imports

# Each entry may import from earlier lines and from its own line, without cycles.
# A name stands for a module and everything below it.
ORDER = """
lingua.redact lingua.errors
lingua.files
lingua.config
lingua.args
lingua
apps.LT2.kernel
apps.LT2.mixers
apps.LT2.block apps.LT2.pattern apps.LT2.loops apps.LT2.loop_loss apps.LT2.cache
apps.LT2.transformer
apps.LT2.flops apps.LT2.parallel apps.LT2.batch apps.LT2.exits
apps.LT2.inference
apps.LT2.evaluation
apps.LT2.training
apps
"""
PLACES = {name: i for i, line in enumerate(ORDER.split("\n")) for name in line.split()}


def place(module: str) -> int:
    """Return the line of ORDER for `module`, by its longest prefix."""
    while module not in PLACES:
        module = module.rpartition(".")[0]
    return PLACES[module]


def imports_of(file: Path, modules: set[str]) -> set[str]:
    """Return our modules that a file imports, also under TYPE_CHECKING and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module; other names are in the package itself
            found |= names & modules or {node.module}
            found |= {node.module} if names - modules else set()
    return found & modules


@functools.cache
def import_graph() -> dict[str, set[str]]:
    modules = set(module_names())
    graph = {}
    for module in modules:
        path = ROOT / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        graph[module] = imports_of(file, modules)
    return graph


def test_imports_follow_the_order():
    against = [
        f"{module} imports {imported}"
        for module, imports in import_graph().items()
        for imported in imports
        if place(imported) > place(module)
    ]
    assert not against, "\n".join(sorted(against))


def test_no_module_imports_itself_by_way_of_others():
    try:
        list(graphlib.TopologicalSorter(import_graph()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_import_graph_is_complete():
    """Else the two tests above could pass without seeing imports."""
    graph = import_graph()
    assert {"lingua.config.yaml", "lingua.errors"} <= graph["lingua.args"]
    assert "lingua.parallel.tensor_parallel" in graph["lingua.parallel.parallelize"]
    assert sum(map(len, graph.values())) > 500

"""Bundle the model into one file that imports torch and transformers only.

    python -m apps.LT2.huggingface.bundle > modeling_lt2.py

The file holds the definitions that the classes in `ROOTS` need, in import order. Imports between
our modules go away. A name that two modules define gets the name of its module. Definitions in
`standins.py` replace definitions of the same name.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from apps.LT2.huggingface import standins

SOURCES = Path(__file__).parents[3]
ROOT, STANDINS = "apps.LT2.huggingface.modeling", standins.__name__
ROOTS = ("LT2Config", "LT2Cache", "LT2Model", "LT2ForCausalLM")
HEADER = '''"""A looped transformer of LT2, for transformers. A program made this file.

It is bundled from the modules of LT2 that its sections name. Load the folder with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

'''

Key = tuple[str, str]  # module, name defined at its top level


@dataclass
class Statement:
    """A statement at the top level of a module."""

    node: ast.stmt
    binds: set[str]
    uses: set[str]
    attributes: set[tuple[str, str]]  # (name, attribute) of `name.attribute`


@dataclass
class Module:
    name: str
    source: bytes
    statements: list[Statement] = field(default_factory=list)
    imports: dict[str, Key] = field(default_factory=dict)  # local name -> ours
    module_imports: dict[str, str] = field(default_factory=dict)  # local name -> our module
    external: dict[str, str] = field(default_factory=dict)  # local name -> import statement

    def __post_init__(self) -> None:
        self.lines = self.source.splitlines(keepends=True)
        starts = itertools.accumulate(map(len, self.lines), initial=0)
        self.line_starts = [0, *starts]  # ast counts lines from 1

    def span(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        starts = self.line_starts
        return starts[node.lineno] + node.col_offset, starts[node.end_lineno] + node.end_col_offset

    def defines(self, name: str) -> bool:
        return any(name in statement.binds for statement in self.statements)


@cache
def bundle() -> str:
    """Return the source of the modelling file."""
    modules: dict[str, Module] = {}
    _read(STANDINS, modules)
    _read(ROOT, modules)
    included = _reachable(modules)
    names = _global_names(modules, included)
    sections, imports = [], set()
    for module in modules.values():
        chosen = [s for s in module.statements if _is_included(s, module, modules, included)]
        if not chosen:
            continue
        used = set().union(*(s.uses for s in chosen))
        imports |= {text for alias, text in module.external.items() if alias in used}
        texts = [_text(s, module, modules, names) for s in chosen]
        doc = ast.get_docstring(ast.parse(module.source))
        comment = "".join(f"# {line}".rstrip() + "\n" for line in (doc or "").splitlines())
        sections.append(f"# {'-' * 90}\n# {module.name}\n#\n{comment}\n\n" + "\n\n".join(texts))
    order = sorted(imports, key=lambda text: (text.startswith("from"), text))
    return HEADER + "\n".join(order) + "\n\n\n" + "\n\n".join(sections)


def _read(name: str, modules: dict[str, Module], reading: tuple[str, ...] = ()) -> None:
    """Add a module to `modules`, after the modules that it imports."""
    if name in modules or name in reading:
        return
    base = SOURCES.joinpath(*name.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    module = Module(name, path.read_bytes())
    for node in ast.parse(module.source).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                text = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                module.external[alias.asname or alias.name.partition(".")[0]] = text
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                _add_import(module, node.module, alias)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            module.statements.append(_statement(node))
    needed = [*(target for target, _ in module.imports.values()), *module.module_imports.values()]
    for other in dict.fromkeys(needed):
        if other not in standins.REPLACED:
            _read(other, modules, (*reading, name))
    modules[name] = module


def _add_import(module: Module, source: str, alias: ast.alias) -> None:
    local = alias.asname or alias.name
    if source.partition(".")[0] not in ("apps", "lingua"):
        renamed = f" as {alias.asname}" if alias.asname else ""
        if source != "__future__":
            module.external[local] = f"from {source} import {alias.name}{renamed}"
        return
    path = SOURCES.joinpath(*source.split("."), alias.name)
    if path.is_dir() or path.with_suffix(".py").is_file():
        module.module_imports[local] = f"{source}.{alias.name}"
    else:
        module.imports[local] = (source, alias.name)


# ---- what is needed


def _bound(node: ast.AST) -> set[str]:
    """Return the names that a statement binds in its own scope."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Lambda):
        return set()
    bound = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.Import | ast.ImportFrom):
        bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ExceptHandler) and node.name:
        bound.add(node.name)
    return bound.union(*map(_bound, ast.iter_child_nodes(node)))


def _statement(node: ast.stmt) -> Statement:
    children = list(ast.walk(node))
    uses = {child.id for child in children if isinstance(child, ast.Name)}
    attributes = {
        (child.value.id, child.attr)
        for child in children
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name)
    }
    return Statement(node, _bound(node), uses, attributes)


def _resolve(modules: dict[str, Module], module: str, name: str) -> Key | None:
    """Return the definition that a name of a module refers to, None if it isn't ours."""
    replaceable = module in standins.REPLACED or module.startswith(("apps.LT2.", "lingua."))
    if replaceable and module != STANDINS and modules[STANDINS].defines(name):
        return STANDINS, name
    if module in standins.REPLACED:
        raise AssertionError(f"standins.py lacks {name} of {module}")
    if name in modules[module].imports:
        return _resolve(modules, *modules[module].imports[name])
    return (module, name) if modules[module].defines(name) else None


def _needs(statement: Statement, module: Module, modules: dict[str, Module]) -> set[Key]:
    keys = {_resolve(modules, module.name, name) for name in statement.uses}
    for name, attribute in statement.attributes:
        if name in module.module_imports:
            keys.add(_resolve(modules, module.module_imports[name], attribute))
    return {key for key in keys if key is not None}


def _reachable(modules: dict[str, Module]) -> set[Key]:
    """Return the definitions that ROOTS and the operators' registrations need."""
    included: set[Key] = set()
    queue: list[Key] = [(ROOT, name) for name in ROOTS] + [(STANDINS, "OPERATORS")]
    while queue:
        key = queue.pop()
        if key in included:
            continue
        included.add(key)
        module = modules[key[0]]
        for statement in module.statements:
            if _is_included(statement, module, modules, included):
                queue += _needs(statement, module, modules)
                queue += [(module.name, name) for name in statement.binds - {"_"}]
    return included


def _is_included(
    statement: Statement, module: Module, modules: dict[str, Module], included: set[Key]
) -> bool:
    """Whether a statement binds an included name, or is a registration on one."""
    if "_" in statement.binds or not statement.binds:
        node = statement.node
        if isinstance(node, ast.FunctionDef):  # @operator.register_fake
            node = node.decorator_list[0]
        names = (child.id for child in ast.walk(node) if isinstance(child, ast.Name))
        return any(_resolve(modules, module.name, name) in included for name in names)
    if module.name != STANDINS and any(modules[STANDINS].defines(n) for n in statement.binds):
        return False
    return any((module.name, name) in included for name in statement.binds)


def _global_names(modules: dict[str, Module], included: set[Key]) -> dict[Key, str]:
    """Give every definition a name in the file."""
    taken: dict[str, str] = {}
    for module in modules.values():
        for alias, text in module.external.items():
            known = taken.setdefault(alias, text)
            plain = all(re.match(rf"import {alias}\b(?!.* as )", x) for x in (known, text))
            assert known == text or plain, f"{module.name}: {text}, elsewhere {known}"
    names: dict[Key, str] = {}
    used = {*taken, *dir(builtins)}
    for module in modules.values():
        for name in sorted({n for m, n in included if m == module.name}):
            unique = name
            if unique in used:
                path = module.name.removeprefix("apps.LT2.").removeprefix("kernel.")
                unique = f"{name}_{path.replace('.', '_')}"
            assert unique not in used, unique
            used.add(unique)
            names[module.name, name] = unique
    return names


# ---- the text


class _Renamer(ast.NodeVisitor):
    """Collect (old text, start, end, new text) of what changes in a statement."""

    def __init__(self, module: Module, modules: dict[str, Module], names: dict[Key, str]):
        self.module, self.modules, self.names = module, modules, names
        self.scopes: list[set[str]] = []
        self.changes: list[tuple[str, int, int, str]] = []

    def replace(self, node: ast.expr, text: str) -> None:
        old = node.id if isinstance(node, ast.Name) else ast.unparse(node)
        self.changes.append((old, *self.module.span(node), text))

    def visit_Name(self, node: ast.Name) -> None:
        if any(node.id in scope for scope in self.scopes):
            return
        key = _resolve(self.modules, self.module.name, node.id)
        if key is not None and self.names[key] != node.id:
            self.replace(node, self.names[key])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        target = self.module.module_imports.get(name)
        if target is None or any(name in scope for scope in self.scopes):
            self.visit(node.value)
        else:
            key = _resolve(self.modules, target, node.attr)
            assert key is not None, f"{target}.{node.attr}"
            self.replace(node, self.names[key])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.rename_definition(node)
        for child in (
            *node.decorator_list,
            *node.args.defaults,
            *filter(None, node.args.kw_defaults),
        ):
            self.visit(child)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
        for annotation in (*(a.annotation for a in arguments), node.returns):
            if annotation is not None:
                self.visit(annotation)
        self.scopes.append({a.arg for a in arguments}.union(*map(_bound, node.body)))
        for child in node.body:
            self.visit(child)
        self.scopes.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        arguments = [*node.args.args, *node.args.kwonlyargs]
        arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
        for child in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(child)
        self.scopes.append({a.arg for a in arguments})
        self.visit(node.body)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.rename_definition(node)
        fields = set().union(*map(_bound, node.body))
        for child in (*node.decorator_list, *node.bases, *node.keywords, *node.body):
            # Methods don't see the names of the class. An annotation refers to the module's.
            hidden = child in node.body and not isinstance(child, ast.FunctionDef | ast.AnnAssign)
            self.scopes.append(fields if hidden else set())
            self.visit(child)
            self.scopes.pop()

    def visit_comprehension_scope(self, node: ast.AST) -> None:
        self.scopes.append(_bound(node))
        self.generic_visit(node)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_comprehension_scope
    visit_GeneratorExp = visit_comprehension_scope

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        before = len(self.changes)
        self.generic_visit(node)
        renamed = {old: new for old, *_, new in self.changes[before:]}
        del self.changes[before:]
        # Python 3.11 gives wrong positions inside of f-strings.
        source = self.source(node)
        text = source
        for old, new in renamed.items():
            in_braces = re.compile(rf"\b{re.escape(old)}\b")
            text = re.sub(r"{[^{}]*}", lambda m, n=new, p=in_braces: p.sub(n, m[0]), text)
        if text.startswith(('f"lt2::', "f'lt2::")):
            text = f"OPERATORS + {text.replace('lt2::', '', 1)}"
        if text != source:
            self.replace(node, text)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Put an operator into the file's own namespace."""
        if isinstance(node.value, str) and node.value.startswith("lt2::"):
            self.replace(node, f"OPERATORS + {self.source(node).replace('lt2::', '', 1)}")

    def source(self, node: ast.expr) -> str:
        start, end = self.module.span(node)
        return self.module.source[start:end].decode()

    def rename_definition(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        new = self.names.get((self.module.name, node.name), node.name)
        if not self.scopes and new != node.name:
            start = self.module.line_starts[node.lineno] + node.col_offset
            start = self.module.source.index(node.name.encode(), start)
            self.changes.append((node.name, start, start + len(node.name.encode()), new))


def _text(
    statement: Statement, module: Module, modules: dict[str, Module], names: dict[Key, str]
) -> str:
    """Return a statement's lines with the comment before it, and names of the file."""
    renamer = _Renamer(module, modules, names)
    renamer.visit(statement.node)
    node = statement.node
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    while first > 1 and module.lines[first - 2].startswith(b"#"):
        first -= 1
    assert node.end_lineno is not None
    start, end = module.line_starts[first], module.line_starts[node.end_lineno + 1]
    text, position = [], start
    for _, at, until, new in sorted(renamer.changes, key=lambda change: change[1]):
        text += [module.source[position:at], new.encode()]
        position = until
    return b"".join([*text, module.source[position:end]]).decode()


if __name__ == "__main__":
    sys.stdout.write(bundle())

"""Find the definition behind a dotted path in source files, without importing anything.

Importing a target to inspect it would import torch (seconds) and run the user's code at the prompt. Definitions that
the source text does not show (extension modules, names created at run time) are `Unknown`, which is not an error.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from trainer.config.namespaces import canonical

_DYNAMIC_NAMES = ("globals()", "sys.modules[", "__getattr__", "exec(", "setattr(")
"""Source text of modules that may create names at run time."""
_MAX_HOPS = 12
"""Maximum number of re-exports to follow for one name; more is a cycle."""


@dataclass(frozen=True)
class Module:
    """A module with its file and the search path of its submodules."""

    name: str
    file: Path | None
    """Source file; None for a namespace package."""
    inside: tuple[str, ...]
    """Directories of a package; empty for a plain module."""


@dataclass(frozen=True)
class Definition:
    """A class or function, with the module that defines it."""

    module: Module
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None = None
    """The class of a method such as `Model.from_size`."""


@dataclass(frozen=True)
class Unknown:
    """A name that may exist, but that source text does not show."""

    path: str = ""
    """Path behind the re-exports that could be followed, such as `os.system` for `mine.os.system`."""


@dataclass(frozen=True)
class NotFound:
    """A name that does not exist: `parent` exists and has the names in `known`, but no `name`."""

    parent: str
    name: str
    known: tuple[str, ...]


LookupResult = Definition | Module | Unknown | NotFound


def find(path: str, cwd: Path) -> LookupResult:
    """Find what the dotted `path` names: in `cwd`, then on Python's own search path, then in `src`.

    `pytorch_lightning` is looked up as `lightning.pytorch`, as in the ranks.
    """
    top, *rest = canonical(path).split(".")
    module = _top(top, cwd)
    if module is None:
        return NotFound("", top, tuple(_top_names(cwd)))
    return _walk(module, rest, _MAX_HOPS)


def lookup(module: Module, name: str) -> LookupResult:
    """Find what a name, which may be dotted, means in the text of `module`, such as that of a base class."""
    first, *rest = name.split(".")
    return _walk_from(_member(module, first, _MAX_HOPS), rest, _MAX_HOPS)


def class_literal(definition: Definition, name: str, inherited: bool = True) -> Any:
    """Return the value of the class attribute `name`, including base classes if `inherited`.

    Returns None unless the value is a literal, or a name that is bound to one at the top level of its module.
    """
    return _class_literal(definition, name, _MAX_HOPS if inherited else 1)


def _class_literal(definition: Definition, name: str, hops: int) -> Any:
    if not isinstance(definition.node, ast.ClassDef) or hops == 0:
        return None
    for node in reversed(definition.node.body):
        if name in _names_of(node) and isinstance(node, (ast.Assign, ast.AnnAssign)):
            return _literal(definition.module, node.value) if node.value is not None else None
    for base in definition.node.bases:
        dotted = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        above = lookup(definition.module, dotted) if all(part.isidentifier() for part in dotted.split(".")) else None
        value = _class_literal(above, name, hops - 1) if isinstance(above, Definition) else None
        if value is not None:
            return value
    return None


def defines(definition: Definition, method: str, but_not: str, hops: int = _MAX_HOPS) -> bool | None:
    """Return whether the class or a base outside of the package `but_not` has this method; None if unknown."""
    if not isinstance(definition.node, ast.ClassDef) or hops == 0:
        return None
    if definition.module.name.partition(".")[0] == but_not:
        return False
    if any(method in _names_of(node) for node in definition.node.body):
        return True
    answers: list[bool | None] = []
    for base in definition.node.bases:
        dotted = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        above = lookup(definition.module, dotted) if all(part.isidentifier() for part in dotted.split(".")) else None
        answers.append(defines(above, method, but_not, hops - 1) if isinstance(above, Definition) else None)
    return True if True in answers else None if None in answers else False


def _literal(module: Module, value: ast.expr) -> Any:
    if isinstance(value, ast.Name) and module.file is not None:
        bound = _bindings(module.file).get(value.id, [])
        if bound and isinstance(bound[-1], (ast.Assign, ast.AnnAssign)) and bound[-1].value is not None:
            value = bound[-1].value
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


@cache
def parsed(file: Path) -> ast.Module | None:
    """Return the syntax tree of a file; None if it cannot be read or is not Python of this version."""
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _walk(module: Module, names: list[str], hops: int) -> LookupResult:
    """Follow names from a module: submodules first, by file only.

    Thus torch/__init__.py is not parsed for `torch.optim.AdamW`.
    """
    while names:
        inner = _submodule(module, names[0])
        if inner is None:
            break
        module, names = inner, names[1:]
    if not names:
        return module
    return _walk_from(_member(module, names[0], hops), names[1:], hops)


def _walk_from(result: LookupResult, names: list[str], hops: int) -> LookupResult:
    if not names or isinstance(result, (Unknown, NotFound)):
        return result
    if isinstance(result, Module):
        return _walk(result, names, hops)
    if not isinstance(result.node, ast.ClassDef) or len(names) > 1:
        return Unknown()
    for node in result.node.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == names[0]:
            return Definition(result.module, node, result.node)
    return Unknown()


def _member(module: Module, name: str, hops: int) -> LookupResult:
    """Find a name at the top level of a module, and follow it through re-exports."""
    if hops == 0:
        return Unknown()
    if module.file is None:
        inner = _submodule(module, name)
        return inner or NotFound(module.name, name, tuple(_submodule_names(module)))
    tree = parsed(module.file) if module.file.suffix == ".py" else None
    if tree is None:
        return Unknown(f"{module.name}.{name}")
    bound = _bindings(module.file)
    for node in reversed(bound.get(name, [])):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            return Definition(module, node)
        return _imported(module, node, name, hops)
    for star in bound.get("*", []):
        result = _imported(module, star, name, hops)
        if not isinstance(result, NotFound):
            return result
    inner = _submodule(module, name)
    if inner is not None:
        return inner
    text = module.file.read_text(encoding="utf-8", errors="replace")
    if any(sign in text for sign in _DYNAMIC_NAMES):
        return Unknown()
    known = {n for n in bound if n != "*" and not n.startswith("_")} | set(_submodule_names(module))
    return NotFound(module.name, name, tuple(sorted(known)))


def _imported(module: Module, node: ast.AST, name: str, hops: int) -> LookupResult:
    if isinstance(node, ast.Import):
        alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == name)
        target = alias.name if alias.asname else name
        return _absolute(target.split("."), module, hops)
    if not isinstance(node, ast.ImportFrom):
        return Unknown()
    base = _import_base(module, node)
    original = next((a.name for a in node.names if (a.asname or a.name) == name), name)
    return _absolute([*base, original], module, hops)


def _import_base(module: Module, node: ast.ImportFrom) -> list[str]:
    written = node.module.split(".") if node.module else []
    if not node.level:
        return written
    package = module.name.split(".") if module.inside else module.name.split(".")[:-1]
    return [*package[: len(package) - node.level + 1], *written]


def _absolute(parts: list[str], seen_from: Module, hops: int) -> LookupResult:
    parts = canonical(".".join(parts)).split(".")
    # The package of the module itself is found next to it, wherever that is.
    top = _top(parts[0], _root_of(seen_from))
    if top is None:  # not installed, or of another platform: `from nt import *` in os.py
        return Unknown(".".join(parts))
    return _walk(top, parts[1:], hops - 1)


def _root_of(module: Module) -> Path:
    anchor = module.file or Path(module.inside[0]) / "__init__.py"
    folder = anchor.parent if module.inside else anchor
    for _ in module.name.split("."):
        folder = folder.parent
    return folder


@cache
def _bindings(file: Path) -> dict[str, list[ast.AST]]:
    """Return the nodes that bind each name at the top level of a module, in order; `*` for star imports.

    Includes those inside of `if` and `try`.
    """
    tree = parsed(file)
    bound: dict[str, list[ast.AST]] = {}
    pending: list[ast.AST] = list(tree.body) if tree else []
    while pending:
        node = pending.pop(0)
        for name in _names_of(node):
            bound.setdefault(name, []).append(node)
        for part in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                pending = [*getattr(node, part, []), *pending] if hasattr(node, part) else pending
    return bound


def _names_of(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets: list[ast.AST] = []
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    names: list[str] = []
    while targets:
        target = targets.pop()
        # Attributes and items are no bindings: `AdamW.__doc__ = ...` binds nothing.
        names += [target.id] if isinstance(target, ast.Name) else []
        targets += target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
    return names


def absolute_name(module: Module, name: str) -> str:
    """Return the dotted path that a name in the text of `module` was imported from, without following it further."""
    first, dot, rest = name.partition(".")
    bound = _bindings(module.file).get(first, []) if module.file is not None and module.file.suffix == ".py" else []
    node = bound[-1] if bound else None
    if isinstance(node, ast.Import):
        alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == first)
        first = alias.name if alias.asname else first
    elif isinstance(node, ast.ImportFrom):
        original = next((a.name for a in node.names if (a.asname or a.name) == first), first)
        first = ".".join([*_import_base(module, node), original])
    elif node is not None:
        first = f"{module.name}.{first}"
    return canonical(first + dot + rest)


def top_module(name: str, cwd: Path) -> Module | None:
    """Return the top-level module `name`, which is looked for in `cwd` first, without importing it."""
    return _top(name, cwd)


def is_users(module: Module, cwd: Path) -> bool:
    """Return whether a module is the user's code: of the project, of PYTHONPATH or of an editable install.

    Modules of the standard library, of site-packages and of other folders with installed packages are not.
    """
    if module.file is not None and not module.file.is_absolute():  # built into the interpreter
        return False
    return is_users_folder(_root_of(module), cwd)


@cache
def is_users_folder(root: Path, cwd: Path) -> bool:
    """Return whether a folder on the import path holds the user's code."""
    if root == cwd or root == source_folder(cwd):
        return True
    if {"site-packages", "dist-packages"} & set(root.parts):
        return False
    libraries = [Path(path) for key in ("stdlib", "platstdlib") if (path := sysconfig.get_path(key))]
    if any(root.resolve().is_relative_to(library.resolve()) for library in libraries):
        return False
    return next(root.glob("*.dist-info"), None) is None  # what `pip install --target` leaves


def source_folder(cwd: Path) -> Path | None:
    """Return `src` of a project with its modules in there; None if `src` is itself a package."""
    folder = cwd / "src"
    return folder if folder.is_dir() and not (folder / "__init__.py").exists() else None


@cache
def _top(name: str, cwd: Path) -> Module | None:
    spec = PathFinder.find_spec(name, [str(cwd)])
    if spec is None or spec.origin is None:
        spec = installed_spec(name) or spec
    source = source_folder(cwd) if spec is None else None
    if source is not None:
        spec = PathFinder.find_spec(name, [str(source)])
    return _module(name, spec) if spec else None


def installed_spec(name: str) -> ModuleSpec | None:
    """Return the location of the top-level module `name`, including editable installs, without importing it.

    Unlike `importlib.util.find_spec` it never returns a module of that name that is already imported, perhaps from
    elsewhere.
    """
    for finder in sys.meta_path:
        if type(finder).__name__ == "DistutilsMetaFinder":  # setuptools': asked for pip, it hands out another distutils
            continue
        find_spec = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find_spec(name, None, None) if find_spec else None
        if spec is not None:
            return spec
    return None


def _module(name: str, spec: ModuleSpec) -> Module:
    file = Path(spec.origin) if spec.has_location and spec.origin else None
    inside = tuple(spec.submodule_search_locations or ())
    if file is None and not inside:
        file = Path("built-in")
    return Module(name, file, inside)


@cache
def _submodule(module: Module, name: str) -> Module | None:
    if not module.inside:
        return None
    # By the last name only: for `a.b` in a namespace package, Python would import `a`.
    spec = PathFinder.find_spec(name, list(module.inside))
    return _module(f"{module.name}.{name}", spec) if spec else None


def _submodule_names(module: Module) -> list[str]:
    return [name for folder in module.inside for name in _python_names(Path(folder))]


def _python_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    files = {entry.stem for entry in folder.glob("*.py")}
    packages = {entry.name for entry in folder.iterdir() if (entry / "__init__.py").is_file()}
    return sorted(name for name in files | packages if name.isidentifier() and not name.startswith("__"))


def _top_names(cwd: Path) -> list[str]:
    """Return the top-level names worth suggesting: the user's modules, and the packages of models and data."""
    return [*_python_names(cwd), "trainer", "torch", "lightning", "torchmetrics", "timm", "transformers"]

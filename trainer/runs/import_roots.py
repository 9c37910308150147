"""Where the prompt finds the user's own modules: the working directory, PYTHONPATH, editable installs, `src`.

A run imports them from its snapshot, in the same order; what is installed in site-packages is not the user's code.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder, all_suffixes
from pathlib import Path

import trainer
from trainer.config.sources import installed_spec, source_folder

_MOST_NAMES = 500
"""Modules in one folder; more is no project."""


@dataclass(frozen=True)
class ImportRoot:
    """A folder from which the prompt imports modules of the user's."""

    folder: Path
    modules: dict[str, Path]
    """Name to its package or file, for those that the prompt takes from here."""
    whole: bool
    """Whether that is every module in the folder, each by its own name: the folder itself can be on the path."""


def import_roots(cwd: Path) -> list[ImportRoot]:
    """The roots beside `cwd`, which comes first, in the order of Python's search path."""
    roots = [_root(folder, cwd) for folder in _folders(cwd)]
    roots += _of_finders(cwd)
    return [root for root in roots if root.modules]


def _folders(cwd: Path) -> list[Path]:
    scripts = {Path(sys.executable).parent}
    if Path(sys.argv[0]).is_file():  # not the `-c` of a command in the command line
        scripts.add(Path(sys.argv[0]).absolute().parent)
    entries = [Path(entry) for entry in (*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path) if entry]
    source = source_folder(cwd)
    folders = [entry.absolute() for entry in entries if entry.absolute() not in scripts]
    folders += [source] if source else []
    found: dict[Path, Path] = {}
    for folder in folders:
        if folder.is_dir() and folder.resolve() != cwd.resolve() and not _is_installed(folder):
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _is_installed(folder: Path) -> bool:
    """Of the standard library or installed for good, or where this project itself is installed from."""
    if {"site-packages", "dist-packages"} & set(folder.parts):
        return True
    library = sysconfig.get_path("stdlib")
    return folder.is_relative_to(library) or folder.resolve() == Path(trainer.__file__).resolve().parents[1]


def _root(folder: Path, cwd: Path) -> ImportRoot:
    names = _module_names(folder)
    modules = {name: path for name, path in names.items() if _taken_from(name, folder, cwd)}
    return ImportRoot(folder, modules, whole=len(modules) == len(names))


def _module_names(folder: Path) -> dict[str, Path]:
    """Modules and folders with modules, by the names that import them."""
    found: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        name = entry.name.partition(".")[0]
        if not name.isidentifier() or name == "__pycache__":
            continue
        if entry.is_dir() and entry.name == name and _holds_modules(entry):
            found[name] = entry
        elif entry.is_file() and any(entry.name == name + suffix or _is_extension(entry) for suffix in all_suffixes()):
            found.setdefault(name, entry)
    return found if len(found) <= _MOST_NAMES else {}


def _is_extension(entry: Path) -> bool:
    return entry.suffix in (".so", ".pyd")


def _holds_modules(folder: Path, deep: int = 2) -> bool:
    entries = list(folder.iterdir())[:1000]
    if any(entry.suffix == ".py" for entry in entries):
        return True
    inner = [entry for entry in entries if entry.is_dir() and entry.name.isidentifier()]
    return deep > 0 and any(_holds_modules(entry, deep - 1) for entry in inner[:50])


def _taken_from(name: str, folder: Path, cwd: Path) -> bool:
    """Whether `import name` at the prompt gives the module in this folder."""
    spec = PathFinder.find_spec(name, [str(cwd)])
    if spec is None or spec.origin is None:
        spec = installed_spec(name) or spec
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        return True  # nobody else has it: in `src`, which is not on the path yet
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places)


def _of_finders(cwd: Path) -> Iterator[ImportRoot]:
    """Editable installs of setuptools that put a finder, and not a folder, where Python looks."""
    by_folder: dict[Path, dict[str, Path]] = {}
    for name, module in list(sys.modules.items()):
        mapping = getattr(module, "MAPPING", None) if name.startswith("__editable__") else None
        for package, place in (mapping or {}).items():
            path = Path(place)
            path = path if path.exists() else path.with_suffix(".py")
            known = "." not in package and path.exists() and package != trainer.__name__
            if known and path.parent.resolve() != cwd.resolve() and not _is_installed(path.parent):
                by_folder.setdefault(path.parent, {})[package] = path
    for folder, modules in by_folder.items():
        named_alike = all(path.name.partition(".")[0] == package for package, path in modules.items())
        yield ImportRoot(folder, modules, whole=named_alike and set(modules) == set(_module_names(folder)))

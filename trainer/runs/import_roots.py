"""Find the folders from which the user's modules are imported: PYTHONPATH, editable installs, `src`.

A run imports them from its snapshot, in the same order. Packages in site-packages are not the user's code.
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
"""A folder with more modules is not a project."""


@dataclass(frozen=True)
class ImportRoot:
    """A folder from which the user's modules are imported."""

    folder: Path
    modules: dict[str, Path]
    """Name to package or file of the modules that `import` takes from here."""
    whole: bool
    """Whether these are all modules of the folder under their own names: the folder itself can be on the path."""


def import_roots(cwd: Path) -> list[ImportRoot]:
    """Return the import roots besides `cwd`, which comes first, in the order of `sys.path`."""
    roots = [_root(folder, cwd) for folder in _folders(cwd)]
    roots += _of_finders(cwd)
    return [root for root in roots if root.modules]


def _folders(cwd: Path) -> list[Path]:
    scripts = {Path(sys.executable).parent}
    if os.path.isfile(sys.argv[0]):  # not the `-c` of `python -c`
        scripts.add(Path(sys.argv[0]).absolute().parent)
    entries = [Path(entry) for entry in (*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path) if entry]
    source = source_folder(cwd)
    folders = [entry.absolute() for entry in entries if entry.absolute() not in scripts]
    folders += [source] if source else []
    by_real_path: dict[Path, Path] = {}
    for folder in folders:
        if os.path.isdir(folder) and folder.resolve() != cwd.resolve() and not _is_installed(folder):
            by_real_path.setdefault(folder.resolve(), folder)
    return list(by_real_path.values())


def _is_installed(folder: Path) -> bool:
    """Return whether a folder is of the standard library, of site-packages, or of this package itself."""
    if {"site-packages", "dist-packages"} & set(folder.parts):
        return True
    library = sysconfig.get_path("stdlib")
    return folder.is_relative_to(library) or folder.resolve() == Path(trainer.__file__).resolve().parents[1]


def _root(folder: Path, cwd: Path) -> ImportRoot:
    names = _module_names(folder)
    modules = {name: path for name, path in names.items() if _taken_from(name, folder, cwd)}
    return ImportRoot(folder, modules, whole=len(modules) == len(names))


def _module_names(folder: Path) -> dict[str, Path]:
    """Return modules, and folders with modules, by their names."""
    modules: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        name = entry.name.partition(".")[0]
        if not name.isidentifier() or name == "__pycache__":
            continue
        if os.path.isdir(entry) and entry.name == name and _holds_modules(entry):
            modules[name] = entry
        elif os.path.isfile(entry) and any(
            entry.name == name + suffix or _is_extension(entry) for suffix in all_suffixes()
        ):
            modules.setdefault(name, entry)
    return modules if len(modules) <= _MOST_NAMES else {}


def _is_extension(entry: Path) -> bool:
    return entry.suffix in (".so", ".pyd")


def _holds_modules(folder: Path, deep: int = 2) -> bool:
    try:
        entries = list(folder.iterdir())[:1000]
    except OSError:  # a link to a closed folder
        return False
    if any(entry.suffix == ".py" for entry in entries):
        return True
    inner = [entry for entry in entries if os.path.isdir(entry) and entry.name.isidentifier()]
    return deep > 0 and any(_holds_modules(entry, deep - 1) for entry in inner[:50])


def _taken_from(name: str, folder: Path, cwd: Path) -> bool:
    """Return whether `import name` finds the module in this folder."""
    spec = PathFinder.find_spec(name, [str(cwd)])
    if spec is None or spec.origin is None:
        spec = installed_spec(name) or spec
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        return True  # no other folder has it: it is in `src`, which is not on the path yet
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places)


def _of_finders(cwd: Path) -> Iterator[ImportRoot]:
    """Yield the editable installs of setuptools that have a finder instead of a path entry."""
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

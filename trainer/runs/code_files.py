"""Select the files of a project that are code: the modules that can be imported, and the resources next to them.

In a git checkout these are the tracked files, the untracked ones that git does not ignore, and among the ignored files
the modules (`_version.py`, compiled extensions) and the contents of packages. Elsewhere they are the files with a
suffix of code and the contents of packages. A folder is classified by its contents, not by its name: a package may have
the name `data`, `runs` or `wandb`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core.files import is_folder
from trainer.core.git import git

MODULES = {".py", ".pyi", ".so", ".pyd", ".dylib"}
"""Suffixes of modules, and of files that Python or a type checker reads next to them."""
_SOURCES = {".yaml", ".yml", ".toml", ".json", ".txt", ".sh", ".cfg", ".ini", ".md", ".in", ".lock"}
_SOURCES |= {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".pyx", ".pxd", ".proto", ".ipynb"}
_SOURCES |= {".csv", ".tsv", ".jsonl", ".html", ".css", ".js", ".j2", ".jinja", ".jinja2", ".tmpl", ".tpl", ".sql"}
_SOURCES |= {".model", ".vocab", ".bpe", ".xml"}
CODE = MODULES | _SOURCES
_NEVER = {".git", "__pycache__", "node_modules", "site-packages"}
_OUTPUTS = {"runs", "wandb", "build", "dist"}
"""Names of output folders, unless a module is directly in them."""
_WANDB_RUN = re.compile(r"(offline-)?run-\d{8}_\d{6}-\w+")
_MAX_ENTRIES = 50_000
"""Limit of directory entries that a walk reads: a project with more has a data set, and `fit` would take long."""
_DATA_SET_ENTRIES = 2000
"""A folder with more entries and no module is not searched."""
_MAX_RESOURCES = 300
"""A folder tree with more files and no module is data."""


@dataclass
class _Walk:
    """A walk over folders; `left` is the number of entries that it may still read."""

    leave_out: Path
    left: int = _MAX_ENTRIES
    seen: set[Path] = field(default_factory=set)

    def files(self, folder: Path, wanted: set[str], in_package: bool) -> list[Path]:
        """Return the files with a suffix of `wanted`, and every file of a package.

        A folder of data (many files and no module) is one path, that of the folder.
        """
        real = folder.resolve()
        if real in self.seen or real == self.leave_out:
            return []
        self.seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if self.left > 0 else None
        except OSError:
            return []
        if entries is None:
            return [folder]
        self.left -= len(entries)
        names = {entry.name for entry in entries}
        has_module = any(name.endswith(".py") for name in names)
        in_package = in_package or "__init__.py" in names
        if _is_output(folder, names, has_module):
            return []
        if len(entries) > _DATA_SET_ENTRIES and not has_module:
            return [folder]
        files = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _NEVER or _suffix(entry.name) == ".pyc":
                continue
            path = Path(entry.path)
            if is_folder(entry):
                files += self.files(path, wanted, in_package)
            elif in_package or _suffix(entry.name) in wanted:
                files.append(path)
        is_data = len(files) > _MAX_RESOURCES and not any(_suffix(path.name) in MODULES for path in files)
        return [folder] if is_data else files


def project_files(root: Path, leave_out: Path) -> list[Path]:
    """Return the files of the project at `root`, its modules first. A folder of data is one path."""
    walk = _Walk(leave_out.resolve())
    tracked = _not_ignored(root)
    if tracked is None:
        files = walk.files(root, CODE, in_package=False)
    else:
        files = [*_expanded(root, tracked, walk), *_ignored(root, walk)]
    return modules_first(path for path in files if path != root)


def tracked_code(root: Path) -> list[Path]:
    """Return the tracked files at `root` that are code: the part of a repository around a project."""
    listed = git_list(root, "--cached", "--deduplicate") or []
    return [path for path in listed if _suffix(path.name) in CODE or path.parent == root]


def package_files(package: Path, leave_out: Path) -> list[Path]:
    """Return all files of a package or module outside the project."""
    if package.is_file():
        return [package]
    return modules_first(_Walk(leave_out.resolve()).files(package, CODE, in_package=False))


def modules_first(paths: Iterable[Path]) -> list[Path]:
    """Return each path once, in order, modules first, because the limits of a snapshot cut off the end."""
    return sorted(dict.fromkeys(paths), key=lambda path: _suffix(path.name) not in MODULES)


def git_list(root: Path, *arguments: str) -> list[Path] | None:
    """Return the files that `git ls-files` lists with these arguments; None if it fails."""
    output = git(root, "ls-files", "-z", *arguments)
    return None if output is None else [root / name for name in output.split("\0") if name]


def _not_ignored(root: Path) -> list[Path] | None:
    """Return the files that git does not ignore; None outside git, and in a folder that the checkout ignores."""
    listed = git_list(root, "--cached", "--others", "--exclude-standard", "--deduplicate")
    if not listed and (listed is None or git(root, "check-ignore", "-q", ".") is not None):
        return None
    return listed


def _expanded(root: Path, listed: list[Path], walk: _Walk) -> Iterator[Path]:
    """Yield the files, including those in linked folders and in checkouts inside this one (submodules)."""
    for path in listed:
        if not path.is_dir():
            if walk.leave_out not in path.parents:
                yield path
        elif path.is_symlink():
            yield from walk.files(path, CODE, in_package=_in_package(path.parent, root))
        elif path.resolve() != walk.leave_out:
            yield from project_files(path, walk.leave_out)


def _ignored(root: Path, walk: _Walk) -> Iterator[Path]:
    for path in git_list(root, "--others", "--ignored", "--exclude-standard", "--directory") or []:
        if any(part.startswith(".") or part in _NEVER for part in path.relative_to(root).parts):
            continue
        in_package = _in_package(path.parent, root)
        if path.is_dir():
            yield from walk.files(path, MODULES, in_package)
        elif _suffix(path.name) in MODULES or (in_package and _suffix(path.name) != ".pyc"):
            yield path


def _in_package(folder: Path, root: Path) -> bool:
    inside = (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))
    return any((parent / "__init__.py").is_file() for parent in inside)


def _is_output(folder: Path, names: set[str], has_module: bool) -> bool:
    """Return whether a folder is an environment, a run or sweep of this project, a run of W&B, or contains one."""
    if {"config.yaml", "manifest.json", "attempts"} <= names or {"trials", "arrays", "slots"} <= names:
        return True
    if _WANDB_RUN.fullmatch(folder.name):
        return True
    return "pyvenv.cfg" in names or "conda-meta" in names or (folder.name in _OUTPUTS and not has_module)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()

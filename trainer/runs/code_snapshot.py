"""Copy the user's code at launch, with uncommitted changes: a run executes the code that was launched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core.git import git
from trainer.runs.code_files import MODULES, package_files, project_files, tracked_code
from trainer.runs.import_roots import ImportRoot, import_roots

MOST_FILES = 5000
MOST_BYTES = 200 * 1024**2
LARGEST_FILE_BYTES = 5 * 1024**2
LARGEST_EXTENSION_BYTES = 100 * 1024**2
"""Limit for a compiled module."""
MOST_LINKS = 20_000
_MOST_AROUND = 2000
"""Limit for files of the repository around the project."""


@dataclass
class Snapshot:
    """The result of a copy: which files were copied, and which were linked instead."""

    files: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    """Files that are too large or too many: linked, or beyond MOST_LINKS left out."""
    commit: str | None = None
    dirty: bool | None = None
    paths: list[str] = field(default_factory=lambda: ["code"])
    """Folders of the run directory from which modules are imported, in order."""


def snapshot(root: Path, target: Path, leave_out: Path) -> Snapshot:
    """Copy the code at `root` to `target`, and the other import roots (`import_roots.py`) there or next to it.

    If `root` is a folder in a git checkout, `target` has the layout of the whole checkout, for code that finds its
    neighbours by `__file__`. Files over 5 MB (compiled modules: 100 MB), and those beyond 5,000 files or 200 MB in all,
    become links to the originals and are listed in `left_out`, as do folders of data.

    Args:
        root: The folder of the project.
        target: The folder to create.
        leave_out: The folder of the runs, which may be in the project.
    """
    copied = Snapshot()
    root, leave_out = root.resolve(), leave_out.resolve()
    target.mkdir()
    top = git(root, "rev-parse", "--show-toplevel")
    if top is not None:
        copied.commit = git(root, "rev-parse", "HEAD")
        status = git(root, "status", "--porcelain")
        copied.dirty = None if status is None else bool(status)
        diff = git(root, "diff", "HEAD") if copied.commit and copied.dirty else None
        if diff:
            (target.parent / "code.diff").write_text(diff + "\n")
    base = Path(top) if top and root.is_relative_to(top) else root
    here = root.relative_to(base)
    copied.paths = [(Path("code") / here).as_posix()]
    marker = [root / ".project-root"]  # rootutils finds the root of a project by it
    _copy(root, [*project_files(root, leave_out), *marker], target / here, copied)
    for number, one in enumerate(import_roots(root)):
        copied.paths.append(_take_root(one, number, base, target=target, leave_out=leave_out, copied=copied))
    if here.parts:
        _copy(base, tracked_code(base)[:_MOST_AROUND], target, copied)
    return copied


def import_paths(code_dir: Path) -> list[str]:
    """Return the folders from which a run with its code at `code_dir` imports the user's modules, in order."""
    try:
        paths = json.loads((code_dir.parent / "manifest.json").read_text())["code"]["paths"]
    except (OSError, ValueError, KeyError, TypeError):  # not a run, or an older run that does not store it
        return [str(code_dir)]
    return [str(code_dir.parent / path) for path in paths]


def _take_root(one: ImportRoot, number: int, base: Path, *, target: Path, leave_out: Path, copied: Snapshot) -> str:
    """Copy an import root; return the folder of the run directory that replaces it."""
    folder = one.folder.resolve()
    inside = folder.is_relative_to(base)
    own = target.parent / "imports" / f"{number}-{folder.name}"
    frozen = target / folder.relative_to(base) if inside else own
    for path in one.modules.values():
        if not (frozen / path.name).exists():
            _copy(folder, _below(folder, package_files(folder / path.name, leave_out)), frozen, copied)
    if one.whole or (not inside and all(path.name.partition(".")[0] == name for name, path in one.modules.items())):
        return frozen.relative_to(target.parent).as_posix()
    view = own if inside else own.with_name(own.name + "-names")
    view.mkdir(parents=True, exist_ok=True)
    for name, path in one.modules.items():
        link = view / (name + "".join(path.suffixes) if path.is_file() else name)
        link.symlink_to(os.path.relpath(frozen / path.name, view))
    return view.relative_to(target.parent).as_posix()


def _below(folder: Path, paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_relative_to(folder)]


def _copy(root: Path, paths: Iterable[Path], target: Path, copied: Snapshot) -> None:
    for path in paths:
        copy = target / path.relative_to(root)
        is_folder = path.is_dir()
        if copy.exists() or not (is_folder or path.is_file()):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        largest = LARGEST_EXTENSION_BYTES if path.suffix in MODULES else LARGEST_FILE_BYTES
        if is_folder or size > largest or copied.files >= MOST_FILES or copied.bytes + size > MOST_BYTES:
            copied.left_out.append(path.relative_to(root).as_posix() + ("/" if is_folder else ""))
            if len(copied.left_out) <= MOST_LINKS:
                copy.symlink_to(path.resolve())
            continue
        shutil.copy2(path, copy)
        copied.files += 1
        copied.bytes += size

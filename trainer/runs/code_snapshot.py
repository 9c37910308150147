"""Copy the user's code at launch, with uncommitted changes: a run executes the code that was launched."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from trainer.core.files import parse_json, read_text
from trainer.core.git import git
from trainer.runs.code_files import MODULES, package_files, project_files, tracked_code
from trainer.runs.credentials import has_key, is_credential, is_hidden, leads_to_credential, masked
from trainer.runs.import_roots import ImportRoot, import_roots

MOST_FILES = 5000
MOST_BYTES = 200 * 1024**2
LARGEST_FILE_BYTES = 5 * 1024**2
LARGEST_EXTENSION_BYTES = 100 * 1024**2
"""Limit for a compiled module."""
_LARGEST_TEXT_BYTES = LARGEST_FILE_BYTES
"""Larger files are not searched for keys: they are linked, or compiled modules."""
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
    withheld: list[str] = field(default_factory=list)
    """Files with the name of credentials, or untracked with a key or token in their text: neither copied nor linked."""
    keys: list[str] = field(default_factory=list)
    """Modules and tracked files with a key or token in their text: linked, because the code may need them."""
    hidden: list[str] = field(default_factory=list)
    """Other dotfiles and files in dotfolders, which are left out."""
    paths: list[str] = field(default_factory=lambda: ["code"])
    """Folders of the run directory from which modules are imported, in order."""


def snapshot(root: Path, target: Path, leave_out: Path) -> Snapshot:
    """Copy the code at `root` to `target`, and the other import roots (`import_roots.py`) there or next to it.

    If `root` is a folder in a git checkout, `target` has the layout of the whole checkout, for code that finds its
    neighbours by `__file__`. Files over 5 MB (compiled modules: 100 MB), and those beyond 5,000 files or 200 MB in all,
    become links to the originals and are listed in `left_out`, as do folders of data. Dotfiles, keys and credentials
    are left out (`withheld`, `keys`, `hidden`), whether or not git ignores them.

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
        diff = _diff(root) if copied.commit and copied.dirty else None
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
        paths = parse_json(read_text(code_dir.parent / "manifest.json"))["code"]["paths"]
        return [str(code_dir.parent / path) for path in paths]
    except (OSError, ValueError, KeyError, TypeError):  # not a run, or an older run that does not store it
        return [str(code_dir)]


def _diff(root: Path) -> str | None:
    """Return the uncommitted changes of the checkout, without files of credentials, and with tokens masked."""
    names = (git(root, "diff", "HEAD", "--name-only", "-z") or "").split("\0")
    secret = [name for name in names if is_hidden(PurePath(name)) or is_credential(PurePath(name), _is_module(name))]
    diff = git(root, "diff", "HEAD", "--", ":/", *(f":(exclude,top,literal){name}" for name in secret))
    return masked(diff) if diff else None


def _is_module(name: str) -> bool:
    return PurePath(name).suffix in MODULES


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
    made: set[Path] = set()
    for path in paths:
        relative = path.relative_to(root)
        copy = target / relative
        try:
            status = path.stat()
        except OSError:
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        if copy.exists() or not (is_folder or stat.S_ISREG(status.st_mode)):
            continue
        if is_credential(relative, _is_module(path.name)) or leads_to_credential(path):
            copied.withheld.append(relative.as_posix())
            continue
        if is_hidden(relative):
            copied.hidden.append(relative.as_posix())
            continue
        if copy.parent not in made:
            copy.parent.mkdir(parents=True, exist_ok=True)
            made.add(copy.parent)
        size = status.st_size
        largest = LARGEST_EXTENSION_BYTES if path.suffix in MODULES else LARGEST_FILE_BYTES
        if is_folder or size > largest or copied.files >= MOST_FILES or copied.bytes + size > MOST_BYTES:
            copied.left_out.append(relative.as_posix() + ("/" if is_folder else ""))
            if len(copied.left_out) <= MOST_LINKS:
                copy.symlink_to(path.resolve())
            continue
        if size > _LARGEST_TEXT_BYTES:
            shutil.copy2(path, copy)
        elif has_key(content := path.read_bytes()):
            _withhold(path, relative, copy, copied)
            continue
        else:
            _write(copy, content, status)
        copied.files += 1
        copied.bytes += size


def _write(copy: Path, content: bytes, status: os.stat_result) -> None:
    """Write what was read of a file, with its mode and times. shutil.copy2 would open both files again."""
    with copy.open("xb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
        os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


def _withhold(path: Path, relative: PurePath, copy: Path, copied: Snapshot) -> None:
    """Link a file with a key or token in its text if the code may need it, else leave it out."""
    is_tracked = git(path.parent, "ls-files", "--error-unmatch", "--", path.name) is not None
    if is_tracked or _is_module(path.name):
        copied.keys.append(relative.as_posix())
        copy.symlink_to(path.resolve())
    else:
        copied.withheld.append(relative.as_posix())

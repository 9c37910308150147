"""The user's code as it is at launch: what runs later is what was launched, uncommitted changes included."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

MOST_FILES = 5000
MOST_BYTES = 200 * 1024**2
LARGEST_FILE_BYTES = 5 * 1024**2
_CODE = {".py", ".yaml", ".yml", ".toml", ".json", ".txt", ".sh", ".cfg", ".ini", ".md", ".cu", ".cpp", ".h"}
_NEVER = {".git", ".venv", "venv", "node_modules", "__pycache__", "runs", "wandb", "data"}


@dataclass
class Snapshot:
    """What was copied, and what not."""

    files: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    commit: str | None = None
    dirty: bool | None = None


def snapshot(root: Path, target: Path, leave_out: Path) -> Snapshot:
    """Copy the code under `root` to `target`.

    In a git checkout: what git tracks and what it does not ignore. Elsewhere: files that look like code. Files over
    5 MB, and those beyond 5,000 files or 200 MB in all, are named in `left_out` instead.
    """
    taken = Snapshot()
    target.mkdir()
    listed = _git_files(root)
    if listed is not None:
        taken.commit = _git(root, "rev-parse", "HEAD")
        taken.dirty = bool(_git(root, "status", "--porcelain"))
        diff = _git(root, "diff", "HEAD") if taken.commit and taken.dirty else None
        if diff:
            (target.parent / "code.diff").write_text(diff + "\n")
    for relative in listed if listed is not None else _code_files(root):
        source = root / relative
        if source.is_symlink() or not source.is_file() or leave_out in source.parents:
            continue
        size = source.stat().st_size
        if size > LARGEST_FILE_BYTES or taken.files >= MOST_FILES or taken.bytes + size > MOST_BYTES:
            taken.left_out.append(str(relative))
            continue
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
        taken.files += 1
        taken.bytes += size
    return taken


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails or git is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _git_files(root: Path) -> list[Path] | None:
    found = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")
    return None if found is None else [Path(name) for name in found.split("\0") if name]


def _code_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _NEVER and not name.startswith("."))
        found += [Path(folder, name).relative_to(root) for name in sorted(files) if Path(name).suffix in _CODE]
        if len(found) > 2 * MOST_FILES:
            break
    return found

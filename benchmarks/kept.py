"""What a benchmark found, kept with the commit and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def commit() -> str:
    """Short, with -dirty where the tree is not what the commit says, apart from the kept results."""
    short = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return (short + ("-dirty" if changed else "")) or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(HERE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


COMMIT = commit()
"""Read when a benchmark starts: the tree may change while it runs."""


def keep(name: str, title: str, text: str, by_hand: bool = False) -> None:
    """Write `text` to results/NAME.md; `by_hand`: keep the sections that were added there below the table."""
    import torch

    path = HERE / "results" / f"{name}.md"
    facts = {
        "commit": COMMIT,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
    }
    command = name if (HERE / name).is_file() else f"{name}.py"
    said = "\n".join(f"- {fact}: {value}" for fact, value in facts.items())
    before = path.read_text() if by_hand and path.exists() else ""
    sections = before[before.index("\n## ") :] if "\n## " in before else ""
    path.write_text(f"# {title}\n\n`benchmarks/{command}`\n\n{said}\n\n{text}\n{sections}")
    print(f"kept in {path}", file=sys.stderr)

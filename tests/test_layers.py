"""The rooms of the package import in one direction: the contract of pyproject.toml, `[tool.importlinter]`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contract judged on the package in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {LINT}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_rooms_import_only_from_below() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "core/files.py",
            "from trainer.runs.directory import RunDirectory",
            "trainer.core is not allowed to import trainer.runs",
        ),
        (
            "runtime/rng.py",
            "def late() -> None:\n    from trainer.train import run",
            "trainer.runtime is not allowed to import trainer.train",
        ),
        (
            "strategies/mesh.py",
            "import trainer.callbacks.guard",
            "trainer.strategies is not allowed to import trainer.callbacks",
        ),
        ("new_room/__init__.py", "", "trainer.new_room"),
    ],
    ids=["upward", "lazy", "sibling", "room without a place"],
)
def test_an_import_from_above_is_found(tmp_path: Path, file: str, line: str, broken: str) -> None:
    shutil.copytree(ROOT / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "trainer" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as text:
        text.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout
    assert broken in done.stdout

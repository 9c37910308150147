"""By which module names the processes of a run start, with the package that the run has frozen, if any."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trainer.supervise import agent, entry

BEFORE, NOW = ("__init__.py", "worker/__init__.py", "worker/__main__.py"), ("__init__.py", "train/__main__.py")
NAMES = {
    entry.RANK: "trainer.worker",
    entry.PRELOAD: "trainer.worker.run",
    entry.EVALUATE: "trainer.worker.evaluate",
    entry.PREDICT: "trainer.worker.predict",
    entry.EXPORT: "trainer.worker.export",
}
"""Name since 0.2 to name up to 0.1."""


def package(folder: Path, files: tuple[str, ...]) -> None:
    for file in files:
        path = folder / "trainer" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def code_dir(tmp_path: Path) -> Path:
    """`code/` of a run, with a module of the user's."""
    code = tmp_path / "run" / "code"
    code.mkdir(parents=True)
    (code / "model.py").touch()
    return code


@pytest.mark.parametrize("files", [(), NOW], ids=["no package", "today's package"])
def test_a_run_without_an_older_package_starts_by_the_names_of_today(code_dir: Path, files: tuple[str, ...]) -> None:
    package(code_dir, files)
    for name in NAMES:
        assert entry.module_of(name, code_dir) == name
        assert entry.started(name, code_dir) == ["-m", "trainer.runtime.start", name]


def test_a_run_that_froze_an_older_package_starts_by_its_names(code_dir: Path) -> None:
    package(code_dir, BEFORE)
    for name, before in NAMES.items():
        assert entry.module_of(name, code_dir) == before
    verbs = {name: NAMES[name].rpartition(".")[2] for name in (entry.EVALUATE, entry.PREDICT, entry.EXPORT)}
    for name, verb in verbs.items():
        assert entry.started(name, code_dir) == ["-m", "trainer.worker.start", verb]


def test_without_a_run_the_installed_package_starts(code_dir: Path) -> None:
    package(code_dir, BEFORE)
    assert entry.started(entry.EXPORT) == ["-m", "trainer.runtime.start", entry.EXPORT]


@pytest.mark.parametrize(("first", "is_before"), [("code/app", False), ("code", True)])
def test_the_first_package_on_the_path_of_the_run_counts(code_dir: Path, first: str, is_before: bool) -> None:
    """`manifest.json` has the folders from which the run imports, in order."""
    package(code_dir, BEFORE)
    package(code_dir / "app", NOW)
    paths = [first, *{"code", "code/app"} - {first}]
    (code_dir.parent / "manifest.json").write_text(json.dumps({"code": {"paths": paths}}))
    assert entry.module_of(entry.RANK, code_dir) == ("trainer.worker" if is_before else entry.RANK)


def test_a_folder_of_that_name_that_is_no_package_is_passed_over(code_dir: Path) -> None:
    package(code_dir, ("worker/__main__.py",))
    assert entry.module_of(entry.RANK, code_dir) == entry.RANK


def test_the_agent_imports_by_the_name_that_the_frozen_package_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agent._module_of_imports().__name__ == "trainer.runtime.imports"
    older = ModuleType("trainer.worker.imports")
    monkeypatch.setitem(sys.modules, "trainer.runtime.imports", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setitem(sys.modules, "trainer.worker", ModuleType("trainer.worker"))
    monkeypatch.setitem(sys.modules, older.__name__, older)
    assert agent._module_of_imports() is older

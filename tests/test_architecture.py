"""docs/architecture.md: every module, function and path that it names exists, and each hop leads to the next."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trainer"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
QUOTED = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"[a-z_]+(\.\w+)+")
FILE = re.compile(r"[\w./-]+\.(py|sbatch)")

HOPS = [
    ("cli.fit.main", "compose_all"),
    ("cli.overrides.compose_all", "compose"),
    ("cli.fit.main", "check_all"),
    ("cli.job.check_all", "check_one"),
    ("cli.job.check_one", "check"),
    ("cli.fit.main", "launch"),
    ("cli.launching.launch", "RunDirectory.create"),
    ("cli.launching.launch", "launchers.launcher"),
    ("launch.launchers.launcher", "LocalLauncher"),
    ("launch.launchers.launcher", "SlurmLauncher"),
    ("supervise.node.main", "Supervisor"),
    ("supervise.supervisor.Supervisor._rounds", "self._round"),
    ("train.__main__.main", "stop.install_handlers"),
    ("train.__main__.main", "run"),
    ("train.run.run", "train"),
    ("train.run.train", "build.build_trainer"),
    ("train.run.train", "trainer.fit"),
    ("train.build.build_trainer", "use_lean_loop"),
    ("train.loop.LeanTrainingEpochLoop.advance", "self._train"),
    ("train.loop_step.LeanOptimization._train", "self._step_closure"),
    ("train.loop_step.LeanOptimization._step_closure", "self._closure"),
    ("train.loop_step.LeanOptimization._closure", "plan.training_step"),
]
"""A function of the page, and what it calls on the way to the training step."""

INDEXES = ["data", "models", "strategies", "cli", "train.checkpoint_contents"]
"""Modules whose docstring lists the files that hold something; `x.py` is the one to be written."""


def found(name: str) -> ast.AST | None:
    """The module, class, function or constant of a dotted name below the package; None if there is none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = PACKAGE.joinpath(*parts[:length])
        path = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if not path.is_file():
            continue
        node: ast.AST | None = ast.parse(path.read_text())
        for part in parts[length:]:
            node = next((one for one in getattr(node, "body", []) if part in names_of(one)), None)
        return node
    return None


def names_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = [*getattr(node, "targets", []), getattr(node, "target", None)]
    return {one.id for target in targets if target for one in ast.walk(target) if isinstance(one, ast.Name)}


def dotted_names(text: str) -> list[str]:
    """Names that begin with a room, without options of a configuration, such as `data.batch_size`, and files."""
    names = [name for name in QUOTED.findall(text) if DOTTED.fullmatch(name) and name.partition(".")[0] in ROOMS]
    return [name for name in names if name not in ("data.batch_size", "config.yaml") and not FILE.fullmatch(name)]


def missing_files(line: str, folder: Path = PACKAGE) -> list[str]:
    """Files that a line names and that do not exist; a bare name is in the folder of the one before it, or `folder`."""
    missing = []
    for name in QUOTED.findall(line):
        if not FILE.fullmatch(name) or "VERB" in name:
            continue
        places = [PACKAGE / name, ROOT / name, folder / name]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            missing.append(name)
        else:
            folder = path.parent
    return missing


def test_every_function_that_the_page_names_exists() -> None:
    names = dotted_names(PAGE)
    assert len(names) > 20
    assert [name for name in names if found(name) is None] == []


def test_every_file_that_the_page_names_exists() -> None:
    lines = PAGE.splitlines()
    assert sum(bool(FILE.fullmatch(name)) for line in lines for name in QUOTED.findall(line)) > 80
    assert [name for line in lines for name in missing_files(line)] == []


@pytest.mark.parametrize("module", INDEXES)
def test_every_file_that_an_index_in_the_code_names_exists(module: str) -> None:
    tree = found(module)
    assert isinstance(tree, ast.Module)
    lines = (ast.get_docstring(tree) or "").splitlines()
    assert sum(len(FILE.findall(line)) for line in lines) > 0
    assert [name for line in lines for name in missing_files(line, PACKAGE / module) if Path(name).stem != "x"] == []


def test_what_does_not_exist_is_found() -> None:
    assert found("train.run.run") is not None
    assert found("train.run.walk") is None
    assert found("train.walk.run") is None
    assert missing_files("`train/run.py`, `walk.py`") == ["walk.py"]


@pytest.mark.parametrize(("caller", "callee"), HOPS)
def test_each_hop_leads_to_the_next(caller: str, callee: str) -> None:
    function = found(caller)
    assert function is not None
    assert callee in {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}

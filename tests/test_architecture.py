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
    ("cli.fit.main", "start_ahead"),
    ("launch.launchers.start_ahead", "local.start_ahead"),
    ("launch.local.start_ahead", "NodeAhead"),
    ("supervise.ahead.main", "torchrun.start_spare"),
    ("supervise.ahead.main", "node.main_then"),
    ("cli.fit.main", "check_all"),
    ("cli.job.check_all", "check_one"),
    ("cli.job.check_one", "check"),
    ("cli.fit.main", "launch"),
    ("cli.launching.launch", "RunDirectory.create"),
    ("cli.launching.launch", "launchers.launcher"),
    ("launch.launchers.launcher", "LocalLauncher"),
    ("launch.launchers.launcher", "SlurmLauncher"),
    ("launch.local.LocalLauncher.launch", "self._ahead.start"),
    ("slurm.submit.SlurmLauncher.launch", "render.script"),
    ("slurm.submit.SlurmLauncher.launch", "submit"),
    ("supervise.node.main_then", "main"),
    ("supervise.node.main", "node.supervise"),
    ("supervise.supervisor.Supervisor.supervise", "self._supervise"),
    ("supervise.supervisor.Supervisor._supervise", "self._rounds"),
    ("supervise.supervisor.Supervisor._rounds", "self._round"),
    ("supervise.supervisor.Supervisor._round", "torchrun.command"),
    ("supervise.supervisor.Supervisor._round", "torchrun.start"),
    ("supervise.torchrun.start", "_popen"),
    ("supervise.agent.main", "forks.ForkServer"),
    ("supervise.fork_server.ForkServer.serve", "self._start"),
    ("supervise.fork_server.ForkServer._start", "run_python"),
    ("supervise.fork_server.run_python", "runpy.run_module"),
    ("train.__main__.main", "stop.install_handlers"),
    ("train.__main__.main", "run"),
    ("train.run.run", "train"),
    ("train.run.train", "build.build_trainer"),
    ("train.run.train", "_make_callbacks"),
    ("train.run.train", "user_callbacks.build"),
    ("train.run.train", "trainer.fit"),
    ("train.build.build_trainer", "use_lean_loop"),
    ("train.loop.use_lean_loop", "use_save_points"),
    ("train.save_points.use_save_points", "SavePointFitLoop"),
    ("train.loop.LeanTrainingEpochLoop.run", "self.on_run_start"),
    ("train.loop.LeanTrainingEpochLoop.on_run_start", "why_not_lean"),
    ("train.loop.LeanTrainingEpochLoop.run", "self.advance"),
    ("train.loop.LeanTrainingEpochLoop.advance", "self._train"),
    ("train.loop_step.LeanOptimization._train", "self._step_closure"),
    ("train.loop_step.LeanOptimization._step_closure", "self._closure"),
    ("train.loop_step.LeanOptimization._closure", "plan.training_step"),
]
"""A function of the page, and what it calls on the way to the training step."""

STARTS = [
    ("supervise.ahead.NodeAhead.__init__", "python_module('trainer.supervise.ahead'", "supervise/ahead.py", "main"),
    ("launch.local.LocalLauncher.launch", "python_module(NODE", "supervise/node.py", "main_then"),
    ("launch.local.NODE", "= 'trainer.supervise.node'", "supervise/node.py", "main_then"),
    ("supervise.torchrun.command", "str(AGENT)", "supervise/agent.py", "main"),
    ("supervise.torchrun.start_spare", "str(AGENT)", "supervise/agent.py", "main"),
    ("supervise.torchrun.AGENT", "'agent.py'", "supervise/agent.py", "main"),
    ("supervise.supervisor.Supervisor._round", "entry.module_of(entry.RANK", "train/__main__.py", "main"),
    ("supervise.entry.RANK", "= 'trainer.train'", "train/__main__.py", "main"),
]
"""Where a hop crosses to another process: the function or constant, what names the file that is started, the file, and
the function that this calls when it is started."""

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
    return [
        name
        for name in names
        if name not in ("data.batch_size", "cluster.network_interface", "config.yaml") and not FILE.fullmatch(name)
    ]


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


@pytest.mark.parametrize(("starter", "text", "file", "main"), STARTS)
def test_each_start_of_a_process_leads_to_the_next_hop(starter: str, text: str, file: str, main: str) -> None:
    node = found(starter)
    assert node is not None
    assert text in ast.unparse(node)
    assert_calls_when_started(file, main)


def test_the_job_script_starts_a_node_process() -> None:
    assert "srun @SRUN@" in (script := (ROOT / "slurm" / "job.sbatch").read_text())
    assert '-m trainer.supervise.node "$run_dir"' in script
    assert_calls_when_started("supervise/node.py", "main_then")


def assert_calls_when_started(file: str, main: str) -> None:
    block = next(
        one
        for one in ast.parse((PACKAGE / file).read_text()).body
        if isinstance(one, ast.If) and ast.unparse(one.test) == "__name__ == '__main__'"
    )
    assert main in {ast.unparse(node.func) for node in ast.walk(block) if isinstance(node, ast.Call)}


def test_the_hops_of_the_page_name_the_functions_that_are_tested() -> None:
    hops = PAGE[PAGE.index("Six hops") : PAGE.index("## Rooms")]
    assert [line[:2] for line in hops.splitlines() if re.match(r"\d\. ", line)] == [f"{n}." for n in range(1, 7)]
    tested = {name for hop in HOPS for name in hop} | {start[0] for start in STARTS}
    modules = [name for name in dotted_names(hops) if isinstance(found(name), ast.FunctionDef)]
    assert len(modules) > 12
    called = {name.rpartition(".")[2] for name in tested}
    assert [name for name in modules if name.rpartition(".")[2] not in called] == []

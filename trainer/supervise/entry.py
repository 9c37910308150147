"""Names of the modules that the processes of a run execute.

A run made in a checkout of this package has a snapshot of the package as well, and its processes import that copy. The
modules had other names until 0.1.
"""

from __future__ import annotations

from pathlib import Path

from trainer.runs.code_snapshot import import_paths

RANK = "trainer.train"
"""`python -m trainer.train RUN_DIR` runs one rank."""
PRELOAD = "trainer.train.run"
"""Module that a rank imports first, and the fork server for all ranks."""
EVALUATE, PREDICT, EXPORT, DEEP, PLAN = (
    "trainer.train.evaluate",
    "trainer.train.predict",
    "trainer.export.run",
    "trainer.train.deep",
    "trainer.plan.run",
)
START = "trainer.runtime.start"
"""`python -m trainer.runtime.start MODULE ARGUMENT...` calls `main` of MODULE."""
_NAMES_UNTIL_0_1 = {
    RANK: "trainer.worker",
    PRELOAD: "trainer.worker.run",
    EVALUATE: "trainer.worker.evaluate",
    PREDICT: "trainer.worker.predict",
    EXPORT: "trainer.worker.export",
}


def module_of(name: str, code_dir: Path) -> str:
    """Return `name`, or the name of that module in the code snapshot `code_dir` if the package there is from 0.1."""
    return _NAMES_UNTIL_0_1[name] if _is_from_0_1(code_dir) else name


def started(name: str, code_dir: Path | None = None) -> list[str]:
    """Return Python's arguments to call `main` of the module `name`, with the code snapshot `code_dir` if given."""
    if code_dir is not None and _is_from_0_1(code_dir):
        return ["-m", "trainer.worker.start", _NAMES_UNTIL_0_1[name].rpartition(".")[2]]
    return ["-m", START, name]


def _is_from_0_1(code_dir: Path) -> bool:
    for folder in import_paths(code_dir):
        package = Path(folder) / "trainer"
        if (package / "__init__.py").is_file():
            return (package / "worker" / "__main__.py").is_file()
    return False

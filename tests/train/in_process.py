"""A whole attempt of one rank inside the calling process: for tests of many small projects, for each of which a process
of its own would cost seconds of importing."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from trainer.cli.job import check_all
from trainer.config.compose import compose
from trainer.runs.directory import RunDirectory

ONE_RANK = ["tracking=none", "resources.gpus=0", "resources.cpu_processes=1", "resilience.max_restarts=0"]


def new_run(folder: Path, overrides: list[str]) -> RunDirectory:
    """Compose, check and freeze a job as `trainer fit` would in `folder`, without launching it."""
    with working_in(folder):
        given = [*(one for one in ONE_RANK if not _given(one, overrides)), *overrides]
        (job,) = check_all([compose(given, config_dirs=[], cwd=folder)])
        return RunDirectory.create(job.config, overrides=given, choices={}, code_root=folder, hydra=job.hydra)


def _given(override: str, overrides: list[str]) -> bool:
    return any(one.startswith(override.partition("=")[0] + "=") for one in overrides)


def attempt(run: RunDirectory, folder: Path, outcome: str = "finished") -> str:
    """Train one attempt of `run` in this process; its output. Raises AssertionError unless it ended as `outcome`."""
    from trainer.train.run import run as train

    said = io.StringIO()
    os.environ["TRAINER_ATTEMPT"] = str(run.next_attempt())
    try:
        with working_in(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run.attempt_logs(run.next_attempt()).mkdir(parents=True)
            train(run.path)
    finally:
        del os.environ["TRAINER_ATTEMPT"]
        HydraConfig.instance().cfg = None
    assert [one.outcome for one in run.attempts()][-1:] == [outcome], said.getvalue()
    return said.getvalue()


def fit(folder: Path, *overrides: str) -> tuple[RunDirectory, str]:
    """A new run of one attempt and its output."""
    run = new_run(folder, list(overrides))
    return run, attempt(run, folder)


def weights(run: RunDirectory) -> dict[str, Any]:
    """The state dict in the newest checkpoint."""
    from trainer.checkpoint.store import CheckpointStore
    from trainer.checkpoint.stored import MODEL, StoredCheckpoint

    newest = max(CheckpointStore(run.checkpoints_dir).committed(), key=lambda one: one.step)
    return {
        name.removeprefix(MODEL): value.clone() for name, value in StoredCheckpoint(newest.path).whole(MODEL).items()
    }


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """`folder` as the working directory from which modules are imported. Those of the last one are forgotten."""
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    known = set(sys.modules)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]

"""The rows: what is read again and when, and what is told of a run that is new, changed or gone."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.fake_runs import make_run
from trainer.dashboard import catalogue as module
from trainer.dashboard.catalogue import ACTIVE_EVERY_S, ENDED_EVERY_S, Catalogue
from trainer.runs.events import StopRequested
from trainer.runs.index import Index


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    for seed in range(3):
        make_run(folder, seed=seed)
    return folder


def states(catalogue: Catalogue, since: int = 0) -> dict[str, Any]:
    return {row["name"]: row["state"] for row in catalogue.changes(since)["rows"]}


def test_new_changed_and_deleted_runs_are_told_once(runs: Path) -> None:
    catalogue = Catalogue([runs])
    catalogue.refresh(0.0)
    assert states(catalogue) == {"digits": "finished"}
    first = catalogue.changes(0)["cursor"]
    catalogue.refresh(ACTIVE_EVERY_S)
    assert catalogue.changes(first)["rows"] == []
    alive = make_run(runs, "alive", outcome=None)
    catalogue.refresh(2 * ACTIVE_EVERY_S)
    assert states(catalogue, first) == {"alive": "running"}
    second = catalogue.changes(0)["cursor"]
    alive.stop_request.touch()
    alive.add_event(StopRequested(reason="trainer stop"))
    catalogue.refresh(3 * ACTIVE_EVERY_S)
    assert states(catalogue, second) == {"alive": "stopping"}
    third = catalogue.changes(0)["cursor"]
    shutil.rmtree(alive.path)
    catalogue.refresh(2 * ENDED_EVERY_S)
    changes = catalogue.changes(third)
    assert (changes["rows"], len(changes["removed"]), changes["reset"]) == ([], 1, False)


def test_ended_runs_are_not_read_every_two_seconds(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue([runs])
    looks: list[bool] = []
    real = module.Index.refresh

    def refresh(index: module.Index, only_active: bool = False) -> None:
        looks.append(only_active)
        real(index, only_active)

    monkeypatch.setattr(module.Index, "refresh", refresh)
    for second in range(60):
        catalogue.refresh(float(second))
    assert len(looks) == 60 / ACTIVE_EVERY_S
    assert looks.count(False) == 60 / ENDED_EVERY_S


def test_a_look_is_not_repeated_within_two_seconds(runs: Path) -> None:
    catalogue = Catalogue([runs])
    catalogue.refresh(0.0)
    before = catalogue.changes(0)["cursor"]
    make_run(runs, "alive", outcome=None)
    catalogue.refresh(ACTIVE_EVERY_S / 2)
    assert catalogue.changes(before)["rows"] == []
    catalogue.look()
    assert states(catalogue, before) == {"alive": "running"}


def test_roots_may_be_folders_runs_and_missing(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    one = make_run(other, "one")
    make_run(other, "two")
    catalogue = Catalogue([runs, one.path, tmp_path / "missing"])
    catalogue.refresh(0.0)
    rows = catalogue.changes(0)["rows"]
    assert sorted((row["root"], row["name"]) for row in rows) == [(0, "digits")] * 3 + [(1, "one")]
    assert len({row["key"] for row in rows}) == 4


def test_nothing_is_written_into_the_runs(runs: Path) -> None:
    hour_ago = time.time() - 3600
    for path in [*runs.rglob("*"), *runs.iterdir()]:
        os.utime(path, (hour_ago, hour_ago))

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in runs.rglob("*")}

    before = files()
    catalogue = Catalogue([runs])
    catalogue.refresh(0.0)
    catalogue.refresh(ENDED_EVERY_S)
    assert files() == before
    Index(runs, use_cache=False).refresh()  # which would have
    assert files() != before


def test_slurm_is_asked_once_for_all_and_not_at_each_look(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    asked: list[list[str]] = []

    def answer(job_ids: list[str]) -> dict[str, str]:
        asked.append(sorted(job_ids))
        return dict.fromkeys(job_ids, "PENDING")

    monkeypatch.setattr(module, "states_of_jobs", answer)
    for number in (1, 2):
        run = make_run(runs, f"queued{number}", outcome=None)
        run.write_launch(replace(run.launch(), cluster="slurm", slurm_job_id=str(number)))
    catalogue = Catalogue([runs])
    for tick in range(5):
        catalogue.refresh(tick * ACTIVE_EVERY_S)
    assert asked == [["1", "2"]]
    assert states(catalogue)["queued1"] == "queued"

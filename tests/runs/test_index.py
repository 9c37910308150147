"""The index of a folder of runs: few calls of the file system, changes since a cursor, a cache that cannot do harm."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.ended import ended_run, make_old
from trainer.runs import row_cache
from trainer.runs.directory import RunDirectory
from trainer.runs.index import Index, rows
from trainer.runs.metric_ranges import RangeScan
from trainer.runs.records import AttemptOutcome
from trainer.runs.summary import summary

MANY = 40
CALLS = ("stat", "lstat", "open", "scandir", "listdir", "access")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def many(root: Path) -> Path:
    """Copies of a run, sealed."""
    template = ended_run(root, "run")
    for number in range(MANY - 1):
        shutil.copytree(template.path, root / f"run{number}-aaaaaaaa")
        make_old(RunDirectory(root / f"run{number}-aaaaaaaa"))
    rows(root)
    return root


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls of the file system by path, and what they were for."""
    made: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            made.append(f"{name} {arguments[0]}")
            return function(*arguments, **named)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr("builtins.open", counted("open", open))
    return made


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "not cached"])
def test_a_sealed_run_costs_three_calls(many: Path, calls: list[str], is_cached: bool) -> None:
    if is_cached:
        rows(many)
    else:
        shutil.rmtree(many.parent / "cache", ignore_errors=True)
    calls.clear()
    assert len(rows(many)) == MANY
    of_runs = [call for call in calls if f"{many}/" in call]
    assert len(of_runs) == 3 * MANY
    assert len(calls) - len(of_runs) < 30
    assert any("summary.json" in call and call.startswith("open") for call in of_runs) is not is_cached


def test_what_changed_since_a_cursor(root: Path) -> None:
    first, second = ended_run(root, "first"), ended_run(root, "second", outcome=None)
    index = Index(root)
    index.refresh()
    everything = index.since()
    assert everything.is_complete
    assert [row.name for row in everything.rows] == ["first", "second"]
    index.refresh()
    unchanged = index.since(everything.cursor)
    assert (unchanged.rows, unchanged.gone, unchanged.is_complete) == ([], [], False)
    third = ended_run(root, "third")
    shutil.rmtree(first.path)
    second.write_outcome(AttemptOutcome(attempt=0, outcome="failed", step=3))
    index.refresh()
    changes = index.since(everything.cursor)
    assert {row.path for row in changes.rows} == {second.path, third.path}
    assert changes.gone == [first.path]
    assert index.since(changes.cursor).rows == []
    third.config_path.write_text("{")
    third.unseal()
    index.refresh()
    broken = index.since(changes.cursor)
    assert list(broken.problems) == broken.gone == [third.path]
    restarted = Index(root)
    restarted.refresh()
    assert restarted.since(changes.cursor).is_complete


def test_active_runs_are_looked_at_alone(root: Path, calls: list[str]) -> None:
    active, ended = ended_run(root, "active", outcome=None), ended_run(root, "ended")
    launch = json.loads(active.launch_path.read_text())
    launch |= {"host": "elsewhere"}
    active.launch_path.write_text(json.dumps(launch))
    beat = json.loads(active.live.path(0).read_text().rstrip())

    def live(step: int) -> None:
        content = {**{k: v for k, v in beat.items() if k != "crc32"}, "time": 4e9, "phase": "train", "step": step}
        active.live.path(0).write_text(json.dumps(content))

    live(4)
    index = Index(root)
    index.refresh()
    index.refresh()
    live(5)
    calls.clear()
    index.refresh(only_active=True)
    assert not [call for call in calls if str(ended.path) in call]
    by_name = {row.name: row for row in index.rows()}
    assert (by_name["active"].state, by_name["active"].facts["step"]) == ("running", 5)
    assert by_name["ended"].state == "finished"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "no JSON": lambda content: b"\x80\x04pickle\n" * 10,
    "cut off": lambda content: content[: len(content) // 2],
    "a line missing": lambda content: content.replace(b"\n", b"", 1),
    "wrong types": lambda content: content.replace(b'"state": "finished"', b'"state": 3'),
    "another state": lambda content: content.replace(b'"state": "finished"', b'"state": "danced"'),
    "deeply nested": lambda content: content.split(b"\n")[0] + b"\n" + b"[" * 100_000,
    "of another folder": lambda content: content.replace(b'"root": "', b'"root": "/other'),
    "newer": lambda content: content.replace(b'"version": 2', b'"version": 3', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_read_anew(root: Path, damage: str) -> None:
    run = ended_run(root)
    for _ in range(2):
        rows(root)
    (cache,) = (root.parent / "cache" / "trainer").iterdir()
    assert cache.stat().st_mode & 0o777 == 0o600
    assert cache.parent.stat().st_mode & 0o777 == 0o700
    content = cache.read_bytes()
    cache.write_bytes(DAMAGES[damage](content))
    (row,) = rows(root)
    assert row.facts == summary(run)
    assert row.config["model"] == "mlp"
    assert row.ranges["val/acc"].highest == 0.9


def test_a_damaged_configuration_is_read_from_the_run(root: Path) -> None:
    ended_run(root)
    for _ in range(2):
        rows(root)
    (cache,) = (root.parent / "cache" / "trainer").iterdir()
    content = cache.read_bytes()
    assert content.count(b'"model": "mlp"') == 1
    cache.write_bytes(content.replace(b'"model": "mlp"', b'"model": "cnn"'))
    assert rows(root)[0].config["model"] == "mlp"


def test_a_cache_that_others_may_write_to_is_not_used(root: Path) -> None:
    ended_run(root)
    folder = root.parent / "cache" / "trainer"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    for _ in range(2):
        assert len(rows(root)) == 1
    assert list(folder.iterdir()) == []
    folder.rmdir()
    folder.symlink_to(root.parent)
    assert len(rows(root)) == 1
    folder.unlink()
    folder.write_text("a file")
    assert len(rows(root)) == 1


def test_a_cache_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        ended_run(root, f"run{number}")
    monkeypatch.setattr(row_cache, "MOST_BYTES", (1 << 16) + 6000)
    for _ in range(2):
        assert len(rows(root)) == 3
    (cache,) = (root.parent / "cache" / "trainer").iterdir()
    assert 1 <= cache.read_bytes().count(b'"seen"') < 3
    monkeypatch.setattr(row_cache, "MOST_FILES", 1)
    (root.parent / "others").mkdir()
    ended_run(root.parent / "others")
    for _ in range(2):
        rows(root.parent / "others")
    assert len(list(cache.parent.iterdir())) == 1
    assert not cache.exists()


def _list_often(root: Path) -> list[str]:
    return [row.state for _ in range(10) for row in Index(root).rows() or rows(root)]


def test_several_processes_write_the_cache(many: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        listed = pool.map(_list_often, [many] * 3)
    assert [set(states) for states in listed] == [{"finished"}] * 3
    assert [len(states) for states in listed] == [10 * MANY] * 3
    assert len(list((many.parent / "cache" / "trainer").iterdir())) == 1


def test_rows_of_runs_that_are_gone_leave_the_cache(root: Path) -> None:
    runs = [ended_run(root, f"run{number}") for number in range(3)]
    for _ in range(2):
        rows(root)
    for run in runs[1:]:
        shutil.rmtree(run.path)
    assert len(rows(root)) == 1
    (cache,) = (root.parent / "cache" / "trainer").iterdir()
    assert cache.read_bytes().count(b'"seen"') == 1


def test_metrics_are_read_on_from_where_they_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    scan = RangeScan(path)
    assert scan.read() == {}
    lines = [{"step": step, "time": 1, "a": value} for step, value in enumerate([3, "nan", 1, 2, "inf"])]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for end in range(0, len(text), 7):  # any part of a line may be there
        path.write_text(text[:end])
        complete = [line for line in text[:end].split("\n")[:-1] if line]
        assert scan.read() == RangeScan(path).read()
        assert (scan.read() == {}) is (not complete)
    path.write_text(text)
    found = scan.read()["a"]
    assert (found.last, found.step, found.lowest, found.lowest_step, found.highest) == ("inf", 4, 1, 2, 3)
    path.write_text(text.replace('"inf"}', '"inf", "b": 7}'))  # the line of a step is extended while it is the last
    assert scan.read()["b"].last == 7
    path.write_text('{"step": 0, "a": 9}\n')  # rewound
    assert scan.read()["a"].highest == 9
    path.write_text('{"step": 0, "a": ' + "9" * 400 + "}\n[]\n{\n" + '{"step": 1, "a": true, "b": [1], "c": null}\n')
    assert scan.read() == {}

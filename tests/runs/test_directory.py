from __future__ import annotations

import json
import multiprocessing
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.config.shape import LaunchShape
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.files import append_line, read_json, read_live, write_atomic, write_live
from trainer.runs import directory
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended, Started
from trainer.supervise import rank_environment
from trainer.supervise.rendezvous import Place


def make(root: Path, name: str = "job", code: Path | None = None, runs_dir: str = "runs") -> RunDirectory:
    code = code or root / "project"
    code.mkdir(exist_ok=True)
    config: dict[str, Any] = {
        "name": name,
        "runs_dir": str(root / runs_dir),
        "trainer": {"max_steps": 10},
        "strategy": {"name": "ddp"},
        "cluster": {"name": "local"},
        "tracking": {"name": "none"},
    }
    return RunDirectory.create(config, overrides=["a=b c"], choices={"model": "mlp"}, code_root=code)


def make_many(root: Path, count: int) -> list[str]:
    directory._ALPHABET = "ab"  # 256 ids, so that launches meet
    return [make(root).path.name for _ in range(count)]


def test_launches_at_once_that_draw_the_same_id_get_directories_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        names = {name for made in pool.starmap(make_many, [(tmp_path, 60)] * 4) for name in made}
    assert len(names) == 240
    assert len(list((tmp_path / "runs").iterdir())) == 240


def test_what_is_frozen_can_be_read_back(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.config()["trainer"] == {"max_steps": 10}
    assert run.overrides_path.read_text() == "'a=b c'\n"
    assert run.manifest()["choices"] == {"model": "mlp"}
    assert run.manifest()["packages"]["torch"]
    assert run.path.stat().st_mode & 0o077 == 0
    assert (run.name, f"job-{run.id}") == ("job", run.path.name)
    assert run.next_attempt() == 0
    run.attempt_logs(7).mkdir()
    assert run.next_attempt() == 8


@pytest.mark.parametrize("runs_dir", ["runs", "l\udcffufe"])
def test_a_folder_that_no_record_can_name_is_refused(tmp_path: Path, runs_dir: str) -> None:
    code = tmp_path / ("project" if runs_dir != "runs" else "proj\udcffct")
    with pytest.raises(UserError, match="a name that is not UTF-8"):
        make(tmp_path, code=code, runs_dir=runs_dir)
    assert not (tmp_path / runs_dir).exists()


def test_the_hash_seed_is_that_of_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert make(tmp_path).hash_seed() == "0"
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    run = make(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "8")
    assert run.hash_seed() == run.manifest()["python_hash_seed"] == "7"
    run.manifest_path.write_text("{}")  # of a run that was made before
    assert run.hash_seed() == "8"
    shape, place = LaunchShape(1, 1, "cpu"), Place()
    python = rank_environment.Interpreter(code_dir=run.code_dir, hash_seed="7")
    assert rank_environment.environment({}, python, shape, place, attempt=0)["PYTHONHASHSEED"] == "7"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-rf", "a b", "x\ny"])
def test_a_name_cannot_leave_the_runs_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        make(tmp_path, name)


def test_a_runs_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(EnvironmentFault, match="runs"):
        make(tmp_path)


def test_the_snapshot_holds_uncommitted_changes_and_nothing_ignored(tmp_path: Path) -> None:
    code = tmp_path / "project"
    code.mkdir()

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x.invalid"]
        subprocess.run(["git", *identity, *arguments], cwd=code, check=True, capture_output=True)

    git("init")
    (code / ".gitignore").write_text("secret.txt\n")
    (code / "model.py").write_text("old\n")
    git("add", ".")
    git("commit", "-m", "first")
    (code / "model.py").write_text("new\n")
    (code / "added.py").write_text("added\n")
    (code / "secret.txt").write_text("secret\n")
    (code / "weights.bin").write_bytes(b"0" * (6 * 1024**2))
    run = make(tmp_path)
    assert (run.code_dir / "model.py").read_text() == "new\n"
    assert (run.code_dir / "added.py").exists()
    assert not (run.code_dir / "secret.txt").exists()
    assert "-old" in (run.path / "code.diff").read_text()
    recorded = run.manifest()["code"]
    assert recorded["dirty"] is True
    assert len(recorded["commit"]) == 40
    assert recorded["left_out"] == ["weights.bin"]


def test_outside_git_only_code_is_taken_and_never_the_runs(tmp_path: Path) -> None:
    code = tmp_path / "project"
    (code / "runs" / "old").mkdir(parents=True)
    (code / "runs" / "old" / "train.py").write_text("")
    (code / "pictures").mkdir()
    (code / "pictures" / "cat.jpg").write_text("")
    (code / "pictures" / "load.py").write_text("")
    run = make(tmp_path)
    taken = sorted(str(path.relative_to(run.code_dir)) for path in run.code_dir.rglob("*") if path.is_file())
    assert taken == ["pictures/load.py"]


def test_a_live_file_is_overwritten_and_half_of_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json"
    long, short = {"x": 1, "y": "y" * 3000}, {"x": 2, "y": "z"}
    write_live(path, long)
    inode = path.stat().st_ino
    assert read_live(path) == long
    write_live(path, short)
    assert (read_live(path), path.stat().st_ino, path.stat().st_mode & 0o777) == (short, inode, 0o600)
    assert {name: read_json(path)[name] for name in short} == short  # plain JSON for whoever else reads it
    assert [one.name for one in tmp_path.iterdir()] == ["rank-0.json"]
    whole = path.read_text()
    for content in ("", '{"x": ', "[1]", whole[:9], whole.replace('"x": 2', '"x": 3'), whole.replace('"z"', '"')):
        path.write_text(content)
        assert read_live(path) == {}
    path.write_text('{"x": 4}')  # of an older version
    assert read_live(path) == {"x": 4}


def test_who_reads_a_live_file_while_it_is_written_sees_the_old_or_the_new(tmp_path: Path) -> None:
    def content(step: int) -> dict[str, Any]:
        return {"step": step, "steps": [step] * (1 + step % 400)}

    def write() -> None:
        while not enough.is_set():
            written.append(len(written))
            write_live(path, content(written[-1]))
            time.sleep(0)  # the reader's turn

    path = tmp_path / "rank-0.json"
    enough, written = threading.Event(), [0]
    write_live(path, content(0))
    writer = threading.Thread(target=write)
    writer.start()
    steps: list[int] = []
    deadline = time.monotonic() + 300
    try:
        while len(set(steps)) < 20 and time.monotonic() < deadline:
            seen = read_live(path)  # empty: met half written at each look
            if seen:
                assert seen == content(seen["step"])
                steps.append(seen["step"])
    finally:
        enough.set()
        writer.join()
    assert len(set(steps)) == 20
    assert steps == sorted(steps)
    assert read_live(path) == content(written[-1])


def test_files_are_replaced_whole_and_events_survive_a_cut_line(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", json.dumps({"x": 1}))
    write_atomic(tmp_path / "a.json", json.dumps({"x": 2}))
    assert read_json(tmp_path / "a.json") == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    run = make(tmp_path)
    run.add_event(Started(step=0))
    append_line(run.events_path, '{"event": "cut')
    run.add_event(Ended(event="finished", step=1))
    assert [event.event for event in run.events()] == ["created", "started", "finished"]

"""The sheet of `trainer show`, its `next` line for each state, and the table of `trainer ls`."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from tests.checkpoint.test_commit import save
from tests.cli.test_why_causes import ENDED, GONE, states
from tests.runs.test_directory import make
from tests.runs.test_state import ended, launched
from trainer.checkpoint import node_record
from trainer.checkpoint.store import CheckpointStore
from trainer.cli import common, main
from trainer.core.errors import DONE, JOB_FAILED
from trainer.core.files import append_line
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Started, Straggler, Tracking
from trainer.runs.records import BestCheckpoint, HeartbeatRecord

RUNNING = r"trainer logs -f \S+   or   trainer stop \S+"
FAILED = r"trainer logs \S+   or   trainer resume \S+"


def sheet(run: RunDirectory, capsys: pytest.CaptureFixture[str], *options: str, code: int = DONE) -> str:
    assert main(["show", str(run.path), *options]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "following"),
    [
        ("never launched", FAILED),
        ("starting", RUNNING),
        ("running", RUNNING),
        ("stopping", RUNNING),
        ("dead", FAILED),
        ("stopped", FAILED),
        ("finished", r"trainer evaluate \S+   or   trainer resume \S+ trainer\.max_steps=\.\.\."),
    ],
)
def test_the_last_line_names_the_next_commands(
    state: str, following: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    states(run, state)
    text = sheet(run, capsys)
    assert re.search(rf"\n  next         {following}\n$", text), text
    assert "\n  command      trainer fit 'a=b c'\n" in text


def test_a_failure_that_would_come_again_is_fixed_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    launched(run, GONE)
    ended(run, 0, "failed", reason="KeyError: 'x'", mend=True, exit_code=93, step=None, time=ENDED)
    text = sheet(run, capsys)
    assert text.startswith(f"job  {run.id}  failed: KeyError: 'x'\n")
    assert "\n  attempts     0  failed before the first step: KeyError: 'x'\n" in text
    assert re.search(r"\n  next         trainer why \S+   and, after fixing the cause, the command above\n$", text)


def test_the_sheet_of_a_running_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    launched(run, os.getpid())
    run.add_event(Started(attempt=0, step=0, world_size=2))
    run.add_event(Straggler(attempt=0, rank=1, host="node7", reason="rank 1 is slow"))
    run.add_event(Tracking(id="x", mode="offline", source="WANDB_MODE", project="p", dir="/w"))
    append_line(run.metrics_path, json.dumps({"step": 5, "epoch": 0, "time": 0, "train/loss": 0.123456}))
    best = BestCheckpoint(metric="val/acc", mode="max", value=0.91234, step=4)
    run.write_heartbeat(0, HeartbeatRecord(time=time.time(), step=6, epoch=1, phase="train", max_steps=10, best=best))
    lines = sheet(run, capsys).splitlines()
    for line in (
        "  step         6 of 10, epoch 1",
        "  best         val/acc 0.9123 at step 4",
        "  tracking     W&B offline (WANDB_MODE), project p, in /w",
        "  stragglers   rank 1 is slow",
        "  metrics      train/loss  0.1235",
    ):
        assert line in lines, lines
    assert any(re.fullmatch(r"  runs on      \d+ ranks?, ddp, local", line) for line in lines)


def test_verify_finds_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    launched(run, GONE)
    store = CheckpointStore(run.checkpoints_dir)
    save(store, 4)
    save(store, 8)
    (run.checkpoints_dir / "step-00000012").mkdir()
    text = sheet(run, capsys)
    assert len(re.findall(r"step \d+ .*  complete\n", text)) == 2
    assert re.search(r"step 12 .*incomplete\n", text)
    text = sheet(run, capsys, "--verify", code=JOB_FAILED)  # step 12 is damaged, too
    assert len(re.findall(r"checksums match\n", text)) == 2
    file = next(path for path in store.path(8).iterdir() if path.is_file() and path.name != "COMMIT")
    file.write_bytes(bytes(reversed(file.read_bytes())) + b"x")
    assert re.search(r"step 8 .*DAMAGED: ", sheet(run, capsys, "--verify", code=JOB_FAILED))


def test_ls_lists_states_and_skips_what_is_damaged(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["ls"]) == DONE
    assert re.fullmatch(r"no runs in .*; start one with trainer fit\n", capsys.readouterr().out)
    runs = [make(workdir, name) for name in ("first", "second", "third")]
    states(runs[0], "finished")
    states(runs[1], "running")
    runs[2].config_path.write_text("{")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["ls"]) == DONE
    output = capsys.readouterr()
    assert output.out.split()[:4] == ["ID", "NAME", "STATE", "STEP"]
    assert [line.split()[1:3] for line in output.out.splitlines()[1:]] == [["second", "running"], ["first", "finished"]]
    assert output.err.startswith(f"trainer: skipped {runs[2].path.name}: ")
    assert main(["ls", "--state", "finished", "--json"]) == DONE
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["first"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (common.duration(45), "45s"),
        (common.duration(200), "3m"),
        (common.duration(5 * 3600 + 1), "5h"),
        (common.duration(2.5 * 86400), "2d"),
        (common.age(None), ""),
        (common.size(None), ""),
        (common.size(999), "999 B"),
        (common.size(648_000), "648 kB"),
        (common.size(1_234_000_000), "1.23 GB"),
        (common.size(5 * 10**15), "5,000 TB"),
        (common.number(0.000123456), "0.0001235"),
        (common.number("nan"), "nan"),
        (common.number(None), ""),
    ],
)
def test_times_sizes_and_numbers(shown: str, expected: str) -> None:
    assert shown == expected


def test_columns_that_do_not_fit_are_dropped_from_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, header = [["a1", "first", "x" * 30], ["b2", "second", "y"]], ["ID", "NAME", "REST"]
    monkeypatch.setenv("COLUMNS", "80")
    assert common.table(rows, header).splitlines() == [
        "ID  NAME    REST",
        f"a1  first   {'x' * 30}",
        "b2  second  y",
    ]
    monkeypatch.setenv("COLUMNS", "20")
    assert common.table(rows, header).splitlines() == ["ID  NAME", "a1  first", "b2  second"]


def test_checkpoints_on_the_disks_of_several_nodes_are_listed_from_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, disk = make(tmp_path), tmp_path / "disk"
    config = run.config()
    config["checkpoint"] = {"local_dir": str(disk)}
    run.config_path.write_text(json.dumps(config))
    node_record.write(run.checkpoints_dir, [f"gpu{number}" for number in range(6)], {"step-00000040": range(6)})
    save(CheckpointStore(run.checkpoints_dir), 30)
    lines = sheet(run, capsys).splitlines()
    assert any(line.endswith("complete, node-local: gpu0, gpu1, gpu2, gpu3 and 2 more") for line in lines), lines
    (shared, elsewhere) = json.loads(sheet(run, capsys, "--json", "--verify"))["checkpoints"]
    assert (shared["step"], shared["nodes"], shared["verified"]) == (30, [], True)
    assert [one["host"] for one in elsewhere["nodes"]] == [f"gpu{number}" for number in range(6)]
    assert (elsewhere["committed"], elsewhere["here"], elsewhere["verified"]) == (True, False, None)

    part = CheckpointStore(disk / run.path.name / "node-3")  # this machine is one of the nodes
    save(part, 40)
    here = json.loads(sheet(run, capsys, "--json", "--verify"))["checkpoints"][1]
    assert (here["path"], here["here"], here["verified"]) == (str(part.path(40)), True, True)
    (part.path(40) / "state.pt").write_bytes(b"abcdeX")
    text = sheet(run, capsys, "--verify", code=JOB_FAILED)
    assert "DAMAGED: state.pt: checksum differs, node-local: gpu0" in text


@pytest.mark.parametrize("content", ["", "[]", '{"hosts": 3}', '{"checkpoints": {"../x": [0], "step-00000001": [9]}}'])
def test_a_damaged_record_of_nodes_hides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    run = make(tmp_path)
    run.config_path.write_text(json.dumps({**run.config(), "checkpoint": {"local_dir": str(tmp_path / "disk")}}))
    save(CheckpointStore(run.checkpoints_dir), 30)
    (run.checkpoints_dir / node_record.RECORD).write_text(content)
    assert "step 30" in sheet(run, capsys)
    assert "../x" not in sheet(run, capsys, "--json")

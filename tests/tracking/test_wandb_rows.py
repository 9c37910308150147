"""Which rows reach W&B: each once, in order, whatever was lost, with and without a server that rewinds a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment
from tests.tracking.wandb_server import ServedRun, WandbServer
from trainer.runs.directory import RunDirectory
from trainer.tracking.upload import upload
from trainer.tracking.wandb_rows import OneCurve, Sent
from trainer.tracking.wandb_segment import last_row

ATTEMPTS = Path(__file__).with_name("wandb_attempts.py")


@dataclass(frozen=True)
class Attempts:
    """Starts attempts through the process of wandb_attempts.py."""

    process: subprocess.Popen[str]

    def __call__(
        self, run: RunDirectory, begin: int, end: int, dies: str, server: WandbServer, mode: str = "online"
    ) -> None:
        """Make one attempt in a process of its own.

        `dies`: "at once", or "slowly": the client has had the time to send its rows, which it does every 15 s.
        """
        seen, code, log = (run.path / name for name in ("seen", "code", "log"))
        for path in (seen, code, log):
            path.unlink(missing_ok=True)
        home = str(run.path.parent)
        environment = {**clean_environment(), "HOME": home, **server.environment(), "WANDB_MODE": mode}
        paths = {"run": str(run.path), "cwd": home, "code": str(code), "log": str(log)}
        job = {**paths, "begin": begin, "end": end, "dies": dies, "environment": environment}
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(job)}\n")
        self.process.stdin.flush()
        while not code.exists():
            assert self.process.poll() is None
            if any(row.get("own") == -end for one in list(server.runs.values()) for row in one.history):
                seen.touch()
            time.sleep(0.1)
        assert code.read_text() == ("-9" if dies else "0"), log.read_text()


@pytest.fixture(scope="module")
def attempt() -> Iterator[Attempts]:
    with subprocess.Popen([sys.executable, str(ATTEMPTS)], stdin=subprocess.PIPE, text=True) as process:
        yield Attempts(process)


def check_one_curve(served: ServedRun, run: RunDirectory, keeps_own: bool = True) -> None:
    """Every line of metrics.jsonl once, the user's own row of each step at most once, and steps that only rise.

    `keeps_own`: the user's own rows are all there; what a client that was killed has not sent is in no other file.
    """
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    values: list[tuple[int, str, Any]] = [
        (row["trainer/global_step"], name, row[name]) for row in served.history for name in row if name in NAMES
    ]
    expected = {(line["step"], name): line[name] for line in lines for name in line if name in NAMES}
    steps = [step for step, _, _ in values]
    assert steps == sorted(steps)
    assert {(step, name): value for step, name, value in values if name != "own"} == pytest.approx(expected)
    assert len(values) == len({(step, name) for step, name, _ in values}), "a value was sent twice"
    own = [step for step, name, _ in values if name == "own"]
    if keeps_own:
        assert own == list(range(1, lines[-1]["step"] + 1))
    numbers = [row["_step"] for row in served.history]
    assert numbers == sorted(set(numbers))


NAMES = ("loss", "acc", "own")
KILLED = ((0, 17, "slowly"), (10, 27, "at once"), (20, 23, "at once"), (20, 36, "slowly"), (30, 33, "at once"))
"""First step, last step, and whether the client had time to send its rows."""


def new_run(folder: Path) -> RunDirectory:
    run = RunDirectory(folder / "runs" / "digits-abcd1234")
    run.path.mkdir(parents=True)
    return run


def killed_five_times(attempt: Attempts, folder: Path, server: WandbServer) -> RunDirectory:
    run = new_run(folder)
    for begin, end, dies in KILLED:
        attempt(run, begin, end, dies, server)
    attempt(run, 30, 45, "", server)
    return run


def test_killed_five_times_online(attempt: Attempts, tmp_path: Path) -> None:
    with WandbServer() as appends, WandbServer(rewinds=True) as rewinds, ThreadPoolExecutor() as pool:
        names = {"appends": appends, "rewinds": rewinds}
        runs = {
            name: pool.submit(killed_five_times, attempt, tmp_path / name, server) for name, server in names.items()
        }
        for name, server in names.items():
            run = runs[name].result()
            (served,) = server.runs.values()
            check_one_curve(served, run, keeps_own=False)
            assert bool(served.rewound_to) == server.rewinds
            record = run.wandb()
            assert record is not None
            assert (record.id, record.entity, record.rewinds) == ("abcd1234", "somebody", server.rewinds)
            assert server.unknown == []


def test_killed_offline_and_uploaded(attempt: Attempts, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with WandbServer() as server:
        for begin, end, dies in KILLED:
            attempt(run, begin, end, dies, server, "offline")
        attempt(run, 30, 40, "", server, "offline")
        assert not server.requests
        # The next attempt is online: the earlier rows are uploaded first.
        attempt(run, 40, 45, "", server)
        (served,) = server.runs.values()
        check_one_curve(served, run, keeps_own=False)
        assert server.unknown == []


def test_online_offline_and_online_again(attempt: Attempts, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with WandbServer() as server:
        attempt(run, 0, 12, "slowly", server)
        attempt(run, 10, 23, "slowly", server, "offline")
        attempt(run, 20, 30, "", server)
        (served,) = server.runs.values()
        check_one_curve(served, run)


def test_a_run_that_the_server_has_lost_is_sent_again(attempt: Attempts, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with WandbServer() as server:
        attempt(run, 0, 10, "", server)
        server.runs.clear()
        attempt(run, 10, 20, "", server)
        (served,) = server.runs.values()
        losses = [row["trainer/global_step"] for row in served.history if "loss" in row]
        assert losses == list(range(1, 21))


def test_the_last_row_of_a_segment_is_that_of_wandbs_own_reader(attempt: Attempts, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with WandbServer() as server:
        attempt(run, 0, 3000, "", server, "offline")
    (path,) = run.wandb_dir.glob("offline-run-*/*.wandb")
    assert path.stat().st_size > 1024**2  # more than is read at once
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean_environment(), check=True)
    records = [json.loads(line) for line in said.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert last_row(path) == int(rows[-1]["_step"]) == 6299
    # A client that was killed leaves a torn end, or a header only.
    os.truncate(path, path.stat().st_size - 100_000)
    number = last_row(path)
    assert number is not None
    assert 0 < number < 6299
    os.truncate(path, 7)
    assert last_row(path) == -1
    assert last_row(path.with_name("missing")) is None
    assert upload(run).uploaded == 0


class Client:
    """Stands for wandb's Run: keeps what it is told to log."""

    def __init__(self, folder: Path, starting_step: int) -> None:
        self.id, self.starting_step, self.rows = "abcd1234", starting_step, []  # type: ignore[var-annotated]
        self.settings = type("Settings", (), {"sync_dir": str(folder)})

    def log(self, data: dict[str, Any], commit: bool | None = None, **more: Any) -> None:
        self.rows.append(data["trainer/global_step"])


def lines_to(last: int) -> Callable[[int], list[dict[str, Any]]]:
    return lambda step: [{"step": number, "time": 0.0, "loss": 1.0} for number in range(step + 1, last + 1)]


@pytest.mark.parametrize(("ended_well", "logged"), [(True, [5, 6, 7, 8]), (False, [7, 8])])
def test_rows_of_somebody_else_are_not_taken_for_those_of_a_crashed_machine(
    tmp_path: Path, ended_well: bool, logged: list[int]
) -> None:
    """The server has two rows more than the file: of a script that adds to the W&B run, or lost with the machine."""
    path, step = tmp_path / "rows.jsonl", 0
    first = OneCurve(Client(tmp_path, 0), path, "online", lambda: step)
    for step in range(1, 5):
        first.log({"loss": 1.0, "trainer/global_step": step})
    first.close()
    client = Client(tmp_path, 6)
    sent = Sent.read(path)
    second = OneCurve(client, path, "online", lambda: step)
    second.continue_from(sent, 4, lines_to(4), ended_well=ended_well)
    for step in range(5, 9):
        second.log({"loss": 1.0, "trainer/global_step": step})
    second.close()
    assert client.rows == logged


def test_an_attempt_that_was_told_not_to_log_is_not_made_up_for(tmp_path: Path) -> None:
    path, step = tmp_path / "rows.jsonl", 0
    first = OneCurve(Client(tmp_path, 0), path, "online", lambda: step)
    for step in range(1, 5):
        first.log({"loss": 1.0, "trainer/global_step": step})
    first.close()
    client = Client(tmp_path, 2)  # the server has got two of the four
    sent = Sent.read(path)
    third = OneCurve(client, path, "online", lambda: step)
    third.continue_from(sent, 8, lines_to(8), only_sent=True)
    third.close()
    assert client.rows == [3, 4]


def test_a_validation_that_was_lost_behind_the_training_metrics_of_its_step_is_made_up_for(tmp_path: Path) -> None:
    """A killed process: W&B has got one of the two rows of step 4, which are one line of metrics.jsonl."""
    path, step = tmp_path / "rows.jsonl", 4
    first = OneCurve(Client(tmp_path, 0), path, "online", lambda: step)
    first.log({"train/loss": 1.0, "trainer/global_step": step})
    first.log({"val/loss": 2.0, "val/acc": 0.5, "trainer/global_step": step})
    first.close()
    for has, missing in ((1, {"val/loss": 2.0, "val/acc": 0.5, "trainer/global_step": 4}), (2, None)):
        sent: list[dict[str, Any]] = []
        client = Client(tmp_path, has)
        client.log = lambda data, sent=sent, **more: sent.append(data)  # type: ignore[method-assign]
        second = OneCurve(client, tmp_path / f"{has}.jsonl", "online", lambda: step)
        line = {"step": 4, "time": 0.0, "train/loss": 1.0, "val/loss": 2.0, "val/acc": 0.5}
        second.continue_from(Sent.read(path), 4, lambda after, line=line: [line] if after < 4 else [])
        second.close()
        assert sent == ([missing] if missing else [])

"""The follower, in a process of its own as the command line runs it, on a pipe and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from io import StringIO
from pathlib import Path

import pytest

from tests.supervise.test_node import end_of, environment, has_step, make_run, wait_until
from trainer.core import processes
from trainer.launch.follow import Follower
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome, Outcome
from trainer.runtime.attempt import Attempt
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank

PROGRAM = """
import sys
from pathlib import Path
from trainer.launch.follow import follow
from trainer.launch.local import LocalLauncher
from trainer.runs.directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
detached = "--detached" in sys.argv
LocalLauncher(detached).launch(run)
sys.exit(follow(run, detached_ok=detached))
"""

pytestmark = pytest.mark.usefixtures("no_orphans")


def start(run: RunDirectory, scenario: str, *arguments: str, stdout: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run.path), *arguments],
        env=environment(scenario),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run: RunDirectory) -> list[int]:
    """Wait until it trains; returns its processes."""
    wait_until(lambda: has_step(run))
    pid = run.launch().pid
    assert pid is not None
    return [pid, *processes.descendants(pid)]


def assert_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(processes.is_alive(pid) for pid in pids))


def test_a_pipe_gets_the_log_and_what_to_type_next(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "finish")
    said, _ = follower.communicate(timeout=300)
    assert follower.returncode == 0
    lines = said.splitlines()
    assert "step 1/50" in lines
    assert "WARNING: something to see" in lines
    assert "\x1b" not in said
    assert any(line.startswith("finished at step 1 after 0:") for line in lines)
    assert "  best    val/acc 0.875 at step 1" in lines
    assert "  run     runs/stand-in-abcdefgh" in lines
    assert lines[-1].endswith("trainer show abcdefgh")


def test_a_failure_is_told_once_and_its_traceback_stays_in_the_log(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "raise_on_rank_1")
    said, _ = follower.communicate(timeout=300)
    assert follower.returncode == 1
    assert said.count("ValueError: the loss is not a number") == 1
    assert re.search(r"^failed at step 0 after 0:\d\d: ValueError: the loss is not a number$", said, re.M)
    assert "runs/stand-in-abcdefgh/logs/attempt-00/rank-1.log" in said
    assert said.splitlines()[-1].endswith("trainer resume abcdefgh")


def test_a_restart_is_told_with_its_cause(workdir: Path) -> None:
    run = make_run(workdir, max_restarts=1)
    follower = start(run, "fail_once")
    said, _ = follower.communicate(timeout=300)
    assert follower.returncode == 0
    assert "attempt 0 died: ValueError: only the first time; restarting as attempt 1" in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_cleanly(workdir: Path, signum: int) -> None:
    run = make_run(workdir)
    follower = start(run, "train")
    pids = wait_for_step(run)
    follower.send_signal(signum)
    said, _ = follower.communicate(timeout=300)
    assert follower.returncode == 130
    assert "stopping: saving a checkpoint first" in said
    assert end_of(run).outcome == "stopped"
    assert [event.event for event in run.events()] == ["stop_requested", "stopped"]
    assert_gone(pids)


def test_a_second_ctrl_c_kills(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "hear_nothing")
    pids = wait_for_step(run)
    follower.send_signal(signal.SIGINT)
    wait_until(run.stop_request.exists)
    follower.send_signal(signal.SIGINT)
    said, _ = follower.communicate(timeout=300)
    assert follower.returncode == 130
    assert "killing the run" in said
    assert "killed by a second Ctrl-C" in end_of(run).reason
    assert_gone(pids)


def test_a_run_that_is_killed_is_told_as_dead(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "train")
    pids = wait_for_step(run)
    os.kill(pids[0], signal.SIGKILL)
    said, _ = follower.communicate(timeout=300)
    assert follower.returncode == 1
    assert "died at step" in said
    assert "trainer resume abcdefgh" in said
    assert_gone(pids)


def test_the_run_saves_and_ends_when_its_follower_is_killed(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "train")
    pids = wait_for_step(run)
    follower.kill()
    follower.communicate(timeout=300)
    assert_gone(pids)
    assert end_of(run).outcome == "stopped"
    assert "was killed" in run.stop_request.read_text()


def test_a_detached_follower_leaves_the_run_alone(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "train", "--detached")
    pids = wait_for_step(run)
    follower.send_signal(signal.SIGINT)
    wait_until(lambda: follower.poll() is not None)
    said, _ = follower.communicate()
    assert "no longer following; the run continues" in said
    assert all(processes.is_alive(pid) for pid in pids)
    assert not run.stop_request.exists()
    processes.send(pids[0], signal.SIGTERM)
    assert_gone(pids)


def read_terminal(descriptor: int, until: str, timeout_s: float = 300) -> str:
    """What a terminal was shown, until it has shown `until` or its other side is closed."""
    os.set_blocking(descriptor, False)
    shown, deadline = "", time.monotonic() + timeout_s
    while until not in shown:
        assert time.monotonic() < deadline, shown[-2000:]
        try:
            shown += os.read(descriptor, 65536).decode()
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # closed: EIO
            break
    return shown


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_gets_one_live_line(workdir: Path, columns: int) -> None:
    run = make_run(workdir)
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    follower = start(run, "train", stdout=terminal)
    os.close(terminal)
    shown = read_terminal(reader, "1,234 samples/s" if columns == 100 else "loss")
    follower.send_signal(signal.SIGINT)
    shown += read_terminal(reader, "trainer resume abcdefgh")
    assert follower.wait(300) == 130
    os.close(reader)
    live = [part for part in shown.replace("\r\n", "\n").split("\r\x1b[K") if part.startswith(("step", "━", "─"))]
    assert len(live) > 2
    assert all(len(part.partition("\n")[0]) < columns for part in live)
    assert ("━" in shown or "─" in shown) == (columns == 100)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


ENDS = {
    "finished": ({}, "finished at step 7 after 0:00"),
    "stopped": ({"reason": "stop requested"}, "stopped at step 7 after 0:00: stop requested"),
    "requeue": ({"reason": "preempted"}, "checkpoint saved for requeueing at step 7 after 0:00: preempted"),
    "failed": (
        {"reason": "a checkpoint\n  warning: disk"},
        "failed at step 7 after 0:00: a checkpoint\n  warning: disk",
    ),
    "hung": ({"reason": "no progress"}, "hung at step 7 after 0:00: no progress"),
}


@pytest.mark.parametrize("where", [StringIO, Terminal])
@pytest.mark.parametrize("outcome", ENDS)
def test_an_end_is_told_once(
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
    where: type[StringIO],
) -> None:
    """The rank logs it as well: `trainer logs` prints that, and a follower does not repeat it."""
    run = make_run(workdir)
    run.attempt_logs(0).mkdir(parents=True)
    fields, said = ENDS[outcome]
    place = Rank(0, 0, 1, 1, 0)
    heartbeat = Heartbeat(run, place)
    heartbeat.step = 7
    Attempt(run, place, heartbeat).end(outcome, 0, fields.get("reason", ""))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{outcome} at step 7")
    run.rank_log(0, 0).write_text(f"warning: before\n{printed}warning: {outcome} at step 7\n")
    monkeypatch.setattr(Follower, "_show_bar", lambda self: None)
    stream = where()
    follower = Follower(run, stream)
    follower.show()
    follower.conclude()
    lines = re.sub("^  [|].*\n", "", stream.getvalue(), flags=re.M)
    assert lines.startswith(f"warning: before\nwarning: {outcome} at step 7\n{said}\n")
    assert stream.getvalue().count(f"{outcome} at step 7:") <= 1


def test_a_requeue_is_told_once(workdir: Path) -> None:
    run = make_run(workdir)
    for attempt in (0, 1):
        run.attempt_logs(attempt).mkdir(parents=True)
    end = AttemptOutcome(attempt=0, outcome="requeue", reason="preempted", step=7)
    stream = StringIO()
    follower = Follower(run, stream)
    follower._attempt = 0
    run.write_outcome(end)
    run.rank_log(0, 0).write_text(f"step 7\n{end.log_line}\n")
    follower.show()
    assert stream.getvalue() == "step 7\nattempt 0 ended at step 7: preempted; resuming as attempt 1\n"

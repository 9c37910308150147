"""The follower, in a process of its own as the command line runs it, on a pipe and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.supervise.test_node import end_of, environment, has_step, make_run, wait_until
from trainer.core import processes
from trainer.runs.directory import RunDirectory

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
    wait_until(lambda: not any(processes.is_alive(pid) for pid in pids), 60)


def test_a_pipe_gets_the_log_and_what_to_type_next(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "finish")
    said, _ = follower.communicate(timeout=60)
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
    said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert said.count("ValueError: the loss is not a number") == 1
    assert "failed: ValueError: the loss is not a number" in said
    assert "runs/stand-in-abcdefgh/logs/attempt-00/rank-1.log" in said
    assert said.splitlines()[-1].endswith("trainer resume abcdefgh")


def test_a_restart_is_told_with_its_cause(workdir: Path) -> None:
    run = make_run(workdir, max_restarts=1)
    follower = start(run, "fail_once")
    said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert "attempt 0 died: ValueError: only the first time; restarting as attempt 1" in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_cleanly(workdir: Path, signum: int) -> None:
    run = make_run(workdir)
    follower = start(run, "train")
    pids = wait_for_step(run)
    follower.send_signal(signum)
    said, _ = follower.communicate(timeout=60)
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
    said, _ = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert "killing the run" in said
    assert "killed by a second Ctrl-C" in end_of(run).reason
    assert_gone(pids)


def test_a_run_that_is_killed_is_told_as_dead(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "train")
    pids = wait_for_step(run)
    os.kill(pids[0], signal.SIGKILL)
    said, _ = follower.communicate(timeout=30)
    assert follower.returncode == 1
    assert "died at step" in said
    assert "trainer resume abcdefgh" in said
    assert_gone(pids)


def test_the_run_saves_and_ends_when_its_follower_is_killed(workdir: Path) -> None:
    run = make_run(workdir)
    follower = start(run, "train")
    pids = wait_for_step(run)
    follower.kill()
    follower.communicate(timeout=30)
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


def read_terminal(descriptor: int, until: str, timeout_s: float = 40) -> str:
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
    assert follower.wait(30) == 130
    os.close(reader)
    live = [part for part in shown.replace("\r\n", "\n").split("\r\x1b[K") if part.startswith(("step", "━", "─"))]
    assert len(live) > 2
    assert all(len(part.partition("\n")[0]) < columns for part in live)
    assert ("━" in shown or "─" in shown) == (columns == 100)

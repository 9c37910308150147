"""The fork server around the real torchrun: what a rank finds, and who ends with whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment
from tests.supervise.test_node import wait_until
from trainer.config.shape import LaunchShape
from trainer.core import processes
from trainer.supervise import agent, rank_environment, torchrun
from trainer.supervise.rendezvous import Place

RANK = Path(__file__).with_name("forked_rank.py")


def start(folder: Path, preload: str = "json", worker: list[str] | None = None) -> subprocess.Popen[bytes]:
    """torchrun of two ranks, which restarts them once; its output in `folder/log`."""
    shape = LaunchShape(1, 2, "cpu")
    # A Python outside of the virtual environment (PYTHON_EXEC) needs the path of the packages as well.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    inherited = {**clean_environment(), "PYTHONPATH": os.pathsep.join([str(RANK.parent), str(folder), *packages])}
    variables = rank_environment.environment(
        inherited, rank_environment.Interpreter(code_dir=folder, preload=preload), shape, Place(), attempt=0
    )
    arguments = torchrun.command(folder, "test", shape, Place(), max_restarts=1, worker=worker or [str(RANK)])
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    stdout = os.dup(1)
    stderr = os.dup(2)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        return torchrun.start(arguments, variables)
    finally:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for descriptor in (log, stdout, stderr):
            os.close(descriptor)


def reports(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What each rank of each attempt wrote of itself."""
    return {
        (found["attempt"], found["rank"]): found
        for found in (json.loads(path.read_text()) for path in folder.glob("report-*.json"))
    }


@pytest.mark.parametrize("as_module", [False, pytest.param(True, marks=pytest.mark.executed)])
def test_a_forked_rank_is_what_its_command_line_says_and_torchrun_starts_it_again(
    tmp_path: Path, as_module: bool
) -> None:
    (tmp_path / "imported_slowly.py").write_text("import time\n\ntime.sleep(0.2)\n")
    child = start(tmp_path, "imported_slowly", worker=["-m", "forked_rank"] if as_module else None)
    server = child.pid
    assert child.wait(180) == 0, (tmp_path / "log").read_text()
    found = reports(tmp_path)
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (attempt, rank), report in found.items():
        assert report["parent"] == server
        assert report["name"] == "__main__"
        assert report["spec"] == ("forked_rank" if as_module else None)
        assert report["argv"] == [str(RANK), str(tmp_path)]
        assert report["environment"] == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        assert report["comm"] == f"rank {rank}"
        assert report["session"] == report["pid"]
        assert report["preloaded"]
        assert report["preload_variable"] is None
        assert (float(report["import_s"]) > 0.1) is (attempt == 0)
        assert report["signals"] == {"SIGCHLD": "SIG_DFL", "SIGTERM": "SIG_IGN", "SIGINT": "SIG_IGN"}
        assert report["rank_zero_only"] == rank
        assert report["descriptors"] == [0, 1, 2]
    assert len({report["random"] for report in found.values()}) == len(found), "two ranks draw the same numbers"
    log = (tmp_path / "log").read_text()
    assert "(exitcode: 7)" in log
    assert log.count("at the end of") == 4, "a rank did not come to its atexit handlers"
    unflushed = [path.read_text() for path in tmp_path.glob("unflushed-*")]
    assert unflushed == ["whole"] * 4, "a rank lost what was in the buffer of an open file"


@pytest.mark.parametrize("victim", ["server", "torchrun"])
def test_without_torchrun_or_the_server_no_process_is_left(tmp_path: Path, victim: str) -> None:
    (tmp_path / "stay").touch()
    child = start(tmp_path)
    wait_until(lambda: len(reports(tmp_path)) == 2)
    ranks = torchrun.workers(child.pid)
    (alone,) = set(processes.children(child.pid)) - set(ranks)
    assert sorted(ranks) == sorted(report["pid"] for report in reports(tmp_path).values())
    os.kill(child.pid if victim == "server" else alone, signal.SIGKILL)
    assert child.wait(300) == -signal.SIGKILL
    wait_until(lambda: not any(processes.is_alive(pid) for pid in [alone, *ranks]))


def test_a_rank_killed_is_known_by_its_signal_and_the_other_is_ended(tmp_path: Path) -> None:
    (tmp_path / "stay").touch()
    child = start(tmp_path)
    wait_until(lambda: len(reports(tmp_path)) == 2)
    os.kill(reports(tmp_path)[0, 1]["pid"], signal.SIGKILL)
    assert child.wait(180) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "(exitcode: -9)" in log
    assert "closing signal SIGTERM" in log
    assert sorted(reports(tmp_path)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.executed
def test_what_cannot_be_imported_is_left_to_the_ranks(tmp_path: Path) -> None:
    child = start(tmp_path, preload="no_such_module_anywhere")
    assert child.wait(180) == 0, (tmp_path / "log").read_text()
    assert "each rank imports torch for itself: ModuleNotFoundError" in (tmp_path / "log").read_text()
    assert not any(report["preloaded"] for report in reports(tmp_path).values())


def test_a_process_with_a_gpu_in_use_is_not_forked(tmp_path: Path) -> None:
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "3").symlink_to("/dev/nvidiactl")  # what asking NVML for the number of GPUs leaves open
    (tmp_path / "fd" / "4").symlink_to("socket:[1234]")
    assert agent.cannot_fork(tmp_path) is None
    (tmp_path / "fd" / "5").symlink_to("/dev/nvidia-uvm")
    assert agent.cannot_fork(tmp_path) == "importing opened /dev/nvidia-uvm"


@pytest.mark.executed
def test_importing_what_a_rank_needs_leaves_a_process_that_can_be_forked_and_a_thread_does_not(tmp_path: Path) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    program = """
from trainer.supervise import agent, entry
for module in (entry.PRELOAD, "trainer.train.evaluate", "trainer.train.predict"):
    assert (found := agent._import_all(module)) is None, (module, found)
assert agent._import_all("starts_a_thread") == "importing started a thread"
"""
    variables = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=variables, timeout=180)


@pytest.mark.executed
def test_another_interpreter_is_started_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's own way to another Python; its ranks, too, are the server's children."""
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHON_EXEC", str(other))
    monkeypatch.setenv("PYTHONHOME", sys.base_prefix)
    child = start(tmp_path)
    assert child.wait(180) == 0, (tmp_path / "log").read_text()
    found = reports(tmp_path)
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert not any(report["preloaded"] for report in found.values())
    assert {report["parent"] for report in found.values()} == {child.pid}

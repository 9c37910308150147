"""A real SLURM for the tests marked slurm: one testbed for the session of a test process, emptied between tests."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import clean_environment

TESTBED = Path(__file__).parents[2] / "slurm" / "testbed" / "testbed"


class Testbed:
    """The commands of a cluster that is up."""

    __test__ = False

    def __init__(self, settings: dict[str, str]) -> None:
        self._settings = settings
        self.conf = self("env").stdout.strip().removeprefix("export SLURM_CONF=")

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`testbed VERB ...`; raises CalledProcessError with its output when it fails."""
        return self._run([str(TESTBED), *arguments], {**clean_environment(), **self._settings})

    def slurm(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return self._run(list(command), {**clean_environment(), "SLURM_CONF": self.conf}).stdout

    def empty(self) -> None:
        """Cancel every job, wait until they are gone, bring every node back."""
        self.slurm("scancel", "--user=root", "--state=PENDING")
        self.slurm("scancel", "--user=root")
        wait_until(lambda: not self.slurm("squeue", "--noheader"), timeout_s=30)
        for line in self.slurm("sinfo", "-hN", "-p", "main", "-o", "%N %T").splitlines():
            node, state = line.split()
            if state.startswith("down"):
                self("boot", node)
            elif state != "idle":
                self.slurm("scontrol", "update", f"nodename={node}", "state=resume")

    @staticmethod
    def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done


def wait_until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """What `condition` returns, once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {timeout_s} s"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="session")
def running_testbed(worker_number: int) -> Iterator[Testbed]:
    settings = {"TESTBED_INSTANCE": str(50 + worker_number), "TESTBED_KILL_WAIT_S": "20"}
    environment = {**clean_environment(), **settings}
    subprocess.run([TESTBED, "up"], env=environment, stdin=subprocess.DEVNULL, timeout=120, check=True)
    try:
        yield Testbed(settings)
    finally:
        subprocess.run([TESTBED, "down"], env=environment, stdin=subprocess.DEVNULL, timeout=60, check=True)


@pytest.fixture(scope="session")
def worker_number() -> int:
    """Which of pytest-xdist's processes this is; 0 without it."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture
def testbed(running_testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Testbed]:
    """An empty cluster of two nodes, to which this process's SLURM commands talk."""
    monkeypatch.setenv("SLURM_CONF", running_testbed.conf)
    yield running_testbed
    running_testbed.empty()

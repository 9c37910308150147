"""A real SLURM for the tests marked slurm: one testbed for the session of a test process, emptied between tests."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MARK, TrainerCli, clean_environment

TESTBED = Path(__file__).parents[2] / "slurm" / "testbed" / "testbed"
NODES = 4
"""Two more than the jobs need: what is lost can be replaced, and left out afterwards."""
PARTITIONS = """
AccountingStorageEnforce=associations,limits,qos
PartitionName=short Nodes=node[0-1] MaxTime=00:10:00 MaxNodes=1 PriorityTier=10
PartitionName=gpu Nodes=ALL MaxTime=1-00:00:00
PartitionName=closed Nodes=ALL State=DOWN
PartitionName=private Nodes=ALL AllowAccounts=others
"""
SETTINGS = {
    "TESTBED_NODES": str(NODES),
    "TESTBED_KILL_WAIT_S": "20",
    "TESTBED_NODE_TIMEOUT_S": "5",
    "TESTBED_SLURM_CONF": PARTITIONS,
}
ACCOUNTING = (
    "add account physics description=x organization=x",
    "add account others description=x organization=x",
    "add qos single set MaxTRESPerUser=node=1",
    "add user root account=physics defaultaccount=physics",
    "modify user root set qos=normal,single",
)
"""What sacctmgr is told: the tests' user may charge one account, and one QOS lets it have a single node."""
HARMLESS = ("env", "exec", "status")
"""Verbs of the testbed after which its nodes need not be brought back."""


class Testbed:
    """The commands of a cluster that is up."""

    __test__ = False

    def __init__(self, settings: dict[str, str]) -> None:
        # Without the mark of a test: what is started here belongs to the cluster.
        self._environment = {name: value for name, value in clean_environment().items() if name != MARK} | settings
        self.host = f"10.77.{settings['TESTBED_INSTANCE']}.1"
        """The address of this machine on the bridge, under which jobs reach it."""
        self.kept: set[str] = set()
        """Jobs that outlive the tests beside which they run."""
        self._harmed = False
        self.conf = self("env").stdout.strip().removeprefix("export SLURM_CONF=")

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`testbed VERB ...`; raises AssertionError with its output when it fails."""
        self._harmed |= arguments[0] not in HARMLESS
        return self._run([str(TESTBED), *arguments], self._environment)

    def slurm(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return self._run(list(command), {**self._environment, "SLURM_CONF": self.conf}).stdout

    def empty(self) -> None:
        """Cancel every job, wait until they are gone, bring every node back."""
        if jobs := self.jobs():
            self.slurm("scancel", *jobs)
            wait_until(lambda: not self.jobs(), timeout_s=120)
        if self._harmed or not self._is_whole():
            self.mend()

    def jobs(self) -> set[str]:
        return set(self.slurm("squeue", "--noheader", "--format=%i").split()) - self.kept

    def queue(self) -> str:
        """What tells why a job does not start: jobs, nodes, the end of the controller's log."""
        log = Path(self.slurm("scontrol", "show", "config").partition("SlurmctldLogFile")[2].split()[1])
        return "\n".join(
            [self.slurm("scontrol", "show", "job"), self.slurm("sinfo", "-N", "-l"), log.read_text()[-20000:]]
        )

    def mend(self) -> None:
        """Bring every node back."""
        for number in range(NODES):
            self("heal", f"node{number}") if self._is_up(f"node{number}") else self("boot", f"node{number}")
        wait_until(self._resume_nodes)
        wait_until(self._takes_jobs)
        self._harmed = False

    def _resume_nodes(self) -> bool:
        for node, state in self._states().items():
            if state.startswith(("down", "drain")):
                try:
                    self.slurm("scontrol", "update", f"nodename={node}", "state=resume")
                except AssertionError:  # it has come back by itself since
                    pass
        return self._is_whole()

    def _states(self) -> dict[str, str]:
        lines = self.slurm("sinfo", "-hN", "-p", "main", "-o", "%N %T").splitlines()
        return dict((node, state) for node, state in map(str.split, lines))

    def _is_whole(self) -> bool:
        return not any(re.match(r"down|drain|unk|.*\*", state) for state in self._states().values())

    def _takes_jobs(self) -> bool:
        """Return whether the controller knows its nodes again: after a restart it refuses jobs until they register."""
        environment = {**self._environment, "SLURM_CONF": self.conf}
        command = ["sbatch", "--test-only", f"--nodes={NODES}", "--wrap=true"]
        return subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode == 0

    def _is_up(self, node: str) -> bool:
        return (Path(self.conf).parents[1] / "run" / f"{node}.init").exists()

    @staticmethod
    def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done


def wait_until(condition: Callable[[], Any], timeout_s: float = 300, why: Callable[[], str] = str) -> Any:
    """What `condition` returns, once it is true; `why` gives what is to be read when it never is."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {timeout_s} s\n{why()}"
        time.sleep(0.25)
    return found


@pytest.fixture(scope="session")
def running_testbed(worker_number: int) -> Iterator[Testbed]:
    settings = {"TESTBED_INSTANCE": str(int(os.environ.get("TESTBED_INSTANCE", 50)) + worker_number), **SETTINGS}
    environment = {**clean_environment(), **settings}
    # Takes the cluster down when this process ends, in whatever way: its end of the pipe is closed then.
    guard = subprocess.Popen(
        ["bash", "-c", 'cat >/dev/null; exec "$1" down', "guard", TESTBED],
        env=environment,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        subprocess.run([TESTBED, "up"], env=environment, stdin=subprocess.DEVNULL, timeout=300, check=True)
        testbed = Testbed(settings)
        for line in ACCOUNTING:
            testbed.slurm("sacctmgr", "-i", *line.split())
        yield testbed
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait(300)


@pytest.fixture(scope="session")
def worker_number() -> int:
    """Which of pytest-xdist's processes this is; 0 without it."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture
def testbed(running_testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Testbed]:
    """An empty cluster of four nodes, to which this process's SLURM commands talk."""
    monkeypatch.setenv("SLURM_CONF", running_testbed.conf)
    yield running_testbed
    running_testbed.empty()


@pytest.fixture
def cli(trainer_cli: TrainerCli, testbed: Testbed) -> TrainerCli:
    """The command line in an environment that knows the cluster."""

    def run(*arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        return trainer_cli(*arguments, env={"SLURM_CONF": testbed.conf, **(env or {})}, **options)

    return run


@pytest.fixture(scope="session")
def report(tables: dict[str, list[str]]) -> list[str]:
    """Lines that are printed after the tests."""
    return tables.setdefault("faults on a SLURM cluster", [])

"""Run jobs with injected faults, and compare each with the undisturbed run of its strategy. Imports no torch."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from trainer.core import processes, records
from trainer.core.git import git
from trainer.faultbench.bad_server import bad_server
from trainer.faultbench.cases import CHECKPOINT_EVERY, KINDS, STEPS, Case, draw
from trainer.faultbench.messages import Comparison, Difference
from trainer.runs.directory import RunDirectory
from trainer.runs.lock import RunLock

JOB = (
    "experiment=quickstart",
    "callbacks=sample_log",
    "tracking=none",
    "name=job",
    f"trainer.max_steps={STEPS}",
    "trainer.max_epochs=null",
    "trainer.log_every_n_steps=5",
    "trainer.val_check_interval=10",
    "trainer.limit_val_batches=2",
    "trainer.gradient_clip_norm=1.0",
    f"checkpoint.every_n_steps={CHECKPOINT_EVERY}",
    "checkpoint.keep_last=10",
    "model.dropout=0.1",
    "resources.cpu_processes=2",
    "resources.gpus=0",
    "resilience.agree_every_s=0.01",
    "resilience.hang_factor=5",
    "resilience.hang_after_s=30",
    "resilience.hang_slow_s=60",
)
"""A small network with dropout and gradient clipping: a job takes seconds and uses every part of the state."""
COMMAND_TIMEOUT_S = 300.0
_running: dict[int, Path] = {}
"""Working directory of each running command, by process id."""


@dataclass(frozen=True)
class Result:
    """The result of one case."""

    number: int
    strategy: str
    kind: str
    case: str
    problem: str | None
    """Deviation from the required outcome, or None."""
    attempts: int
    lost_steps: int
    """Number of optimizer steps that were repeated."""
    seconds: float
    """Time from the first command to the end of the run, in seconds."""
    down_s: float
    """`seconds` minus those of the undisturbed run."""
    commit: str = "unknown"
    """Commit of this package."""


class Comparer:
    """A process that has imported torch, used for all comparisons."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            processes.python_module("trainer.faultbench.compare"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def difference(self, ours: Path, theirs: Path, step: int = STEPS) -> str | None:
        """Return the first difference of two runs at a step, or None if they are equal bit for bit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = Comparison(ours=str(ours), theirs=str(theirs), step=step)
        self._process.stdin.write(records.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that compares the runs has died; its error is above")
        return records.loads(Difference, answer, "the answer of the process that compares the runs").difference

    def close(self) -> None:
        """End the process."""
        with self._process:  # closes its pipes
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=30)


class FaultBench:
    """The cases of one seed. Runs are made in `folder`; those that end as required are deleted."""

    def __init__(self, folder: Path, seed: int, strategies: list[str], kinds: list[str]) -> None:
        self.folder, self.seed, self.strategies, self.kinds = folder, seed, strategies, kinds or list(KINDS)
        self._comparer = Comparer()
        self._unharmed: dict[str, tuple[Path, float]] = {}
        self._one_at_a_time = Lock()
        """Guards the comparer and the callback that receives the results."""
        self._commit = _commit_of_this()

    def run(self, numbers: Sequence[int], report: Callable[[Result], None], at_once: int = 1) -> None:
        """Run the cases with these numbers: all kinds in turn, each time with the next strategy.

        The ranks, steps and times of a case are drawn from (seed, number).

        Args:
            numbers: Numbers of the cases.
            report: Called with each result, by one thread at a time.
            at_once: Number of jobs that run in parallel.
        """

        def run_and_report(number: int) -> None:
            result = self.run_one(number, self._strategy(number), self.kinds[number % len(self.kinds)])
            with self._one_at_a_time:
                report(result)

        pool = ThreadPoolExecutor(at_once)
        try:
            strategies = {self._strategy(number) for number in numbers}
            for reference in [pool.submit(self._reference, strategy) for strategy in sorted(strategies)]:
                reference.result()
            for case in [pool.submit(run_and_report, number) for number in numbers]:
                case.result()
        except BaseException:  # Ctrl-C is raised in this thread only
            pool.shutdown(wait=False, cancel_futures=True)
            _kill_running()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.close()

    def _strategy(self, number: int) -> str:
        return self.strategies[(number + number // len(self.kinds)) % len(self.strategies)]

    def close(self) -> None:
        """End the process that compares."""
        self._comparer.close()

    def run_one(self, number: int, strategy: str, kind: str) -> Result:
        """Run one case to its end, and compare it with the undisturbed run of its strategy."""
        choose = random.Random(f"{self.seed} {number} {kind}")
        case = draw(kind, choose)
        reference, reference_s = self._reference(strategy)
        home = self.folder / f"{number:03d}-{kind}-{strategy}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        began = time.monotonic()
        problem = self._harm(case, home, strategy, choose)
        seconds = time.monotonic() - began
        run = _only_run(home)
        if run is not None and problem is None:
            with self._one_at_a_time:
                problem = self._comparer.difference(run.path, reference)
            problem = problem or (case.check(run) if case.check else None)
        attempts = len(run.logged_attempts()) if run else 0
        lost = lost_steps(run) if run else 0
        if problem is None:
            shutil.rmtree(home)
        return Result(
            number,
            strategy,
            kind,
            case.name,
            problem,
            attempts,
            lost,
            round(seconds, 1),
            round(max(0.0, seconds - reference_s), 1),
            self._commit,
        )

    def _reference(self, strategy: str) -> tuple[Path, float]:
        if strategy not in self._unharmed:
            home = self.folder / f"unharmed-{strategy}"
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            began = time.monotonic()
            done = command(["fit", *JOB, f"strategy={strategy}"], home)
            run = _only_run(home)
            if run is None or not is_finished(run):
                raise RuntimeError(f"the undisturbed run of {strategy} did not finish:\n{done.stdout}{done.stderr}")
            self._unharmed[strategy] = (run.path, time.monotonic() - began)
        return self._unharmed[strategy]

    def _harm(self, case: Case, home: Path, strategy: str, choose: random.Random) -> str | None:
        """Run the job with the fault to its end, and return what went wrong on the way, or None."""
        fit = ["fit", *JOB, f"strategy={strategy}", *case.overrides]
        errors = ""
        try:
            if case.second_attempt:
                problem = _fit_beside_another(fit, home)
                if problem:
                    return problem
            else:
                with bad_server(case.server) if case.server else nullcontext() as url:
                    errors = command(fit, home, case.variables | ({"WANDB_BASE_URL": url} if url else {})).stderr
            run = _only_run(home)
            if run is None:
                return f"no run was created: {errors[-300:]}"
            if case.resumes is False or (case.resumes is None and is_finished(run)):
                return None if is_finished(run) else f"it did not finish without a resume: {_last_reason(run)}"
            if case.resumes and is_finished(run):
                return "it finished without a resume, as if there had been no fault"
            if case.between:
                case.between(run, choose)
            resumed = command(["resume"], home)
            output = (resumed.stdout + resumed.stderr)[-300:]
            return None if is_finished(run) else f"it did not finish after a resume: {output}"
        except subprocess.TimeoutExpired:
            return f"hang: a command did not end within {COMMAND_TIMEOUT_S:.0f} s"


def command(
    arguments: list[str], cwd: Path, variables: dict[str, str] | None = None, timeout_s: float = COMMAND_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run `trainer ARGUMENTS`.

    Raises:
        TimeoutExpired: After `timeout_s` seconds; all processes that the command started have been killed.
    """
    process = subprocess.Popen(
        processes.python_module("trainer", *arguments),
        cwd=cwd,
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _running[process.pid] = cwd
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException:
        _kill_node_of(cwd)
        processes.kill_tree(process.pid)
        process.communicate()
        raise
    finally:
        del _running[process.pid]
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _kill_running() -> None:
    """Kill the jobs of all threads."""
    for pid, cwd in list(_running.items()):
        _kill_node_of(cwd)
        processes.kill_tree(pid)


def is_finished(run: RunDirectory) -> bool:
    """Return whether the last attempt of the run finished."""
    ends = run.attempts()
    return bool(ends) and ends[-1].outcome == "finished"


def lost_steps(run: RunDirectory) -> int:
    """Return the number of optimizer steps that rank 0 repeated."""
    begun, distinct = 0, set()
    for path in sorted((run.path / "samples").glob("*-rank-0.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            begun += 1
            distinct.add((record["epoch"], record["step"], record.get("loader")))
    return begun - len(distinct)


def _fit_beside_another(fit: list[str], home: Path) -> str | None:
    """Start a second node process on the run directory while the job trains: the second one must exit at once."""
    first = subprocess.Popen(
        processes.python_module("trainer", *fit, "--detach"),
        cwd=home,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    first.wait(timeout=COMMAND_TIMEOUT_S)
    run = _only_run(home)
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while run is not None and not RunLock(run).is_taken and time.monotonic() < deadline:
        time.sleep(0.05)
    if run is None or not RunLock(run).is_taken:
        return "the first attempt did not start"
    holder = run.launch().pid
    if holder is None:
        return "the first attempt has no process"
    os.kill(holder, signal.SIGSTOP)  # a job this short could end before the second one looks
    try:
        second = subprocess.run(
            processes.python_module("trainer.supervise.node", str(run.path)),
            cwd=home,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    finally:
        os.kill(holder, signal.SIGCONT)
    while (not is_finished(run) or _lives(run)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if second.returncode == 0 or "already" not in second.stderr:
        return f"the second attempt exited with code {second.returncode}, stderr {second.stderr[-200:]!r}"
    return None


def _lives(run: RunDirectory) -> bool:
    pid = run.launch().pid
    return pid is not None and processes.is_alive(pid)


def _commit_of_this() -> str:
    return git(Path(__file__).parent, "rev-parse", "--short", "HEAD") or "unknown"


def _only_run(home: Path) -> RunDirectory | None:
    paths = sorted((home / "runs").glob("job-*"))
    return RunDirectory(paths[0]) if paths else None


def _kill_node_of(home: Path) -> None:
    run = _only_run(home)
    launch = run.launch() if run else None
    if launch and launch.pid and processes.is_alive(launch.pid, launch.pid_started):
        processes.kill_tree(launch.pid)


def _last_reason(run: RunDirectory) -> str:
    ends = run.attempts()
    return ends[-1].reason if ends else "no attempt has ended"

"""Runs jobs with faults and compares each with the unharmed run of its strategy. Imports no torch."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from trainer.core import processes
from trainer.faultbench.bad_server import bad_server
from trainer.faultbench.cases import CHECKPOINT_EVERY, KINDS, STEPS, Case, draw
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
"""A small network with dropout and clipping: seconds a job, and every part of the state is in use."""
COMMAND_TIMEOUT_S = 300.0
_running: dict[int, Path] = {}
"""Process ids of the commands that run now, and their working directories."""


@dataclass(frozen=True)
class Result:
    """One case, done."""

    number: int
    strategy: str
    kind: str
    case: str
    problem: str | None
    """None: it ended as required."""
    attempts: int
    lost_steps: int
    """Optimizer steps done again."""
    seconds: float
    """From the first command to the finished run."""
    down_s: float
    """`seconds` less those of the unharmed run."""
    commit: str = "unknown"
    """Of this trainer."""


class Comparer:
    """A process that has torch, kept for all comparisons."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.faultbench.compare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def difference(self, ours: Path, theirs: Path, step: int = STEPS) -> str | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"ours": str(ours), "theirs": str(theirs), "step": step}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that compares has died; its error is above")
        found = json.loads(answer)["difference"]
        return None if found is None else str(found)

    def close(self) -> None:
        with self._process:  # closes its pipes
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=30)


class FaultBench:
    """The cases of one seed, in `folder`; the run of a case that ended as required is deleted."""

    def __init__(self, folder: Path, seed: int, strategies: list[str], kinds: list[str]) -> None:
        self.folder, self.seed, self.strategies, self.kinds = folder, seed, strategies, kinds or list(KINDS)
        self._comparer = Comparer()
        self._unharmed: dict[str, tuple[Path, float]] = {}
        self._one_at_a_time = Lock()
        """For the comparer, and for who reads the results."""
        self._commit = _commit_of_this()

    def run(self, numbers: Sequence[int], report: Callable[[Result], None], at_once: int = 1) -> None:
        """All kinds in turn, the next time with the next strategy, each with moments drawn from (seed, number).

        `at_once`: jobs side by side, in threads that mostly wait; `report` is called by one of them at a time.
        """

        def run_and_report(number: int) -> None:
            result = self.run_one(number, self._strategy(number), self.kinds[number % len(self.kinds)])
            with self._one_at_a_time:
                report(result)

        pool = ThreadPoolExecutor(at_once)
        try:
            wanted = {self._strategy(number) for number in numbers}
            for made in [pool.submit(self._reference, strategy) for strategy in sorted(wanted)]:
                made.result()
            for done in [pool.submit(run_and_report, number) for number in numbers]:
                done.result()
        except BaseException:  # Ctrl-C reaches this thread only
            pool.shutdown(wait=False, cancel_futures=True)
            _kill_running()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.close()

    def _strategy(self, number: int) -> str:
        return self.strategies[(number + number // len(self.kinds)) % len(self.strategies)]

    def close(self) -> None:
        self._comparer.close()

    def run_one(self, number: int, strategy: str, kind: str) -> Result:
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
        attempts = len(list(run.logs_dir.glob("attempt-*"))) if run else 0
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
                raise RuntimeError(f"the unharmed run of {strategy} did not finish:\n{done.stdout}{done.stderr}")
            self._unharmed[strategy] = (run.path, time.monotonic() - began)
        return self._unharmed[strategy]

    def _harm(self, case: Case, home: Path, strategy: str, choose: random.Random) -> str | None:
        """Run the case to its end; what went wrong on the way."""
        fit = ["fit", *JOB, f"strategy={strategy}", *case.overrides]
        said = ""
        try:
            if case.second_attempt:
                problem = _fit_beside_another(fit, home)
                if problem:
                    return problem
            else:
                with bad_server(case.server) if case.server else nullcontext() as address:
                    said = command(fit, home, case.variables | ({"WANDB_BASE_URL": address} if address else {})).stderr
            run = _only_run(home)
            if run is None:
                return f"no run was made: {said[-300:]}"
            if case.resumes is False or (case.resumes is None and is_finished(run)):
                return None if is_finished(run) else f"it did not finish by itself: {_last_words(run)}"
            if case.resumes and is_finished(run):
                return "it finished as if nothing had happened"
            if case.between:
                case.between(run, choose)
            resumed = command(["resume"], home)
            return None if is_finished(run) else f"resume did not finish it: {(resumed.stdout + resumed.stderr)[-300:]}"
        except subprocess.TimeoutExpired:
            return f"it hung: no end within {COMMAND_TIMEOUT_S:.0f} s"


def command(
    arguments: list[str], cwd: Path, variables: dict[str, str] | None = None, timeout_s: float = COMMAND_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """`trainer ...`, bounded in time; raises TimeoutExpired after it has killed all that it started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
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
    """The jobs of all threads."""
    for pid, cwd in list(_running.items()):
        _kill_node_of(cwd)
        processes.kill_tree(pid)


def is_finished(run: RunDirectory) -> bool:
    ends = run.attempts()
    return bool(ends) and ends[-1]["outcome"] == "finished"


def lost_steps(run: RunDirectory) -> int:
    """Optimizer steps that the first rank began more than once."""
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
    """While the job trains, start a second node process on its run directory: that one must leave at once."""
    first = subprocess.Popen(
        [sys.executable, "-m", "trainer", *fit, "--detach"], cwd=home, stdout=subprocess.DEVNULL, start_new_session=True
    )
    first.wait(timeout=COMMAND_TIMEOUT_S)
    run = _only_run(home)
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while run is not None and not RunLock(run).is_taken and time.monotonic() < deadline:
        time.sleep(0.05)
    if run is None or not RunLock(run).is_taken:
        return "the first attempt did not start"
    second = subprocess.run(
        [sys.executable, "-m", "trainer.supervise.node", str(run.path)],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    while (not is_finished(run) or processes.is_alive(run.launch()["pid"])) and time.monotonic() < deadline:
        time.sleep(0.1)
    if second.returncode == 0 or "already" not in second.stderr:
        return f"the second attempt ended with {second.returncode} and said {second.stderr[-200:]!r}"
    return None


def _commit_of_this() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or "unknown"


def _only_run(home: Path) -> RunDirectory | None:
    found = sorted((home / "runs").glob("job-*"))
    return RunDirectory(found[0]) if found else None


def _kill_node_of(home: Path) -> None:
    run = _only_run(home)
    launch = run.launch() if run else {}
    pid = launch.get("pid")
    if pid and processes.is_alive(pid, launch.get("pid_started")):
        processes.kill_tree(pid)


def _last_words(run: RunDirectory) -> str:
    ends = run.attempts()
    return str(ends[-1].get("reason")) if ends else "it left no word"

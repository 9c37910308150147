"""Supervise torchrun on one node: forward signals, kill what should have ended, record why an attempt died."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from trainer.config.shape import LaunchShape
from trainer.core import processes
from trainer.core.claims import CLAIMED_VARIABLE
from trainer.core.errors import HUNG, JOB_FAILED, NEVER_RESTART, TrainerError
from trainer.notify.herald import Herald
from trainer.runs import cause
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved, Ended
from trainer.runs.node_folder import NodeFolder
from trainer.runs.records import AttemptOutcome
from trainer.runtime.process import NODE_BEGAN_VARIABLE
from trainer.supervise import entry, rank_environment, rendezvous, torchrun
from trainer.supervise.hang_response import HangHandler, Watched
from trainer.supervise.rank_environment import Interpreter
from trainer.supervise.relay import Relay, interval_s
from trainer.supervise.rendezvous import Place
from trainer.supervise.usage import UsageRecorder

POLL_S = 0.1
FAILED_GRACE_S = 3.0
"""Grace period of the other ranks after one has recorded that the job failed for good."""
SURVIVOR_GRACE_S = 10.0
"""Grace period of the other ranks after one has died. torchrun itself waits 30 s for ranks stuck in a collective."""
ENDED_GRACE_S = 30.0
"""Grace period of the other ranks after the first has recorded a good end."""
_CLOSING = re.compile(rb"Sending process (\d+) closing signal SIGTERM")
"""Log line of torchrun when it stops the remaining ranks; torch/distributed/elastic/multiprocessing/api.py."""


class Supervisor:
    """Runs one node of a launch: torchrun, once or several times."""

    def __init__(self, run: RunDirectory, shape: LaunchShape, place: Place) -> None:
        self.run = run
        self.shape = shape
        self.place = place
        self.config = run.config()
        attempt = os.environ.get("TRAINER_ATTEMPT")
        self.base = int(attempt) if attempt else run.next_attempt()
        self.node_log = run.node_log(self.base, place.node_rank)
        self.requested: set[int] = set()
        """Signals received."""
        self._forwarded: set[tuple[int, int]] = set()
        """Process id and signal."""
        self._attempts = [self.base]
        """Attempts of this launch, with the restarts by torchrun."""
        self._log_offset = 0
        self._closing: dict[int, float] = {}
        self._hangs: HangHandler
        self._relay: Relay | None = None
        """Between the ranks of this node and the run directory, in a job on several nodes."""
        self._interval_s = interval_s(place.nodes)
        self._looked = 0.0
        self._stop_seen_at: float | None = None
        self._outcome_seen_at: float | None = None
        self._herald = Herald(run) if place.node_rank == 0 else None

    def supervise(self) -> int:
        """Run torchrun until the job ends, and return the exit code of the job."""
        try:
            return self._supervise()
        finally:
            if self._herald:
                self._herald.close()

    def _supervise(self) -> int:
        with UsageRecorder(self.run, self.place.node_rank, self.shape, lambda: self.attempt):
            try:
                if self.place.nodes > 1:
                    self.place = replace(self.place, link=self._join())
            except TrainerError as error:
                return self._fail("failed", JOB_FAILED, cause.Cause(str(error), [], None, None)).code
            with rendezvous.private_folder() as self._store:
                self._start_watching(self._store)
                return self._rounds()

    def _start_watching(self, folder: Path) -> None:
        """Make the watch on hangs and, on several nodes, the relay."""
        place, size = self.place, self.shape.processes_per_node
        node_folder = NodeFolder(folder) if place.nodes > 1 else None
        if node_folder is not None:
            self._relay = Relay(self.run, node_folder, place.node_rank, self.base)
        own = range(place.node_rank * size, (place.node_rank + 1) * size)
        self._hangs = HangHandler(Watched(self.run, self.shape.world_size, own, self.node_log, node_folder))

    def _join(self) -> rendezvous.Link:
        """Open the server of the job on node 0, or find it.

        Raises:
            EnvironmentFault: This node has no address, or node 0 no server.
        """
        place = self.place
        link = rendezvous.join(
            self.run.stop_request.with_name(f"rendezvous-{self.base}.json"),
            place,
            is_needed=lambda: not self.requested and self._outcome() is None,
        )
        print(f"node {place.node_rank} is {link.own}; node 0 serves {link.server.endpoint}", flush=True)
        return link

    def _rounds(self) -> int:
        most = int(self.config["resilience"]["max_restarts"])
        # With several nodes, the job script restarts all of them, so that they number their attempts alike.
        restarts, first = most if self.place.nodes == 1 else 0, self.base
        while True:
            code = self._round(first, restarts)
            outcome = self._outcome()
            if outcome is None and code == 0:
                outcome = self._fail("failed", JOB_FAILED, cause.Cause("the workers left no outcome", [], None, 0))
            if outcome is not None:
                return outcome.code
            root_cause = self._cause(self.attempt)
            if self.place.nodes > 1:
                return self._give_up(root_cause)  # slurm/attempt.py decides for all nodes
            restarts = most - self._failures_since_checkpoint()
            if restarts < 0 or most == 0 or self._stop_seen_at is not None:
                return self._give_up(root_cause)
            self._record_death(self.attempt, root_cause)
            first = self.attempt + 1
            tries = f"{restarts + 1} more {'try' if restarts == 0 else 'tries'}"
            print(f"attempt {self.attempt} died: {root_cause.reason}; starting torchrun again, {tries}", flush=True)

    @property
    def attempt(self) -> int:
        """The newest attempt of this launch."""
        return self._attempts[-1]

    def _round(self, first: int, restarts: int) -> int:
        """Run torchrun, whose attempts are numbered from `first`; return its exit code."""
        if first != self.attempt:
            self._attempts.append(first)
            # The newest attempt even if no rank writes there.
            self.run.attempt_logs(first).mkdir(exist_ok=True)
        given = os.environ.get("TRAINER_WORKER_MODULE")
        worker = given or entry.module_of(entry.RANK, self.run.code_dir)
        arguments = torchrun.command(
            self.run.path,
            f"{self.run.id}-{first}",
            self.shape,
            self.place,
            max_restarts=restarts,
            worker=["-m", worker],
            numa_binding=self.config["resources"].get("numa_binding"),
        )
        variables = rank_environment.environment(
            os.environ,
            Interpreter(
                code_dir=self.run.code_dir,
                preload=None if given else entry.module_of(entry.PRELOAD, self.run.code_dir),
                hash_seed=self.run.hash_seed(),
                expandable_segments=self.config["trainer"].get("expandable_segments", True),
            ),
            self.shape,
            self.place,
            attempt=first,
            store=self._store,
        )
        if first == self.base:
            variables.setdefault(NODE_BEGAN_VARIABLE, f"{time.time() - processes.age_s():.3f}")
        print(
            f"attempt {first}: {self.shape}, {variables['OMP_NUM_THREADS']} threads each, on {socket.gethostname()}"
            + (f", {os.environ[CLAIMED_VARIABLE]}" if os.environ.get(CLAIMED_VARIABLE) else ""),
            flush=True,
        )
        child = torchrun.start(arguments, variables)
        while child.poll() is None:
            time.sleep(POLL_S)
            self._forward(child.pid)
            if time.monotonic() - self._looked >= self._interval_s:
                self._looked = time.monotonic()
                self._look(child)
            if self._herald:
                self._herald.poll()
        if self._relay is not None:
            self._relay.publish()
        self._note_restarts()
        if child.returncode < 0 and self._outcome() is None:
            name = cause.signal_name(-child.returncode)
            print(f"torchrun on {socket.gethostname()} was killed by {name}", flush=True)
        return int(child.returncode)

    def _look(self, child: subprocess.Popen[bytes]) -> None:
        """Look at the run directory, which several nodes share: end what should have ended, find a hang."""
        if self._relay is not None:
            self._relay.publish()
        self._note_restarts()
        self._end_survivors()
        self._enforce_end(child)
        if self._outcome_seen_at is None and self._stop_seen_at is None:
            hung = self._hangs.check(self.attempt, child.pid)
            if hung is not None and self.place.node_rank == 0:
                self._record_death(self.attempt, hung)

    def _forward(self, torchrun_pid: int) -> None:
        """Forward each signal once to each worker that has a handler; a worker ignores the signal until then."""
        for signum in self.requested:
            for pid in torchrun.workers(torchrun_pid):
                if (pid, signum) not in self._forwarded and processes.handles(pid, signum):
                    self._pass_stop_on()  # a rank that gets the signal first would ask to be requeued
                    self._forwarded.add((pid, signum))
                    processes.send(pid, signum)

    def _note_restarts(self) -> None:
        """Record why an attempt died once torchrun has begun the next one."""
        while self.run.attempt_logs(self.attempt + 1).is_dir():
            died = self.attempt
            self._attempts.append(died + 1)
            if self.place.node_rank == 0 and not self.run.attempt_record(died).exists():
                root_cause = self._cause(died)
                self._record_death(died, root_cause)
                print(f"attempt {died} died: {root_cause.reason}; torchrun restarts the workers", flush=True)

    def _end_survivors(self) -> None:
        """Kill the ranks that torchrun is stopping and that do not exit, because the restart waits for them."""
        now = time.monotonic()
        with self.node_log.open("rb") as file:
            file.seek(self._log_offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._log_offset += len(text)
        self._closing.update({int(match[1]): now for match in _CLOSING.finditer(text)})
        for pid, since in list(self._closing.items()):
            if now - since > SURVIVOR_GRACE_S:
                del self._closing[pid]
                processes.send(pid, signal.SIGKILL)

    def _enforce_end(self, child: subprocess.Popen[bytes]) -> None:
        """Kill the remaining ranks once they should have ended: after an outcome, or after a request to stop."""
        now = time.monotonic()
        outcome = self._outcome()
        if outcome is not None:
            self._outcome_seen_at = self._outcome_seen_at or now
            is_failed = outcome.outcome == "failed"
            grace_s = FAILED_GRACE_S if is_failed else ENDED_GRACE_S + self._finish_timeout_s()
            if now - self._outcome_seen_at > grace_s:
                print(f"attempt {outcome.outcome}; killing the remaining ranks", flush=True)
                processes.kill_tree(child.pid)
        elif (stops := self.run.stop_request.exists()) or self.requested:
            if stops:
                self._pass_stop_on()
            self._stop_seen_at = self._stop_seen_at or now
            # The deadline of the ranks themselves comes first, and saves a checkpoint if it can.
            limit_s = float(self.config["resilience"]["stop_deadline_s"]) + ENDED_GRACE_S
            if now - self._stop_seen_at > limit_s:
                root_cause = cause.Cause(f"still running {limit_s:.0f} s after a request to stop", [], None, None)
                self._fail("hung", HUNG, root_cause)
                processes.kill_tree(child.pid)

    def _pass_stop_on(self) -> None:
        """Pass a request to stop on to the ranks, which on several nodes do not look for it in the run directory."""
        if self._relay is not None and self.run.stop_request.exists():
            self._relay.request_stop()

    def _finish_timeout_s(self) -> float:
        return float(self.config["tracking"].get("finish_timeout_s", 0))

    def _failures_since_checkpoint(self) -> int:
        """Count the attempts since the newest checkpoint, including the one that committed it, which died as well."""
        writers = [event.attempt for event in self.run.events_of(CheckpointSaved) if event.attempt is not None]
        return self.attempt - max([self.base, *writers[-1:]]) + 1

    def _cause(self, attempt: int) -> cause.Cause:
        """Return why this attempt died: a hang, or the cause in its logs."""
        return self._hangs.causes.get(attempt) or cause.find(self.run, attempt, self.node_log)

    def _record_death(self, attempt: int, root_cause: cause.Cause) -> None:
        """Record the death of an attempt that was restarted."""
        is_hang = attempt in self._hangs.causes
        self._record(attempt, "hung" if is_hang else "failed", HUNG if is_hang else JOB_FAILED, root_cause)

    def _give_up(self, root_cause: cause.Cause) -> int:
        code = root_cause.exit_code
        if code in (HUNG, NEVER_RESTART):
            outcome = self._fail("hung" if code == HUNG else "failed", code, root_cause)
        else:
            outcome = self._fail("failed", 128 - code if code is not None and code < 0 else JOB_FAILED, root_cause)
        return outcome.code

    def _outcome(self) -> AttemptOutcome | None:
        """Return how this launch ended, as recorded by a worker.

        That is the final outcome of the newest attempt, or of the one before if torchrun restarted workers that had
        ended well.
        """
        for attempt in reversed(self._attempts):
            outcome = self.run.outcome(attempt)
            if outcome is not None and not outcome.restarted:
                return outcome
        return None

    def _fail(self, outcome: Literal["failed", "hung"], code: int, root_cause: cause.Cause) -> AttemptOutcome:
        """Record the end of the launch when no worker could."""
        record = self._record(self.attempt, outcome, code, root_cause, is_final=True)
        print(f"attempt {self.attempt} {outcome}: {root_cause.reason}", flush=True)
        return record

    def _record(
        self,
        attempt: int,
        outcome: Literal["failed", "hung"],
        code: int,
        root_cause: cause.Cause,
        is_final: bool = False,
    ) -> AttemptOutcome:
        step = self.run.last_step(attempt)
        log = str(root_cause.log.relative_to(self.run.path)) if root_cause.log else None
        record = AttemptOutcome(
            attempt=attempt,
            outcome=outcome,
            exit_code=code,
            reason=root_cause.reason,
            step=step,
            log=log,
            lines=root_cause.lines,
            where=root_cause.where,
            mend=root_cause.mend,
            restarted=not is_final,
            time=time.time(),
        )
        # Any of several nodes may write it; the others read it, and end.
        if self.place.node_rank == 0 or not self.run.attempt_record(attempt).exists():
            self.run.write_outcome(record)
            if is_final and self.place.rendezvous is None:  # else slurm/attempt.py, which knows whether it is the end
                self.run.add_event(Ended(event=outcome, attempt=attempt, step=step, reason=root_cause.reason))
        return record

"""What a rank writes down about its attempt: how it began and how it ended."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.store import Checkpoint
from trainer.config.batch import BatchPlan
from trainer.core.errors import NEVER_RESTART
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended, Started
from trainer.runs.metrics_lines import rewind
from trainer.runs.records import AttemptOutcome, Failure, Outcome
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank


@dataclass
class Attempt:
    """This rank in this attempt of this run, and how it ended."""

    directory: RunDirectory
    rank: Rank
    heartbeat: Heartbeat
    plan: BatchPlan | None = None
    """Once the data is there."""
    first_step: int | None = None
    """Where it began; null until the checkpoint is chosen."""
    memory: str = ""
    """What held it when it ran out."""

    def begin(self, resumed: Checkpoint | None) -> list[dict[str, Any]]:
        """What the first rank writes down before training, and takes back of what the last attempt logged too far.

        Returns the lines of metrics.jsonl that the last attempt, if it was killed, may not have got to another tracker.
        """
        step = resumed.step if resumed else 0
        rewound = rewind(self.directory.metrics_path, step)
        if rewound.dropped:
            print(
                f"metrics.jsonl: {rewound.dropped} lines after step {step} dropped; they are logged again", flush=True
            )
        self.directory.add_event(
            Started(
                attempt=self.rank.attempt,
                step=step,
                world_size=self.rank.world_size,
                host=socket.gethostname(),
                slurm_job_id=os.environ.get("SLURM_JOB_ID"),
            )
        )
        print(
            f"attempt {self.rank.attempt}: " + (f"resumed from step {step}" if resumed else "from the start"),
            flush=True,
        )
        before = self.directory.outcome(self.rank.attempt - 1)
        ended_well = before is not None and before.outcome in ("finished", "stopped", "requeue")
        return [] if ended_well else rewound.recent

    def end(self, outcome: Outcome, exit_code: int, reason: str = "", every_rank: bool = False) -> None:
        """Record the outcome, which the node process turns into the job's exit code."""
        if self.rank.is_first or every_rank:
            record = AttemptOutcome(
                attempt=self.rank.attempt,
                outcome=outcome,
                exit_code=exit_code,
                reason=reason,
                step=self.heartbeat.step,
                rank=self.rank.rank,
                host=socket.gethostname(),
                time=time.time(),
            )
            self._record(record, replaces=not every_rank)
        self.heartbeat.stop(outcome)

    def fail(self, failure: Failure) -> None:
        """Record that the job is over: any rank, the first to come, so that it is said once."""
        log = self.directory.rank_log(self.rank.attempt, failure.rank)
        record = AttemptOutcome(
            attempt=self.rank.attempt,
            outcome="failed",
            exit_code=NEVER_RESTART,
            reason=failure.reason,
            where=failure.where,
            mend=failure.mend,
            step=failure.step,
            rank=failure.rank,
            host=socket.gethostname(),
            log=str(log.relative_to(self.directory.path)),
            time=failure.time,
        )
        self._record(record, replaces=False)
        self.heartbeat.stop("failed")

    def _record(self, record: AttemptOutcome, replaces: bool) -> None:
        """Write the end of the attempt; unless it `replaces`, only where no rank has done so."""
        if not self.directory.write_outcome(record, replace=replaces):
            return
        outcome, step, reason = record.outcome, record.step, record.reason
        event = "preempted" if outcome == "requeue" else outcome
        self.directory.add_event(Ended(event=event, attempt=record.attempt, step=step, reason=reason))
        if record.log is None:  # of a failure everything is said from there
            print(f"{outcome} at step {step}" + (f": {reason}" if reason else ""), flush=True)

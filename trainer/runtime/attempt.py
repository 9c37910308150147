"""Record how an attempt of a rank starts and how it ends."""

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
    """A rank in an attempt of a run; it records the start and the outcome."""

    directory: RunDirectory
    rank: Rank
    heartbeat: Heartbeat
    plan: BatchPlan | None = None
    """None until the data is set up."""
    first_step: int | None = None
    """The step from which the attempt starts; None until the checkpoint is chosen."""
    memory: str = ""
    """A sentence on what occupied memory when it ran out."""

    def begin(self, resumed: Checkpoint | None) -> list[dict[str, Any]]:
        """Record the start of the attempt, and rewind metrics.jsonl to its first step. Called on the first rank.

        Returns:
            The lines of metrics.jsonl that the previous attempt, if killed, may not have sent to another tracker.
        """
        step = resumed.step if resumed else 0
        rewound = rewind(self.directory.metrics_path, step)
        if rewound.dropped:
            print(
                f"metrics.jsonl: {rewound.dropped} lines after step {step} removed; they are logged again", flush=True
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
        """Record the outcome, from which the node process derives the exit code of the job.

        Args:
            outcome: How the attempt ended.
            exit_code: The exit code of the job.
            reason: A sentence.
            every_rank: Any rank may record it, and the first record is kept. By default only rank 0 records it.
        """
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
        """Record that the job failed for good. Any rank may call it; only the first record is kept."""
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
        """Write the outcome; unless it `replaces`, only if no rank has written one."""
        if not self.directory.write_outcome(record, replace=replaces):
            return
        event = "preempted" if record.outcome == "requeue" else record.outcome
        self.directory.add_event(Ended(event=event, attempt=record.attempt, step=record.step, reason=record.reason))
        if record.log is None:  # the log of a failure has the traceback
            print(record.log_line, flush=True)

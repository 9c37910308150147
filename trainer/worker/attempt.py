"""What a rank writes down about its attempt: how it began and how it ended."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.store import Checkpoint
from trainer.config.batch import BatchPlan
from trainer.runs.directory import RunDirectory
from trainer.runs.files import write_atomic
from trainer.worker.heartbeat import Heartbeat
from trainer.worker.process import Rank


@dataclass
class Attempt:
    """This rank in this attempt of this run, and how it ended."""

    directory: RunDirectory
    rank: Rank
    heartbeat: Heartbeat
    plan: BatchPlan | None = None
    """Once the data is there."""
    memory: str = ""
    """What held it when it ran out."""

    def begin(self, resumed: Checkpoint | None) -> list[dict[str, Any]]:
        """What the first rank writes down before training, and takes back of what the last attempt logged too far.

        Returns the lines of metrics.jsonl that the last attempt, if it was killed, may not have got to another tracker.
        """
        from trainer.tracking.metrics_file import rewind  # needs Lightning, without which an attempt must end well

        step = resumed.step if resumed else 0
        rewound = rewind(self.directory.metrics_path, step)
        if rewound.dropped:
            print(
                f"metrics.jsonl: {rewound.dropped} lines after step {step} dropped; they are logged again", flush=True
            )
        self.directory.event(
            "started",
            attempt=self.rank.attempt,
            step=step,
            world_size=self.rank.world_size,
            host=socket.gethostname(),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        )
        print(
            f"attempt {self.rank.attempt}: " + (f"resumed from step {step}" if resumed else "from the start"),
            flush=True,
        )
        ended_well = any(
            record["attempt"] == self.rank.attempt - 1 and record["outcome"] in ("finished", "stopped", "requeue")
            for record in self.directory.attempts()
        )
        return [] if ended_well else rewound.recent

    def end(self, outcome: str, exit_code: int, reason: str = "", every_rank: bool = False) -> None:
        """Record the outcome, which the node process turns into the job's exit code."""
        if self.rank.is_first or every_rank:
            record = {
                "outcome": outcome,
                "exit_code": exit_code,
                "reason": reason,
                "step": self.heartbeat.step,
                "rank": self.rank.rank,
                "host": socket.gethostname(),
                "time": time.time(),
            }
            path = self.directory.attempts_dir / f"attempt-{self.rank.attempt:02d}.json"
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(record))
            event = "preempted" if outcome == "requeue" else outcome
            self.directory.event(event, attempt=self.rank.attempt, step=self.heartbeat.step, reason=reason)
            print(f"{outcome} at step {self.heartbeat.step}" + (f": {reason}" if reason else ""), flush=True)
        self.heartbeat.stop(outcome)

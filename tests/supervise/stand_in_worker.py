"""A worker without torch, run by the real torchrun: `STAND_IN` in the environment says what happens to it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved, Ended
from trainer.runs.records import AttemptOutcome, BestCheckpoint, HeartbeatRecord, Outcome
from trainer.runtime import process, stop


class StandIn:
    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.rank = process.Rank.from_environment()
        self.step = 0

    def beat(self) -> None:
        """One step: a line in the log, a heartbeat."""
        self.step += 1
        if self.rank.rank == 0:
            beat = HeartbeatRecord(
                step=self.step,
                max_steps=50,
                attempt=self.rank.attempt,
                phase="train",
                metrics={"train/loss": 1 / self.step},
                rate=1234.0,
                rate_unit="samples/s",
                eta_s=75.0,
                best=BestCheckpoint(metric="val/acc", mode="max", value=0.875, step=self.step),
            )
            self.run.write_heartbeat(0, beat)
        print(f"step {self.step}/50", flush=True)

    def end(self, outcome: Outcome, code: int, reason: str = "") -> None:
        if self.rank.rank == 0:
            attempt = self.rank.attempt
            self.run.write_outcome(
                AttemptOutcome(attempt=attempt, outcome=outcome, exit_code=code, reason=reason, step=self.step)
            )
            self.run.add_event(Ended(event="preempted" if outcome == "requeue" else outcome, attempt=attempt))
        sys.exit(0)

    def lose_the_peer(self) -> None:
        """What a rank in a collective does when its peer is gone: torchrun has noticed first."""
        while not stop.signalled():
            time.sleep(0.02)
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4321")

    def finish(self) -> None:
        self.beat()
        environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")}
        print(json.dumps({**environment, "cwd": os.getcwd(), "path": sys.path}))
        print("WARNING: something to see", flush=True)
        self.end("finished", 0)

    def raise_on_rank_1(self) -> None:
        """Rank 1 is the cause; rank 0 notices only that its peer is gone, and is what torchrun sees first."""
        if self.rank.rank == 0:
            raise RuntimeError("Connection closed by peer [127.0.0.1]:4321")
        time.sleep(0.3)
        raise ValueError("the loss is not a number")

    def die_of_a_signal(self) -> None:
        if self.rank.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def fail_once(self) -> None:
        self.beat()
        if self.rank.attempt == 0:
            raise ValueError("only the first time")
        self.end("finished", 0)

    def checkpoint_then_fail(self) -> None:
        """Fails each time, and gets as far as another checkpoint in the first three attempts."""
        if self.rank.rank == 0 and self.rank.attempt < 3:
            self.run.add_event(CheckpointSaved(step=self.rank.attempt + 1, attempt=self.rank.attempt))
        if self.rank.rank == 0:
            raise ValueError(f"attempt {self.rank.attempt}")
        self.lose_the_peer()

    def never_restart(self) -> None:
        """The first rank says that it makes no sense; the other one hangs."""
        if self.rank.rank == 0:
            self.end("failed", 93, "ImportError: no such module")
        time.sleep(60)

    def no_outcome(self) -> None:
        sys.exit(0)

    def train(self) -> None:
        """Until it is asked to stop."""
        while True:
            self.beat()
            signalled = stop.signalled()  # before the request, which is written before the signal is sent
            if self.run.stop_request.exists():
                self.end("stopped", 0, "asked to stop")
            if signalled:
                self.end("requeue", 75, "asked to make room")
            time.sleep(0.1)

    def hear_nothing(self) -> None:
        while True:
            self.beat()
            time.sleep(0.1)


if __name__ == "__main__":
    stop.install_handlers()
    process.frozen_code_first()
    directory = RunDirectory(Path(sys.argv[1]))
    process.die_with_parent()
    process.redirect_output(directory.path)
    getattr(StandIn(directory), os.environ["STAND_IN"])()

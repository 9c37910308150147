"""One case of `benchmarks/overhead.py`: started by it, writes `found.json` in a folder."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from overhead import is_on
from parity_data import CASES, Batches
from parity_turns import Blocks, Pace, Ranks
from parity_variants import config_of

from trainer.config.instantiate import freeze
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runtime.flight_recorder import FlightRecorder
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank
from trainer.train import run

CASE = "resnet"
BATCH = {1: 24, 2: 18}
"""Samples a rank, which take about 20 ms of CPU time on the machine that this was written on."""
STEPS = 2
"""A block: the machine's own speed changes within tens of steps."""
WARM_UP = 10
REPORTED = 40
"""Blocks: those that do not count, and those after which the costs are told."""
WATCHERS = ("Guard", "StepClock", "Boundary", "DeviceTime", "MemoryReport")
NEVER_S = 1e6
LEAST_HOOKS = 2
"""The guard's and the clock's: else something else than the watching is measured. That the loop notes the loss and
the time for both (about 1 us) is on in all blocks."""


class Switch:
    """In the place of the pace: from block to block the training is watched or not. It does not stop in between."""

    def __init__(self, pace: Pace, heartbeat: Heartbeat) -> None:
        self._pace, self._heartbeat = pace, heartbeat
        self._write = heartbeat.write
        self._hooks: dict[bool, dict[str, list[Any]]] = {}
        self._costs: list[float] = []
        self._began = 0.0
        self.trainer: Trainer

    def at_fetch(self, number: int) -> None:
        length = self._pace.blocks.length
        block, place = divmod(number, length)
        if place or block == 0:  # the first batch may be fetched before there is a loop
            return
        if block > WARM_UP:
            self._costs.append((time.process_time() - self._began) / length * 1e6)
        if len(self._costs) == REPORTED:
            self._pace.tell(self._costs)
            self._costs.clear()
        self._turn(block >= WARM_UP and is_on(block - WARM_UP))
        self._began = time.process_time()

    def _turn(self, on: bool) -> None:
        plan = self.trainer.fit_loop.epoch_loop.plan
        if not self._hooks:
            without = {name: [hook for hook in hooks if not _watches(hook)] for name, hooks in plan.hooks.items()}
            self._hooks = {True: plan.hooks, False: without}
            found, kept = (sum(map(len, hooks.values())) for hooks in self._hooks.values())
            assert found - kept >= LEAST_HOOKS, f"of {found} hooks only {found - kept} watch"
        plan.hooks = self._hooks[on]
        self._heartbeat.write = self._write if on else _nothing  # type: ignore[method-assign]


def _watches(hook: Any) -> bool:
    return type(hook.func.__self__).__name__ in WATCHERS if isinstance(hook, partial) else False


def _nothing() -> None:
    pass


def watched(steps: int, agrees: bool, pace: Pace, folder: Path) -> None:
    """Train one rank as `trainer fit` does, and turn the switch."""
    torch.set_num_threads(1)
    rank = Rank.from_environment()
    directory = RunDirectory(folder)
    for path in (directory.live_dir, directory.attempts_dir, directory.checkpoints_dir, directory.stop_request.parent):
        path.mkdir(parents=True, exist_ok=True)
    heartbeat = Heartbeat(directory, rank)
    switch = Batches.pace = Switch(pace, heartbeat)  # type: ignore[assignment]
    build_trainer = run.build.build_trainer

    def keeping(*arguments: Any, **options: Any) -> Trainer:
        switch.trainer = build_trainer(*arguments, **options)
        return switch.trainer

    run.build.build_trainer = keeping
    config = config_of(CASE, steps, rank, folder)
    config.trainer.log_every_n_steps = 10**9
    # The clock counts watched steps, half of all: by its reckoning the ranks would agree twice as often as they do.
    config.resilience.agree_every_s = 2 * config.resilience.agree_every_s if agrees else NEVER_S
    write_atomic(directory.config_path, freeze(asdict(config)))
    heartbeat.on_beat = FlightRecorder(directory, rank).check
    heartbeat.start()
    attempt = run.Attempt(directory, rank, heartbeat)
    run.train(config, attempt, run.init_process_group(config, rank), run.StartClock(attempt))
    heartbeat.stop("finished")


def measure(ranks: int, agrees: bool, rounds: int, count: int, folder: Path) -> None:
    """In the process that has imported all: [[CPU us a step of a block, ...] a round] into `folder`."""
    run.silence_known_warnings()
    CASES[CASE] = replace(CASES[CASE], batch_size=BATCH[ranks])
    blocks = Blocks(WARM_UP + count, settle=0, measured=STEPS)
    costs: list[list[float]] = []
    for number in range(rounds):
        running = Ranks(partial(watched, blocks.steps, agrees), ranks, blocks, folder / str(number))
        try:
            costs.append([])
            while len(costs[-1]) < count - count % REPORTED:
                costs[-1] += running.reached()
        finally:
            running.kill()
    (folder / "found.json").write_text(json.dumps(costs))


if __name__ == "__main__":
    ranks, agrees, rounds, count = map(int, sys.argv[1:5])
    measure(ranks, bool(agrees), rounds, count, Path(sys.argv[5]))

"""Watch a trial beside its run and prune it: `python -m trainer.cli.sweep_watch SWEEP_DIR TRIAL RUN_DIR`.

The decision to prune is a file of the sweep; then the run is asked to stop as `trainer stop` asks it, so that it saves
a checkpoint and can be resumed. Without this process nothing is pruned, and nothing else changes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from trainer.config.direction import direction_of
from trainer.core import processes
from trainer.core.errors import DONE
from trainer.launch.launchers import signal_stop
from trainer.runs.directory import RunDirectory
from trainer.runs.summary import best as best_of_run
from trainer.sweeps.directory import Names, SweepDirectory
from trainer.sweeps.outcome import final_outcome, history, mode_of
from trainer.sweeps.pruning import why_pruned
from trainer.sweeps.records import Prune, Spec

_POLL_S, _SHARE = 0.2, 50
"""Seconds between two looks, and how many times as long as a look they are at least."""
_started: list[subprocess.Popen[bytes]] = []


def start(sweep: SweepDirectory, number: int, run: RunDirectory) -> None:
    """Start the watching process of a trial."""
    with (sweep.logs_dir / "watch.log").open("ab") as log:
        command = processes.python_module("trainer.cli.sweep_watch", str(sweep.path), str(number), str(run.path))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    _started.append(process)


def main(arguments: list[str]) -> int:
    """Watch until the run has ended or the trial has another owner, and return the exit code."""
    sweep, number, run = SweepDirectory(Path(arguments[0])), int(arguments[1]), RunDirectory(Path(arguments[2]))
    spec, first = sweep.spec(), run.next_attempt()
    mine = sweep.names()[number]
    if mine.retries:  # somebody wants this one to be trained
        return DONE
    curves = Curves(sweep, spec)
    while True:
        began = time.monotonic()
        names = sweep.names().get(number)
        if names is None or names.is_over or names.owners != mine.owners or final_outcome(run, first) is not None:
            return DONE
        decision = sweep.prune(number, names.retries)
        if decision is None:
            decision = _decide(spec, number, curves, run)
            if decision is not None:
                sweep.add_prune(number, names.retries, decision)
        if decision is not None and not run.stop_request.exists():
            print(f"trial {number} is pruned: {decision.reason}", flush=True)
            run.request_stop("pruned by its sweep")
            signal_stop(run)
        time.sleep(max(_POLL_S, _SHARE * (time.monotonic() - began)))


def _decide(spec: Spec, number: int, curves: Curves, run: RunDirectory) -> Prune | None:
    metric, mode = _metric(spec, run)
    if metric is None:
        return None
    found = curves.read(metric, number, run)
    verdict = why_pruned(spec, number, found, mode)
    if verdict is None:
        return None
    at, reason = verdict
    return Prune(step=at, value=found[number][at - 1], reason=reason, time=time.time())


def _metric(spec: Spec, run: RunDirectory) -> tuple[str | None, Literal["min", "max"]]:
    if spec.metric:
        return spec.metric[0], mode_of(spec, 0)
    best = best_of_run(run, run.heartbeat(0))
    if best is None or best.metric is None:
        return None, "min"
    return best.metric, direction_of(best.metric) or best.mode


class Curves:
    """The validations of every trial; a file is read again only when it has grown.

    Args:
        sweep: The sweep.
        spec: Its spec.
    """

    def __init__(self, sweep: SweepDirectory, spec: Spec) -> None:
        self._sweep, self._spec = sweep, spec
        self._known: dict[int, tuple[tuple[str, int], list[float]]] = {}

    def read(self, metric: str, number: int, own: RunDirectory) -> dict[int, list[float]]:
        """Return the curve of every trial that has a run; `own` is the run of trial `number`."""
        names = self._sweep.names()
        for trial, one in names.items():
            run = own if trial == number else self._run(trial, one)
            if run is None:
                continue
            try:
                key = str(run.path), run.metrics_path.stat().st_size
            except OSError:
                continue
            if trial not in self._known or self._known[trial][0] != key:
                self._known[trial] = key, [value for _, value in history(run, metric)]
        found = {trial: curve for trial, (_, curve) in self._known.items()}
        return {number: [], **found}

    def _run(self, trial: int, names: Names) -> RunDirectory | None:
        record = self._sweep.run_of(trial, names.runs[-1]) if names.runs else None
        return RunDirectory(Path(record.path)) if record is not None else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

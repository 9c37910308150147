"""Follow a run until it ends: progress, problems, how it ended and the command to type next."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal, TextIO

from trainer.core import processes
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, INTERRUPTED, JOB_FAILED, USER_MUST_CHANGE
from trainer.core.files import no_space_on, open_regular, read_text
from trainer.core.text import log_text, one_line
from trainer.launch import bar, local
from trainer.launch.jobs import states_of
from trainer.launch.launchers import cancel, signal_stop
from trainer.notify.herald import Herald
from trainer.runs import cause
from trainer.runs.directory import RunDirectory
from trainer.runs.ending import is_over
from trainer.runs.events import Ended
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Outcome
from trainer.runs.registry import reference_to, shortest
from trainer.runs.state import state_of
from trainer.runs.summary import best as best_of_run

POLL_S = 0.2
_SLURM_POLL_S = 3.0
"""Interval of the squeue calls that check whether the job still exists."""
_NOTABLE = re.compile(r"\b(warning|error|skipped)\b|Warning:|Error:", re.IGNORECASE)
"""Lines of the log that are shown on a terminal, above the progress bar."""
_SHOWN_LINES = 12
AGENT_WAITS_S = 25.0
"""`wandb agent` kills the command of a trial 30 s after it has asked it to stop."""
_CHUNK_BYTES = 8 * 1024**2
"""Largest part of a log that is read at a time."""


def follow(run: RunDirectory, *, detached_ok: bool = False, stream: TextIO | None = None) -> int:
    """Show `run` until it ends; return the exit code of the command.

    Ctrl-C (or SIGTERM, SIGHUP) tells the run to save a checkpoint and stop; a second one kills it. With `detached_ok`,
    Ctrl-C only stops following, except under `wandb agent`: the run is its trial.
    """
    agent = is_under_agent()
    follower = Follower(run, stream or sys.stdout, kills_after_s=AGENT_WAITS_S if agent else None)
    with _signals(follower):
        while not follower.is_over():
            follower.show()
            if follower.interrupts and detached_ok and not agent:
                follower.say(f"no longer following; the run continues. To stop: {_command()} stop {reference_to(run)}")
                return INTERRUPTED
            follower.act_on_interrupts()
            time.sleep(POLL_S)
        follower.show()
        local.reap()
        code = follower.conclude()
        # The agent gives up after three trials that fail in the first minute: one that it has stopped has not failed.
        return DONE if agent and code == INTERRUPTED else code


def is_under_agent() -> bool:
    """Return whether `wandb agent` has started this command for a trial of a sweep."""
    return bool(os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"))


@contextmanager
def _signals(follower: Follower) -> Iterator[None]:
    """Count the signals that ask to stop; restore the former handlers at the end."""

    def count(signum: int, frame: FrameType | None) -> None:
        follower.interrupts += 1

    before = {signum: signal.signal(signum, count) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Follower:
    """Shows the progress of a run, and remembers what it has shown.

    Args:
        run: The run.
        stream: Where it is shown.
        kills_after_s: Seconds after the request to stop at which the run is killed; None: only on a second request.
    """

    def __init__(self, run: RunDirectory, stream: TextIO, kills_after_s: float | None = None) -> None:
        self.run = run
        self._kills_after_s = kills_after_s
        self._asked_at = 0.0
        self.interrupts = 0
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._bar_shown = False
        self._acted = 0
        self._attempt: int | None = None
        self._offset = 0
        self._in_traceback = False
        self._since = time.time()
        self._first_attempt = run.launch().attempt
        self._polled_at, self._is_in_slurm = time.monotonic(), True
        self._herald = Herald(run, by_verb=True, output=subprocess.DEVNULL)

    def is_over(self) -> bool:
        """Return whether the process of the run is gone or, if it is on another machine, whether an end is recorded."""
        launch = self.run.launch()
        if launch.slurm_job_id:
            return not self._lives_in_slurm()
        if launch.pid is None:
            return self._end() is not None
        if launch.host == socket.gethostname() and launch.boot_id == processes.boot_id():
            return not processes.is_alive(launch.pid, launch.pid_started)
        return self._end() is not None

    def _lives_in_slurm(self) -> bool:
        """Return whether the job is pending, running or requeued; the last answer while SLURM does not respond."""
        if time.monotonic() - self._polled_at >= _SLURM_POLL_S:
            self._polled_at, states = time.monotonic(), states_of([self.run])
            if states is not None or is_over(self.run):
                state = state_of(self.run, states)
                self._is_in_slurm = state.is_active
                if state.name in ("queued", "requeued"):
                    self._herald.remind()
        return self._is_in_slurm

    def show(self) -> None:
        """Print the progress since the last call."""
        attempt = self._newest_attempt()
        if attempt is not None and attempt != self._attempt:
            if self._attempt is not None:
                self._show_log()
                self._show_restart(self._attempt, attempt)
            self._attempt, self._offset, self._in_traceback = attempt, 0, False
        self._show_log()
        if self._is_terminal:
            self._show_bar()

    def act_on_interrupts(self) -> None:
        """Stop the run after the first interrupt, kill it after the second."""
        if self.interrupts == 0 or self._acted >= 2:
            return
        if self._acted == 0:
            self._acted, self._asked_at = 1, time.monotonic()
            self.run.request_stop("the command that follows it was interrupted")
            self.say("stopping: saving a checkpoint first (Ctrl-C again kills the run at once)")
            signal_stop(self.run)
        is_late = self._kills_after_s is not None and time.monotonic() - self._asked_at > self._kills_after_s
        if self.interrupts >= 2 or is_late:
            self._acted = 2
            self._kill()

    def _kill(self) -> None:
        self.say("killing the run")
        launch = self.run.launch()
        if launch.slurm_job_id:
            cancel(self.run)
        elif launch.pid is not None and processes.is_alive(launch.pid, launch.pid_started):
            processes.kill_tree(launch.pid)
        attempt = self._newest_attempt() or 0
        if self._end() is None:
            by = "a second Ctrl-C" if self.interrupts >= 2 else "the agent's limit for a stop"
            reason = f"killed by {by}: progress since the last checkpoint is lost"
            beat = self.run.heartbeat(0)
            step = beat.step if beat else None
            end = AttemptOutcome(
                attempt=attempt, outcome="stopped", exit_code=INTERRUPTED, reason=reason, step=step, time=time.time()
            )
            self.run.write_outcome(end)
            self.run.add_event(Ended(event="stopped", attempt=attempt, step=step, reason=reason))

    def conclude(self) -> int:
        """Print how the run ended, and return the exit code."""
        end, beat = self._end(), self.run.heartbeat(0)
        outcome: Outcome | Literal["dead"] = end.outcome if end else "dead"
        step = end.step if end and end.step is not None else beat.step if beat else 0
        failure = self._failure(end) if outcome in ("failed", "hung", "dead") else None
        if outcome == "dead":  # nothing of the job is left that could tell
            self._herald.close(is_due=True)
        for line in failure.lines if failure else []:
            self.say(f"  | {line}")
        words = {"requeue": "checkpoint saved for requeueing", "dead": "died"}
        reason = failure.reason if failure else end.reason if end else ""
        took = bar.duration(time.time() - self._since)
        self.say(f"{words.get(outcome, outcome)} at step {step} after {took}" + (f": {reason}" if reason else ""))
        if failure is not None:
            if failure.where:
                self.say(f"  in      {failure.where}")
            self.say(f"  log     {shortest(failure.log or self.run.logs_dir)}")
        best = best_of_run(self.run, beat)
        if best:
            self.say(f"  best    {best.metric} {best.value:.4g} at step {best.step}")
        self.say(f"  run     {shortest(self.run.path)}")
        wandb = self.run.wandb()
        if wandb is not None and wandb.url:
            self.say(f"  W&B     {one_line(wandb.url)}")
        self.say(f"  next    {self._next(end)}")
        if outcome == "finished":
            return DONE
        if outcome == "stopped" or self._acted:
            return INTERRUPTED
        code = end.code if end else JOB_FAILED
        return code if code in (USER_MUST_CHANGE, ENVIRONMENT_MUST_CHANGE) else JOB_FAILED

    def _next(self, end: AttemptOutcome | None) -> str:
        """Return the next command. A resume uses the code snapshot of the run, so it cannot fix a bug in the code."""
        if end and end.outcome == "finished":
            return f"{_command()} show {reference_to(self.run)}"
        if end and end.mend:
            return f"fix it, then: {fit_again(self.run)}"
        return f"{_command()} resume {reference_to(self.run)}"

    def say(self, line: str) -> None:
        """Print a line above the progress bar. A closed terminal or pipe must not end the run."""
        line = log_text(line) if self._is_terminal else line
        self._write(("\r\x1b[K" if self._bar_shown else "") + line + "\n")
        self._bar_shown = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._is_terminal = False
            self._stream = open(os.devnull, "w")  # noqa: SIM115  open until the process ends

    def _show_bar(self) -> None:
        beat = self.run.heartbeat(0)
        if beat is None or beat.attempt != self._attempt:
            beat = HeartbeatRecord(step=beat.step if beat else 0, phase="start")
        width = shutil.get_terminal_size().columns - 1
        self._write("\r\x1b[K" + bar.render(beat, width))
        self._bar_shown = True

    def _show_log(self) -> None:
        """Print new lines of the log of rank 0; on a terminal only warnings and errors."""
        while self._attempt is not None:
            try:
                with open_regular(self.run.rank_log(self._attempt, 0)) as file:
                    file.seek(self._offset)
                    text = file.read(_CHUNK_BYTES)
            except OSError:
                return
            is_full = len(text) == _CHUNK_BYTES
            whole = text[: text.rfind(b"\n") + 1] or (text if is_full else b"")
            self._offset += len(whole)
            self._show_lines(whole)
            if not is_full:
                return

    def _show_lines(self, whole: bytes) -> None:
        text = whole.decode(errors="replace")
        end = None if self._attempt is None else self.run.outcome(self._attempt)
        if end is not None:  # `conclude` prints how the run ended
            text = f"\n{text}".replace(f"\n{end.log_line}\n", "\n", 1)[1:]
        for line in text.splitlines():
            if line in (cause.TRACEBACK_BEGINS, cause.TRACEBACK_ENDS):
                self._in_traceback = line == cause.TRACEBACK_BEGINS
            elif not self._in_traceback and (not self._is_terminal or _NOTABLE.search(line)):
                self.say(line)

    def _show_restart(self, died: int, following: int) -> None:
        end = self.run.outcome(died)
        if end and end.outcome == "requeue":
            self.say(f"attempt {died} ended at step {end.step}: {end.reason}; resuming as attempt {following}")
            return
        # The node process may not have recorded it yet.
        reason = end.reason if end else cause.find(self.run, died).reason
        self.say(f"attempt {died} died: {reason}; restarting as attempt {following}")

    def _failure(self, end: AttemptOutcome | None) -> cause.Cause:
        """Return where and why the run failed, with the lines to show of a log that has no traceback."""
        reason = (end.reason or "no reason recorded") if end else "its processes were killed"
        if end is None and (full := no_space_on(self.run.path)):
            reason = f"{full}; {reason}"
        lines, log, where = (end.lines, end.log, end.where) if end else ([], None, None)
        path = self.run.path / log if log else None
        if not lines and path is None:
            found = cause.find(self.run, self._attempt or 0)
            own = end.log_line.splitlines() if end else []
            lines, where, path = [one for one in found.lines if one not in own], found.where, found.log
        lines = [] if lines and lines[0].startswith(cause.TRACEBACK) else lines[-_SHOWN_LINES:]  # it is in the log
        launch_log = self.run.logs_dir / "launch.log"
        if path is None and launch_log.exists() and launch_log.stat().st_size:
            path, lines = launch_log, lines + cause.tail(launch_log)[-_SHOWN_LINES:]
        return cause.Cause(reason, lines, path, None, where=where)

    def _newest_attempt(self) -> int | None:
        """Return the newest attempt of this launch."""
        return max((one for one in self.run.logged_attempts() if one >= self._first_attempt), default=None)

    def _end(self) -> AttemptOutcome | None:
        """Return the recorded end of this launch."""
        attempt = self._newest_attempt()
        end = None if attempt is None else self.run.outcome(attempt)
        return None if end is None or end.restarted else end


def fit_again(run: RunDirectory, command: str | None = None) -> str:
    """Return the command that started the run, to be typed again; `command` stands for `trainer`."""
    return f"{command or _command()} fit {typed(run)}".rstrip()


def typed(run: RunDirectory) -> str:
    """Return the overrides that started the run, as they were typed; empty if the file cannot be read."""
    try:
        return read_text(run.overrides_path, errors="replace").strip()
    except OSError:
        return ""


def _command() -> str:
    """Return how to type `trainer`: with its path if the environment is not activated."""
    own = Path(sys.prefix) / "bin" / "trainer"
    return "trainer" if shutil.which("trainer") or not own.exists() else shlex.quote(shortest(own))

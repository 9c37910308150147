"""What the job script asks before and after each attempt: `python -m trainer.cluster.slurm.attempt begin|end ...`.

`begin RUN_DIR` prints lines for the script's `eval`. `end RUN_DIR CODE` says why srun ended with CODE, has the job
requeued where that helps, and ends with 75 when the script should try again on the nodes that it has.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from trainer.checkpoint.store import CheckpointStore
from trainer.cluster.node import CODES, last_step
from trainer.cluster.slurm import query
from trainer.cluster.slurm.commands import SlurmRefused
from trainer.cluster.slurm.commands import run as call
from trainer.cluster.slurm.submit import script_path, submit
from trainer.errors import DONE, JOB_FAILED, NEVER_RESTART, REQUEUE, TrainerError
from trainer.runs.directory import RunDirectory
from trainer.runs.files import write_atomic

_REQUEUE_WAIT_S = 4.0
"""How long the script lives on, at the most, to let the requeued job start at once."""


def begin(run: RunDirectory) -> list[str]:
    """Number an attempt and write it down. The lines are bash: exports, or an `exit`."""
    job_id = os.environ["SLURM_JOB_ID"]
    if run.stop_request.exists():
        return _end_here(run, "stopped", DONE, "stopped before it started")
    launch = run.launch()
    if str(launch.get("slurm_job_id")) != job_id:
        # Resubmitted by hand: another job with other attempts.
        run.event("queued", slurm_job_id=job_id)
    step = newest_step(run)
    most = int(run.config()["cluster"]["attempts_without_progress"])
    if _without_progress(run, step) >= most:
        last = [record["reason"] for record in run.attempts() if record.get("reason")]
        why = f": {last[-1]}" if last else ""
        return _end_here(run, "failed", NEVER_RESTART, f"{most} attempts in a row left no newer checkpoint{why}")
    attempt = run.next_attempt()
    nodes = call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    wanted = int(launch["shape"]["nodes"])
    launch.update(slurm_job_id=job_id, attempt=attempt, host=None, boot_id=None, pid=None, pid_started=None)
    write_atomic(run.launch_path, json.dumps(launch, indent=1))
    (run.logs_dir / f"attempt-{attempt:02d}").mkdir(parents=True, exist_ok=True)
    run.event("allocated", attempt=attempt, slurm_job_id=job_id, nodes=nodes, checkpoint=step)
    # Two jobs may share a node, and the last attempt's port may not be free yet.
    port = 20000 + (int(job_id) * 8 + attempt % 8) % 10000
    variables = {
        "TRAINER_ATTEMPT": str(attempt),
        "TRAINER_NODES": str(wanted),
        "TRAINER_LEFT_OUT": ",".join(nodes[wanted:]),
        "TRAINER_RENDEZVOUS": f"{nodes[0]}:{port}",
    }
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _end_here(run: RunDirectory, outcome: str, code: int, reason: str) -> list[str]:
    """Record an attempt that is not made, and have the script exit."""
    _record(run, run.next_attempt(), outcome, code, reason)
    print(f"{run.path.name} {outcome}: {reason}", file=sys.stderr)
    return [f"exit {code}"]


def newest_step(run: RunDirectory) -> int | None:
    """The step of the newest committed checkpoint."""
    return max((checkpoint.step for checkpoint in CheckpointStore(run.checkpoints_dir).committed()), default=None)


def _without_progress(run: RunDirectory, step: int | None) -> int:
    """How many attempts in a row, up to now, began with the checkpoint that still is the newest."""
    count = 0
    for event in reversed(run.events()):
        if event["event"] in ("queued", "resumed"):  # a person wants it tried again
            break
        if event["event"] == "allocated":
            if event.get("checkpoint") != step:
                break
            count += 1
    return count


def end(run: RunDirectory, code: int) -> int:
    """What to do after srun ended with `code`; the code with which the script goes on (75: once more) or exits."""
    attempt = int(os.environ["TRAINER_ATTEMPT"])
    record = next((one for one in reversed(run.attempts()) if one["attempt"] >= attempt), None)
    if record is None or record.get("restarted"):
        return _after_silence(run, attempt, code)
    outcome = record["outcome"]
    print(f"attempt {record['attempt']} {outcome} at step {record.get('step')}: {record.get('reason')}", flush=True)
    if outcome == "requeue" and not run.stop_request.exists():
        return requeue(run)
    return int(record.get("exit_code", CODES.get(outcome, JOB_FAILED)))


def _after_silence(run: RunDirectory, attempt: int, code: int) -> int:
    """Nobody wrote down why it ended: a node, or what supervises the ranks on one, was killed."""
    state = query.job(os.environ["SLURM_JOB_ID"]).get("JobState", "")
    newest = max([attempt, *(one["attempt"] for one in run.attempts())])
    if run.stop_request.exists():
        _record(run, newest, "stopped", DONE, "it ended without saving when it was asked to stop")
        return JOB_FAILED
    reason = f"its processes were killed (srun ended with {code}, the job is {state or 'unknown'})"
    _record(run, newest, "requeue", REQUEUE, reason)
    print(f"attempt {newest} ended: {reason}", flush=True)
    return REQUEUE if state == "RUNNING" else JOB_FAILED


def requeue(run: RunDirectory) -> int:
    """Have SLURM run this job again as soon as it can. Where it may not, submit another job of the same run."""
    job_id = os.environ["SLURM_JOB_ID"]
    # SLURM ends this script at once; it must stay to bring the start forward.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if query.job(job_id).get("JobState") != "RUNNING":  # preempted, cancelled: SLURM does what is to be done
            return REQUEUE_BY_SLURM
        call("scontrol", "requeue", job_id)
    except SlurmRefused as refused:
        print(f"SLURM does not requeue this job ({refused}); submitting another", flush=True)
        other = submit(script_path(run), Path(run.launch()["cwd"]), f"--dependency=afterany:{job_id}")
        write_atomic(run.launch_path, json.dumps({**run.launch(), "slurm_job_id": other}, indent=1))
        run.event("requeued", slurm_job_id=other)
        return DONE
    run.event("requeued", slurm_job_id=job_id)
    # A requeued job waits 120 s by default (cred_expire of slurm.conf); its owner may bring that forward.
    deadline = time.monotonic() + _REQUEUE_WAIT_S
    while time.monotonic() < deadline:
        try:
            call("scontrol", "update", f"JobId={job_id}", "StartTime=now")
            break
        except SlurmRefused:
            time.sleep(0.3)
    return REQUEUE_BY_SLURM


REQUEUE_BY_SLURM = DONE
"""The script's exit code no longer matters: the job is pending again, or gone."""


def _record(run: RunDirectory, attempt: int, outcome: str, code: int, reason: str) -> None:
    step = last_step(run)
    record: dict[str, Any] = {"outcome": outcome, "exit_code": code, "reason": reason, "step": step}
    run.attempts_dir.mkdir(exist_ok=True)
    path = run.attempts_dir / f"attempt-{attempt:02d}.json"
    write_atomic(path, json.dumps({**record, "log": None, "lines": [], "restarted": False, "time": time.time()}))
    run.event("preempted" if outcome == "requeue" else outcome, attempt=attempt, step=step, reason=reason)


def main(arguments: list[str]) -> int:
    verb, run = arguments[0], RunDirectory(Path(arguments[1]))
    if verb == "begin":
        print("\n".join(begin(run)))
        return DONE
    return end(run, int(arguments[2]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (TrainerError, SlurmRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", JOB_FAILED))

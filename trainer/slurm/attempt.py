"""Begin and end an attempt in the job script: `python -m trainer.slurm.attempt begin|end ...`.

`begin RUN_DIR` prints lines for the script's `eval`. `end RUN_DIR CODE` records why srun ended with CODE, decides
whether to requeue the job, and exits with 75 if the script should start another attempt in the same allocation.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from trainer.checkpoint.store import CheckpointStore
from trainer.config.elastic import most_nodes
from trainer.core.errors import (
    DONE,
    ENVIRONMENT_MUST_CHANGE,
    JOB_FAILED,
    NEVER_RESTART,
    REQUEUE,
    USER_MUST_CHANGE,
    TrainerError,
    UserError,
)
from trainer.notify.herald import Herald
from trainer.runs import cause, trust
from trainer.runs.directory import RunDirectory
from trainer.runs.ending import seal_ended
from trainer.runs.events import Allocated, CheckpointSaved, Ended, Preflight, Queued, Requeued, Resumed
from trainer.runs.records import AttemptOutcome, Outcome
from trainer.slurm import ending, lost_nodes, preflight, query
from trainer.slurm.commands import SlurmRefused, patiently
from trainer.slurm.commands import run as call
from trainer.slurm.submit import script_path, submit
from trainer.supervise.variables import NODES_VARIABLE, PEERS_VARIABLE, RENDEZVOUS_VARIABLE

_HOPELESS = (NEVER_RESTART, USER_MUST_CHANGE, ENVIRONMENT_MUST_CHANGE)


def begin(run: RunDirectory) -> list[str]:
    """Number and record an attempt. Returns lines of bash: exports, or an `exit`."""
    job_id = os.environ["SLURM_JOB_ID"]
    if run.stop_request.exists():
        return _end_here(run, "stopped", DONE, "stopped before it started")
    launch = run.launch()
    try:
        trust.require(run, launch.trusted)
    except UserError as error:
        return _end_here(run, "failed", NEVER_RESTART, error.message)
    step = newest_step(run)
    nodes = query.hostnames(os.environ["SLURM_JOB_NODELIST"])
    is_restart = "TRAINER_ATTEMPT" in os.environ
    if not is_restart:
        if launch.slurm_job_id != job_id:
            # Resubmitted by hand: another job with other attempts.
            run.add_event(Queued(slurm_job_id=job_id))
        _explain_silence(run)
        most = int(run.config()["cluster"]["attempts_without_progress"])
        if _without_progress(run, step) >= most:
            last = [end.reason for end in run.attempts() if end.reason]
            why = f"; the last one: {last[-1]}" if last else ""
            return _end_here(run, "failed", NEVER_RESTART, f"{most} attempts in a row left no newer checkpoint{why}")
    requested = run.shape()
    bad = _bad_nodes(run, nodes, is_restart)
    fit = [node for node in nodes if node not in bad]
    count = most_nodes(run.config(), requested, len(fit))
    if count is None:
        if patiently(lambda: query.job(job_id)).get("JobState") != "RUNNING":
            return [f"exit {JOB_FAILED}"]  # SLURM ended it during the preflight
        reason = "preflight: " + "; ".join(f"{node}: {problem}" for node, problem in bad.items())
        if not bad:
            reason = f"SLURM allocated {len(nodes)} nodes, and the run needs {requested.nodes}"
        return _end_here(run, "failed", NEVER_RESTART, reason)
    chosen = fit[:count]
    attempt = run.next_attempt()
    nowhere_yet = replace(launch, host=None, boot_id=None, pid=None, pid_started=None)
    run.write_launch(replace(nowhere_yet, slurm_job_id=job_id, attempt=attempt))
    run.attempt_logs(attempt).mkdir(parents=True, exist_ok=True)
    run.add_event(
        Allocated(
            event="restarted" if is_restart else "allocated",
            attempt=attempt,
            slurm_job_id=job_id,
            nodes=chosen,
            checkpoint=step,
            since=None if is_restart else int(os.environ["TRAINER_JOB_BEGAN"]),
        )
    )
    fewer = f" ({count} of {requested.nodes} nodes)" if count < requested.nodes else ""
    print(ending.beginning(attempt, chosen) + fewer, file=sys.stderr, flush=True)
    variables = {
        "TRAINER_ATTEMPT": str(attempt),
        NODES_VARIABLE: str(count),
        "TRAINER_LEFT_OUT": ",".join(node for node in nodes if node not in chosen),
        RENDEZVOUS_VARIABLE: chosen[0],
        PEERS_VARIABLE: ",".join(chosen),
    }
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _bad_nodes(run: RunDirectory, nodes: list[str], is_restart: bool) -> dict[str, str]:
    """Return the problem of each bad node, from the preflight of this allocation."""
    if not run.config()["cluster"].get("preflight") or not preflight.folder(run).is_dir():
        return {}
    bad, bytes_per_s = preflight.judge(run, nodes)
    if not is_restart:
        slow = preflight.slow(run, nodes)
        run.add_event(Preflight(bad=bad, bytes_per_s=bytes_per_s, slow=slow or None))
        for node, measurements in slow.items():
            print(f"preflight: {node} is slow: {'; '.join(measurements)}", file=sys.stderr, flush=True)
        speed = f", all-reduce at {bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s else ""
        excluded = "; ".join(f"{node} is excluded: {problem}" for node, problem in bad.items())
        print(f"preflight: {excluded or f'{len(nodes)} nodes passed'}{speed}", file=sys.stderr, flush=True)
    return bad


def _end_here(run: RunDirectory, outcome: Outcome, code: int, reason: str) -> list[str]:
    """Record an attempt that is not started, and make the script exit."""
    _record(run, AttemptOutcome(attempt=run.next_attempt(), outcome=outcome, exit_code=code, reason=reason))
    seal_ended(run)
    print(f"{run.path.name} {outcome}: {reason}", file=sys.stderr)
    return [f"exit {code}"]


def newest_step(run: RunDirectory) -> int | None:
    """Return the step of the newest committed checkpoint."""
    return max((checkpoint.step for checkpoint in CheckpointStore(run.checkpoints_dir).committed()), default=None)


def _explain_silence(run: RunDirectory) -> None:
    """Record how the last attempt ended if `end` could not.

    The node of the job script was lost, or SLURM killed the script before srun returned.
    """
    events = run.events()
    begun = [event for event in events if isinstance(event, Allocated)]
    if not begun:
        return
    attempt, nodes = begun[-1].attempt, begun[-1].nodes
    ends = [end for end in run.attempts() if end.attempt >= attempt]
    outcome = ends[-1].outcome if ends else None
    is_told = outcome in ("finished", "stopped") or any(
        event.event in ("failed", "hung", "requeued") and event.time > begun[-1].time for event in events
    )
    if is_told:
        return
    slurm_reason = ending.by_slurm(run, str(begun[-1].slurm_job_id), attempt)
    if outcome == "requeue":  # the ranks had saved
        attempt, step = ends[-1].attempt, ends[-1].step
        _record(run, _requeued(attempt, f"saved: {slurm_reason or 'preempted'}", step))
        return
    lost = lost_nodes.sentence(lost_nodes.note_lost(run, nodes))
    reason = lost or slurm_reason or f"{nodes[0]}, where the job script ran, was lost"
    _record(run, _requeued(attempt, f"not saved: {reason}"))


def _without_progress(run: RunDirectory, step: int | None) -> int:
    """Count the latest allocations in a row that began with the checkpoint that is still the newest."""
    count = 0
    for event in reversed(run.events()):
        if isinstance(event, (Queued, Resumed)):  # the user has submitted or resumed the run
            break
        if isinstance(event, Allocated) and event.event == "allocated":
            if event.checkpoint != step:
                break
            count += 1
    return count


def end(run: RunDirectory, code: int) -> int:
    """Record the end of srun with `code`; return the exit code of the script, or 75 to try again."""
    attempt, job_id = int(os.environ["TRAINER_ATTEMPT"]), os.environ["SLURM_JOB_ID"]
    record = next((end for end in reversed(run.attempts()) if end.attempt >= attempt), None)
    if record is not None:
        attempt = record.attempt
        if record.restarted and run.attempt_logs(attempt + 1).is_dir():
            attempt, record = attempt + 1, None  # torchrun had begun another, and was killed
    outcome = record.outcome if record else None
    if run.stop_request.exists() and outcome in (None, "requeue", "hung"):
        _record(run, AttemptOutcome(attempt=attempt, outcome="stopped", exit_code=DONE, reason="stop requested"))
        return DONE
    if record and (outcome in ("finished", "stopped") or record.code in _HOPELESS):
        _say(attempt, record.outcome, record.step, record.reason)
        return record.code
    job = patiently(lambda: query.job(job_id))
    is_running = job.get("JobState") == "RUNNING"
    slurm_reason = ending.by_slurm(run, job_id, attempt)
    if outcome == "requeue":
        slurm_reason = slurm_reason or ("its time limit was near" if is_running else "preempted")
        _record(run, _requeued(attempt, f"saved: {slurm_reason}", record.step if record else None))
    elif is_running:
        return _after_failure(run, attempt, code, record)
    else:
        lost = lost_nodes.note_lost(run, query.hostnames(os.environ["SLURM_JOB_NODELIST"]))
        reason = lost_nodes.sentence(lost) or slurm_reason or f"the job is {job.get('JobState', 'gone')}"
        _record(run, _requeued(attempt, f"not saved: {reason}"))
    if is_running or slurm_reason == ending.TIME_LIMIT:
        return requeue(run)
    if int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        run.add_event(Requeued(slurm_job_id=job_id))
        lost_nodes.exclude(run, job_id)
    return JOB_FAILED


def _after_failure(run: RunDirectory, attempt: int, code: int, record: AttemptOutcome | None) -> int:
    """Handle the death of ranks, or of their supervisor, while the job is still running.

    The job is tried again on the same nodes if they are up and it has not failed too often since the newest checkpoint.
    """
    lost = lost_nodes.note_lost(run, query.hostnames(os.environ["SLURM_JOB_NODELIST"]))
    if lost:
        _record(run, _requeued(attempt, f"not saved: {lost_nodes.sentence(lost)}"))
        return requeue(run)
    is_single = int(os.environ[NODES_VARIABLE]) == 1
    if record and is_single:  # torchrun has used up its restarts
        run.add_event(_ended(record.outcome, attempt, record.step, record.reason))
        _say(attempt, record.outcome, record.step, record.reason)
        return record.code
    root_cause = cause.find(run, attempt, run.node_log(attempt, 0))
    if record and record.restarted:  # the node process has recorded the hang
        root_cause = replace(root_cause, reason=record.reason)
    if record is None and root_cause.exit_code is None and not cause.is_traceback(root_cause):
        root_cause = cause.Cause(
            f"its processes were killed: srun ended with {code}", root_cause.lines, root_cause.log, None
        )
    failures = _failures_since_checkpoint(run, attempt)
    goes_on = failures <= int(run.config()["resilience"]["max_restarts"])
    outcome: Outcome = record.outcome if record else "failed"
    exit_code = record.code if record else JOB_FAILED
    end = AttemptOutcome(
        attempt=attempt,
        outcome=outcome,
        exit_code=exit_code,
        reason=root_cause.reason,
        restarted=goes_on,
        log=str(root_cause.log.relative_to(run.path)) if root_cause.log else None,
        lines=root_cause.lines,
        rank=root_cause.rank,
        host=root_cause.host,
        where=root_cause.where,
        mend=root_cause.mend,
    )
    _record(run, end)
    return REQUEUE if goes_on else exit_code or JOB_FAILED


def _failures_since_checkpoint(run: RunDirectory, attempt: int) -> int:
    """Count the attempts of this allocation, beginning with the one that committed the newest checkpoint."""
    events = run.events()
    first = [one.attempt for one in events if isinstance(one, Allocated) and one.event == "allocated"]
    writers = [one.attempt for one in events if isinstance(one, CheckpointSaved) and one.attempt is not None]
    return attempt - max([*first[-1:], *writers[-1:]], default=attempt) + 1


def requeue(run: RunDirectory) -> int:
    """Requeue this job. If SLURM refuses, submit another job of the same run."""
    job_id = os.environ["SLURM_JOB_ID"]
    try:
        patiently(lambda: call("scontrol", "requeue", job_id))
    except SlurmRefused as refused:
        print(f"SLURM does not requeue this job ({refused}); submitting another", file=sys.stderr, flush=True)
        other = submit(script_path(run), Path(run.launch().cwd or "."), f"--dependency=afterany:{job_id}")
        run.write_launch(replace(run.launch(), slurm_job_id=other))
        run.add_event(Requeued(slurm_job_id=other))
        return DONE
    run.add_event(Requeued(slurm_job_id=job_id))
    lost_nodes.exclude(run, job_id)
    return DONE


def _record(run: RunDirectory, record: AttemptOutcome) -> None:
    """Write how an attempt ended, with the time, and the last step if the record has none."""
    step = run.last_step(record.attempt) if record.step is None else record.step
    record = replace(record, step=step, time=time.time())
    before = run.outcome(record.attempt)
    run.write_outcome(record)
    if not record.restarted and (before is None or before.outcome != "requeue"):
        # Otherwise the rank wrote the event when it saved.
        run.add_event(_ended(record.outcome, record.attempt, step, record.reason))
    _say(record.attempt, "died" if record.restarted else record.outcome, step, record.reason)


def _requeued(attempt: int, reason: str, step: int | None = None) -> AttemptOutcome:
    return AttemptOutcome(attempt=attempt, outcome="requeue", exit_code=REQUEUE, reason=reason, step=step)


def _ended(outcome: Outcome, attempt: int, step: int | None, reason: str) -> Ended:
    return Ended(event="preempted" if outcome == "requeue" else outcome, attempt=attempt, step=step, reason=reason)


def _say(attempt: int, outcome: str, step: int | None, reason: str | None) -> None:
    print(
        f"attempt {attempt} {outcome} at step {step}" + (f": {reason}" if reason else ""), file=sys.stderr, flush=True
    )


def main(arguments: list[str]) -> int:
    """Run `begin` or `end`, and return the exit code."""
    verb, run = arguments[0], RunDirectory(Path(arguments[1]))
    herald = Herald(run, output=sys.stderr)  # bash reads what `begin` prints
    if verb == "begin":
        lines = begin(run)
        if any(line.startswith("exit") for line in lines):
            herald.close(is_due=True)
        else:
            herald.start()  # that it was requeued, if SLURM ended the last attempt too early for that
        print("\n".join(lines))
        return DONE
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it more than once
    code = end(run, int(arguments[2]))
    herald.close()  # first: SLURM may end this process soon after a requeue
    from trainer.report import write  # only at the end

    write.at_end(run, on_slurm=True)
    if code != REQUEUE:
        seal_ended(run)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (TrainerError, SlurmRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", JOB_FAILED))

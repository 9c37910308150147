"""Run a sweep on SLURM: one job array for up to a thousand trials, whose tasks claim their trial when they start.

Of grid, random and Sobol sweeps the array index is the trial. A task of an adaptive sweep claims the next trial. A task
that finds its trial claimed by a living job, or done, ends at once: so nothing is trained twice if an array is
submitted twice, and correctness never depends on what SLURM has replied.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from trainer.config.instantiate import read_plain
from trainer.config.shape import resolve
from trainer.core import processes
from trainer.core.errors import EnvironmentFault
from trainer.core.files import write_atomic
from trainer.slurm import render, resources
from trainer.slurm.commands import SlurmRefused
from trainer.slurm.commands import run as call
from trainer.slurm.submit import submit
from trainer.sweeps import decide
from trainer.sweeps.advance import completed, myself
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import TrialView, settle, views
from trainer.sweeps.records import ADAPTIVE, Array, ArrayJob, Spec

_MOST_INDEX = 1000
"""Indices of an array where SLURM does not say how many it allows: MaxArraySize is 1001 by default."""
_FRESH_S = 60.0
"""squeue may have been asked before an array of this age was submitted."""
Submit = Literal["all", "lost", "nothing"]
_TASK = re.compile(r"([0-9]+)_([0-9]+)")


def advance(sweep: SweepDirectory, spec: Spec, *, submit: Submit) -> list[TrialView]:
    """Record what has ended, find lost submissions, and return the trials.

    Args:
        sweep: The sweep.
        spec: Its spec.
        submit: Also submit arrays for the trials that no job will train: for all, or for those that lost theirs.
    """
    states = states_of(sweep)
    found = completed(sweep, spec, settle(sweep, spec, views(sweep, states)))
    if states is None:
        return found
    _note_jobs(sweep, states)
    if submit != "nothing" and not decide.why_stopped(spec, found, is_stopped=sweep.stop_request.exists()):
        _submit(sweep, spec, found, states, only_lost=submit == "lost")
    return found


def states_of(sweep: SweepDirectory) -> dict[str, str] | None:
    """Return the state of the user's jobs of this sweep by id, from one call of squeue; None if SLURM does not respond.

    A task of an array has its own id once it runs; one that waits is named ARRAY_INDEX, and its array by its id.
    """
    try:
        printed = call("squeue", "--noheader", "--array", "--me", "--format=%A|%i|%T|%k")
    except (EnvironmentFault, SlurmRefused):
        return None
    found: dict[str, str] = {}
    for line in printed.splitlines():
        job, task, state, comment = [*line.split("|", 3), "", "", ""][:4]
        if not comment.startswith(_comment(sweep.path.name)):
            continue
        found[task] = state
        if found.get(job, "PENDING") == "PENDING":  # a waiting task has the id of its array, if it never ran
            found[job] = state
        found.setdefault(f"comment:{comment}", task.partition("_")[0])
    return found


def _comment(name: str) -> str:
    return f"trainer-sweep:{name}"


def _note_jobs(sweep: SweepDirectory, states: Mapping[str, str]) -> None:
    """Note the job of each array whose submitter died before it did, found again by its comment."""
    for number, (array, job) in sweep.arrays().items():
        found = states.get(f"comment:{array.comment}")
        if job is None and found is not None:
            sweep.add_array_job(number, ArrayJob(slurm_job_id=found))


def _submit(
    sweep: SweepDirectory, spec: Spec, found: list[TrialView], states: Mapping[str, str], *, only_lost: bool
) -> None:
    """Submit the trials that no living owner and no waiting task has."""
    free = [view for view in found if view.result is None and not view.is_alive]
    lost = [view.number for view in free if view.owner is not None]
    if spec.method in ADAPTIVE:
        undecided = _undecided(spec, found, only_lost=only_lost)
        left = len(lost if only_lost else free) + undecided - _waiting_tasks(sweep, states)
        if left > 0:
            _submit_array(sweep, spec, 0, list(range(left)))
        return
    covered = _covered(sweep, states)
    wanted = [number for number in (lost if only_lost else [view.number for view in free]) if number not in covered]
    most = _most_index() if wanted else 1
    for begin in range(0, spec.trials if wanted else 0, most):
        part = [number - begin for number in wanted if begin <= number < begin + most]
        if part:
            _submit_array(sweep, spec, begin, part)


def _undecided(spec: Spec, found: list[TrialView], *, only_lost: bool) -> int:
    """Return how many trials are to be asked for: all that are left, or those of the generation that may begin.

    The end of a generation submits the next one, also where only lost trials are submitted.
    """
    left = max(0, spec.trials - len(found))
    if spec.generation is None:
        return 0 if only_lost else left
    into = len(found) % spec.generation
    if into == 0 and any(view.result is None for view in found):
        return 0
    return min(left, spec.generation - into)


def _covered(sweep: SweepDirectory, states: Mapping[str, str]) -> set[int]:
    """Return the trials whose task waits, or was submitted so recently that it may not be known."""
    covered: set[int] = set()
    for array, job in sweep.arrays().values():
        if _is_unknown(array, job, states):
            covered.update(array.first + index for index in expanded(array.indices))
        elif job is not None:
            waiting = [task for task, state in states.items() if state == "PENDING" and _index(task, job) is not None]
            covered.update(array.first + (_index(task, job) or 0) for task in waiting)
    return covered


def _is_unknown(array: Array, job: ArrayJob | None, states: Mapping[str, str]) -> bool:
    """Return whether the array is being submitted, or was since squeue was asked."""
    if job is None:
        return processes.boot_id() == array.boot_id and processes.is_alive(array.pid, array.pid_started)
    is_listed = any(_index(task, job) is not None for task in states)
    return not is_listed and time.time() - array.time < _FRESH_S


def _index(task: str, job: ArrayJob) -> int | None:
    match = _TASK.fullmatch(task)
    return int(match[2]) if match and match[1] == job.slurm_job_id else None


def _waiting_tasks(sweep: SweepDirectory, states: Mapping[str, str]) -> int:
    fresh = [array for array, job in sweep.arrays().values() if _is_unknown(array, job, states)]
    waiting = sum(state == "PENDING" and _TASK.fullmatch(task) is not None for task, state in states.items())
    return waiting + sum(len(expanded(array.indices)) for array in fresh)


def _submit_array(sweep: SweepDirectory, spec: Spec, first: int, indices: list[int]) -> None:
    """Decide on an array, submit it and note its job."""
    me = myself(0, None)
    number = max(sweep.arrays(), default=-1) + 1
    comment = f"{_comment(sweep.path.name)}:{number}"
    array = Array(
        first=first,
        indices=compact(indices),
        comment=comment,
        host=me.host,
        boot_id=me.boot_id,
        pid=me.pid,
        pid_started=me.pid_started,
        time=time.time(),
    )
    if not sweep.add_array(number, array):
        return  # another process submits now; the next advance sees what is left
    throttle = f"%{spec.at_once}" if spec.at_once else ""
    script = sweep.path / "sweep.sbatch"
    if not script.exists():
        write_atomic(script, script_of(sweep, spec))
    options = (
        f"--array={array.indices}{throttle}",
        f"--comment={comment}",
        f"--export=ALL,TRAINER_SWEEP_FIRST={first}",
    )
    job = submit(script, Path(spec.cwd), *options)
    sweep.add_array_job(number, ArrayJob(slurm_job_id=job))


def script_of(sweep: SweepDirectory, spec: Spec) -> str:
    """Return the job script of the sweep: that of a run, whose run is chosen when a task starts."""
    config = read_plain(sweep.path / "base.yaml")
    shape = resolve(config)
    placeholder = Path(spec.runs_dir) / sweep.path.name
    text = render.script(config, shape, placeholder, Path(spec.cwd), resources.cpus_per_process(config, shape))
    text = re.sub(r"(?m)^#SBATCH --output=.*$", f"#SBATCH --output={sweep.logs_dir}/slurm-%j.log", text, count=1)
    task, path = '"$python" -m trainer.cli.sweep_task', shlex.quote(str(sweep.path))
    begin = f'run_dir=$({task} begin {path}) || exit\n[ -n "$run_dir" ] || exit 0\n\n'
    end = f'    [ $code -eq 75 ] && continue\n    {task} end {path} "$run_dir" $code\n    exit $code\n'
    for old, new in (
        (f"run_dir={shlex.quote(str(placeholder))}\n", ""),
        ("# At the time limit,", f"{begin}# At the time limit,"),
        ("    [ $code -eq 75 ] || exit $code\n", end),
    ):
        if text.count(old) != 1:
            raise EnvironmentFault(f"slurm/job.sbatch has no line {old.strip()!r}", "restore it: a sweep replaces it")
        text = text.replace(old, new)
    return text


def cancel_waiting(sweep: SweepDirectory) -> None:
    """Cancel the tasks that wait; those that run are asked to stop one by one.

    Raises:
        EnvironmentFault: SLURM does not respond.
    """
    jobs = [job.slurm_job_id for _, job in sweep.arrays().values() if job is not None]
    states = states_of(sweep)
    if states is None:
        raise EnvironmentFault("SLURM does not respond", "try again in a minute: trainer sweep stop")
    alive = {task.partition("_")[0] for task in states}
    for job in [one for one in jobs if one in alive and one.isdigit()]:
        try:
            call("scancel", "--state=PENDING", job)
        except SlurmRefused:  # it has just started or ended
            pass


def _most_index() -> int:
    """Return the number of indices that an array may have."""
    try:
        printed = call("scontrol", "show", "config")
    except (EnvironmentFault, SlurmRefused):
        return _MOST_INDEX
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", printed)
    return max(1, int(match[1]) - 1) if match else _MOST_INDEX


def compact(numbers: Iterable[int]) -> str:
    """Return SLURM's list of indices: `0-3,7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def expanded(text: str) -> list[int]:
    """Return the numbers of a list of `compact`."""
    ranges = [part.partition("-") for part in text.split(",")]
    return [number for low, _, high in ranges for number in range(int(low), int(high or low) + 1)]

"""Submit a run to SLURM through its job script."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.problems import raise_all
from trainer.config.shape import LaunchShape, resolve
from trainer.config.typed import problems_of
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Queued
from trainer.runs.records import Launch
from trainer.runs.registry import reference_to
from trainer.slurm import render, resources
from trainer.slurm.commands import SlurmRefused, is_here
from trainer.slurm.commands import run as call
from trainer.slurm.options import check_values

_INPUT_VARIABLE = {"time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE", "signal": "SBATCH_SIGNAL"}
"""Options of sbatch whose environment variable has another name; man sbatch, INPUT ENVIRONMENT VARIABLES."""


def script_path(run: RunDirectory) -> Path:
    """Return the path of the job script."""
    return run.path / "job.sbatch"


def preview(config: dict[str, Any], launch_shape: LaunchShape) -> str:
    """Return the job script of a run that does not exist yet."""
    path = Path(config["runs_dir"]).expanduser().absolute() / f"{config['name']}-ID"
    return render.script(config, launch_shape, path, Path.cwd(), resources.cpus_per_process(config, launch_shape))


def try_out(config: dict[str, Any], launch_shape: LaunchShape) -> None:
    """Validate the job with `sbatch --test-only`, if SLURM is installed here.

    Raises:
        UserError: SLURM refuses the job.
    """
    if not is_here():
        return
    text = preview(config, launch_shape)
    command = ("sbatch", "--test-only", f"--chdir={Path.cwd()}")
    try:
        call(*command, environment=_environment(os.environ, _options(text)), standard_input=text)
    except SlurmRefused as refused:
        raise _refusal(refused) from None


def _refusal(refused: SlurmRefused) -> UserError:
    message = str(refused).replace("allocation failure: ", "").replace("Batch job submission failed: ", "")
    return UserError(f"SLURM refuses the job: {message}", "change the option that it names (cluster.*, resources.*)")


class SlurmLauncher:
    """Submits runs to SLURM.

    Args:
        keep_script: Submit the existing job script, which may have been edited.
        after: Id of a job to start after, in addition to `cluster.dependency`.
    """

    def __init__(self, keep_script: bool = False, after: str | None = None) -> None:
        self.keep_script = keep_script
        self.after = after

    def launch(self, run: RunDirectory) -> None:
        """Submit `run` and write the id of its job into `launch.json`. The run is kept on errors.

        Raises:
            UserError: SLURM refuses the job.
            EnvironmentFault: SLURM does not respond.
        """
        before = run.launch()
        config = run.config()
        launch_shape = before.shape or resolve(config)
        cwd = Path(before.cwd or os.getcwd())
        launch = Launch(cluster="slurm", shape=launch_shape, cwd=str(cwd), attempt=run.next_attempt())
        launch = replace(launch, trusted=before.trusted)
        if not (self.keep_script and script_path(run).exists()):
            _judge(config["cluster"])
            cpus = resources.cpus_per_process(config, launch_shape)
            text = render.script(config, launch_shape, run.path, cwd, cpus)
            write_atomic(script_path(run), text)
        # The job reads these files, and may start before sbatch returns.
        was_asked_to_stop = run.stop_request.read_text() if run.stop_request.exists() else None
        run.stop_request.unlink(missing_ok=True)
        run.write_launch(launch)
        try:
            job_id = submit(script_path(run), cwd, *self._dependency(config))
        except TrainerError as error:
            run.write_launch(before)
            if was_asked_to_stop is not None:
                write_atomic(run.stop_request, was_asked_to_stop)
            error.fix += f"; the run is kept: trainer resume {reference_to(run)} submits it again"
            raise
        run.write_launch(replace(launch, slurm_job_id=job_id))
        run.add_event(Queued(slurm_job_id=job_id))

    def _dependency(self, config: dict[str, Any]) -> list[str]:
        """Return the option for the command line, not for the script, which may be submitted again separately."""
        if self.after is None:
            return []
        return ["--dependency=" + ",".join(filter(None, [config["cluster"]["dependency"], f"afterany:{self.after}"]))]


def _judge(cluster: dict[str, Any]) -> None:
    """Check the frozen section again, because the file may have been changed since it was checked.

    Raises:
        UserError: A value could end a line of the job script, or SLURM refuses it.
    """
    raise_all(problems_of("cluster", cluster))
    raise_all(list(check_values(cluster)))


def submit(script: Path, cwd: Path, *options: str) -> str:
    """Submit the script with sbatch, and return the id of the job. `options` come before the script."""
    names = _options(script.read_text())
    command = ("sbatch", "--parsable", f"--chdir={cwd}", *options, str(script))
    try:
        printed = call(*command, environment=_environment(os.environ, names))
    except SlurmRefused as refused:
        raise _refusal(refused) from None
    job_id = printed.strip().partition(";")[0]
    if not job_id.isdigit():
        raise EnvironmentFault(f"sbatch printed no job id but {printed.strip()!r}", "see squeue --me")
    return job_id


def _options(script: str) -> set[str]:
    """Return the names of the sbatch options in a script, without dashes."""
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {line.removeprefix("#SBATCH --").partition("=")[0] for line in directives}


def _environment(inherited: Mapping[str, str], options: set[str]) -> dict[str, str]:
    """Return the environment without variables that override options of the script or describe an enclosing job."""
    overriding = {_INPUT_VARIABLE.get(name, "SBATCH_" + name.replace("-", "_").upper()) for name in options}
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in inherited.items()
        if name in kept or not (name in overriding or name.startswith(("SLURM_", "SLURMD_", "SRUN_", "TRAINER_")))
    }

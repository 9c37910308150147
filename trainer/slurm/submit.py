"""Submitting a run to SLURM: through its job script, which is all that SLURM is given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.shape import LaunchShape, resolve
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Queued
from trainer.runs.records import Launch
from trainer.runs.registry import reference_to
from trainer.slurm import render, resources
from trainer.slurm.commands import SlurmRefused, is_here
from trainer.slurm.commands import run as call

_INPUT_VARIABLE = {"time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE", "signal": "SBATCH_SIGNAL"}
"""Of sbatch's options those whose variable has another name; man sbatch, INPUT ENVIRONMENT VARIABLES."""


def script_path(run: RunDirectory) -> Path:
    return run.path / "job.sbatch"


def preview(config: dict[str, Any], launch_shape: LaunchShape) -> str:
    """The job script of a run that is not made yet."""
    path = Path(config["runs_dir"]).expanduser().absolute() / f"{config['name']}-ID"
    return render.script(config, launch_shape, path, Path.cwd(), resources.cpus_per_process(config, launch_shape))


def try_out(config: dict[str, Any], launch_shape: LaunchShape) -> None:
    """Let SLURM, where it is here, judge the job without submitting it. Raises UserError with what it objects to."""
    if not is_here():
        return
    text = preview(config, launch_shape)
    command = ("sbatch", "--test-only", f"--chdir={Path.cwd()}")
    try:
        call(*command, environment=_environment(os.environ, _options(text)), standard_input=text)
    except SlurmRefused as refused:
        raise _refusal(refused) from None


def _refusal(refused: SlurmRefused) -> UserError:
    told = str(refused).replace("allocation failure: ", "").replace("Batch job submission failed: ", "")
    return UserError(f"SLURM refuses the job: {told}", "change the option that it names (cluster.*, resources.*)")


class SlurmLauncher:
    """Submits runs. `keep_script`: submit the script that is there, as a person may have changed it. `after`: id of a
    job that must have ended first, besides `cluster.dependency`."""

    def __init__(self, keep_script: bool = False, after: str | None = None) -> None:
        self.keep_script = keep_script
        self.after = after

    def launch(self, run: RunDirectory) -> None:
        """Submit `run` and write the id of its job into `launch.json`.

        Raises UserError for what SLURM refuses, EnvironmentFault where it does not answer; the run is kept.
        """
        before = run.launch()
        config = run.config()
        launch_shape = before.shape or resolve(config)
        cwd = Path(before.cwd or os.getcwd())
        launch = Launch(cluster="slurm", shape=launch_shape, cwd=str(cwd), attempt=run.next_attempt())
        if not (self.keep_script and script_path(run).exists()):
            cpus = resources.cpus_per_process(config, launch_shape)
            text = render.script(config, launch_shape, run.path, cwd, cpus)
            write_atomic(script_path(run), text)
        # The job reads these, and may begin before sbatch has returned.
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
        """On the command line, where it overrides the script's: the script may be submitted again, alone."""
        if self.after is None:
            return []
        return ["--dependency=" + ",".join(filter(None, [config["cluster"]["dependency"], f"afterany:{self.after}"]))]


def submit(script: Path, cwd: Path, *options: str) -> str:
    """sbatch the script; the id of the job. `options` go before the script."""
    names = _options(script.read_text())
    command = ("sbatch", "--parsable", f"--chdir={cwd}", *options, str(script))
    try:
        printed = call(*command, environment=_environment(os.environ, names))
    except SlurmRefused as refused:
        raise _refusal(refused) from None
    job_id = printed.strip().partition(";")[0]
    if not job_id.isdigit():
        raise EnvironmentFault(f"sbatch printed no job id but {printed.strip()!r}", "look at squeue --me")
    return job_id


def _options(script: str) -> set[str]:
    """Names of the options that a script gives to sbatch, without dashes."""
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {line.removeprefix("#SBATCH --").partition("=")[0] for line in directives}


def _environment(inherited: Mapping[str, str], options: set[str]) -> dict[str, str]:
    """Without what would override the script's own options, and without the job that this may be running in."""
    overriding = {_INPUT_VARIABLE.get(name, "SBATCH_" + name.replace("-", "_").upper()) for name in options}
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in inherited.items()
        if name in kept or not (name in overriding or name.startswith(("SLURM_", "SLURMD_", "SRUN_", "TRAINER_")))
    }

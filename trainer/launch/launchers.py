"""The launcher of each cluster, by `cluster.name`, and what else differs between them before a launch."""

from __future__ import annotations

from typing import Any, Protocol

from trainer.config.shape import LaunchShape
from trainer.runs.directory import RunDirectory


class Launcher(Protocol):
    """Starts a run, or has it started."""

    def launch(self, run: RunDirectory) -> None: ...


def launcher(cluster: str, *, detached: bool, keep_script: bool = False, after: RunDirectory | None = None) -> Launcher:
    """`detached`: the run goes on without the command that launched it, as on SLURM it always does. `keep_script`:
    submit the job script of the last launch as it is by now. `after`: not before that run has ended (SLURM)."""
    if cluster == "slurm":
        from trainer.slurm.submit import SlurmLauncher

        return SlurmLauncher(keep_script, str(after.launch()["slurm_job_id"]) if after else None)
    from trainer.launch.local import LocalLauncher

    return LocalLauncher(detached)


def prepare(config: dict[str, Any]) -> None:
    """Fill in what of `resources` only the cluster knows."""
    if config["cluster"]["name"] == "slurm":
        from trainer.slurm import resources

        resources.choose_nodes(config)


def check(config: dict[str, Any], shape: LaunchShape) -> None:
    """Raise UserError for what this cluster would refuse or never run."""
    if config["cluster"]["name"] == "slurm":
        from trainer.slurm import resources as slurm_shape
        from trainer.slurm import submit

        slurm_shape.check(config, shape)
        submit.try_out(config, shape)


def preview(config: dict[str, Any], shape: LaunchShape) -> str | None:
    """The job script that would be submitted; null where there is none."""
    if config["cluster"]["name"] != "slurm":
        return None
    from trainer.slurm.submit import preview as preview_script

    return preview_script(config, shape)


def cost(config: dict[str, Any], shape: LaunchShape) -> str | None:
    """What an allocation may use at the most; null where nothing is asked of anybody, or no limit is known."""
    if config["cluster"]["name"] != "slurm":
        return None
    from trainer.slurm.resources import cost as cost_of

    return cost_of(config, shape)


def signal_stop(run: RunDirectory) -> None:
    """Tell a run that its `control/stop` is there, where it would not look soon; one that only waits is cancelled."""
    if run.launch().get("slurm_job_id"):
        from trainer.slurm.stop import stop

        stop(run)


def cancel(run: RunDirectory) -> None:
    """Take a run's job from SLURM at once."""
    from trainer.slurm.stop import cancel as cancel_job

    cancel_job(run)

"""Choose the launcher by `cluster.name`, and run the cluster-specific steps before a launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from trainer.config.shape import LaunchShape
from trainer.runs.directory import RunDirectory

if TYPE_CHECKING:
    from trainer.supervise.ahead import NodeAhead


class Launcher(Protocol):
    """Starts a run, or submits it."""

    def launch(self, run: RunDirectory) -> None:
        """Start or submit `run`."""


def launcher(
    cluster: str,
    *,
    detached: bool,
    keep_script: bool = False,
    after: RunDirectory | None = None,
    ahead: NodeAhead | None = None,
) -> Launcher:
    """Return the launcher of a cluster.

    Args:
        cluster: `cluster.name`.
        detached: The run continues without the command that launched it. On SLURM it always does.
        keep_script: Submit the existing job script, which may have been edited.
        after: Start after this run ends (SLURM).
        ahead: The result of `start_ahead`.
    """
    if cluster == "slurm":
        from trainer.slurm.submit import SlurmLauncher

        return SlurmLauncher(keep_script, after.launch().slurm_job_id if after else None)
    from trainer.launch.local import LocalLauncher

    return LocalLauncher(detached, ahead)


@contextmanager
def start_ahead(config: dict[str, Any]) -> Iterator[NodeAhead | None]:
    """Start what a job on this machine needs before it is checked, and end it if the job is not launched."""
    if config["cluster"].get("name") != "local":
        yield None
        return
    from trainer.launch import local

    ahead = local.start_ahead(config)
    try:
        yield ahead
    finally:
        if ahead is not None:
            ahead.close()


def prepare(config: dict[str, Any]) -> None:
    """Set the `resources` that depend on the cluster."""
    if config["cluster"]["name"] == "slurm":
        from trainer.slurm import resources

        resources.choose_nodes(config)


def check(config: dict[str, Any], shape: LaunchShape) -> None:
    """Check the job against the cluster.

    Raises:
        UserError: The cluster would refuse the job or never run it.
    """
    if config["cluster"]["name"] == "slurm":
        from trainer.slurm import resources as slurm_shape
        from trainer.slurm import submit

        slurm_shape.check(config, shape)
        submit.try_out(config, shape)


def preview(config: dict[str, Any], shape: LaunchShape) -> str | None:
    """Return the job script that would be submitted; None on a cluster without one."""
    if config["cluster"]["name"] != "slurm":
        return None
    from trainer.slurm.submit import preview as preview_script

    return preview_script(config, shape)


def cost(config: dict[str, Any], shape: LaunchShape) -> str | None:
    """Return the maximum cost of an allocation; None on this machine, and without a time limit."""
    if config["cluster"]["name"] != "slurm":
        return None
    from trainer.slurm.resources import cost as cost_of

    return cost_of(config, shape)


def time_limit_s(config: dict[str, Any]) -> int | None:
    """Return the time limit of an allocation; None on this machine, and where it is not known."""
    if config["cluster"]["name"] != "slurm":
        return None
    from trainer.slurm.resources import time_limit_s as limit_of

    return limit_of(config)


def signal_stop(run: RunDirectory) -> None:
    """Notify a SLURM job of its `control/stop`; cancel it if it is pending."""
    if run.launch().slurm_job_id:
        from trainer.slurm.stop import stop

        stop(run)


def cancel(run: RunDirectory) -> None:
    """Cancel the SLURM job of a run."""
    from trainer.slurm.stop import cancel as cancel_job

    cancel_job(run)

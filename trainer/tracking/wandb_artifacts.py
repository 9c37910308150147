"""Artifacts of the W&B run: the frozen code, and checkpoints.

The client copies the files of an artifact to `wandb/artifacts/staging` of the run directory before it uploads them: so
a checkpoint may be deleted right after. Offline they are uploaded by `trainer sync`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.store import Checkpoint
from trainer.runs.directory import RunDirectory


def log_code(experiment: Any, run: RunDirectory) -> None:
    """Log the frozen code and the job script. Links, which lead out of the run directory, are left out."""
    import wandb

    artifact = wandb.Artifact(f"code-{run.id}", type="code", description=f"Code of {run.path.name}")
    for path in sorted(run.code_dir.rglob("*")):
        if path.is_file() and not any(one.is_symlink() for one in (path, *path.parents)):
            artifact.add_file(str(path), name=str(path.relative_to(run.path)))
    script = run.path / "job.sbatch"
    if script.is_file():
        artifact.add_file(str(script), name=script.name)
    experiment.log_artifact(artifact)


def log_checkpoint(
    experiment: Any, run: RunDirectory, checkpoint: Checkpoint, is_best: bool, which: Literal["none", "best", "all"]
) -> None:
    """Log a committed checkpoint, if `tracking.artifacts` asks for it.

    Args:
        experiment: wandb's Run.
        run: The run directory.
        checkpoint: The checkpoint.
        is_best: Whether it is the best of the run.
        which: `tracking.artifacts`.
    """
    import wandb

    if which == "none" or (which == "best" and not is_best):
        return
    metadata = {"step": checkpoint.step, "epoch": checkpoint.epoch, "metrics": checkpoint.metrics, "run": run.id}
    artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=metadata)
    artifact.add_dir(str(Path(checkpoint.path)))
    aliases = ["latest", f"step-{checkpoint.step}", *(["best"] if is_best else [])]
    experiment.log_artifact(artifact, aliases=aliases)

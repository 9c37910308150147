"""Projects in the style of other people's: each trains, is killed, resumes exactly, and its checkpoint can be used.

They were written for this suite, after the ways of lightning-hydra-template, Lightning's GAN, text and ImageNet
examples, SimCLR and BYOL, DDPM, torchvision's detection, nanoGPT, torch_geometric and k-fold cross validation.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy

from tests.conftest import TrainerCli

HERE = Path(__file__).parent
TWO_RANKS = ["resources.gpus=0", "resources.cpu_processes=2"]
VERIFY = ["--kills", "2", "--keep", "verified"]


@dataclass(frozen=True)
class Project:
    """A folder beside this file, the experiment in it that is trained, and what comes out of a checkpoint."""

    folder: str
    experiment: str
    metric: str
    """That `evaluate` reports for the test data."""
    rows: int
    """That `predict` gives for the test data."""
    steps: int
    """That are trained: a few more than an epoch has."""
    output: str = "predictions"


def check_project(trainer_cli: TrainerCli, workdir: Path, project: Project) -> None:
    """Train, kill and resume the project; then evaluate, predict and export. Raises AssertionError."""
    shutil.copytree(HERE / project.folder, workdir, dirs_exist_ok=True)
    job = [f"experiment={project.experiment}", *TWO_RANKS]
    # The ranks are killed, which torchrun starts again; then the whole job, for `trainer resume`.
    verified = trainer_cli("verify-resume", *job, "--steps", str(project.steps), *VERIFY, timeout=300)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "kills: 2" in verified.stdout
    assert "past the end of an epoch" in verified.stdout
    assert "equal bit for bit" in verified.stdout

    (run,) = (workdir / "verified" / "killed").iterdir()
    evaluated = trainer_cli("evaluate", str(run), "--json")
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    metrics = json.loads(evaluated.stdout)["metrics"]
    assert numpy.isfinite(metrics[project.metric])

    predicted = trainer_cli("predict", str(run), "--split", "test", "--json")
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    outputs = json.loads(predicted.stdout)["outputs"]
    assert outputs[project.output]["rows"] == project.rows

    exported = trainer_cli("export", str(run), "--out", "weights")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert list((workdir / "weights").rglob("*.safetensors"))

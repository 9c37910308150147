"""Projects on images, in the style of other people's; see project.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.projects.project import Project, check_project

PROJECTS = [
    Project("gan", "gan", "test_realism", 16, 10),
    pytest.param(Project("selfsup", "simclr", "test_loss", 16, 10, "features"), marks=pytest.mark.slow),
    Project("selfsup", "byol", "test/total_loss", 16, 10),
    Project("ddpm", "ddpm", "test/loss_simple", 16, 10),
    Project("detection", "shapes", "test_found", 9, 10),
    pytest.param(Project("imagenet", "imagenet", "test_acc1", 32, 11), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.experiment)
def test_project(trainer_cli: TrainerCli, workdir: Path, project: Project) -> None:
    check_project(trainer_cli, workdir, project)

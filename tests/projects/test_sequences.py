"""Projects on text, graphs and tables, and the template, in the style of other people's; see project.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.projects.project import Project, check_project

PROJECTS = [
    Project("template", "example", "test/acc", 32, 10),
    pytest.param(Project("bert", "glue", "test_loss", 33, 10), marks=pytest.mark.slow),
    Project("nanogpt", "char", "test/loss", 16, 20),
    Project("graphs", "gcn", "test_acc", 12, 11),
    Project("kfold", "cv", "test/auroc/dataloader_idx_0", 114, 12, "dataloader_idx_0.predictions"),
]


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.experiment)
def test_project(trainer_cli: TrainerCli, workdir: Path, project: Project) -> None:
    check_project(trainer_cli, workdir, project)

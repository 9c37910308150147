"""What an installed package holds: the configs, the SLURM template, the license, the types, one version."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import trainer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="./launch/test installs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_holds_what_a_job_needs(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {"trainer/py.typed", "trainer/_conf/config.yaml", "trainer/_slurm/job.sbatch"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trainer").rglob("*.py")}
    assert modules <= names
    assert any(name.startswith("trainer/cli/templates/") for name in names)
    assert "trainer/report/style.css" in names
    static = {str(path.relative_to(ROOT)) for path in (ROOT / "trainer/dashboard/static").rglob("*") if path.is_file()}
    assert {"trainer/dashboard/static/index.html", "trainer/dashboard/static/vendor/uplot/LICENSE"} <= static <= names


def test_its_metadata_has_the_version_and_the_license(wheel: zipfile.ZipFile) -> None:
    info = f"trainer-{trainer.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == trainer.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_changelog_has_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{trainer.__version__}] - " in changelog
    assert changelog.index("## [Unreleased]") < changelog.index(f"## [{trainer.__version__}]")

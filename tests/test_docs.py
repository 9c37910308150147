"""Every command in the README and in docs/ is run, in order, page by page, in an empty directory.

Trainings that name no number of steps are cut short, are of one rank where no more are asked for, and are not tracked:
what they learn is tested in tests/test_experiments.py, and W&B in tests/tracking.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("./launch/", "cluster=slurm")
"""What this suite is run by, and what tests/slurm submits to a real SLURM; here only their files are looked for."""
SHORT = " trainer.max_epochs=null trainer.max_steps=30 resources.cpu_processes=1 tracking=none"


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = clean_environment()
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("no_orphans")
def test_every_command_works(page: Path, workdir: Path) -> None:
    for kind, block in BLOCK.findall(page.read_text()):
        if kind == "console":
            assert_console(block, workdir)
            continue
        for command in filter(None, (line.partition("  #")[0].strip() for line in block.splitlines())):
            if any(word in command for word in ELSEWHERE):
                script = ROOT / command.split()[0]
                assert not command.startswith("./") or os.access(script, os.X_OK), command
                continue
            done = shell(command + SHORT * is_long(command), workdir)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def is_long(command: str) -> bool:
    return "trainer fit " in command and "max_steps" not in command


def assert_console(block: str, cwd: Path) -> None:
    """`$ command`, then the beginnings of lines that it prints."""
    for entry in filter(None, block.split("$ ")):
        command, _, expected = entry.partition("\n")
        done = shell(command, cwd)
        for line in filter(None, map(str.strip, expected.splitlines())):
            assert line in done.stdout + done.stderr, f"{command} printed\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target

"""The documentation site: its strict build and API reference; neither the build nor a reader needs a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.core.paths import conf_dir

ROOT = Path(__file__).parents[1]
WITHOUT_A_NETWORK = """
import socket, sys

def refuse(*arguments):
    raise OSError("the build of the site opens a connection")

socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*?\ssrc=["']?(?:https?:)?//|<link[^>]*?\shref=["']?(?:https?:)?//[^>]*"""
    r"""|@import\s+["']?(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)
"""What a browser fetches from another server without a click."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocstrings", reason="./launch/test installs the packages of the extra docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_NETWORK, "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_reader_needs_no_other_server(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    found = {(str(page.relative_to(site)), match[0]) for page in pages for match in LOADED.finditer(page.read_text())}
    assert found == set()


def test_what_a_configuration_names_is_in_the_reference(site: Path) -> None:
    files = "".join(path.read_text() for path in conf_dir().rglob("*.yaml"))
    named = set(re.findall(r"_target_: (trainer\.[\w.]+)", files))
    assert len(named) > 30
    reference = "".join(path.read_text() for path in (site / "reference").rglob("*.html"))
    assert {name for name in named if f'id="{name}"' not in reference} == set()


@pytest.mark.parametrize(
    "name",
    [
        "trainer.runs.directory.RunDirectory.events",
        "trainer.config.schema.TrainerOptions.max_steps",
        "trainer.config.strategy.Fsdp.cpu_offload",
        "trainer.config.cluster.Slurm.partition",
        "trainer.data.order.GlobalBatchSampler",
        "trainer.checkpoint.store.CheckpointStore.newest_good",
        "trainer.faultbench.inject.InjectFault",
    ],
)
def test_the_public_surface_is_in_the_reference(site: Path, name: str) -> None:
    assert any(f'id="{name}"' in path.read_text() for path in (site / "reference").rglob("*.html"))

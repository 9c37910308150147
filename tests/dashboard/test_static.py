"""The files of the page: nothing from elsewhere, no markup from text, others' code as it was published."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.dashboard.server import STATIC

SCRIPTS = sorted((STATIC / "js").glob("*.js"))
OWN = [*SCRIPTS, *STATIC.glob("*.css"), STATIC / "index.html"]


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_is_loaded_from_elsewhere(path: Path) -> None:
    addresses = re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z.]+", path.read_text())
    assert [one for one in addresses if not one.startswith("http://www.w")] == []  # the name of SVG


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_text_never_becomes_markup_or_code(path: Path) -> None:
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|javascript:|"
        r"createContextualFragment|setAttribute\([\"']on",
        path.read_text(),
    )
    assert found == []


def test_the_page_has_no_code_of_its_own() -> None:
    """The Content-Security-Policy forbids it, and it would not run."""
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=", page) == []


def test_uplot_is_as_it_was_published() -> None:
    folder = STATIC / "vendor" / "uplot"
    readme = (folder / "README.md").read_text()
    sums = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", readme, re.MULTILINE))
    assert set(sums) == {"uPlot.esm.js", "uPlot.min.css", "LICENSE"}
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums} == sums
    assert "1.6.32" in readme
    assert "https://github.com/leeoniya/uPlot" in readme


@pytest.mark.executed
def test_the_server_imports_no_torch() -> None:
    heavy = "{'torch', 'lightning', 'pytorch_lightning', 'deepspeed', 'wandb', 'scipy', 'pandas'}"
    code = f"import sys, trainer.dashboard.serve as one; print({heavy} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "none\n"

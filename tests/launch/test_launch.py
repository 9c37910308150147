"""The launch scripts on a checkout of their own, with stand-ins for the large packages and no index to reach."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import clean_environment

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"torch": "2.13.0", "lightning": "2.6.6", "hydra": "1.3.8"}

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "trainer"
version = "0"
"""

BACKEND = '''
"""An editable wheel of this folder, with a command `trainer` that prints its arguments."""
import os, zipfile

def get_requires_for_build_editable(settings=None):
    return []

def build_editable(folder, settings=None, metadata=None):
    name = "trainer-0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("trainer.pth", os.path.dirname(os.path.abspath(__file__)) + "\\n")
        info = "trainer-0.dist-info/"
        requires = "Provides-Extra: test\\nProvides-Extra: dev\\nRequires-Dist: lightning\\nRequires-Dist: hydra\\n"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: trainer\\nVersion: 0\\n" + requires)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\ntrainer = trainer:main\\n")
        wheel.writestr(info + "RECORD", "")
    return name
'''

PYTHON = """#!/bin/sh
# The interpreter, which makes its first virtual environment, and copies that in the place of others: pip and all.
if [ "$1 $2" != "-m venv" ]; then
    exec "{interpreter}" "$@"
elif [ ! -e "{made}" ]; then
    "{interpreter}" -m venv "$3" && cp -a "$3" "{made}"
else
    cp -a "{made}" "$3"
fi
"""


def write_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        for name, version in PACKAGES.items():
            write_wheel(self.wheels, name, version)
        self.python = folder / "python"
        self.python.write_text(PYTHON.format(interpreter=sys.executable, made=folder / "made"))
        self.python.chmod(0o755)
        shutil.copytree(REPOSITORY / "launch", self.root / "launch")
        (self.root / "pyproject.toml").write_text(PROJECT)
        (self.root / "backend.py").write_text(BACKEND)
        self.pin(PACKAGES)
        (self.root / "trainer").mkdir()
        (self.root / "trainer" / "__init__.py").write_text("def main():\n    import sys\n    print(sys.argv[1:])\n")

    def pin(self, packages: dict[str, str]) -> None:
        """Write constraints.txt, and the hashes of all but torch."""
        pins = {name: f"{name}=={version}" for name, version in packages.items()}
        (self.root / "constraints.txt").write_text("".join(f"{pin}\n" for pin in pins.values()))
        (self.root / "requirements").mkdir(exist_ok=True)
        (self.root / "requirements" / "build.txt").write_text("")
        with (self.root / "requirements" / "test.txt").open("w") as file:
            for name, version in packages.items():
                wheel = self.wheels / f"{name}-{version}-py3-none-any.whl"
                if name != "torch":
                    file.write(f"{pins[name]} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")

    def launch(self, *overrides: str, offline: bool = False, cwd: str = "/") -> subprocess.CompletedProcess[str]:
        links = "" if offline else self.wheels.as_uri()  # never those of this machine
        pip = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}
        pip["PIP_FIND_LINKS"] = links
        command = [str(self.root / "launch" / "local"), *overrides]
        environment = {**clean_environment(), **pip, "PYTHON": str(self.python)}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Made once and set up; each test harms it in another way and sees it mended."""
    made = Checkout(tmp_path_factory.mktemp("launch"))
    done = made.launch()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['fit', 'experiment=quickstart']\n"
    assert "making .venv" in done.stderr
    return made


def test_a_second_time_and_offline_it_installs_nothing(checkout: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "link"
    elsewhere.symlink_to(checkout.root / "launch" / "local")
    done = subprocess.run(
        [elsewhere, "a=b c"], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "['fit', 'a=b c']\n")
    assert done.stderr == "==> trainer fit a=b c\n"


def test_a_changed_pin_brings_it_up_to_date_in_place(checkout: Checkout) -> None:
    kept = checkout.venv / "kept"
    kept.write_text("")
    write_wheel(checkout.wheels, "lightning", "2.6.7")
    checkout.pin({**PACKAGES, "lightning": "2.6.7"})
    done = checkout.launch()
    assert done.returncode == 0, done.stderr
    assert "bringing .venv up to date" in done.stderr
    assert kept.exists()
    assert list(checkout.venv.glob("lib/*/site-packages/lightning-2.6.7.dist-info"))


@pytest.mark.parametrize("harm", ["no interpreter", "checkout moved"])
def test_a_broken_environment_is_made_anew(checkout: Checkout, harm: str) -> None:
    if harm == "no interpreter":
        python = checkout.venv / "bin" / "python"
        python.unlink()
        python.symlink_to("/nonexistent/python3")
    else:
        moved = checkout.root.with_name(f"{checkout.root.name} moved")
        checkout.root.rename(moved)
        checkout.root = moved
    done = checkout.launch("x=1")
    assert (done.returncode, done.stdout) == (0, "['fit', 'x=1']\n"), done.stderr
    assert "broken or half made: making it anew" in done.stderr


def test_half_made_and_without_an_index_it_says_what_to_do_and_recovers(checkout: Checkout) -> None:
    shutil.rmtree(next(checkout.venv.glob("lib/*/site-packages/pip")))
    (checkout.venv / ".stamp").unlink()
    failed = checkout.launch(offline=True)
    assert failed.returncode == 3
    assert "broken or half made: making it anew" in failed.stderr
    assert "error: pip could not install the packages" in failed.stderr
    assert "run this again" in failed.stderr
    assert "Successfully installed" not in failed.stderr, "packages of this machine"
    done = checkout.launch()
    assert (done.returncode, done.stdout) == (0, "['fit', 'experiment=quickstart']\n"), done.stderr

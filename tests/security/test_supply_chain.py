"""What set-up installs has hashes, what is malicious is refused, and advice names packages that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.launch.test_constraints import CHOSEN_BY_TORCH, PINS, needed
from trainer.cli import main
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, EnvironmentFault
from trainer.core.install import EXTRAS, MALICIOUS, pip_install, refuse_malicious
from trainer.supervise import node
from trainer.train import __main__ as rank

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def locked(name: str) -> dict[Requirement, list[str]]:
    """The packages of requirements/NAME.txt with their hashes."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace(" \\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {Requirement(line.partition(" --hash")[0].strip()): HASH.findall(line) for line in lines}


def test_every_package_that_setup_installs_has_hashes_and_the_version_of_the_constraints() -> None:
    """blocked by: hashes in requirements/"""
    pins = {(canonicalize_name(pin.name), str(pin.specifier), str(pin.marker)) for pin in PINS}
    everything = {name: locked(name) for name in ("build", "test", "dev", "hf")}
    for name, packages in everything.items():
        for package, hashes in packages.items():
            assert hashes, f"{name}: {package}"
            assert (canonicalize_name(package.name), str(package.specifier), str(package.marker)) in pins, package
    for extra, parts in (("test", ("build", "test")), ("dev", ("build", "test", "dev"))):
        has = {
            canonicalize_name(package.name)
            for part in parts
            for package in everything[part]
            if package.marker is None or package.marker.evaluate()
        }
        wanted = {name for name in needed(Requirement(f"trainer[{extra}]"), set()) if name not in ("trainer", "torch")}
        assert {name for name in wanted if not name.startswith(CHOSEN_BY_TORCH)} - has == set()


def test_pip_refuses_a_package_whose_hash_differs(tmp_path: Path) -> None:
    """With the options of the set-up and a package that somebody has replaced on the index.

    blocked by: --require-hashes
    """
    wheel = tmp_path / "hjson-3.1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + b"\0" * 18)
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "test.txt").write_text("hjson==3.1.0 --hash=sha256:" + "0" * 64 + "\n")
    script = f"""
root={tmp_path}; mkdir -p $root/.venv/bin; ln -s {sys.executable} $root/.venv/bin/python
source {ROOT}/launch/environment.sh; root={tmp_path}
install_hashed test --no-index --find-links {tmp_path} --target {tmp_path}/there
"""
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "there").exists()


def test_what_builds_the_package_is_bounded() -> None:
    """blocked by: upper bounds in pyproject.toml"""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in pyproject["build-system"]["requires"]:
        assert any(one.operator in ("<", "==", "~=") for one in Requirement(line).specifier), line
    for package, releases in MALICIOUS.items():
        (requirement,) = (one for one in map(Requirement, pyproject["project"]["dependencies"]) if one.name == package)
        assert not any(requirement.specifier.contains(release) for release in releases)
    extras = pyproject["project"]["optional-dependencies"]
    assert {name: tuple(extras[name]) for name in extras if name not in ("test", "docs", "dev")} == EXTRAS


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_release_is_refused_before_anything_imports_it(
    package: str, version: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """blocked by: the version is read from the metadata first"""
    versions = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == package else versions(name))
    assert main(["fit", "experiment=quickstart"]) == ENVIRONMENT_MUST_CHANGE
    said = capsys.readouterr().err
    assert said.startswith(f"trainer: {package} {version} is installed, a malicious upload")
    assert "GHSA-w37p-236h-pfx3" in said
    assert list(workdir.iterdir()) == []
    assert main(["ls"]) == DONE  # reads only
    with pytest.raises(EnvironmentFault, match="GHSA-w37p-236h-pfx3"):
        node.main([str(workdir)])
    refused: list[BaseException] = []
    monkeypatch.setattr(rank.failure, "conclude", lambda error, attempt: refused.append(error) or 3)
    for name in ("install_handlers",):
        monkeypatch.setattr(rank.stop, name, lambda: None)
    for name in ("frozen_code_first", "die_with_parent"):
        monkeypatch.setattr(rank.process, name, lambda: None)
    for name in ("redirect_output", "dump_stacks_on_request"):
        monkeypatch.setattr(rank.process, name, lambda path: None)
    monkeypatch.setattr(sys, "argv", ["train", str(workdir)])
    assert rank.main() == 3
    assert "GHSA-w37p-236h-pfx3" in str(refused[0])
    monkeypatch.setattr(metadata, "version", versions)
    refuse_malicious()


def test_no_advice_names_a_package_that_somebody_else_could_own() -> None:
    """blocked by: messages name the packages themselves"""
    files = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "docs").glob("*.md")]
    advised = {
        (file.name, one)
        for file in [*files, ROOT / "README.md"]
        for one in re.findall(r"pip install (?:-\S+ )*'?trainer\b[^`\"]*", file.read_text(encoding="utf-8"))
        if file.name != "install.py"  # which says why
    }
    assert advised == set()
    assert pip_install("hf") == "pip install 'transformers>=5,<6'"


def asked(tmp_path: Path, ci: str | None, stdin: str) -> str:
    """What `need_packages` of launch/test does as root for a package that is missing; apt-get is not called."""
    text = (ROOT / "launch" / "test").read_text()
    functions = text[text.index("is_installed()") : text.index("failed=()")]
    script = f"""
say() {{ echo "==> $*"; }}
id() {{ echo 0; }}; apt-get() {{ echo "ran apt-get $*"; }}; dpkg-query() {{ return 1; }}
{functions}
need_packages "some tests" slurmd munge
"""
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"CI": ci} if ci is not None else {}
    done = subprocess.run(["bash", "-c", script], input=stdin, capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


def test_system_packages_are_installed_only_where_it_was_said(tmp_path: Path) -> None:
    """blocked by: CI=true"""
    for ci in ("true", "1"):
        assert "==> installing slurmd munge" in asked(tmp_path, ci, "")
    for ci, stdin in ((None, ""), (None, "y\n"), ("false", "")):  # no terminal: nobody was asked
        said = asked(tmp_path, ci, stdin)
        assert "==> skipping some tests: CI=true" in said
        assert "installing" not in said
    assert "export CI=true" in (ROOT / ".ci" / "run").read_text()


def test_at_a_terminal_it_asks(tmp_path: Path) -> None:
    """blocked by: a question"""
    import pty

    for answer, outcome in (
        ("y", "==> installing slurmd munge"),
        ("n", "==> skipping some tests"),
        ("", "==> skipping"),
    ):
        parent, child = pty.openpty()
        os.write(parent, answer.encode() + b"\n")
        text = (ROOT / "launch" / "test").read_text()
        functions = text[text.index("is_installed()") : text.index("failed=()")]
        script = (
            'say() { echo "==> $*"; }; id() { echo 0; }; apt-get() { :; }; dpkg-query() { return 1; }\n'
            f'{functions}\nneed_packages "some tests" slurmd munge'
        )
        environment = {name: value for name, value in os.environ.items() if name != "CI"}
        done = subprocess.run(["bash", "-c", script], stdin=child, capture_output=True, text=True, env=environment)
        os.close(parent)
        os.close(child)
        assert "Install system packages as root (slurmd munge)? [y/N]" in done.stderr
        assert outcome in done.stdout, done.stderr

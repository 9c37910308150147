"""What people do every day, in the ways that a defence could get in: each works, or one line says how to allow it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT, TrainerCli, clean_environment
from tests.runs.test_directory import make
from tests.security.test_run_directories import NOBODY, needs_root
from trainer.cli import main
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, USER_MUST_CHANGE
from trainer.runs import trust
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import all_runs

pytestmark = pytest.mark.honest

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
SHORT = (
    *("tracking=none", "resources.gpus=0", "resources.cpu_processes=1", "trainer.max_steps=4"),
    *("trainer.limit_val_batches=1", "checkpoint.every_n_steps=2"),
)
APART = Path(sys.prefix) / "transformers"
"""Where ./launch/test puts transformers and peft."""


def command(*arguments: str, umask: int = 0o022, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a new process with a umask, which a shell would have set."""
    with masked(umask):
        return subprocess.run(
            [sys.executable, "-m", "trainer", *arguments],
            env={**clean_environment(), **variables},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
        )


@contextmanager
def masked(umask: int) -> Iterator[None]:
    """With this umask here, too: tests/warm.py forks what inherits one, and executes what is given one."""
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def only_run(folder: Path) -> RunDirectory:
    (run,) = all_runs(folder)
    return run


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_ready_or_its_data_is_named(
    experiment: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["fit", f"experiment={experiment}", "--dry-run", *SHORT[:3]])
    said = capsys.readouterr()
    if code == DONE:
        return
    assert code in (USER_MUST_CHANGE, ENVIRONMENT_MUST_CHANGE), said.err
    problem, fix = said.err.splitlines()
    assert "refused" not in problem
    assert any(words in fix for words in ("data.", "apt-get install", "name a file"))


@pytest.mark.parametrize(
    ("package", "overrides"),
    [
        ("timm", ["model=timm", "model.architecture=resnet10t", "data=digits"]),
        ("peft", ["experiment=quickstart", "finetune.lora_rank=2"]),
        ("transformers", ["model=hf", "model.config={model_type: gpt2, n_layer: 1}", "data=text", "data.root=text"]),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(
    package: str, overrides: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    (workdir / "text").mkdir()
    (workdir / "text" / "a.txt").write_text("To be, or not to be.\n" * 2000)
    code = main(["check", *overrides, *SHORT[:3]])
    said = capsys.readouterr()
    assert code in (USER_MUST_CHANGE, ENVIRONMENT_MUST_CHANGE)
    assert len(said.err.splitlines()) == 2, said.err
    assert "pip install" in said.err


@pytest.mark.skipif(not APART.is_dir(), reason="./launch/test puts transformers and peft apart")
def test_a_network_of_transformers_passes_the_check_and_takes_adapters(workdir: Path) -> None:
    (workdir / "text").mkdir()
    (workdir / "text" / "a.txt").write_text("To be, or not to be.\n" * 2000)
    model = "model.config={model_type: gpt2, n_layer: 1, n_embd: 32, n_head: 2}"
    job = ["model=hf", model, "data=text", "data.root=text", "data.sequence_length=16", *SHORT]
    where = f"{APART}{os.pathsep}{ROOT}"
    done = command("check", *job, "finetune.lora_rank=2", cwd=workdir, PYTHONPATH=where)
    assert done.returncode == DONE, done.stdout + done.stderr
    refused = command("check", *job, "+model.config.trust_remote_code=true", cwd=workdir, PYTHONPATH=where)
    assert refused.returncode == USER_MUST_CHANGE
    assert "code from the model's folder would run" in refused.stderr


@needs_root
def test_a_new_project_is_trained_killed_resumed_and_used(tmp_path: Path, no_orphans: None) -> None:
    """With a umask of 0, as in containers, on the scratch disk of a group, behind a home directory that is a link."""
    scratch = tmp_path / "disk" / "group"
    scratch.mkdir(parents=True)
    os.chown(scratch, 0, 100)  # users
    scratch.chmod(0o2775)
    (tmp_path / "homes" / "me").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "homes")
    home = tmp_path / "home" / "me"
    (home / "scratch").symlink_to(scratch)
    where = {"HOME": str(home), "TRAINER_RUNS_DIR": str(home / "scratch" / "runs")}
    assert command("init", "my-net", cwd=home, umask=0, **where).returncode == DONE
    project = home / "my-net"
    job = ["fit", "experiment=mine", *SHORT[:3], "trainer.max_steps=100000", *SHORT[4:]]
    with masked(0):
        fit = subprocess.Popen(
            [sys.executable, "-m", "trainer", *job],
            env={**clean_environment(), **where},
            cwd=project,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    deadline = time.monotonic() + 200
    while not list(scratch.glob("runs/*/checkpoints/step-*/COMMIT")) and time.monotonic() < deadline:
        time.sleep(0.1)
    fit.send_signal(signal.SIGKILL)
    fit.wait()
    run = only_run(scratch / "runs")
    while (pid := run.launch().pid) and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # it saves, and ends with the command that followed it
    step = max(int(path.name[5:13]) for path in run.checkpoints_dir.glob("step-*"))
    for arguments in (
        ["resume", f"trainer.max_steps={step + 2}"],
        ["evaluate", "--split", "val"],
        ["predict", "--split", "val"],
        ["export", str(home / "scratch" / "runs" / run.path.name)],
        ["show"],
        ["rm", run.id, "--yes"],
    ):
        done = command(*arguments, cwd=project, umask=0, **where)
        assert done.returncode == DONE, (arguments, done.stdout, done.stderr)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o2775, 0o1777])
def test_a_run_is_trusted_whatever_the_umask_and_the_mode_of_the_folder(tmp_path: Path, umask: int, mode: int) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "mine.py").write_text("")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(mode)
    with masked(umask):
        run = make(tmp_path)
    assert run.path.stat().st_mode & 0o777 == 0o700
    trust.require(run)


@pytest.mark.parametrize("is_checkout", [False, True])
def test_links_in_a_project_that_lead_nowhere_stop_no_launch(tmp_path: Path, is_checkout: bool) -> None:
    """As another user, to whom some of the folders are closed."""
    folder = Path(tempfile.mkdtemp(prefix="trainer-project-"))
    project = folder / "project"
    (project / "src").mkdir(parents=True)
    closed = folder / "closed"
    (closed / "inner").mkdir(parents=True)
    for name in ("mine.py", "src/theirs.py"):
        (project / name).write_text("")
    for place in (project, project / "src"):
        (place / "loop").symlink_to("loop")
        (place / "loop.py").symlink_to("loop.py")
        (place / "gone.py").symlink_to("nothing")
        (place / "beyond").symlink_to(closed / "inner")
        (place / "shut").mkdir()
        os.mkfifo(place / "pipe.py")
    if is_checkout:
        subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    make(tmp_path, code=project)  # imports what the other user may not be able to read
    try:
        if os.getuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        for path in (closed, project / "shut", project / "src" / "shut"):
            path.chmod(0)
        if os.getuid() == 0:
            os.chown(closed, 0, 0)
            os.seteuid(NOBODY)
        try:
            run = make(folder, code=project)
        finally:
            os.seteuid(os.getuid())
        assert (run.code_dir / "mine.py").is_file()
        assert (run.code_dir / "src" / "theirs.py").is_file()
    finally:
        for path in (closed, project / "shut", project / "src" / "shut"):
            path.chmod(0o700)
        shutil.rmtree(folder)


@needs_root
def test_the_run_of_a_colleague_is_used_where_it_is_named_and_trusted(
    trainer_cli: TrainerCli, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = trainer_cli("fit", "experiment=quickstart", *SHORT)
    assert done.returncode == DONE, done.stdout + done.stderr
    run = only_run(workdir / "runs")
    theirs = workdir / "theirs" / run.path.name
    shutil.copytree(run.path, theirs, symlinks=True)
    for path in (theirs, *theirs.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    copied = workdir / "copied" / run.path.name
    shutil.copytree(theirs, copied, symlinks=True)
    environment: Mapping[str, str] = {"TRAINER_RUNS_DIR": str(workdir / "theirs")}
    for arguments in (["show"], ["ls"], ["why"], ["report", "-o", "report.html"]):
        assert trainer_cli(*arguments, env=environment).returncode == DONE, arguments
    for arguments in (["evaluate"], ["export"], ["resume", "trainer.max_steps=6"]):
        verb, *more = arguments
        refused = trainer_cli(verb, str(theirs), *more)
        assert refused.returncode == USER_MUST_CHANGE
        assert "belongs to nobody" in refused.stderr
        assert "add --trust" in refused.stderr
        done = trainer_cli(verb, str(theirs), *more, "--trust")
        assert done.returncode == DONE, (arguments, done.stdout, done.stderr)
    done = trainer_cli("evaluate", str(copied))  # a copy is one's own
    assert done.returncode == DONE, done.stdout + done.stderr

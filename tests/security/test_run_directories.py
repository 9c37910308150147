"""Run directories of others, and with crafted content: nothing is executed, deleted or killed on their behalf."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.fake_runs import make_sweep
from tests.runs.test_directory import make
from trainer.cli import main, stop
from trainer.config.shape import LaunchShape
from trainer.core import processes
from trainer.core.errors import DONE, USER_MUST_CHANGE, UserError
from trainer.core.git import git
from trainer.runs import trust
from trainer.runs.directory import RunDirectory
from trainer.runs.lock import RunLock
from trainer.runs.records import Launch
from trainer.slurm import attempt, query, render, submit
from trainer.slurm import stop as slurm_stop
from trainer.supervise import node

NOBODY = 65534
EXECUTING = ("resume", "evaluate", "predict", "export", "sync")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of runs in which every user may create something, as on a cluster's scratch disk."""
    folder = Path(tempfile.mkdtemp(prefix="trainer-shared-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_nobody(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script as the other user."""
    return subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-ec", script, "sh"]
        + [str(argument) for argument in arguments],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


def plant(own: RunDirectory, name: str) -> RunDirectory:
    """Let the other user plant a run with its own code beside `own`; a copy that would pass every other check."""
    source = Path(tempfile.mkdtemp(dir="/tmp"))
    shutil.copytree(own.path, source / "run")
    subprocess.run(["chmod", "-R", "a+rX", str(source)], check=True)
    target = own.path.parent / name
    script = 'umask 022; cp -r "$1/run" "$2"; echo "import os; os.system(\'touch $2/executed\')" > "$2/code/evil.py"'
    done = as_nobody(script, source, target)
    shutil.rmtree(source)
    assert done.returncode == 0, done.stderr
    later = time.time() + 100
    as_nobody('touch -d "@$2" "$1/config.yaml"', target, later)
    return RunDirectory(target)


@needs_root
def test_a_run_of_another_user_is_not_executed(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """blocked by: the owners of the run directory and of what is in it"""
    own = make(tmp_path, runs_dir=str(shared))
    planted = plant(own, "job-aaaaaaaa")
    options = ["--runs-dir", str(shared)]
    for verb in EXECUTING:
        assert main([verb, "job-aaaaaaaa", *options]) == USER_MUST_CHANGE
        text = capsys.readouterr().err
        assert "belongs to nobody" in text, (verb, text)
        assert "--trust" in text
        assert main([verb, str(planted.path)]) == USER_MUST_CHANGE
        assert "belongs to nobody" in capsys.readouterr().err
    assert main(["export", str(planted.path / "checkpoints" / "step-00000001")]) == USER_MUST_CHANGE
    capsys.readouterr()
    # Without a name the latest run is meant, and the planted one is later.
    main(["evaluate", *options])
    text = capsys.readouterr().err
    assert text.startswith("trainer: skipped: ")
    assert f"{own.path.name} has no checkpoint" in text or own.config_path.name in text
    main(["sync", *options])
    out, err = capsys.readouterr()
    assert own.path.name in out
    assert "job-aaaaaaaa" not in out
    assert "skipped" in err
    # Requeued, or started by hand, it is not executed either.
    with pytest.raises(UserError, match="belongs to nobody"):
        node.main([str(planted.path)])
    assert not (planted.path / "executed").exists()


@needs_root
def test_a_requeue_of_a_run_that_another_user_can_write_ends(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """blocked by: each attempt judges the run again"""
    run = make(tmp_path, runs_dir=str(shared))
    run.path.chmod(0o777)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert as_nobody('echo "import os" > "$1/code/evil.py" || touch "$1/x"', run.path).returncode == 0
    (line,) = attempt.begin(run)
    assert line == "exit 93"
    assert "may write" in run.attempts()[-1].reason or "belongs to" in run.attempts()[-1].reason


@needs_root
@pytest.mark.parametrize("place", ["", "code", "config.yaml", "code/module.py", "job.sbatch", ".hydra"])
def test_each_part_that_is_executed_is_judged(shared: Path, tmp_path: Path, place: str) -> None:
    """blocked by: owners and modes of each part"""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "module.py").write_text("")
    run = make(tmp_path, runs_dir=str(shared))
    (run.path / "job.sbatch").write_text("")
    (run.path / ".hydra").mkdir(exist_ok=True)
    run.path.chmod(0o755)
    assert trust.why_untrusted(run) is None
    (run.path / place).chmod(0o757)
    assert "everybody may write" in str(trust.why_untrusted(run))
    (run.path / place).chmod(0o755)
    os.chown(run.path / place, NOBODY, NOBODY)
    assert "belongs to nobody" in str(trust.why_untrusted(run))
    trust.require(run, trusted=True)


@pytest.mark.honest
def test_a_group_counts_as_the_user_if_it_is_the_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """umask 002 with private groups, and a project folder whose group is private, go on working."""
    import grp
    import pwd

    run = make(tmp_path)
    run.path.chmod(0o775)
    me = pwd.getpwuid(os.geteuid())

    def group(name: str, members: list[str]) -> None:
        gid = run.path.stat().st_gid
        monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group((name, "x", gid, members)))

    group(me.pw_name, [])
    assert trust.why_untrusted(run) is None
    group(me.pw_name, [me.pw_name])
    assert trust.why_untrusted(run) is None
    group("project", [me.pw_name])
    assert trust.why_untrusted(run) is None
    group("project", [me.pw_name, "another"])
    assert "the group project may write" in str(trust.why_untrusted(run))
    group("users", [])
    assert "the group users may write" in str(trust.why_untrusted(run))
    group(me.pw_name, [])
    other = pwd.struct_passwd(("another", "x", 4242, run.path.stat().st_gid, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwall", lambda: [me, other])
    assert "may write" in str(trust.why_untrusted(run))


def test_a_link_in_place_of_a_part_of_the_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """blocked by: no part of a run may be a link, with --trust either"""
    for name in ("checkpoints", "code", "control"):
        run = make(tmp_path)
        shutil.move(run.path / name, tmp_path / f"{name}-of-{run.id}")
        (run.path / name).symlink_to(tmp_path / f"{name}-of-{run.id}")
        for verb in ("resume", "evaluate"):
            assert main([verb, str(run.path), "--trust"]) == USER_MUST_CHANGE
            assert "is a symbolic link" in capsys.readouterr().err


def test_a_link_in_place_of_the_lock_or_a_log_changes_nothing_outside(tmp_path: Path) -> None:
    """blocked by: files are opened without following links"""
    from trainer.cli.chosen import logged

    run, letter = make(tmp_path), tmp_path / "letter.txt"
    letter.write_text("mine")
    (run.path / "control" / "lock").symlink_to(letter)
    (run.logs_dir / "export.log").symlink_to(letter)
    with pytest.raises(OSError, match="symbolic links"):
        RunLock(run).take(0)
    with pytest.raises(OSError, match="symbolic links"), logged(run.logs_dir / "export.log", {}):
        pass
    assert letter.read_text() == "mine"


def test_a_link_in_place_of_a_report_changes_nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: files are written beside their place and renamed, and printed from a private folder"""
    run, letter = make(tmp_path), tmp_path / "letter.txt"
    letter.write_text("mine")
    for name in ("report.html", "report.pdf"):
        (run.path / name).symlink_to(letter)
    browser = tmp_path / "chromium"
    browser.write_text(
        '#!/bin/sh\nfor one; do case "$one" in --print-to-pdf=*) echo "%PDF $#" > "${one#*=}";; file:*) '
        f'echo "$one" > {tmp_path}/printed;; esac; done\n'
    )
    browser.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["report", str(run.path), "--pdf"]) == DONE
    assert letter.read_text() == "mine"
    assert (run.path / "report.pdf").read_text().startswith("%PDF")
    assert str(run.path) not in (tmp_path / "printed").read_text()


@needs_root
def test_a_sweep_of_another_user_is_not_executed(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """blocked by: the owners of the sweep and of what is in it; without a name it is skipped"""
    (shared / "runs").mkdir(mode=0o755)
    (shared / "sweeps").mkdir()
    (shared / "sweeps").chmod(0o1777)
    own = make_sweep(shared / "runs", [shared / "runs"] * 8)
    planted = shared / "sweeps" / "search-zzzzzzzz"
    source = Path(tempfile.mkdtemp(dir="/tmp"))
    shutil.copytree(own.path, source / "sweep")
    subprocess.run(["chmod", "-R", "a+rX", str(source)], check=True)
    done = as_nobody(
        'umask 022; cp -r "$1/sweep" "$2"; touch -d "@$3" "$2/spec.json"', source, planted, time.time() + 9
    )
    shutil.rmtree(source)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(shared / "runs"))
    for verb in ("status", "resume", "stop", "retry --state failed", "best", "export", "extend --trials 1", "rm --yes"):
        name, *options = verb.split()
        assert main(["sweep", name, "zzzzzzzz", *options]) == USER_MUST_CHANGE
        assert "belongs to nobody" in capsys.readouterr().err, verb
    assert main(["sweep", "best"]) == DONE
    said = capsys.readouterr()
    assert "trial 7" in said.out
    assert "skipped" in said.err
    assert main(["sweep", "ls"]) == DONE
    assert "zzzzzzzz" in capsys.readouterr().out
    assert planted.is_dir()


def test_rm_deletes_runs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """blocked by: the name and the manifest of a run"""
    made = make(tmp_path)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "config.yaml").write_text("chapter: 1\n")
    named = tmp_path / "thesis-abcdefgh"
    shutil.copytree(other, named)
    renamed = tmp_path / "documents"
    shutil.copytree(made.path, renamed)
    linked = tmp_path / "link-abcdefgh"
    linked.symlink_to(made.path)
    for path in (other, named, renamed, linked):
        assert main(["rm", str(path), "--yes"]) == USER_MUST_CHANGE
        assert "is not deleted" in capsys.readouterr().err
        assert path.exists()
    assert main(["rm", str(made.path), "--yes"]) == DONE
    assert not made.path.exists()


def test_predictions_and_exports_replace_only_their_own(tmp_path: Path) -> None:
    """blocked by: the record that they write, and no link"""
    from trainer.cli.chosen import make_room

    photos = tmp_path / "photos" / "step-00000001-test"
    photos.mkdir(parents=True)
    (photos / "cat.jpg").write_text("")
    with pytest.raises(UserError, match="is not deleted"):
        make_room(photos, "predictions.json")
    (photos / "predictions.json").write_text("{}")
    (tmp_path / "predictions").symlink_to(photos.parent)
    with pytest.raises(UserError, match="is not deleted"):
        make_room(tmp_path / "predictions" / photos.name, "predictions.json")
    assert (photos / "cat.jpg").exists()
    make_room(photos, "predictions.json")
    assert not photos.exists()


def test_verify_resume_keeps_what_is_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """blocked by: folders that exist are refused"""
    (tmp_path / "unharmed").mkdir()
    (tmp_path / "unharmed" / "letter.txt").write_text("mine")
    assert main(["verify-resume", "--keep", str(tmp_path)]) == USER_MUST_CHANGE
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "unharmed" / "letter.txt").exists()


def test_stop_now_kills_only_the_process_of_this_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """blocked by: pid, start time, and command line or log"""
    import socket

    run = make(tmp_path)
    here = {"host": socket.gethostname(), "boot_id": processes.boot_id(), "shape": LaunchShape(1, 1, "cpu")}
    run.logs_dir.mkdir(exist_ok=True)
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    bystander = subprocess.Popen(sleeping)
    with (run.logs_dir / "launch.log").open("ab") as log:
        ahead = subprocess.Popen([*sleeping, "trainer.supervise.ahead"], stdout=log)
    node_like = subprocess.Popen([*sleeping, "trainer.supervise.node", str(run.path)])
    try:
        for started in (None, processes.started_ticks(bystander.pid)):
            run.write_launch(Launch(cluster="local", pid=bystander.pid, pid_started=started, **here))  # type: ignore[arg-type]
            assert main(["stop", str(run.path), "--now", "--wait", "0"]) == USER_MUST_CHANGE
            assert "names no process of this run" in capsys.readouterr().err
        launch = Launch(pid=node_like.pid, pid_started=processes.started_ticks(node_like.pid), **here)  # type: ignore[arg-type]
        assert stop.is_node_process(run, launch)
        assert not stop.is_node_process(make(tmp_path), launch)
        assert not stop.is_node_process(run, Launch(pid=node_like.pid, pid_started=1, **here))  # type: ignore[arg-type]
        begun = Launch(pid=ahead.pid, pid_started=processes.started_ticks(ahead.pid), **here)  # type: ignore[arg-type]
        assert stop.is_node_process(run, begun)
        assert not stop.is_node_process(make(tmp_path), begun)
        elsewhere = {**here, "host": "another"}
        assert not stop.is_node_process(run, Launch(pid=node_like.pid, **elsewhere))  # type: ignore[arg-type]
        assert bystander.poll() is None
    finally:
        for process in (bystander, node_like, ahead):
            process.kill()
            process.wait()


@pytest.mark.parametrize("job_id", ["--user=me", "7 8", "12", "-1"])
def test_another_job_is_not_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_id: str) -> None:
    """blocked by: the name of the job"""
    run = make(tmp_path)
    run.write_launch(Launch(cluster="slurm", slurm_job_id=job_id))
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm_stop, "call", lambda *command: called.append(command))
    monkeypatch.setattr(query, "job", lambda _: {"JobName": "another-job"})
    with pytest.raises(UserError, match="not a job of this run"):
        slurm_stop.cancel(run)
    assert called == []
    run.write_launch(Launch(cluster="slurm", slurm_job_id="12"))
    monkeypatch.setattr(query, "job", lambda _: {"JobName": run.path.name})
    slurm_stop.cancel(run)
    assert called == [("scancel", "12")]


HOSTILE = [
    {"partition": "gpu\ntouch /tmp/executed"},
    {"account": 'a"\ntouch /tmp/executed\n"'},
    {"save_before_end_s": "5\ntouch /tmp/executed"},
    {"extra": ["switches=1\ntouch /tmp/executed"]},
    {"setup": ["true\ntouch /tmp/executed"]},
    {"modules": ["cuda\ntouch /tmp/executed"]},
    {"preflight_timeout_s": "300; touch /tmp/executed"},
]


def slurm_config(**cluster: Any) -> dict[str, Any]:
    from trainer.config.compose import compose

    config = compose(["experiment=quickstart", "cluster=slurm", "tracking=none"], config_dirs=[], cwd=Path.cwd()).config
    config["cluster"].update(cluster)
    return dict(config)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_the_frozen_cluster_section_is_judged_before_it_reaches_bash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: dict[str, Any]
) -> None:
    """blocked by: values of the section are checked again, before the script is written"""
    from trainer.config.instantiate import freeze

    run = make(tmp_path)
    run.config_path.write_text(freeze(slurm_config(**hostile)))
    run.write_launch(Launch(cluster="slurm", shape=LaunchShape(1, 1, "cpu"), cwd=str(tmp_path)))
    monkeypatch.setattr(submit, "call", lambda *command, **_: pytest.fail(f"submitted: {command}"))
    with pytest.raises(UserError):
        submit.SlurmLauncher().launch(run)
    assert not submit.script_path(run).exists()


def test_no_line_of_the_job_script_is_broken_whatever_is_checked_before() -> None:
    """blocked by: a line is written whole or not at all"""
    for value in ("gpu\ntouch x", 'gpu"', "gpu\\", "gpu\x00", "gpu\u2028"):
        with pytest.raises(UserError, match="cannot be written"):
            render._line("partition", value)
    assert render._line("comment", "two words") == '#SBATCH --comment="two words"'


def test_the_frozen_configuration_is_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """blocked by: targets are judged again when a run is used"""
    from trainer.cli.chosen import judge
    from trainer.config.instantiate import freeze

    run, config = make(tmp_path), slurm_config()
    run.config_path.write_text(freeze(config))
    judge(run)
    config["model"] = {"_target_": "os.system", "command": "touch x"}
    run.config_path.write_text(freeze(config))
    with pytest.raises(UserError, match="system"):
        judge(run)
    assert main(["evaluate", str(run.path)]) == USER_MUST_CHANGE
    assert "system" in capsys.readouterr().err


@pytest.mark.parametrize("version", [sys.version_info, (3, 10)])
def test_children_do_not_import_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    """blocked by: PYTHONSAFEPATH, and its like for Python 3.10"""
    (tmp_path / "wandb").mkdir()
    for name in ("wandb/__init__.py", "wandb/__main__.py", "runpy.py", "this.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.setattr(sys, "version_info", version)
    done = subprocess.run(
        processes.python_module("this", "argument"), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert "Zen of Python" in done.stdout, done.stderr
    assert not (tmp_path / "executed").exists()


def test_wandb_is_not_imported_from_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: PYTHONSAFEPATH, and no relative entries in PYTHONPATH"""
    from trainer.tracking import upload

    run = make(tmp_path)
    segment = run.wandb_dir / "offline-run-20260101_000000-abc" / "run-abc.wandb"
    segment.parent.mkdir(parents=True)
    segment.write_bytes(b"x" * 100)
    for name in ("__init__.py", "__main__.py"):
        (run.wandb_dir / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.setenv("PYTHONPATH", f":{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(upload, "_TIMEOUT_S", 5)
    upload.upload(run)
    assert not (tmp_path / "executed").exists()


def test_git_executes_nothing_that_a_checkout_configures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: hooks, monitor, filters and diffs are turned off, or git is not asked"""
    checkout, executed = tmp_path / "checkout", tmp_path / "executed"
    checkout.mkdir()
    payload = tmp_path / "payload"
    payload.write_text(f'#!/bin/sh\necho "$0 $*" >> {executed}\ncat\n')
    payload.chmod(0o755)
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for hook in ("post-index-change", "fsmonitor-watchman", "pre-auto-gc"):
        shutil.copy(payload, hooks / hook)

    def run(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True)

    run("init", "-q")
    (checkout / "model.py").write_text("a = 1\n")
    (checkout / ".gitattributes").write_text("*.py filter=evil diff=evil\n*.txt diff=evil\n")
    run("add", ".")
    run("commit", "-qm", "first")
    for key in ("core.fsmonitor", "diff.external", "diff.evil.command", "diff.evil.textconv", "filter.evil.clean"):
        run("config", key, str(payload))
    run("config", "filter.evil.process", str(payload))
    run("config", "core.hooksPath", str(hooks))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(payload))
    (checkout / "model.py").write_text("a = 2\n")
    executed.unlink(missing_ok=True)
    assert git(checkout, "status", "--porcelain") == " M model.py"
    assert "+a = 2" in str(git(checkout, "diff", "HEAD"))
    assert git(checkout, "ls-files", "-z", "--others", "--cached", "--exclude-standard") is not None
    assert git(checkout, "rev-parse", "--show-toplevel") == str(checkout)
    assert not executed.exists()
    run("config", "filter.a=b.clean", str(payload))
    executed.unlink(missing_ok=True)
    assert git(checkout, "diff", "HEAD") is None, "a name that cannot be turned off"
    assert not executed.exists()


def test_a_checkpoint_of_a_run_carries_its_id(tmp_path: Path) -> None:
    """blocked by: an id in the manifest has a form"""
    run = make(tmp_path)
    assert run.identity() == run.id
    renamed = RunDirectory(run.path.rename(tmp_path / "final"))
    assert renamed.identity() == run.id != renamed.id
    manifest = json.loads(renamed.manifest_path.read_text())
    for wrong in (None, 7, "../../x"):
        renamed.manifest_path.write_text(json.dumps({**manifest, "id": wrong}))
        assert renamed.identity() == "final"


@pytest.mark.honest
@needs_root
def test_a_run_made_without_a_umask_is_closed_by_the_mode_of_its_directory(shared: Path, tmp_path: Path) -> None:
    """Containers often have umask 0: what is inside is writable by all, and reached by nobody else."""
    before = os.umask(0)
    try:
        run = make(tmp_path, runs_dir=str(shared))
        (run.path / ".hydra").mkdir(exist_ok=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.config_path.stat().st_mode) & 0o002 or (run.path / ".hydra").stat().st_mode & 0o002
    assert trust.why_untrusted(run) is None
    os.chown(run.config_path, NOBODY, NOBODY)
    with pytest.raises(UserError) as refused:
        trust.require(run)
    assert "chown -R root " in (refused.value.fix or "")
    run.path.chmod(0o755)
    os.chown(run.config_path, 0, 0)
    assert "everybody may write" in str(trust.why_untrusted(run))

"""`trainer repro`: the same run from its frozen code, and a line for each thing that differs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_compare import change_manifest
from tests.cli.test_why import real_run
from tests.conftest import TrainerCli
from trainer.cli import main
from trainer.core.errors import DONE, USER_MUST_CHANGE
from trainer.launch.local import LocalLauncher
from trainer.runs import trust
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Resumed
from trainer.runs.records import HeartbeatRecord, Launch
from trainer.runs.registry import all_runs

CODE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

SCALE = 1.0


class Data(LightningDataModule):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def train_dataloader(self):
        values = [float(line) for line in open(self.path)]
        return DataLoader(TensorDataset(torch.tensor(values)), batch_size=4, shuffle=True)


class Model(LightningModule):
    def __init__(self, folder: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1))

    def training_step(self, batch, batch_idx):
        loss = SCALE * (self.weight * batch[0] + torch.randn(1) - 1).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
"""


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def run(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A finished run, not trained; nothing is launched."""
    made = real_run(workdir / "runs")
    monkeypatch.setattr(LocalLauncher, "launch", lambda self, run: None)
    return made


def not_restored(run: RunDirectory, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    capsys.readouterr()
    assert main(["repro", run.id, "--dry-run", "--json", *arguments]) == DONE
    answer = json.loads(capsys.readouterr().out)
    assert answer["id"] is None
    assert answer["reproduces"] == str(run.path)
    return {one["topic"]: one["text"] for one in answer["not_restored"]}


def test_a_run_is_repeated_from_its_frozen_code_after_the_project_has_changed(
    trainer_cli: TrainerCli, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "mine.py").write_text(CODE)
    (workdir / ".gitignore").write_text("runs\n*.txt\n")
    (workdir / "conf/model").mkdir(parents=True)
    (workdir / "conf/model/m.yaml").write_text("_target_: mine.Model\nfolder: ${hydra:runtime.output_dir}\n")
    (workdir / "conf/data").mkdir()
    (workdir / "conf/data/d.yaml").write_text("_target_: mine.Data\npath: numbers.txt\n")
    git(workdir, "init", "-q")
    git(workdir, "add", ".")
    git(workdir, "commit", "-qm", "first")
    (workdir / "mine.py").write_text(CODE.replace("SCALE = 1.0", "SCALE = 2.0"))  # not committed
    (workdir / "numbers.txt").write_text("".join(f"{number / 10}\n" for number in range(40)))
    job = ["model=m", "data=d", "tracking=none", "seed=7", "resources.gpus=0", "resources.cpu_processes=1"]
    job += ["trainer.max_steps=12", "trainer.log_every_n_steps=1"]
    done = trainer_cli("fit", *job, "name=first")
    assert done.returncode == 0, done.stdout + done.stderr

    (workdir / "mine.py").write_text("raise SystemExit('the project has moved on')\n")
    (workdir / "other").mkdir()
    (first,) = all_runs(workdir / "runs")
    done = trainer_cli("repro", str(first.path), "--runs-dir", "again", cwd=workdir / "other")
    assert done.returncode == 0, done.stdout + done.stderr
    (again,) = all_runs(workdir / "other/again")
    commit = git(workdir, "rev-parse", "HEAD")[:12]
    restored = f"code at commit {commit} with uncommitted changes, configuration, seed 7, PYTHONHASHSEED 0\n"
    assert f"restored from {first.path.name}: {restored}nothing differs of what the run recorded\n" in done.stdout
    assert f"metrics and those of {first.path.name}: equal at 12 steps\n" in done.stdout
    assert again.id != first.id
    assert again.manifest()["reproduces"] == {"id": first.id, "name": first.path.name, "path": str(first.path)}
    assert again.config()["model"]["folder"] == str(again.path)
    assert again.config()["runs_dir"] == str(again.path.parent)
    assert str(first.path) not in (again.path / ".hydra/hydra.yaml").read_text()
    assert again.launch().cwd == str(workdir)
    assert "SCALE = 2.0" in (again.path / "code.diff").read_text()

    assert main(["compare", str(first.path), str(again.path), "--json"]) == DONE
    sections = json.loads(capsys.readouterr().out)["sections"]
    assert set(sections["config"]["rows"]) == {"runs_dir"}
    assert not any(sections[name]["rows"] for name in ("code", "packages", "hardware", "data"))
    assert main(["show", str(again.path)]) == DONE
    assert f"\n  reproduces   {first.path}\n" in capsys.readouterr().out


def test_what_is_not_the_same_has_a_line_each(
    run: RunDirectory, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run.manifest()
    before = not_restored(run, capsys)
    assert before == {}
    (workdir / "set").write_text("123")
    versions = {**manifest["installed"]["versions"], "torch": "2.0.1", "lost-package": "7"}
    change_manifest(
        run,
        installed={"versions": versions, "origins": {"numpy": "git+https://host/numpy@abc"}},
        machine={"cpu": "Another CPU", "cores": 1, "gpus": ["NVIDIA H200"]},
        platform="Plan 9",
        code={**manifest["code"], "withheld": [".env"], "hidden": [".settings", ".gitignore"]},
        data={
            "data.gone": {"path": "/gone", "bytes": 1, "modified": 0.0},
            "data.path": {"path": str(workdir / "set"), "bytes": 2, "modified": 0.0},
        },
    )
    config = run.config()
    config["data"]["path"], config["data"]["gone"] = str(workdir / "set"), "/gone"
    run.config_path.write_text(yaml.safe_dump(config))
    run.write_heartbeat(0, HeartbeatRecord(phase="finished", device="cuda:0, NVIDIA H200"))
    (run.code_dir / "weights.bin").symlink_to("/gone/weights.bin")
    (run.code_dir / "large.bin").symlink_to(workdir / "set")
    run.add_event(Resumed(overrides=["trainer.max_steps=20"]))
    lost = not_restored(run, capsys, "resources.cpu_processes=1")
    assert lost == {
        "torch": f"was 2.0.1, here {manifest['installed']['versions']['torch']}",
        "lost-package": "was 7, here not installed",
        "numpy": "was from git+https://host/numpy@abc, here an index",
        "trainer": lost.get("trainer", ""),
        "GPU": "kernels may be nondeterministic: trainer.deterministic is not true",
        "processor": f"was Another CPU, here {manifest['machine']['cpu']}",
        "system": f"was Plan 9, here {manifest['platform']}",
        "code/weights.bin": "/gone/weights.bin is gone",
        "code/large.bin": f"{workdir / 'set'} may have changed: it was linked, not copied",
        ".env": "is not in the code snapshot: it may hold credentials",
        ".settings": "is not in the code snapshot: it is a dotfile",
        "data.gone": "/gone is missing here",
        "data.path": "bytes was 2, here 3",
        "trainer.max_steps": "changed by a resume: trainer.max_steps=20",
        "resources.cpu_processes": "changed by this command: resources.cpu_processes=1",
    }
    assert main(["repro", run.id, "--dry-run"]) == DONE
    text = capsys.readouterr().out
    assert "\n  GPU " in text
    assert "was NVIDIA H200, here none\n" in text
    assert text.index("torch ") < text.index("lost-package ")
    assert main(["repro", run.id, "--requirements"]) == DONE
    assert "lost-package==7\n" in capsys.readouterr().out


def test_a_run_of_an_older_version_says_what_it_did_not_record(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(run, installed=None, data=None, machine=None)
    lost = not_restored(run, capsys)
    assert lost["packages"].startswith("versions were not recorded: only those of trainer, torch")
    assert lost["data"] == "size and time of its files were not recorded"
    assert lost["processor"] == "was not recorded"
    assert main(["repro", run.id, "--requirements"]) == USER_MUST_CHANGE
    assert "did not record its packages" in capsys.readouterr().err


VALUES = [7, "x\x1b[2J", [], {}, None, {"versions": 3, "origins": []}, {"path": {"a": 1}}, {"commit": [1], "paths": 1}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_manifest_of_any_content_is_survived(
    run: RunDirectory, value: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")  # what nobody foresaw is raised here
    other = real_run(run.path.parent)
    for key in ("installed", "packages", "machine", "data", "code", "choices", "reproduces", "platform"):
        manifest = run.manifest()
        run.manifest_path.write_text(json.dumps({**manifest, key: value}))
        for arguments in (["compare", run.id, other.id], ["repro", run.id, "--dry-run"], ["show", run.id]):
            assert main(arguments) == DONE, (key, arguments)
            assert "\x1b" not in capsys.readouterr().out
        run.manifest_path.write_text(json.dumps(manifest))


def test_only_what_does_not_change_the_result_may_be_overridden(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["repro", run.id, "optimizer.lr=1"]) == USER_MUST_CHANGE
    assert "a reproduction cannot change this" in capsys.readouterr().err
    assert main(["repro", run.id, "resources.cpu_processes=0"]) == USER_MUST_CHANGE
    assert [one.path for one in all_runs(run.path.parent)] == [run.path]


def test_a_run_that_others_can_write_is_not_executed(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    os.chmod(run.path, 0o777)
    os.chmod(run.code_dir, 0o777)
    assert main(["repro", run.id, "--dry-run"]) == USER_MUST_CHANGE
    assert "is not executed: everybody may write" in capsys.readouterr().err
    assert main(["repro", run.id, "--detach", "--trust"]) == DONE
    new = all_runs(run.path.parent)[-1]
    assert new.manifest()["reproduces"]["id"] == run.id
    assert trust.why_untrusted(new) is None
    assert not new.launch().trusted


def test_a_run_of_another_machine_gets_its_data_here(
    run: RunDirectory, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_launch(Launch(cwd="/gone", host="elsewhere"))
    facts = {"path": "/gone/set", "bytes": 3, "modified": 1.0}
    change_manifest(run, data={"data.path": facts})
    config = run.config()
    config["data"]["path"] = "set"
    run.config_path.write_text(yaml.safe_dump(config))
    assert not_restored(run, capsys) == {"data.path": "/gone/set is missing here"}
    (workdir / "elsewhere").write_text("1234")
    assert main(["repro", run.id, "data.path=elsewhere", "--detach", "--json"]) == DONE
    answer = json.loads(capsys.readouterr().out)
    changed = {"topic": "data.path", "text": f"path was /gone/set, here {workdir / 'elsewhere'}; bytes was 3, here 4"}
    assert changed in answer["not_restored"]
    new = RunDirectory(Path(answer["path"]))
    assert new.config()["data"]["path"] == "elsewhere"
    assert new.launch().cwd == str(workdir)
    assert new.manifest()["data"]["data.path"]["bytes"] == 4
    assert main(["repro", run.id, "data.name=x", "--detach"]) == USER_MUST_CHANGE


def test_another_cluster(run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    submitted: list[RunDirectory] = []

    class Launcher:
        def launch(self, run: RunDirectory) -> None:
            submitted.append(run)

    monkeypatch.setattr("trainer.launch.launchers.launcher", lambda *args, **options: Launcher())
    monkeypatch.setattr("trainer.launch.launchers.prepare", lambda config: None)  # they ask SLURM
    monkeypatch.setattr("trainer.launch.launchers.check", lambda config, shape: None)
    monkeypatch.setattr("trainer.launch.jobs.states_of", lambda runs: {})
    assert main(["repro", run.id, "cluster=slurm", "cluster.partition=gpu", "resources.cpu_processes=1"]) == DONE
    (new,) = submitted
    assert new.config()["cluster"]["name"] == "slurm"
    assert new.config()["cluster"]["partition"] == "gpu"
    assert new.launch().shape is not None
    assert "cluster=slurm cluster.partition=gpu" in new.overrides_path.read_text()

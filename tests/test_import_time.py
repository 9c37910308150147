"""The control plane imports no torch, lightning, deepspeed or wandb: that is what keeps its commands fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.core.errors import DONE, USER_MUST_CHANGE

pytestmark = pytest.mark.executed

HEAVY = ("torch", "lightning", "pytorch_lightning", "deepspeed", "wandb", "torchmetrics", "sklearn", "numpy")
MOST_CPU_S = 2.5
"""Half a second is the budget on an idle machine; five times that only fails for a real mistake."""
_PROBE = """
import json, sys, time
from trainer.cli import main
code = main(sys.argv[1:])
loaded = [name for name in {heavy!r} if name in sys.modules]
print("\\n" + json.dumps({{"code": code, "heavy": loaded, "cpu_s": time.process_time()}}))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["ls"],
        ["fit", "--cfg", "job"],
        ["fit", "--dry-run"],
        ["check", "experiment=quickstart", "callbacks=early_stopping"],
        ["init", "a-new-project"],
        ["sweep", "seed=1,2", "resources.gpus=0", "--dry-run"],
        ["sweep", "ls"],
    ],
    ids=" ".join,
)
def test_commands_before_a_launch_import_nothing_heavy(arguments: list[str], workdir: Path) -> None:
    for attempt in range(3):  # once is enough, unless something else had the caches
        cwd = workdir / str(attempt)
        cwd.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", _PROBE.format(heavy=HEAVY), *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        seen = json.loads(done.stdout.splitlines()[-1])
        assert seen["code"] == 0, done.stderr
        assert seen["heavy"] == []
        if seen["cpu_s"] < MOST_CPU_S:
            break
    assert seen["cpu_s"] < MOST_CPU_S


_OWN = """
import os
open(os.environ["IMPORTED"], "a").close()
import torch
from lightning.pytorch import LightningDataModule, LightningModule
raise RuntimeError("imported")

class Net(torch.nn.Module):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()

class Task(LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()

    def training_step(self, batch, batch_idx):
        return batch.sum()

class Data(LightningDataModule):
    def __init__(self, folder: str = ".", batch_size: int = 4) -> None:
        super().__init__()

    def train_dataloader(self):
        return []
"""


@pytest.mark.parametrize(
    ("override", "problem"),
    [("model.width=3", None), ("model.widht=3", "did you mean model.width?"), ("data.folder=x", None)],
)
def test_a_job_of_ones_own_is_checked_without_importing_it(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, problem: str
) -> None:
    package = workdir / "mine"
    package.mkdir()
    for module in ("__init__", "parts"):
        (package / f"{module}.py").write_text(_OWN)
    for group, target in {"model": "Net\nwidth: 4", "data": "Data", "task": "Task"}.items():
        (workdir / "conf" / group).mkdir(parents=True)
        (workdir / "conf" / group / "mine.yaml").write_text(f"_target_: mine.parts.{target}\n")
    monkeypatch.setenv("IMPORTED", str(workdir / "imported"))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another test
    code = main(["check", "model=mine", "data=mine", "task=mine", "tracking=none", "trainer.max_steps=3", override])
    error = capsys.readouterr().err
    assert code == (DONE if problem is None else USER_MUST_CHANGE), error
    assert problem is None or problem in error
    assert not (workdir / "imported").exists()
    assert "mine" not in sys.modules


def test_every_control_plane_module_can_be_imported_without_them() -> None:
    code = (
        "import pkgutil, sys, importlib\n"
        "for package in ('core', 'hardware', 'cli', 'doctor', 'config', 'runs', 'checks', 'supervise', 'slurm',"
        " 'launch', 'starter'):\n"
        "    root = importlib.import_module(f'trainer.{package}')\n"
        "    for module in pkgutil.iter_modules(root.__path__, root.__name__ + '.'):\n"
        "        if module.name == 'trainer.doctor.measure': continue  # a process of its own\n"
        "        importlib.import_module(module.name)\n"
        "        print(module.name, [n for n in ('torch', 'lightning', 'deepspeed', 'wandb') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 20
    assert [line for line in lines if not line.endswith("[]")][:1] == []

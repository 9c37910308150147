"""Manual optimization and accumulation by a callback are checked from the source of the module."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.core.errors import UserError

MODULES = """
from lightning.pytorch import LightningModule

class Manual(LightningModule):
    def __init__(self, width: int = 2):
        super().__init__()
        self.automatic_optimization = False

class Derived(Manual):
    pass

class Own(Manual):
    def __init__(self):
        super().__init__()
        self.width = 3

class Back(Manual):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

class Perhaps(LightningModule):
    def __init__(self, manual: bool = True):
        super().__init__()
        if manual:
            self.automatic_optimization = False
        self.automatic_optimization = not manual

class Plain(LightningModule):
    pass
"""
SCHEDULER = "callbacks.more._target_=lightning.pytorch.callbacks.GradientAccumulationScheduler"
CLIP = "trainer.gradient_clip_norm=0.5"


def problem(cwd: Path, monkeypatch: pytest.MonkeyPatch, model: str, *overrides: str) -> str:
    """Return the error of `check`, or an empty string."""
    (cwd / "models.py").write_text(MODULES)
    monkeypatch.chdir(cwd)
    config = compose(["resources.gpus=0", "resources.cpu_processes=1", *overrides], config_dirs=[]).config
    config["model"] = {"_target_": f"models.{model}"}
    try:
        check(config, cwd, fits=False)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("model", "refused"),
    [("Manual", True), ("Derived", True), ("Own", True), ("Back", False), ("Perhaps", False), ("Plain", False)],
)
def test_clipping_under_manual_optimization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, refused: bool
) -> None:
    message = problem(tmp_path, monkeypatch, model, CLIP)
    assert ("trainer.gradient_clip_norm=null" in message) is refused
    assert ("self.clip_gradients(optimizer, gradient_clip_val=0.5" in message) is refused
    assert not problem(tmp_path, monkeypatch, model)


def test_an_accumulation_scheduler_under_manual_optimization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [f"+{SCHEDULER}", "+callbacks.more.scheduling={0:2}"]
    message = problem(tmp_path, monkeypatch, "Manual", *more)
    assert "callbacks.more: GradientAccumulationScheduler: the module uses manual optimization" in message
    assert not problem(tmp_path, monkeypatch, "Plain", *more)


def test_an_accumulation_scheduler_with_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [f"+{SCHEDULER}", "+callbacks.more.scheduling={0:2}", "data.batch_size=32"]
    message = problem(tmp_path, monkeypatch, "Plain", *more, "data.micro_batch=8")
    assert "32 in 4 micro-batches" in message
    assert "write data.batch_size=8" in message
    assert not problem(tmp_path, monkeypatch, "Plain", *more)


def test_accumulation_under_manual_optimization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = problem(tmp_path, monkeypatch, "Manual", "trainer.accumulate_grad_batches=2")
    assert "trainer.accumulate_grad_batches=2: the module uses manual optimization" in message
    assert not problem(tmp_path, monkeypatch, "Manual", "trainer.accumulate_grad_batches=1")
    assert not problem(tmp_path, monkeypatch, "Plain", "data.micro_batch=16", "trainer.accumulate_grad_batches=2")

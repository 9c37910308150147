"""`trainer verify-resume` on a job that resumes exactly, and on one with a callback that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from trainer.cli.verify_resume import gpu_note

JOB = ["experiment=quickstart", "resources.cpu_processes=1", "--steps", "8", "--keep", "verified"]
DRIFT = """
import os

from lightning.pytorch import Callback


class Drift(Callback):
    def on_train_start(self, trainer, module):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            next(module.parameters()).data.add_(1e-6)
"""


def test_an_exact_job_is_found_equal(trainer_cli: TrainerCli, workdir: Path) -> None:
    done = trainer_cli("verify-resume", "model.dropout=0.1", *JOB, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 steps (not to the end of an epoch of 39; for that use --steps 59), 2 kills" in done.stdout
    assert "kills: 2; repeated steps: " in done.stdout
    assert "equal bit for bit" in done.stdout
    (killed,) = (workdir / "verified" / "killed").iterdir()
    assert len(list((killed / "logs").glob("attempt-*"))) == 3
    assert '"resumed"' in (killed / "events.jsonl").read_text()  # the last kill was of the whole job


def test_what_differs_is_named(trainer_cli: TrainerCli, workdir: Path) -> None:
    (workdir / "drift.py").write_text(DRIFT)
    done = trainer_cli("verify-resume", "+callbacks.drift._target_=drift.Drift", *JOB, "--kills", "1", timeout=180)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the first batch after resume 1: the weights before the batch: " in done.stdout
    assert "likely cause: something changes them when training starts" in done.stdout
    assert "deterministic" not in done.stdout


@pytest.mark.parametrize(
    ("gpus", "deterministic", "noted"),
    [(1, False, True), (4, "warn", True), (1, True, False), (0, False, False), (None, False, False)],
)
def test_a_job_on_gpus_without_deterministic_kernels_is_told_so(gpus: int, deterministic: object, noted: bool) -> None:
    note = gpu_note({"resources": {"gpus": gpus}, "trainer": {"deterministic": deterministic}})
    assert ("trainer.deterministic=true" in (note or "")) is noted

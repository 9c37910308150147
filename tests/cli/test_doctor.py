"""`trainer doctor` and `trainer env` on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from trainer.cli import main
from trainer.core.errors import ENVIRONMENT_MUST_CHANGE
from trainer.doctor.run import CHECKS
from trainer.hardware import baseline


def test_a_real_machine_is_measured_and_compared_with_itself(
    trainer_cli: TrainerCli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    cache = {"XDG_CACHE_HOME": str(workdir / "cache"), "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
    (workdir / "numpy.py").write_text("raise SystemExit('taken from the working directory')\n")
    done = trainer_cli("doctor", "--json", env=cache)
    report = json.loads(done.stdout)
    assert [one for one in report["findings"] if one["status"] == "error"] == []
    assert done.returncode == 0, done.stderr
    assert {one["check"] for one in report["findings"]} >= set(CHECKS)
    measured = report["measured"]
    (rate,) = [name for name in measured if name.startswith("cpu matrix fp32")]
    assert measured[rate] > 1e8
    if len(os.sched_getaffinity(0)) > 1:
        assert measured["cpu all-reduce of 2"] > 1e6
    assert [path.name for path in workdir.iterdir() if path.name not in ("cache", "numpy.py")] == []
    # Another host of this name was a thousand times faster.
    (path,) = (workdir / "cache/trainer/baselines").iterdir()
    kept = json.loads(path.read_text())
    for samples in kept["samples"].values():
        samples[0]["value"] *= 1000
    path.write_text(json.dumps(kept))
    text = trainer_cli("doctor", env={**cache, "COLUMNS": "80"}).stdout
    assert f"{rate} has 0% of what this machine usually reaches" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    again = baseline.read(kept["host"], kept["hardware"])
    assert again.usual(rate) == kept["samples"][rate][0]["value"], "what is slower is not kept"


def test_an_error_ends_with_3(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    assert main(["doctor", "--quick", "tracking.mode=auto"]) == ENVIRONMENT_MUST_CHANGE
    assert "unknown W&B mode" in capsys.readouterr().out
    assert list(workdir.iterdir()) == []


def test_a_bug_report_has_no_secrets(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(Path.home())
    for name, value in {
        "TRAINER_API_TOKEN": "tell-nobody-1234",
        "NCCL_DEBUG": "INFO",
        "HYDRA_PROXY": "https://me:hunter2hunter2@proxy/x",
        "SLURM_JOB_USER": "anna",
        "LD_LIBRARY_PATH": f"{home}/lib",
        "MY_NOTES": "not asked for",
        "WANDB_API_KEY": "0123456789abcdef0123",
        "TRAINER_NOTE": "key 0123456789abcdef0123 here",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    report: dict[str, Any] = json.loads(text)
    for secret in ("tell-nobody", "hunter2", "anna", "not asked for", "0123456789abcdef"):
        assert secret not in text
    if home != "/":
        assert report["variables"]["LD_LIBRARY_PATH"] == "~/lib"
    assert report["variables"]["NCCL_DEBUG"] == "INFO"
    assert report["packages"]["torch"]
    assert report["machine"]["cores"] >= 1
    assert main(["env"]) == 0
    assert "NCCL_DEBUG" in capsys.readouterr().out

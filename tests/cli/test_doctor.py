"""`trainer doctor` and `trainer env` on this machine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TrainerCli
from trainer.cli import main
from trainer.core.errors import ENVIRONMENT_MUST_CHANGE
from trainer.doctor.run import CHECKS
from trainer.hardware import baseline


def test_a_real_machine_is_measured_and_held_against_what_it_reached(
    trainer_cli: TrainerCli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier, a machine of this name was a thousand times faster."""
    cache = {"XDG_CACHE_HOME": str(workdir / "cache"), "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
    monkeypatch.setenv("XDG_CACHE_HOME", cache["XDG_CACHE_HOME"])
    (workdir / "numpy.py").write_text("raise SystemExit('taken from the working directory')\n")
    host, hardware = socket.gethostname(), baseline.hardware_of([])
    rates = {f"cpu matrix fp32 of {threads} threads": 1e15 for threads in range(1, 1 + (os.cpu_count() or 1))}
    baseline.write(baseline.Baseline(host=host, hardware=hardware).with_measured(rates))
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
    slower = [one["text"] for one in report["findings"] if one["check"] == "matrix rate" and one["status"] == "warning"]
    assert f"{rate} has 0% of what this machine usually reaches" in slower
    assert report["usual"][rate] == 1e15
    kept = baseline.read(host, hardware)
    assert kept.usual(rate) == 1e15, "what is slower is not kept"
    assert kept.usual(next(name for name in measured if name.startswith("cpu memory")))
    assert sorted(path.name for path in workdir.iterdir()) == ["cache", "numpy.py"], "nothing is left behind"


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
        "HYDRA_PROXY": f"https://me:{'hunter2' * 2}@proxy/x",
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

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.config.schema import TrackingOptions
from trainer.tracking import weights_and_biases


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield SimpleNamespace(path=tmp_path, id="abcd1234", wandb_dir=tmp_path / "wandb")
    import wandb

    wandb.teardown()


def test_without_a_key_it_is_offline_and_asks_nobody(run: SimpleNamespace) -> None:
    logger = weights_and_biases.start(run, TrackingOptions(), {"data": {"api_key": "x"}}, lambda: 7)
    logger.log_metrics({"train/loss": 1.0}, step=3)
    assert logger.experiment.offline
    assert logger.experiment.id == "abcd1234"
    assert logger.experiment.config["data"]["api_key"] == "***"
    assert logger.experiment.summary["trainer/global_step"] == 7
    weights_and_biases.finish(logger, 0)
    assert list((run.path / "wandb").glob("offline-run-*-abcd1234/run-abcd1234.wandb"))


def test_a_server_that_is_not_there_costs_seconds_not_the_run(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as reserved:  # bound, not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "local" + "0" * 40)
        started = time.monotonic()
        logger = weights_and_biases.start(run, TrackingOptions(init_timeout_s=1), {}, lambda: 0)
    assert logger.experiment.offline
    assert logger.experiment.id == "abcd1234"
    assert time.monotonic() - started < 60
    weights_and_biases.finish(logger, 0)


def test_secrets_are_masked_at_any_depth() -> None:
    config = {"data": [{"access_token": "t", "path": "p"}], "optimizer": {"lr": 0.1}, "password": "p"}
    assert weights_and_biases.masked(config) == {
        "data": [{"access_token": "***", "path": "p"}],
        "optimizer": {"lr": 0.1},
        "password": "***",
    }

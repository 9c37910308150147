"""The same module with Lightning's own WandbLogger, with ours, and without W&B: what it logs arrives, or is a file."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.runs.directory import RunDirectory
from trainer.tracking.no_logger import NoLogger


def log_media(logger: Any) -> None:
    """What users do with `self.logger` and `self.logger.experiment`."""
    import wandb

    image = torch.linspace(0, 1, 48).reshape(3, 4, 4)
    logger.log_image(
        "samples/a", [image, (image * 255).byte(), image.permute(1, 2, 0).numpy()], caption=["x", "y", "z"]
    )
    logger.log_image("one", [Image.new("L", (3, 2), 7)])
    logger.log_table("predictions", columns=["name", "score"], data=[["cat", 0.5], ["dog", 0.25]])
    logger.log_text("texts", columns=["text"], data=[["hello"]])
    logger.experiment.log({"by_hand": wandb.Image(np.zeros((2, 2), np.uint8)), "scalar": 1.0})
    logger.experiment.config.update({"a": 1})
    logger.experiment.define_metric("x", summary="max")
    logger.watch(torch.nn.Linear(1, 1))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    run = RunDirectory(tmp_path / "digits-abcd1234")
    run.path.mkdir()
    return run


def test_files_have_the_pixels_that_wandb_has(run: RunDirectory, tmp_path: Path) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    oracle = WandbLogger(save_dir=str(tmp_path), mode="offline")
    log_media(oracle)
    theirs = Path(oracle.experiment.dir) / "media"
    wandb.finish()
    wandb.teardown()
    log_media(NoLogger(run, lambda: 10))
    ours = run.path / "media"
    for key, count in (("samples/a", 3), ("one", 1), ("by_hand", 1)):
        expected = [_pixels(path) for path in theirs.glob(f"**/{key}*.png")]
        found = [_pixels(path) for path in sorted((ours / key).glob("step-00000010-*.png"))]
        assert len(found) == count
        assert set(found) == set(expected)  # the client stores equal images once
    assert json.loads((ours / "samples" / "a" / "step-00000010-1.json").read_text()) == {"caption": "y"}
    with (ours / "predictions" / "step-00000010.csv").open() as file:
        assert list(csv.reader(file)) == [["name", "score"], ["cat", "0.5"], ["dog", "0.25"]]
    assert (ours / "texts" / "step-00000010.csv").read_text().split() == ["text", "hello"]


def _pixels(path: Path) -> tuple[Any, ...]:
    with Image.open(path) as image:
        return image.mode, image.size, image.tobytes()


def test_what_cannot_be_written_is_no_reason_to_end_a_training(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = NoLogger(run)
    logger.log_image("bad", [object()])
    logger.log_image("bad", [torch.zeros(3, 2, 2)], caption=[])
    logger.log_audio("bad", ["/missing.wav"])
    logger.log_table("bad", columns=["a"], data=[[1, 2]])
    logger.log_image("../../outside", [np.zeros((2, 2), np.uint8)])
    logger.experiment.log(None)
    logger.anything_else  # noqa: B018
    assert capsys.readouterr().out.count("media: bad cannot be written") == 1
    assert not (run.path.parent / "outside").exists()
    assert len(list(run.path.glob("media/**/outside/*.png"))) == 1

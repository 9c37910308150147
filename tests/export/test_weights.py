"""Exported weights are those of the checkpoint, whatever its layout, in files of bounded size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import MODEL
from trainer.core.errors import UserError
from trainer.export.weights import export_safetensors


def network() -> nn.Module:
    torch.manual_seed(3)
    built = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    built[2].weight = built[0].weight  # tied
    return built


@pytest.fixture(params=["file", "sharded"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "checkpoints")
    writer = CheckpointWriter(store, asynchronous=False)
    state = network().state_dict()
    info = CommitInfo(step=1, layout=request.param)
    if request.param == "file":
        writer.save({"state_dict": state, "optimizer_states": []}, store.path(1), info)
    else:
        tensors = {MODEL + name: tensor for name, tensor in state.items()}
        writer.save_sharded(tensors, {"optimizers": {"groups": [], "values": {}}}, store.path(1), info, None)
    writer.raise_if_failed()
    return store.path(1)


def test_one_file_has_the_weights_and_the_metadata(checkpoint: Path, tmp_path: Path) -> None:
    (file,) = export_safetensors(checkpoint, tmp_path / "out", {"run": "mine", "step": "1"})
    torch.testing.assert_close(load_file(file), dict(network().state_dict()), rtol=0, atol=0)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "run": "mine", "step": "1"}


def test_several_files_have_an_index(checkpoint: Path, tmp_path: Path) -> None:
    *files, index = export_safetensors(checkpoint, tmp_path / "out", max_file_bytes=300)
    assert len(files) == 3
    assert sum(len(load_file(file)) for file in files) == len(network().state_dict())
    where = json.loads(index.read_text())["weight_map"]
    for name, tensor in network().state_dict().items():
        torch.testing.assert_close(load_file(tmp_path / "out" / where[name])[name], tensor, rtol=0, atol=0)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        export_safetensors(tmp_path / "missing" / "step-00000001", tmp_path / "out")

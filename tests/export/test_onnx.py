"""ONNX files give torch's outputs, for any number of samples; a file that does not is refused."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from trainer.core.errors import TrainerError
from trainer.export.onnx import export_onnx
from trainer.models.transformer import Transformer


def test_a_transformer_takes_other_batches_and_lengths(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = Transformer(vocab_size=50, sequence_length=16, dim=32, layers=1, heads=4, kv_heads=2)
    files, difference = export_onnx(network, (torch.randint(50, (2, 16)),), tmp_path / "out", {"run": "mine"})
    assert [path.name for path in files] == ["model.onnx"]
    assert difference < 1e-5
    session = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["run"] == "mine"
    tokens = torch.randint(50, (5, 9))
    found = session.run(None, {"input": tokens.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(tokens), rtol=1e-4, atol=1e-5)


class OtherEachTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(inputs) * self.calls


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="outputs of the exported network differ from torch's"):
        export_onnx(OtherEachTime(), (torch.randn(2, 3),), tmp_path / "out", {})

"""Low-rank additions become part of the weights on export, or a message says why not."""

from __future__ import annotations

import pytest
import torch

from trainer.checkpoint.lora import Merged, layers
from trainer.checkpoint.stored import MODEL
from trainer.core.errors import UserError


class InMemory:
    """What a checkpoint gives."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {MODEL + name: tensor for name, tensor in tensors.items()}
        self.shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, into: dict[str, torch.Tensor]) -> None:
        for name, tensor in into.items():
            tensor.copy_(self.tensors[name])


def adapted(weight: torch.Tensor, outputs: int, inputs: int) -> InMemory:
    generator = torch.Generator().manual_seed(0)
    return InMemory(
        {
            "body.0.query.base_layer.weight": weight,
            "body.0.query.base_layer.bias": torch.ones(outputs),
            "body.0.query.lora_A.default.weight": torch.randn(2, inputs, generator=generator).to(weight.dtype),
            "body.0.query.lora_B.default.weight": torch.randn(outputs, 2, generator=generator).to(weight.dtype),
            "norm.weight": torch.full((3,), 7.0),
        }
    )


def read(merged: Merged, name: str) -> torch.Tensor:
    shape, dtype = merged.shapes[MODEL + name]
    tensor = torch.empty(shape, dtype=dtype)
    merged.read({MODEL + name: tensor})
    return tensor


@pytest.mark.parametrize(("outputs", "inputs", "turned"), [(4, 3, False), (3, 4, True), (4, 4, False), (4, 4, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_added_under_the_plain_name(outputs: int, inputs: int, turned: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(inputs, outputs).to(dtype) if turned else torch.randn(outputs, inputs).to(dtype)
    stored = adapted(weight, outputs, inputs)
    assert layers(stored) == ["body.0.query"]
    merged = Merged(stored, alpha=6.0, transposed=["body.0.query"] if turned else [])
    assert set(merged.shapes) == {MODEL + name for name in ("body.0.query.weight", "body.0.query.bias", "norm.weight")}
    inputs_ = torch.randn(5, inputs).to(dtype).float()
    down, up = (stored.tensors[f"{MODEL}body.0.query.lora_{kind}.default.weight"].float() for kind in "AB")
    whole = weight.float().t() if turned else weight.float()
    expected = inputs_ @ whole.t() + (inputs_ @ down.t()) @ up.t() * (6.0 / 2)
    found = read(merged, "body.0.query.weight")
    assert found.dtype == dtype
    found = found.float().t() if turned else found.float()
    torch.testing.assert_close(inputs_ @ found.t(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.3)
    assert read(merged, "norm.weight").tolist() == [7.0] * 3
    assert read(merged, "body.0.query.bias").tolist() == [1.0] * outputs


def test_additions_of_another_kind_are_refused() -> None:
    stored = InMemory({"embedding.lora_embedding_A": torch.zeros(2, 3)})
    with pytest.raises(UserError, match="cannot be merged"):
        Merged(stored, alpha=1.0)

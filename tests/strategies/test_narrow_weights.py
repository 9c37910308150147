"""bf16-mixed under FSDP2 computes what plain autocast computes, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader

from trainer import strategies
from trainer.config.strategy import Fsdp, Single
from trainer.models.sync_batch_norm import SyncBatchNorm
from trainer.strategies.narrow_weights import compute_as_autocast
from trainer.train.precision import BFloat16Mixed

FLOAT, NARROW = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class OwnLayerNorm(nn.Module):
    """As in nanoGPT."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, features: Tensor) -> Tensor:
        return functional.layer_norm(features, self.weight.shape, self.weight, self.bias, 1e-5)


class ChannelsNorm(nn.LayerNorm):
    """As in torchvision's and timm's ConvNeXt: a subclass that normalizes another axis."""

    def forward(self, features: Tensor) -> Tensor:
        features = features.permute(0, 2, 3, 1)
        return functional.layer_norm(features, self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class NormAct(nn.BatchNorm2d):
    """As in timm: a normalization layer with a forward pass of its own and a child."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.act = nn.PReLU(dim)

    def forward(self, features: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return self.act(functional.batch_norm(features, mean, variance, self.weight, self.bias, self.training))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch_2d": (lambda: nn.BatchNorm2d(4), (3, 4, 4, 4)),
    "batch_3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 2, 2)),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 4, 4)),
    "synchronized": (lambda: SyncBatchNorm(4), (3, 4, 4, 4)),
    "instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 4, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 4, 4)),
    "layer": (lambda: nn.LayerNorm(4), (3, 4, 4, 4)),
    "own layer": (lambda: OwnLayerNorm(4), (3, 4)),
    "channels": (lambda: ChannelsNorm(4), (3, 4, 4, 4)),
    "norm and act": (lambda: NormAct(4), (3, 4, 4, 4)),
    "prelu": (lambda: nn.PReLU(4), (3, 4)),
    "after a convolution": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), (3, 4, 4, 4)),
    "after an embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(5)), (2, 5)),
}


class Root(nn.Module):
    """What is sharded as one group; FSDP2 warns of one that returns a view."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs) * 1.0


def sharded(module: nn.Module) -> nn.Module:
    compute_as_autocast(module)
    policy = MixedPrecisionPolicy(param_dtype=NARROW, reduce_dtype=FLOAT, cast_forward_inputs=False)
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)


def passes(module: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The output, the gradients of the parameters and the buffers after a training pass and one in evaluation mode."""
    with torch.autocast("cpu", NARROW):
        output = module(inputs)
        output.float().square().mean().backward()
        gradients: list[Any] = [parameter.grad for parameter in module.parameters()]
        module.eval()
        output = torch.stack([output, module(inputs)]).detach()
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in gradients]
    return output, whole, dict(module.named_buffers())


def with_bfloat16_values(module: nn.Module) -> nn.Module:
    """Draw values for vectors that are not all 0 or 1, and that bfloat16 has."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator).to(NARROW))
    return module


@pytest.mark.parametrize("dtype", [FLOAT, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_as_in_autocast(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    module = Root(with_bfloat16_values(make()))
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    if name == "after an embedding":
        inputs = inputs.abs().long()
    expected, gradients, buffers = passes(copy.deepcopy(module), inputs)
    output, of_shards, own = passes(sharded(module), inputs)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    for ours, theirs in zip(of_shards, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)  # they are rounded to bfloat16 once
    assert own.keys() == buffers.keys()
    assert all(torch.equal(own[key], buffers[key]) for key in buffers)


@pytest.mark.parametrize("kind", [nn.Bilinear, getattr(nn, "LinearCrossEntropyLoss", None)])
def test_layers_with_matrices_that_autocast_does_not_cast(kind: Any) -> None:
    if kind is None:
        pytest.skip("from torch 2.13")
    module = Root(with_bfloat16_values(kind(4, 4, 3) if kind is nn.Bilinear else kind(4, 3)))
    inputs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    given = (inputs[0], inputs[1]) if kind is nn.Bilinear else (inputs[0], torch.tensor([0, 1, 2, 0, 1]))
    with torch.autocast("cpu", NARROW):
        expected = module(*given)
        output = sharded(module)(*given)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)


class Strict(LightningModule):
    """Interpolates with a matrix of its own: torch.lerp takes one data type, and autocast does not cast it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.mixture = nn.Parameter(torch.full((2, 4), 0.1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = torch.lerp(self.net(batch).float(), self.mixture, 0.5).square().mean()
        self.seen = [*getattr(self, "seen", []), float(loss.detach())]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def losses(options: Any) -> list[float]:
    torch.manual_seed(0)
    module = Strict()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        use_distributed_sampler=False,
        strategy=strategies.build(options, 1, torch.device("cpu"), 60.0),
        plugins=[LightningEnvironment(), BFloat16Mixed("cpu")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), batch_size=2))
    return module.seen


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:The `srun` command", "ignore:The .train_dataloader. does not have many workers"
)
def test_any_operation_computes_as_with_ddp_if_weights_are_gathered_in_float32() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)lerp|dtype.*set strategy.param_dtype=float32, or strategy=ddp"):
        losses(Fsdp())
    assert losses(Fsdp(param_dtype="float32")) == losses(Single())


@pytest.mark.parametrize(
    "message",
    [
        "mixed dtype (CPU): expect parameter to have scalar type of Float",
        "All tensors must have the same dtype, got input1: float, input2: float, weight: c10::BFloat16",
        "expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16",
        "expected dtype float for `end` but got dtype c10::BFloat16",
        "index_add_(): self (Float) and source (BFloat16) must have the same scalar type",
        "Index put requires the source and destination dtypes match, got Float for the destination",
        "linalg.slogdet: Low precision dtypes not supported. Got BFloat16",
        "\"linalg_qr\" not implemented for 'BFloat16'",
    ],
)
def test_torchs_message_gets_what_to_set(message: str) -> None:
    strategy = strategies.build(Fsdp(), 1, torch.device("cpu"), 60.0)
    strategy.precision_plugin = BFloat16Mixed("cpu")
    error = RuntimeError(message + "\nmore")
    strategy.on_exception(error)
    assert str(error).startswith(message)
    assert "strategy.param_dtype=float32" in str(error)
    other = ValueError("shapes (2, 3) and (4, 5) differ")
    strategy.on_exception(other)
    assert str(other) == "shapes (2, 3) and (4, 5) differ"


def test_weights_are_themselves_again_after_a_failed_pass() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4))
    own = dict(module[0].named_parameters())
    compute_as_autocast(module.to(NARROW))
    with pytest.raises(ValueError, match="expected 4D input"):
        module(torch.zeros(2, 4))
    assert all(getattr(module[0], name) is one for name, one in own.items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_block_is_one_graph() -> None:
    module = with_bfloat16_values(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())))
    assert isinstance(module, nn.Sequential)
    inputs = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    expected, _, buffers = passes(copy.deepcopy(module), inputs)
    compute_as_autocast(module)
    module[0].compile(fullgraph=True, backend="aot_eager")
    policy = MixedPrecisionPolicy(param_dtype=NARROW, reduce_dtype=FLOAT, cast_forward_inputs=False)
    for part in (module[0], module):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    output, _, own = passes(module, inputs)
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(own, buffers, rtol=1e-3, atol=1e-4)

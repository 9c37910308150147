"""The quick check of the guard agrees with `torch.isfinite`, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.callbacks import guard
from trainer.callbacks.gradient_check import (
    FiniteGradientCheck,
    first_non_finite,
    local_gradients,
    non_finite_flag,
)


class Odd(LightningModule):
    """Gradients that are sparse, and that are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4, sparse=True)
        self.phase = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))


SHAPES = [(3,), (FiniteGradientCheck.MIN_SUMMED_NUMEL,), (64, 65), (0,), (2, 3, 5), (FiniteGradientCheck.LARGE_NUMEL,)]


def gradients_in(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return [parameter.grad for parameter in parameters]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def optimizer(request: pytest.FixtureRequest) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=request.param)) for shape in SHAPES]
    return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=1.0)


def test_finite_gradients_stay_as_they_are(optimizer: torch.optim.Optimizer) -> None:
    gradients = gradients_in(optimizer)
    before = [gradient.clone() for gradient in gradients]
    assert FiniteGradientCheck(optimizer).is_finite()
    assert all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("number", [number for number, shape in enumerate(SHAPES) if shape != (0,)])
def test_one_bad_element_is_seen_and_not_remembered(optimizer: torch.optim.Optimizer, number: int, bad: float) -> None:
    look = FiniteGradientCheck(optimizer)
    gradients_in(optimizer)[number].view(-1)[-1] = bad
    assert not look.is_finite()
    gradients_in(optimizer)
    assert look.is_finite()


def test_infinities_of_both_signs_do_not_cancel(optimizer: torch.optim.Optimizer) -> None:
    gradient = gradients_in(optimizer)[1]
    gradient[0], gradient[1] = float("inf"), float("-inf")
    assert not FiniteGradientCheck(optimizer).is_finite()


def test_a_gradient_that_comes_later_may_be_sparse_or_complex() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    phase = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = torch.optim.SGD([embedding.weight, phase], lr=1.0)
    look = FiniteGradientCheck(optimizer)
    assert look.is_finite()
    embedding(torch.tensor([1, 2])).sum().backward()
    phase.grad = torch.ones_like(phase)
    assert look.is_finite()
    phase.grad[0] = complex(0.0, float("nan"))
    assert not look.is_finite()


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_the_close_look_that_follows_sees_it_and_names_the_parameter(kind: str) -> None:
    module = Odd()
    module.embedding(torch.tensor([1, 2])).sum().backward()
    module.phase.grad = torch.ones_like(module.phase)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    assert math.isfinite(non_finite_flag(local_gradients(optimizer)).item())
    assert first_non_finite(module) is None
    if kind == "sparse":
        assert module.embedding.weight.grad is not None
        module.embedding.weight.grad = module.embedding.weight.grad * float("inf")
    else:
        module.phase.grad[0] = complex(0.0, float("nan"))
    assert not math.isfinite(non_finite_flag(local_gradients(optimizer)).item())
    assert first_non_finite(module) == ("embedding.weight" if kind == "sparse" else "phase")


def test_one_large_gradient_among_small_ones_is_looked_at_with_them() -> None:
    shapes = ((FiniteGradientCheck.LARGE_NUMEL,), (3,), (4,))
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    look = FiniteGradientCheck(optimizer)
    gradients = gradients_in(optimizer)
    assert look.is_finite()
    assert look._small == parameters
    gradients[0][5] = float("nan")
    assert not look.is_finite()


def test_small_gradients_beside_few_large_ones_are_summed_as_they_are() -> None:
    """One check for all: the code of a second one is not in the caches."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((784, 128), (128,), (128, 10), (10,))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    look = FiniteGradientCheck(optimizer)
    gradients = gradients_in(optimizer)
    assert look.is_finite()
    assert (look._small, look._summed) == ([], parameters)
    for gradient in gradients:
        gradient.view(-1)[-1] = float("-inf")
        assert not look.is_finite()
        gradient.zero_()
    assert look.is_finite()


Bucket = tuple[torch.Tensor, list[torch.nn.Parameter]]


@pytest.fixture
def bucket() -> Bucket:
    """One memory, and parameters whose gradients fill it."""
    flat = torch.randn(24)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (16,), (2,))]
    for parameter, part in zip(parameters, flat.split([6, 16, 2]), strict=True):
        parameter.grad = part.view(parameter.shape)
    return flat, parameters


def looked_at(look: FiniteGradientCheck) -> list[torch.Tensor]:
    """The buckets."""
    return [one.args[0] for one in look._reductions]  # type: ignore[attr-defined]


def test_gradients_in_a_bucket_are_looked_at_together(bucket: Bucket) -> None:
    flat, parameters = bucket
    other = torch.nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    look = FiniteGradientCheck(torch.optim.SGD([*parameters[::-1], other], lr=1.0))
    before = flat.clone()
    assert look.is_finite()
    assert ([one.numel() for one in looked_at(look)], look._small, look._summed) == ([24], [other], [])
    assert torch.equal(flat, before)
    for place in range(24):
        flat[place] = float("inf")
        assert not look.is_finite()
        flat[place] = 1.0
        assert look.is_finite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bucket_of_16_bits_may_hold_what_squared_would_be_infinite(dtype: torch.dtype) -> None:
    flat = torch.full((24,), 300.0, dtype=dtype)
    assert dtype is torch.bfloat16 or not flat.dot(flat).isfinite()
    parameters = [torch.nn.Parameter(torch.zeros(12, dtype=dtype)) for _ in range(2)]
    for parameter, part in zip(parameters, flat.split(12), strict=True):
        parameter.grad = part
    look = FiniteGradientCheck(torch.optim.SGD(parameters, lr=1.0))
    assert look.is_finite()
    assert len(look._reductions) == 1
    flat[20] = float("nan")
    assert not look.is_finite()


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_a_gradient_that_left_its_bucket_is_found_where_it_is(bucket: Bucket, replaced: int) -> None:
    _, parameters = bucket
    look = FiniteGradientCheck(torch.optim.SGD(parameters, lr=1.0))
    assert look.is_finite()
    assert look._reductions
    parameters[replaced].grad = torch.full_like(parameters[replaced], float("nan"))
    assert not look.is_finite()
    assert not look._reductions
    parameters[replaced].grad = None
    assert look.is_finite()


def test_memory_that_others_fill_too_is_not_looked_at(bucket: Bucket) -> None:
    flat, parameters = bucket
    for some in ([0, 1], [1, 2], [0, 2]):
        look = FiniteGradientCheck(torch.optim.SGD([parameters[one] for one in some], lr=1.0))
        assert look.is_finite()
        assert not look._reductions
    parameters[2].grad = flat[:2]  # two gradients in one place, and the end left out
    look = FiniteGradientCheck(torch.optim.SGD(parameters, lr=1.0))
    assert look.is_finite()
    assert not look._reductions


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("only_ddp", "watched"), [(False, 4), (True, 1)])
def test_the_buckets_of_ddp_are_found_and_found_again_when_it_has_made_them_anew(
    process_group: None, only_ddp: bool, watched: int
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    look, memories = FiniteGradientCheck(optimizer, only_ddp), []
    for _ in range(4):
        optimizer.zero_grad()
        wrapped(torch.ones(3, 4)).sum().backward()
        assert look.is_finite()
        assert [one.numel() for one in looked_at(look)] == [58]
        assert not look._small + look._summed
        assert len(look._watched) == watched
        memories.append(looked_at(look)[0].data_ptr())
        assert {one.grad.untyped_storage().data_ptr() for one in model.parameters()} == {memories[-1]}
    assert memories[0] != memories[1] == memories[-1]
    assert model[1].bias.grad is not None
    model[1].bias.grad[1] = float("nan")
    assert not look.is_finite()


class Touching(Callback):
    """Its hooks may put another gradient in the place of DDP's."""

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None: ...


class Scaling(LightningModule):
    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", True),
        ("a callback", False),
        ("the module", False),
        ("by hand", False),
        ("a parameter's hook", False),
        ("not DDP", False),
    ],
)
def test_only_ddp_sets_the_gradients_where_no_other_code_runs_in_between(
    process_group: None, kind: str, expected: bool
) -> None:
    module = Scaling() if kind == "the module" else LightningModule()
    module.layer = torch.nn.Linear(2, 2)
    if kind == "by hand":
        module.automatic_optimization = False
    elif kind == "a parameter's hook":
        module.layer.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    model = module if kind == "not DDP" else DistributedDataParallel(module)
    callbacks = [guard.Guard.__new__(guard.Guard), Callback(), *([Touching()] if kind == "a callback" else [])]
    trainer = SimpleNamespace(strategy=SimpleNamespace(model=model), callbacks=callbacks)
    assert guard._only_ddp_sets_gradients(trainer, module) is expected  # type: ignore[arg-type]


def test_no_gradients_are_finite(optimizer: torch.optim.Optimizer) -> None:
    assert FiniteGradientCheck(optimizer).is_finite()


def test_parameters_that_come_later_and_sparse_gradients_are_looked_at() -> None:
    first = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([first], lr=1.0)
    look = FiniteGradientCheck(optimizer)
    gradients_in(optimizer)
    assert look.is_finite()
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer.add_param_group({"params": [embedding.weight]})
    embedding(torch.tensor([1, 2])).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.is_sparse
    assert look.is_finite()
    embedding.weight.grad = embedding.weight.grad * float("nan")
    assert not look.is_finite()


@pytest.fixture
def one_rank_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # left by Lightning's DeepSpeed; a mesh would choose that GPU
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mesh_device", ["cpu", "cuda"])
def test_sharded_gradients_of_one_rank_are_read_from_their_local_shards(one_rank_group: None, mesh_device: str) -> None:
    """fsdp on one rank; "cuda": with cpu_offload the shards are in host memory, and the mesh is the GPU's."""
    mesh = DeviceMesh(mesh_device, torch.arange(1))

    def sharded(values: torch.Tensor) -> DTensor:
        spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(values.shape, values.stride(), values.dtype))
        return DTensor(values, spec, requires_grad=False)  # type: ignore[no-untyped-call]

    parameters = [torch.nn.Parameter(sharded(torch.zeros(shape))) for shape in SHAPES]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    check = FiniteGradientCheck(optimizer)
    assert check.is_finite()  # none has a gradient yet
    values = [torch.ones(shape) for shape in SHAPES]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = sharded(value)
    with _NoDTensors():
        assert check.is_finite()
        assert FiniteGradientCheck(optimizer).is_finite()
        for value in values:
            if value.numel():
                value.view(-1)[-1] = math.nan
                assert not check.is_finite()
                value.view(-1)[-1] = 1.0
        assert check.is_finite()


class _NoDTensors(TorchDispatchMode):
    """Refuses operations on DTensors: they redistribute, or read a storage that a DTensor does not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(issubclass(kind, DTensor) for kind in types), func
        return func(*args, **(kwargs or {}))

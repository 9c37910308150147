"""One rank of a job trains for two steps on fake tensors, wrapped by its strategy, and the peak of memory is kept.

The process group is torch's `fake` one, in which collectives do nothing: any number of ranks, in one process. The
Reducer of ddp is not simulated, because it reads pointers, which fake tensors do not have: its buckets are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from trainer import strategies
from trainer.config.strategy import Ddp, DeepspeedZero1, DeepspeedZero2, DeepspeedZero3, Fsdp, Hsdp, Tp
from trainer.core.errors import UserError
from trainer.plan import zero
from trainer.plan.messages import Simulated
from trainer.plan.on_cuda import as_on_cuda
from trainer.plan.parts import BUCKETS, GRADIENTS, OPTIMIZER, PARAMETERS
from trainer.plan.tracked import BLOCK, Tracked, first_shards, real_meshes
from trainer.plan.work import Work
from trainer.strategies.blocks import prepare
from trainer.strategies.deepspeed_zero import DTYPES
from trainer.strategies.fsdp import clip_by_global_norm
from trainer.strategies.mesh import TENSOR, make_mesh
from trainer.strategies.narrow_weights import normalize_with_wide_weights
from trainer.strategies.tensor_parallel import parallelize

ZERO = (DeepspeedZero1, DeepspeedZero2, DeepspeedZero3)
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on beside the model, the batch and the optimizer."""

    strategy: Any
    """Options of the strategy: an instance of one of `trainer.config.strategy.STRATEGIES`."""
    world_size: int
    ranks_of_node: int = 0
    """0: all ranks are on one node."""
    precision: str = "32-true"
    """Lightning's name, not `auto`."""
    device: str = "cuda"
    """Device that is planned for: cuda or cpu."""
    clips: bool = False
    """Whether gradients are clipped by their norm."""
    accumulates: bool = False
    """Whether a step has several micro-batches."""
    classes: int | None = None
    """Size of the last dimension of logits; None: not known."""
    block: int = BLOCK
    """Bytes to which an allocation is rounded."""


def simulate(
    make_module: Callable[[], Any],
    batch: Any,
    make_optimizer: Callable[[Any], Any],
    setting: Setting,
) -> Simulated:
    """Return the memory of the second step, which has the optimizer states from its beginning.

    Args:
        make_module: Returns the LightningModule; called where tensors are fake.
        batch: Tensors on the meta device or the CPU: the micro-batch of one rank.
        make_optimizer: Returns the optimizer of the wrapped module, or None.
        setting: Strategy, ranks, precision and device.

    Raises:
        UserError: The strategy is not simulated.
    """
    setting = replace(setting, strategy=_settled(setting))
    torch.distributed.init_process_group("fake", rank=0, world_size=setting.world_size, store=FakeStore())
    try:
        with ExitStack() as stack:
            wrap = wrapper(setting)  # the device mesh has values
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(as_on_cuda() if setting.device == "cuda" else nullcontext())
            stack.enter_context(real_meshes())
            stack.enter_context(first_shards())
            tracked = stack.enter_context(Tracked(setting.classes, setting.block, setting.device == "cpu"))
            stack.enter_context(tracked.resizing())
            if isinstance(setting.strategy, ZERO):
                stack.enter_context(zero.on_fake_tensors(setting.world_size))
            stack.enter_context(_default_type(setting.precision))
            module = make_module()
            wrap(module)
            inputs = tree_map_only(torch.Tensor, partial(_fake, dtype=_type_of_inputs(setting)), batch)
            return steps(module, inputs, make_optimizer, setting, tracked)
    finally:
        torch.distributed.destroy_process_group()


def steps(
    module: Any, batch: Any, make_optimizer: Callable[[Any], Any], setting: Setting, tracked: Tracked
) -> Simulated:
    """Train a wrapped module for two steps, and return the memory of the second; on fake or on real tensors."""
    for parameter in (*module.parameters(), *module.buffers()):
        tracked.add(parameter, PARAMETERS)
    trained: _Plain | zero.Engine
    if isinstance(setting.strategy, ZERO):
        trained = zero.Engine(module, make_optimizer, setting, tracked)
    else:
        trained = _Plain(module, make_optimizer, setting, tracked)
    counter = tracked.counter
    for is_second in (False, True):
        begin = tracked.mark()
        at_rest = tracked.alive
        for is_last in _micro_batches(setting, is_second):
            counts = is_second and is_last
            counter.during = "forward" if counts else None
            loss = trained.forward(batch, is_last)
            loss = loss["loss"] if isinstance(loss, dict) else loss
            counter.during = "backward" if counts else None
            trained.backward(loss, is_last)
            del loss
        counter.during = "update" if is_second else None
        passes, middle = tracked.peak, tracked.mark()
        gradients = trained.sizes()[GRADIENTS]
        trained.update()
        counter.during = None
        update, end = tracked.peak, tracked.mark()
        states = {**trained.sizes(), GRADIENTS: gradients}
        trained.zero_grad()
    where, parts = (
        ("passes", tracked.parts(begin, middle)) if passes >= update else ("update", tracked.parts(middle, end))
    )
    return Simulated(max(passes, update), parts, where, at_rest, passes, update, states, _work_of(module, tracked))


def _micro_batches(setting: Setting, is_second: bool) -> tuple[bool, ...]:
    """Return for each micro-batch of a step whether it is the last; of more than two, those between are like the first.

    The first step is there for the optimizer states, which one micro-batch makes as well; but DeepSpeed counts them.
    """
    accumulates = setting.accumulates and (is_second or isinstance(setting.strategy, ZERO))
    return (False, True) if accumulates else (True,)


class _Plain:
    """A module that its strategy has wrapped, with torch's own optimizer: what a step consists of."""

    def __init__(self, module: Any, make_optimizer: Callable[[Any], Any], setting: Setting, tracked: Tracked) -> None:
        self._module, self._setting, self._tracked = module, setting, tracked
        self._optimizer = make_optimizer(module)
        self._buckets: _Buckets | None = None
        if isinstance(setting.strategy, Ddp) and setting.world_size > 1:
            self._buckets = _Buckets(module, setting.strategy.gradient_as_bucket_view)
            tracked.label(self._buckets.tensors, BUCKETS)

    def forward(self, batch: Any, is_last: bool) -> Any:
        """Return what the training step returns for a micro-batch."""
        if self._buckets is not None:
            self._buckets.receives = is_last
        with autocast(self._setting.precision):
            return self._module.training_step(batch, 0)

    def backward(self, loss: Any, is_last: bool) -> None:
        """Run the backward pass."""
        loss.backward()
        self._tracked.label((one.grad for one in self._module.parameters()), GRADIENTS)

    def update(self) -> None:
        """Clip the gradients and update the weights."""
        if self._setting.clips:
            clip_by_global_norm(list(self._module.parameters()), 1.0)
        if self._optimizer is not None:
            self._optimizer.step()
            self._tracked.label(_states(self._optimizer), OPTIMIZER)

    def zero_grad(self) -> None:
        """Free the gradients."""
        self._module.zero_grad() if self._optimizer is None else self._optimizer.zero_grad()

    def sizes(self) -> dict[str, int]:
        """Return the bytes of parameters, gradients and optimizer states now."""
        parameters = list(self._module.parameters())
        return {
            PARAMETERS: sum(map(_nbytes, (*parameters, *self._module.buffers()))),
            GRADIENTS: sum(_nbytes(one.grad) for one in parameters),
            OPTIMIZER: 0 if self._optimizer is None else sum(map(_nbytes, _states(self._optimizer))),
        }


def _work_of(module: Any, tracked: Tracked) -> Work:
    """Return what was counted, and the number of parameters; of a sharded one, of the whole."""
    parameters = {one: int(getattr(one, "ds_numel", one.numel())) for one in module.parameters()}
    is_zero3 = any(hasattr(one, "ds_numel") for one in parameters)
    gathers = [one for one in module.modules() if isinstance(one, FSDPModule)]
    if is_zero3:  # DeepSpeed gathers the parameters of a module when it is called
        gathers = [one for one in module.modules() if any(True for _ in one.parameters(recurse=False))]
    return Work(
        tracked.counter.of("forward"),
        tracked.counter.of("backward"),
        tracked.counter.of("update"),
        elements=sum(parameters.values()),
        trained=sum(size for one, size in parameters.items() if one.requires_grad),
        units=max(1, len(gathers)),
    )


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Return the context of a forward pass, with the autocast that Lightning's precision plugin enters."""
    if precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast("cpu", _AUTOCAST[precision], cache_enabled=False)


def _settled(setting: Setting) -> Any:
    options = strategies.resolved(setting.strategy, setting.world_size, setting.device)
    if isinstance(options, ZERO) and {options.offload_optimizer, getattr(options, "offload_parameters", "none")} != {
        "none"
    }:
        raise UserError(f"strategy={options.name}: offloading is not simulated", "plan it without, or strategy=fsdp")
    ranks = setting.ranks_of_node or setting.world_size  # which the strategy reads from torchrun's environment
    if isinstance(options, Hsdp):
        options = replace(options, shard_size=options.shard_size or ranks)
    if isinstance(options, Tp):
        options = replace(options, tensor_parallel_size=options.tensor_parallel_size or ranks)
    return replace(options, compile=False)


def wrapper(setting: Setting) -> Callable[[Any], None]:
    """Return what prepares a module as the strategy does."""
    options = setting.strategy
    if not isinstance(options, Fsdp):

        def whole(module: Any) -> None:
            if isinstance(options, ZERO) and setting.precision.endswith("mixed"):
                normalize_with_wide_weights(module)
            prepare(module, options)

        return whole
    sharding: Any = strategies.build(options, setting.world_size, torch.device("cpu"), 60.0)
    sharding._precision_plugin = Precision()
    sharding._precision_plugin.precision = setting.precision
    sharding._device_mesh = make_mesh("cpu", sharding.sizes)

    def sharded(module: Any) -> None:
        splits = {key: getattr(options, f"{key}_parallel", False) for key in ("sequence", "loss")}
        parallelize(module, sharding._device_mesh[TENSOR], **splits)
        sharding._shard(module)

    return sharded


class _Buckets:
    """The buckets of DDP's Reducer, which are there all the time, and the gradients in them.

    Args:
        module: The module.
        as_views: Whether gradients become views of them (`gradient_as_bucket_view`), or are copied into them.
    """

    def __init__(self, module: Any, as_views: bool) -> None:
        self.receives = True
        """False during the micro-batches after which gradients are not reduced: they stay where autograd makes them."""
        self._as_views = as_views
        self.tensors: list[torch.Tensor] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                self.tensors.append(torch.empty_like(parameter))
                parameter.register_post_accumulate_grad_hook(partial(self._receive, bucket=self.tensors[-1]))

    def _receive(self, parameter: torch.Tensor, bucket: torch.Tensor) -> None:
        assert parameter.grad is not None
        if self.receives and parameter.grad is not bucket:
            bucket.copy_(parameter.grad)
            if self._as_views:
                parameter.grad = bucket


@contextmanager
def _default_type(precision: str) -> Iterator[None]:
    """Create parameters in the type of a true precision, as Lightning does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_TRUE.get(precision, before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _type_of_inputs(setting: Setting) -> torch.dtype | None:
    """Return the type to which Lightning converts what is not integers: that of a true precision, and DeepSpeed's."""
    return DTYPES[setting.precision] if isinstance(setting.strategy, ZERO) else _TRUE.get(setting.precision)


def _fake(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)


def _states(optimizer: Any) -> list[Any]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def _nbytes(tensor: Any) -> int:
    if tensor is None:
        return 0
    local = getattr(tensor, "_local_tensor", tensor)
    return int(local.numel() * local.element_size())

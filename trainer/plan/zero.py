"""DeepSpeed's own engine on fake tensors: what ZeRO 1 to 3 hold is what its code allocates.

What it reads of values gets a stand-in: losses and norms are finite, and all ranks agree. Copies to the host
(`offload_optimizer`, `offload_parameters`) are not simulated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import strategies
from trainer.core.errors import UserError
from trainer.plan.parts import BUCKETS, GRADIENTS, OPTIMIZER, PARAMETERS
from trainer.plan.tracked import Tracked
from trainer.strategies.deepspeed_zero import DTYPES

_MOVES = ("to", "cpu", "half", "bfloat16", "float")


class Engine:
    """A module under DeepSpeed, with the optimizer that it wraps.

    Args:
        module: The LightningModule.
        make_optimizer: Returns the optimizer of the module.
        setting: Strategy, ranks and precision (`simulation.Setting`).
        tracked: Counts the memory.
    """

    def __init__(self, module: Any, make_optimizer: Callable[[Any], Any], setting: Any, tracked: Tracked) -> None:
        self._module, self._tracked = module, tracked
        self._strategy = cast(Any, strategies.build(setting.strategy, setting.world_size, torch.device("cpu"), 60.0))
        self._strategy.parallel_devices = [torch.device("cpu", 0)]
        self._strategy.precision_plugin = DeepSpeedPrecision(setting.precision)
        self._strategy.config |= {
            "gradient_accumulation_steps": 2 if setting.accumulates else 1,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0 if setting.clips else 0.0,
        }
        self._strategy._init_config_if_needed()
        optimizer = make_optimizer(module)
        if optimizer is None:
            raise UserError(f"strategy={setting.strategy.name}: the module has no optimizer", "plan strategy=fsdp")
        self._narrow(optimizer, DTYPES[setting.precision])
        with self._unmoved():
            self._engine, self._zero = self._strategy._setup_model_and_optimizer(module, optimizer)
        self.label()

    def _narrow(self, optimizer: Any, dtype: torch.dtype) -> None:
        """Convert the weights, as the strategy (stage 3) or DeepSpeed's constructor does.

        Buffers keep their type in mixed precision; in a true one Lightning converts them as well.
        """
        module = self._module
        if self._strategy.options.stage == 3:
            self._strategy._configured = optimizer, None
            self._strategy._partition(module, initialize=True)
        tensors = [] if self._strategy.options.stage == 3 else list(module.parameters())
        if str(self._strategy.precision_plugin.precision).endswith("true"):
            tensors += module.buffers()
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        """Inside this context, do not let the constructor convert the module, whose parameters cannot be swapped."""
        for name in _MOVES:
            setattr(self._module, name, lambda *_, **__: self._module)
        try:
            yield
        finally:
            for name in _MOVES:
                delattr(self._module, name)

    def forward(self, batch: Any, is_last: bool) -> Any:
        """Return what the training step returns for a micro-batch."""
        return self._strategy._forward_redirection(self._engine, self._module, "training_step", batch, 0)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Run the backward pass, with its reductions."""
        self._engine.backward(loss, scale_wrt_gas=False)
        self.label()
        if not is_last:
            self._engine.step()

    def update(self) -> None:
        """Clip, update and gather the weights, and free the gradients."""
        self._engine.step()
        self.label()

    def zero_grad(self) -> None:
        """Do nothing: the update has freed the gradients."""

    def label(self) -> None:
        """Assign what the engine holds to the parts of the memory."""
        tracked = self._tracked
        tracked.label(self._buckets(), BUCKETS)
        tracked.label(self.gradients(), GRADIENTS)
        tracked.label(self.states(), OPTIMIZER)
        tracked.label(self.weights(), PARAMETERS)

    def weights(self) -> list[Tensor]:
        """Return the weights in the type of the products: whole, or at stage 3 this rank's shards; and buffers."""
        shards = [getattr(one, "ds_tensor", one) for one in self._module.parameters()]
        return [*shards, *self._module.buffers()]

    def gradients(self) -> list[Tensor]:
        """Return the gradients that are there between two micro-batches, or before the update."""
        found = [one.grad for one in self._module.parameters() if one.grad is not None]
        for group in getattr(self._zero, "averaged_gradients", {}).values():
            found += [one for one in group or () if one is not None]
        flat = getattr(self._zero, "grad_partitions_flat_buffer", None)  # of stage 3, there all the time
        return found if flat is None else [*found, flat]

    def states(self) -> list[Tensor]:
        """Return the fp32 master weights and the states of the optimizer."""
        masters = getattr(self._zero, "single_partition_of_fp32_groups", None)
        masters = self._zero.fp32_partitioned_groups_flat if masters is None else masters
        held = self._zero.optimizer.state.values()
        return [*masters, *(value for state in held for value in state.values() if isinstance(value, Tensor))]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of parameters, gradients and optimizer states; a storage that several share counts once."""
        found = {}
        for part, tensors in (
            (PARAMETERS, self.weights()),
            (GRADIENTS, self.gradients()),
            (OPTIMIZER, self.states()),
        ):
            storages = {id(one.untyped_storage()): one.untyped_storage().nbytes() for one in tensors}
            found[part] = sum(storages.values())
        return found

    def _buckets(self) -> list[Tensor]:
        buffers = [getattr(one, "buffer", None) for one in getattr(self._zero, "ipg_buckets", {}).values()]
        return [one for buffer in buffers for one in ([buffer] if isinstance(buffer, Tensor) else buffer or ())]


class _Scalars(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what is read of a fake tensor: 1, or False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 1.0 if args[0].is_floating_point() else False


@contextmanager
def on_fake_tensors(world_size: int) -> Iterator[None]:
    """Inside this context, inside that of fake tensors, DeepSpeed's engine runs as rank 0 of a fake process group."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is first imported
    import deepspeed.comm.comm as comm
    import deepspeed.ops
    from deepspeed.runtime.zero import utils
    from deepspeed.utils import groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with ExitStack() as stack:
        for known in (vars(comm), vars(groups)):  # process groups that are gone afterwards
            stack.enter_context(mock.patch.dict(known))
        stack.enter_context(mock.patch.dict(os.environ, rank))
        # Stage 3 replaces it "until manually reset": what is simulated afterwards would be counted with it.
        stack.enter_context(mock.patch.object(functional, "linear", functional.linear))
        stack.enter_context(mock.patch.object(utils, "assert_lst_len_same_as_other_ranks"))
        stack.enter_context(mock.patch.object(utils, "get_lst_from_rank0", list))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", return_value=0))  # whose alignment is checked
        stack.enter_context(_Scalars())  # type: ignore[no-untyped-call]
        yield

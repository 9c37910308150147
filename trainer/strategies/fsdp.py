"""FSDP2 (`fully_shard`): alone, with replicas of sharded groups (hsdp), or combined with tensor parallelism (tp).

Lightning's ModelParallelStrategy expects each LightningModule to shard itself in `configure_model`. This strategy
shards a module that does not, so that any module works unchanged.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from trainer.checkpoint.named import by_name, named_groups, set_options
from trainer.checkpoint.stored import Optimizers, StoredCheckpoint, flatten
from trainer.config.strategy import Fsdp
from trainer.core.errors import UserError
from trainer.runtime.clipping import OnNorm, report_clipping
from trainer.strategies import MeshSizes
from trainer.strategies.blocks import prepare
from trainer.strategies.buffers import BuffersOfRank0
from trainer.strategies.fsdp_layout import prefetch_groups, shard_groups, shard_networks
from trainer.strategies.initialization import Recipe, are_equal_on_all_ranks, recipes, replace_parameters
from trainer.strategies.mesh import REPLICATE, SHARD, TENSOR, is_sharded, is_split, make_mesh
from trainer.strategies.narrow_weights import compute_as_autocast
from trainer.strategies.saving import ShardedCheckpoints, model_tensors, unwrapped
from trainer.strategies.tensor_parallel import parallelize

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods of a LightningModule that use its parameters: by default FSDP gathers them only around `forward`."""

_FREED = (
    "weights were used that FSDP2 had freed, as by a derivative of a gradient (create_graph=True) or a block that is"
    " not called through its forward method\n  set strategy=ddp"
)
_OF_DTYPES = re.compile(r"same (scalar |d)type|scalar type|dtypes (match|not supported)|expected dtype|for '?BFloat16")
"""What torch says of operands of two data types, and of operations that bfloat16 does not have."""
_NARROW = (
    "{problem}\n  under bf16-mixed strategy={name} gathers weights in bfloat16, which this operation does not take:"
    " set strategy.param_dtype=float32, or strategy=ddp"
)


class RunFSDPStrategy(ShardedCheckpoints, BuffersOfRank0, ModelParallelStrategy):
    """FSDP2 over a device mesh with the axes (dp_replicate, dp_shard, tp); each may have size 1.

    A module that shards itself or applies tensor parallelism in `configure_model`, with `self.device_mesh`, is left
    unchanged.
    """

    def __init__(self, options: Fsdp, sizes: MeshSizes, backend: str, timeout_s: float) -> None:
        super().__init__(
            data_parallel_size=sizes.dp_replicate * sizes.dp_shard,
            tensor_parallel_size=sizes.tp,
            process_group_backend=backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.options = options
        self.sizes = sizes

    def setup_environment(self) -> None:
        """Set up the process group, and a mesh with three axes instead of ModelParallelStrategy's two."""
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.sizes)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of DistributedSampler: ranks of one tensor parallel group read the same samples."""
        tp = self.sizes.tp
        return {"num_replicas": self.world_size // tp, "rank": self.global_rank // tp}

    def setup(self, trainer: Trainer) -> None:
        """Shard the model, then create the optimizers; otherwise as ModelParallelStrategy does."""
        assert self.accelerator is not None
        module = self.lightning_module
        assert module is not None
        self.accelerator.setup(trainer)
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            problem = (
                f"strategy={self.options.name}: {type(module).__name__} has submodules in FullyShardedDataParallel"
            )
            raise UserError(problem, "remove it, because the strategy shards the model, or use fully_shard instead")
        deferred = recipes(module)
        self._broadcast_parameters(module)
        self.model = self.precision_plugin.convert_module(module)
        if not is_split(module):
            splits = {name: getattr(self.options, f"{name}_parallel", False) for name in ("sequence", "loss")}
            parallelize(module, self.device_mesh[TENSOR], **splits)
        self._shard(module)
        self._materialize(module, deferred, initialize=trainer.ckpt_path is None)
        _materialize_distributed_module(module, self.root_device)  # parameters that the module itself put on meta
        self.model_to_device()
        report_clipping(self.precision_plugin, clip_by_global_norm)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING and not self._offloads:
            _optimizers_to_device(self.optimizers, self.root_device)

    def on_exception(self, exception: BaseException) -> None:
        """Explain an error of torch that does not say what was done."""
        if "out of bounds for storage of size 0" in str(exception):
            exception.args = (_FREED,)
        elif self._narrows and _OF_DTYPES.search(str(exception)):
            problem = next(iter(str(exception).splitlines()))
            exception.args = (_NARROW.format(problem=problem, name=self.options.name),)
        super().on_exception(exception)

    @property
    def _narrows(self) -> bool:
        """Whether weights are gathered in fewer bits than they have."""
        return str(self.precision_plugin.precision) == "bf16-mixed" and self.options.param_dtype == "auto"

    @property
    def _offloads(self) -> bool:
        """Whether shards are in host memory and not on the device. On CPU ranks they are in host memory anyway."""
        return self.options.cpu_offload and self.root_device.type != "cpu"

    def model_to_device(self) -> None:
        """Move the model to the device, unless shards are offloaded: `fully_shard` has placed everything then."""
        if not self._offloads:
            super().model_to_device()

    def _broadcast_parameters(self, module: LightningModule) -> None:
        """Broadcast rank 0's initial values, as DDP does; each rank then takes its shard of them."""
        group = self._group()
        if group is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.is_meta and not isinstance(tensor, DTensor):
                    dist.broadcast(tensor.data, src=0, group=group)

    def _materialize(self, module: LightningModule, deferred: dict[str, Recipe], *, initialize: bool) -> None:
        """Allocate the shards of parameters that were built on the meta device.

        Each rank fills its own shards, on its device. At most one parameter is whole in memory at a time, and none
        if its initialization allows it.

        Args:
            module: The sharded module.
            deferred: Recipes of the parameters, by name.
            initialize: Fill the shards with the initial values; False if a checkpoint is loaded afterwards.
        """
        device = torch.device("cpu") if self._offloads else self.root_device
        from_rank_0 = initialize and not are_equal_on_all_ranks(deferred, self._group())
        parameters = dict(module.named_parameters(remove_duplicate=False))
        materialized: dict[int, nn.Parameter] = {}
        for name, recipe in deferred.items():
            parameter = parameters[name]
            assert isinstance(parameter, DTensor)
            if id(parameter) in materialized:
                continue
            shard = torch.empty_like(parameter, device=device)
            assert isinstance(shard, DTensor)
            if initialize:
                self._fill_shard(shard, recipe, from_rank_0)
                recipe.clear()
            materialized[id(parameter)] = nn.Parameter(shard, parameter.requires_grad)
        replace_parameters(module, materialized)
        module._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]  # FSDP2 registers the new memory in its hook

    def _fill_shard(self, shard: DTensor, recipe: Recipe, from_rank_0: bool) -> None:
        (chunk,) = shard.__create_chunk_list__()  # type: ignore[no-untyped-call]
        group = self._group()
        if from_rank_0:  # the ranks drew differently, as with a seed of their own
            whole = recipe.make(group)
            dist.broadcast(whole, src=0, group=group)
            recipe = Recipe(recipe.parameter, None, dtype=recipe.dtype, source=lambda: whole)
        with torch.no_grad():
            recipe.fill(shard.to_local(), chunk.offsets, group)

    def _shard(self, module: LightningModule) -> None:
        """Shard the blocks, then the rest. A module that has sharded itself: only what it has left unsharded."""
        own = is_sharded(module)
        arguments = self._sharding()
        if arguments["mp_policy"].param_dtype is not None and not own:
            compute_as_autocast(module)
        blocks = prepare(module, self.options, self.options.blocks)
        groups = [] if own else shard_groups(module, blocks, arguments)
        if not module.automatic_optimization:
            self._shard_parts(module, arguments)
        elif not own or any(one.requires_grad and not isinstance(one, DTensor) for one in module.parameters()):
            fully_shard(module, **{**arguments, "reshard_after_forward": False})  # backward needs the root immediately
        for name in STEPS:
            register_fsdp_forward_method(module, name)
        if not own and module.automatic_optimization:
            prefetch_groups(module, groups, self.options.prefetch)

    def _shard_parts(self, module: LightningModule, arguments: dict[str, Any]) -> None:
        """Shard what a module that optimizes manually has left, each of its networks for itself.

        It runs the backward pass inside `training_step`. If that were the forward pass of a root, FSDP2 would reduce no
        gradient, and the optimizers would have nothing to do.

        Raises:
            UserError: A parameter is not in a network of its own.
        """
        shard_networks(module, arguments)
        rest = [name for name, one in module.named_parameters() if one.requires_grad and not isinstance(one, DTensor)]
        if rest:
            raise UserError(
                f"strategy={self.options.name}: {type(module).__name__} optimizes manually, and {rest[0]} is not in a"
                " submodule of its own, or in two",
                "put it into one submodule with a forward method, or use strategy=ddp",
            )

    def _sharding(self) -> dict[str, Any]:
        """Return the arguments of `fully_shard`."""
        options = self.options
        compute = torch.bfloat16 if self._narrows else None
        return {
            "mesh": self.device_mesh[REPLICATE, SHARD] if self.sizes.dp_replicate > 1 else self.device_mesh[SHARD],
            "reshard_after_forward": options.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute, reduce_dtype=getattr(torch, options.reduce_dtype), cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy() if self._offloads else OffloadPolicy(),
        }

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Skip the gradient reduction inside this context, if `gradient_sync` is `step`.

        Lightning enters it for all micro-batches of a step but the last. Without a reduction FSDP2 keeps the unsharded
        gradients of the whole model.
        """
        assert self.model is not None
        skips = self.options.gradient_sync == "step"
        sharded = [part for part in self.model.modules() if skips and isinstance(part, FSDPModule)]
        for part in sharded:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in sharded:
                part.set_requires_gradient_sync(True, recurse=False)

    def on_validation_end(self) -> None:
        """Free the weights that an evaluation has gathered last: no backward pass follows that would."""
        super().on_validation_end()
        self._reshard()

    def on_test_end(self) -> None:
        """Free the gathered weights."""
        super().on_test_end()
        self._reshard()

    def on_predict_end(self) -> None:
        """Free the gathered weights."""
        super().on_predict_end()
        self._reshard()

    def _reshard(self) -> None:
        assert self.model is not None
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the sharded state without copying it: `save_checkpoint` copies."""
        assert self.model is not None
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` saves the optimizer states itself, by parameter name."""
        return {}

    def _local_state(self) -> tuple[dict[str, torch.Tensor], Optimizers]:
        module = self.lightning_module
        assert module is not None
        tensors, rest = flatten([_named_state(optimizer, module) for optimizer in self.optimizers])
        tensors.update(model_tensors(module))
        # Rank 0 saves replicated state: its buffers are authoritative.
        is_saved = {name: isinstance(tensor, DTensor) or self.global_rank == 0 for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in tensors.items() if is_saved[name]}, rest

    def _restore(self, stored: StoredCheckpoint) -> None:
        module = self.lightning_module
        assert module is not None
        tensors = model_tensors(module)
        if module.trainer.state.fn == TrainerFn.FITTING:
            for number, optimizer in enumerate(self.optimizers):
                get_optimizer_state_dict(module, unwrapped(optimizer))  # creates the empty state that is filled below
                names = [group["params"] for group in named_groups(unwrapped(optimizer), module)]
                set_options(unwrapped(optimizer), stored.optimizers.groups[number], names)
            optimizer_tensors, _ = flatten([_named_state(optimizer, module) for optimizer in self.optimizers])
            tensors.update({name: tensor for name, tensor in optimizer_tensors.items() if name in stored.shapes})
        stored.read(tensors)


def _named_state(optimizer: Any, module: nn.Module) -> dict[str, Any]:
    optimizer = unwrapped(optimizer)
    return by_name(optimizer.state_dict(), [group["params"] for group in named_groups(optimizer, module)])


def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, on_norm: OnNorm = lambda norm: None
) -> torch.Tensor:
    """Scale gradients in place so that their global L2 norm, over all ranks, is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` cannot mix tensors of different meshes, which 2D parallelism has.

    Returns:
        The norm before clipping, a scalar; 0 if no parameter has a gradient.
    """
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = defaultdict(list)
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter in with_gradient:
        assert parameter.grad is not None
        by_mesh[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter.grad)
    norms = []
    for gradients in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(gradients, 2.0)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        on_norm(torch.zeros(()))
        return torch.zeros(())
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    on_norm(total)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradients in by_mesh.values():
        for gradient in gradients:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.mul_(scale.to(local.dtype))
    return total


def build(options: Fsdp, sizes: MeshSizes, device: torch.device, timeout_s: float) -> RunFSDPStrategy:
    """Build the strategy for this rank's `device`; the product of `sizes` is the world size."""
    # gloo as well: with cpu_offload, gradients and their norm are in host memory
    return RunFSDPStrategy(options, sizes, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout_s)

"""FSDP2 (`fully_shard`), alone, in groups with copies between them (hsdp), or over tensor parallel layers (tp).

Lightning's ModelParallelStrategy wants each LightningModule to shard itself in `configure_model`; here the strategy
does it for one that does not, so that any module works unchanged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
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
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.checkpoint.named import by_name, named_groups, set_options
from trainer.checkpoint.stored import Optimizers, Stored, flatten
from trainer.config.strategy import Fsdp
from trainer.core.errors import UserError
from trainer.strategies.blocks import prepare
from trainer.strategies.buffers import BuffersOfRank0
from trainer.strategies.deferred import Recipe, make_whole, recipes, replace_parameters
from trainer.strategies.mesh import REPLICATE, SHARD, TENSOR, is_sharded, is_split, make_mesh
from trainer.strategies.saving import ShardedCheckpoints, model_tensors, unwrapped
from trainer.strategies.tensor_parallel import parallelize

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods of a LightningModule that run its parameters; FSDP gathers around `forward` unless told."""


class RunFSDPStrategy(ShardedCheckpoints, BuffersOfRank0, ModelParallelStrategy):
    """The mesh is (dp_replicate, dp_shard, tp): each axis may be 1.

    A module that shards or splits itself in `configure_model`, with `self.device_mesh`, is left as it is.
    """

    def __init__(self, options: Fsdp, sizes: tuple[int, int, int], backend: str, timeout_s: float) -> None:
        super().__init__(
            data_parallel_size=sizes[0] * sizes[1],
            tensor_parallel_size=sizes[2],
            process_group_backend=backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.options = options
        self.sizes = sizes

    def setup_environment(self) -> None:
        """ModelParallelStrategy's, with a mesh of three named axes instead of its two."""
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.sizes)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks of one tensor parallel group read the same samples."""
        tensor = self.sizes[2]
        return {"num_replicas": self.world_size // tensor, "rank": self.global_rank // tensor}

    def setup(self, trainer: Trainer) -> None:
        """ModelParallelStrategy's, with the sharding in it."""
        assert self.accelerator is not None
        module = self.lightning_module
        assert module is not None
        self.accelerator.setup(trainer)
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            problem = f"strategy={self.options.name}: {type(module).__name__} has parts in FullyShardedDataParallel"
            raise UserError(problem, "use fully_shard in its place, or leave it out: the strategy shards")
        if self.sizes[2] > 1:
            make_whole(module)  # DTensor's tensor parallel replaces parameters one layer at a time
        later = recipes(module)
        self._agree_on_parameters(module)
        self.model = self.precision_plugin.convert_module(module)
        if not is_split(module):
            parallelize(module, self.device_mesh[TENSOR])
        self._shard(module)
        self._fill(module, later, trainer.ckpt_path is None)
        _materialize_distributed_module(module, self.root_device)  # what a module has put on the meta device itself
        self.model_to_device()
        self.precision_plugin.clip_grad_by_norm = MethodType(_clip_grad_by_norm, self.precision_plugin)  # type: ignore[method-assign]
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING and not self._offloads:
            _optimizers_to_device(self.optimizers, self.root_device)

    @property
    def _offloads(self) -> bool:
        """Whether shards are kept away from the device. On CPU ranks they are in host memory anyway."""
        return self.options.cpu_offload and self.root_device.type != "cpu"

    def model_to_device(self) -> None:
        """Not when shards stay in host memory: `fully_shard` has put everything where it belongs."""
        if not self._offloads:
            super().model_to_device()

    def _agree_on_parameters(self, module: LightningModule) -> None:
        """Rank 0's initial values everywhere, as in DDP; each rank then cuts its shard out of them."""
        group = self._group()
        if group is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.is_meta and not isinstance(tensor, DTensor):
                    dist.broadcast(tensor.data, src=0, group=group)

    def _fill(self, module: LightningModule, later: dict[str, Recipe], with_values: bool) -> None:
        """Memory for the shards of parameters that were built on the meta device, and rank 0's values in them.

        One parameter is whole at a time. Without `with_values` a checkpoint brings them.
        """
        device = torch.device("cpu") if self._offloads else self.root_device
        found = dict(module.named_parameters(remove_duplicate=False))
        filled: dict[int, nn.Parameter] = {}
        for name, recipe in later.items():
            parameter = found[name]
            assert isinstance(parameter, DTensor)
            if id(parameter) in filled:
                continue
            shard = torch.empty_like(parameter, device=device)
            assert isinstance(shard, DTensor)
            if with_values:
                self._cut(recipe.make(), shard)
            filled[id(parameter)] = nn.Parameter(shard, parameter.requires_grad)
        replace_parameters(module, filled)
        module._apply(lambda tensor: tensor)  # FSDP2 takes note of the new memory there

    def _cut(self, whole: torch.Tensor, shard: DTensor) -> None:
        group = self._group()
        if group is not None:
            dist.broadcast(whole, src=0, group=group)
        with torch.no_grad():
            whole = whole.to(device=shard.device_mesh.device_type, dtype=shard.dtype)
            # None: every rank has the whole and cuts its own part; nothing is sent
            part = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
            shard.to_local().copy_(part.to_local())

    def _shard(self, module: LightningModule) -> None:
        """By blocks and then the rest; of a module that has sharded itself only what it has left whole, if anything."""
        own = is_sharded(module)
        arguments = self._sharding()
        blocks = []
        for block in prepare(module, self.options, self.options.blocks):
            if not own and not _shares_parameters(block, module):
                blocks.append(fully_shard(block, **arguments))
        if not own or any(one.requires_grad and not isinstance(one, DTensor) for one in module.parameters()):
            fully_shard(module, **{**arguments, "reshard_after_forward": False})  # the root is needed again at once
        for name in STEPS:
            register_fsdp_forward_method(module, name)
        _prefetch(blocks, self.options.prefetch)

    def _sharding(self) -> dict[str, Any]:
        """The arguments of `fully_shard`."""
        options = self.options
        compute = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.precision_plugin.precision))
        return {
            "mesh": self.device_mesh[REPLICATE, SHARD] if self.sizes[0] > 1 else self.device_mesh[SHARD],
            "reshard_after_forward": options.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute, reduce_dtype=getattr(torch, options.reduce_dtype), cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy() if self._offloads else OffloadPolicy(),
        }

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Gradients of all but the last micro-batch stay on their rank."""
        assert self.model is not None
        sharded = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        for part in sharded:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in sharded:
                part.set_requires_gradient_sync(True, recurse=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Sharded and not copied: `save_checkpoint` does that."""
        assert self.model is not None
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Saved by `save_checkpoint` itself, by name."""
        return {}

    def _held(self) -> tuple[dict[str, torch.Tensor], Optimizers]:
        module = self.lightning_module
        assert module is not None
        tensors, rest = flatten([_named_state(optimizer, module) for optimizer in self.optimizers])
        tensors.update(model_tensors(module))
        # What every rank has whole is given by rank 0 (whose buffers are the ones that count).
        return {n: t for n, t in tensors.items() if isinstance(t, DTensor) or self.global_rank == 0}, rest

    def _restore(self, stored: Stored) -> None:
        module = self.lightning_module
        assert module is not None
        tensors = model_tensors(module)
        if module.trainer.state.fn == TrainerFn.FITTING:
            for number, optimizer in enumerate(self.optimizers):
                get_optimizer_state_dict(module, unwrapped(optimizer))  # makes the (empty) state that is filled below
                names = [group["params"] for group in named_groups(unwrapped(optimizer), module)]
                set_options(unwrapped(optimizer), stored.optimizers.groups[number], names)
            held, _ = flatten([_named_state(optimizer, module) for optimizer in self.optimizers])
            tensors.update({name: tensor for name, tensor in held.items() if name in stored.shapes})
        stored.read(tensors)


def _named_state(optimizer: Any, module: nn.Module) -> dict[str, Any]:
    optimizer = unwrapped(optimizer)
    return by_name(optimizer.state_dict(), [group["params"] for group in named_groups(optimizer, module)])


def _shares_parameters(block: nn.Module, module: nn.Module) -> bool:
    """Whether the block is tied to something outside: FSDP2 wants all users of a parameter in one group, the root."""
    inside = Counter(id(parameter) for _, parameter in block.named_parameters(remove_duplicate=False))
    everywhere = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return any(everywhere[parameter] > count for parameter, count in inside.items())


def _prefetch(blocks: list[Any], ahead: int) -> None:
    """Gather the next blocks while one computes. FSDP2 prefetches one by itself only as fast as the CPU issues it."""
    for index, block in enumerate(blocks):
        following, before = blocks[index + 1 : index + 1 + ahead], blocks[max(0, index - ahead) : index]
        if following:
            block.set_modules_to_forward_prefetch(following)
        if before:
            block.set_modules_to_backward_prefetch(before[::-1])


def _clip_grad_by_norm(_: Any, optimizer: Any, clip_val: float, *unused: Any) -> None:
    clip_by_global_norm((p for group in optimizer.param_groups for p in group["params"]), float(clip_val))


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients so that the L2 norm over all of them and all ranks is at most `max_norm`; returns that norm.

    torch's own function cannot mix tensors of different meshes, which 2D parallelism has.
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
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradients in by_mesh.values():
        for gradient in gradients:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.mul_(scale.to(local.dtype))
    return total


def build(options: Fsdp, sizes: tuple[int, int, int], device: torch.device, timeout_s: float) -> RunFSDPStrategy:
    """`sizes`: of the axes dp_replicate, dp_shard, tp; their product is the world size."""
    # gloo, too: with cpu_offload gradients and their norm are in host memory
    return RunFSDPStrategy(options, sizes, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout_s)

"""DeepSpeed ZeRO stages 1, 2 and 3, on CUDA and CPU ranks, with checkpoints that other strategies can read.

DeepSpeed's own checkpoints are pickles. They overwrite each other, with `latest` renamed before all ranks have
finished, and load only with the same stage and world size (the universal format refuses stage 2 to 3). So the state is
extracted by parameter name and saved like FSDP's. Each parameter in turn is gathered on all ranks, and one rank, round
robin, keeps it for writing. This costs one all-reduce of the state per save, and no rank holds the whole state.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from trainer.checkpoint.named import named_groups, plain_name, set_options
from trainer.checkpoint.stored import MODEL, OPTIMIZER, Optimizers, StoredCheckpoint
from trainer.config.strategy import DeepspeedZero1, DeepspeedZero2, DeepspeedZero3
from trainer.core.errors import UserError
from trainer.strategies.blocks import prepare
from trainer.strategies.deepspeed_muon import import_muon
from trainer.strategies.deferred import Recipe, recipes, replace_parameters
from trainer.strategies.narrow_weights import normalize_with_wide_weights
from trainer.strategies.saving import ShardedCheckpoints

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
}
"""Type of the parameters that the forward pass uses, by precision."""
Options = DeepspeedZero1 | DeepspeedZero2 | DeepspeedZero3


class RunDeepSpeedStrategy(ShardedCheckpoints, DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy with our checkpoints, on CPU ranks as well."""

    def __init__(self, options: Options, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.options = options
        self._names: list[list[str]] = []
        """Parameter names of each optimizer group, from before DeepSpeed flattens the parameters."""
        self._configured: tuple[Any, Any] | None = None
        """Optimizer and scheduler of stage 3, from before the parameters are partitioned."""

    def setup_environment(self) -> None:
        """Set up as Lightning does, but without its restriction to CUDA (`setup_environment` in Lightning 2.6.6)."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        import deepspeed.ops

        # init_distributed would compile this operator (30 to 60 s), which only inference kernels use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert self.parallel_devices is not None
        # `cpu` has no index, which Lightning's device check and deepspeed.initialize both require.
        self.parallel_devices = [torch.device(one.type, index) for index, one in enumerate(self.parallel_devices)]
        super(DeepSpeedStrategy, self).setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Do nothing around `configure_model`: `setup` partitions the parameters, which are deferred until then."""
        yield

    def setup(self, trainer: Trainer) -> None:
        """Apply activation checkpointing and compilation, then set up as Lightning does."""
        assert self.model is not None
        if str(self.precision_plugin.precision).endswith("mixed"):
            normalize_with_wide_weights(self.model)
        prepare(self.model, self.options)
        if self.options.stage == 3:
            if trainer.state.fn == TrainerFn.FITTING:
                self._configured = self._init_optimizers()  # while parameters still show their shapes
            self._partition(self.model, initialize=trainer.ckpt_path is None)
        super().setup(trainer)

    def _partition(self, module: nn.Module, *, initialize: bool) -> None:
        """Partition the parameters one by one, as inside `deepspeed.zero.Init`; one is whole in memory at a time.

        `deepspeed.initialize` would move the whole model to each GPU first. A constructor inside `zero.Init` would find
        its layers partitioned when it initializes their weights.

        Args:
            module: The module; its parameters may be deferred (`strategies/deferred.py`).
            initialize: Give the parameters rank 0's initial values; False if a checkpoint is loaded afterwards.
        """
        import deepspeed

        self._init_config_if_needed()
        dtype = DTYPES[str(self.precision_plugin.precision)]
        # With a module, if only an empty one, it prepares functional.linear as for a module that it partitions itself.
        init = deepspeed.zero.Init(module=nn.Module(), dtype=dtype, config_dict_or_path=self.config)
        deferred = {id(recipe.parameter): recipe for recipe in recipes(module).values()}
        partitioned: dict[int, nn.Parameter] = {}
        for parameter in module.parameters():
            if hasattr(parameter, "ds_id"):  # created by the user inside `zero.Init`
                continue
            recipe = deferred.get(id(parameter))
            part = parameter if recipe is None else nn.Parameter(torch.empty(0), parameter.requires_grad)
            if recipe is None:
                part.data = parameter.data.to(device=self.root_device, dtype=dtype)
            else:
                part.data = self._initial_values(recipe, initialize).to(device=self.root_device, dtype=dtype)
                partitioned[id(parameter)] = part
                recipe.clear()
            init._zero_init_param(part)  # broadcasts rank 0's values and keeps this rank's part
        replace_parameters(module, partitioned)
        for group in () if self._configured is None else self._configured[0].param_groups:
            group["params"] = [partitioned.get(id(one), one) for one in group["params"]]
        for buffer in module.buffers():  # `deepspeed.initialize` does not move those of a partitioned module
            buffer.data = buffer.data.to(self.root_device)
            if self.world_size > 1:
                dist.broadcast(buffer.data, src=0)

    def _initial_values(self, recipe: Recipe, initialize: bool) -> torch.Tensor:
        """Return the whole parameter on rank 0, which the others receive; on these memory of its size."""
        is_collective = any(kept.owner is not None for kept in recipe.kept)
        if initialize and (self.global_rank == 0 or is_collective):
            return recipe.make(self._group() if is_collective else None)
        return torch.empty(recipe.parameter.shape, dtype=recipe.dtype)

    def _init_optimizers(self) -> tuple[Any, Any]:
        """Create the optimizer and the scheduler.

        Raises:
            UserError: There is not exactly one optimizer, or more than one scheduler.
        """
        if self._configured is not None:
            return self._configured
        module = self.lightning_module
        assert module is not None
        configured, schedulers = _init_optimizers_and_lr_schedulers(module)
        optimizers = [one for one in configured if one.param_groups]
        if len(optimizers) != 1 or len(schedulers) > 1:
            counts = f"{len(optimizers)} optimizers and {len(schedulers)} schedulers"
            problem = f"strategy={self.options.name}: {type(module).__name__} has {counts}"
            fix = "DeepSpeed supports one optimizer and at most one scheduler: set strategy=fsdp or strategy=ddp"
            raise UserError(problem, fix)
        return optimizers[0], schedulers[0] if schedulers else None

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        if optimizer is not None:
            self._names = [group["params"] for group in named_groups(optimizer, model)]
        import_muon()
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Run the backward pass without DeepSpeed's division of the loss by the accumulation steps.

        Lightning has already divided the loss by the number of micro-batches. A second division makes the gradients too
        small by that factor. AdamW hides this, SGD and gradient clipping do not (Lightning 2.6.6, DeepSpeed 0.19.8).
        """
        return super().backward(closure_loss, optimizer, *arguments, scale_wrt_gas=False, **keywords)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return an empty dict at stage 3, where parameters are sharded; `save_checkpoint` gathers them one by one."""
        assert self.lightning_module is not None
        return {} if self.options.stage == 3 else self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` saves the optimizer states itself, by parameter name."""
        return {}

    local_state_is_private = True

    def _local_state(self) -> tuple[dict[str, torch.Tensor], Optimizers]:
        module, zero = self.lightning_module, self.optimizers[0]
        assert module is not None
        local: dict[str, torch.Tensor] = {}
        rest = Optimizers(groups=[self._groups(zero)])
        for number, (name, parameter) in enumerate(module.named_parameters()):
            is_ours = number % self.world_size == self.global_rank
            gathered = {MODEL + name: _whole(zero, parameter)}
            if parameter.requires_grad:
                for key, value in _state_of(zero, parameter).items():
                    flat = f"{OPTIMIZER}0/{name}/{key}"
                    if not isinstance(value, torch.Tensor):
                        rest.values[flat] = value
                    elif value.dim() == 0:
                        gathered[flat] = value
                    else:
                        gathered[flat] = _whole(zero, parameter, key)
            if is_ours:
                local.update({plain_name(flat): _host_copy(tensor) for flat, tensor in gathered.items()})
        if self.global_rank == 0:
            names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            local.update(
                {
                    MODEL + plain_name(name): _host_copy(value)
                    for name, value in module.state_dict().items()
                    if name not in names and isinstance(value, torch.Tensor)
                }
            )
        local.update(_tied(module, local))
        return local, rest

    def _groups(self, zero: Any) -> list[dict[str, Any]]:
        """Return the optimizer's groups with parameter names under `params`."""
        return [
            {**{key: value for key, value in group.items() if key != "params"}, "params": names}
            for group, names in zip(zero.param_groups, self._names, strict=True)
        ]

    def _restore(self, stored: StoredCheckpoint) -> None:
        module = self.lightning_module
        assert module is not None
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        zero: Any = self.optimizers[0] if fitting else None
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                self._restore_parameter(stored, plain_name(name), parameter, zero)
            buffers = {
                MODEL + plain_name(name): value
                for name, value in module.named_buffers()
                if MODEL + plain_name(name) in stored.shapes
            }
            stored.read(buffers)
        if zero is not None:
            set_options(zero, stored.optimizers.groups[0], self._names)
            if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
                zero._hp_optimizer_states_linked = False
                zero._lazy_init_hp_params_optimizer_state()

    def _restore_parameter(self, stored: StoredCheckpoint, name: str, parameter: nn.Parameter, zero: Any) -> None:
        whole = torch.empty(torch.Size(getattr(parameter, "ds_shape", parameter.shape)))
        stored.read({MODEL + name: whole})
        _set_weights(parameter, whole)
        if zero is None or not parameter.requires_grad:
            return
        master = _master(zero, parameter)
        _set_part(zero, parameter, whole, master)
        state = zero.optimizer.state[master]
        for key, value in _stored_state(stored, name).items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                if key not in state:
                    state[key] = torch.zeros_like(master, dtype=value.dtype)
                _set_part(zero, parameter, value, state[key])
            else:
                state[key] = value


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _tied(module: nn.Module, local: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the further names of tied parameters, on the rank that holds the first name in `local`."""
    first = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    return {
        MODEL + plain_name(name): local[MODEL + first[id(parameter)]]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if plain_name(name) != first[id(parameter)] and MODEL + first[id(parameter)] in local
    }


def _stored_state(stored: StoredCheckpoint, name: str) -> dict[str, Any]:
    """Return the optimizer state of one parameter, unsharded."""
    prefix = f"{OPTIMIZER}0/{name}/"
    tensors = {
        flat: torch.empty(shape, dtype=dtype)
        for flat, (shape, dtype) in stored.shapes.items()
        if flat.startswith(prefix)
    }
    stored.read(tensors)
    values = {flat: value for flat, value in stored.optimizers.values.items() if flat.startswith(prefix)}
    return {flat.removeprefix(prefix): value for flat, value in {**tensors, **values}.items()}


def _master(zero: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Return this rank's flat fp32 tensor that holds the parameter, or a part of it."""
    if hasattr(parameter, "ds_id"):
        group_number = zero.grad_position[zero.get_param_id(parameter)][0]
        partition: torch.Tensor = zero.fp32_partitioned_groups_flat[group_number]
        return partition
    flat: torch.Tensor
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        if any(parameter is one for one in group):
            return flat
    raise AssertionError("the parameter is not in the optimizer")


def _state_of(zero: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the inner optimizer's state of the flat tensor of `parameter`; empty before the first step."""
    state: dict[str, Any] = zero.optimizer.state.get(_master(zero, parameter), {})
    return state


def _part(zero: Any, parameter: Any) -> Iterator[tuple[slice, slice]]:
    """Yield the slice of the flattened parameter that this rank holds and its place in the flat tensor, if any."""
    if hasattr(parameter, "ds_id"):
        _, begin, _ = zero.grad_position[zero.get_param_id(parameter)]
        size = parameter.ds_tensor.ds_numel if hasattr(parameter.ds_tensor, "ds_numel") else parameter.ds_tensor.numel()
        first = size * zero._get_param_partition_rank(parameter)
        count = max(0, min(size, parameter.ds_numel - first))
        yield slice(first, first + count), slice(begin, begin + count)
    elif parameter._hp_mapping is not None:
        mapping = parameter._hp_mapping
        low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        yield slice(low.start, low.start + low.numel), slice(high.start, high.start + high.numel)


def _set_part(zero: Any, parameter: nn.Parameter, whole: torch.Tensor, flat: torch.Tensor) -> None:
    for of_parameter, of_flat in _part(zero, parameter):
        flat.data[of_flat].copy_(whole.flatten()[of_parameter])


def _set_weights(parameter: Any, whole: torch.Tensor) -> None:
    """Set the weights that the forward pass uses: the whole parameter, or this rank's shard of it at stage 3."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(whole)
        return
    part = parameter.ds_tensor
    first = part.numel() * dist.get_rank()
    count = max(0, min(part.numel(), parameter.ds_numel - first))
    part.data.flatten()[:count].copy_(whole.flatten()[first : first + count])


def _whole(zero: Any, parameter: nn.Parameter, key: str | None = None) -> torch.Tensor:
    """Return the whole fp32 parameter, or its optimizer state `key`, on every rank. Collective.

    Each rank writes its part into zeros, and an all-reduce sums them. DeepSpeed's `safe_get_full_optimizer_state` does
    the same, but in 0.19.8 it relies on references that exist only for the first parameters of each rank.
    """
    if not parameter.requires_grad:
        if not hasattr(parameter, "ds_id"):
            return parameter.data
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()
    master = _master(zero, parameter)
    source = master if key is None else zero.optimizer.state[master][key]
    shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
    whole = torch.zeros(shape.numel(), dtype=source.dtype, device=parameter.device)
    for of_parameter, of_flat in _part(zero, parameter):
        whole[of_parameter] = source.data[of_flat].to(whole.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(whole)
    return whole.view(shape)


def build(options: Options, device: torch.device, timeout_s: float) -> RunDeepSpeedStrategy:
    """Build the strategy for this rank's `device`."""
    if device.type != "cuda":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed first determines its accelerator
    # DeepSpeed 0.19.8 uses names that torch 2.13 has deprecated, which would warn twice per step.
    warnings.filterwarnings("ignore", r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is", FutureWarning)
    offload_parameters = getattr(options, "offload_parameters", "none")
    strategy = RunDeepSpeedStrategy(
        options,
        stage=options.stage,
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        reduce_bucket_size=options.reduce_bucket_size,
        allgather_bucket_size=options.allgather_bucket_size,
        overlap_comm=options.overlap_comm,
        offload_optimizer=options.offload_optimizer != "none",
        offload_optimizer_device=options.offload_optimizer if options.offload_optimizer != "none" else "cpu",
        offload_parameters=offload_parameters != "none",
        offload_params_device=offload_parameters if offload_parameters != "none" else "cpu",
        nvme_path=options.nvme_path,
        logging_batch_size_per_gpu=1,  # only for DeepSpeed's log; without it Lightning reads `batch_sampler.batch_size`
    )
    assert isinstance(strategy.config, dict)
    # Use the configured optimizer on the CPU as well: DeepSpeed would accept only its own DeepSpeedCPUAdam.
    strategy.config["zero_force_ds_cpu_optimizer"] = False
    return strategy

"""Set up torch and Lightning for a distributed command: the process groups, and filters of known warnings."""

from __future__ import annotations

import logging
import resource
import warnings
from datetime import timedelta

import torch
import torch.distributed

from trainer.config.schema import Config, TrainerOptions
from trainer.core.errors import EnvironmentFault
from trainer.runtime import cpu_groups
from trainer.runtime.process import FULL_MESH_UP_TO, Rank
from trainer.runtime.store import use_private_store

Group = torch.distributed.ProcessGroup
_OPEN_FILES = 65536


def device_of(config: Config, rank: Rank) -> torch.device:
    """Return the device of this rank: a GPU if `resources.gpus` is set, else the CPU."""
    return torch.device("cuda", rank.local_rank) if config.resources.gpus else torch.device("cpu")


def init_process_group(config: Config, rank: Rank, timeout_s: float | None = None) -> Group | None:
    """Initialize the process group before any slow work.

    Args:
        config: The configuration.
        rank: This rank.
        timeout_s: Timeout of collectives; None: `resilience.collective_timeout_s`.

    Returns:
        A CPU (gloo) group for agreements; None for one rank.

    Raises:
        EnvironmentFault: The run is for GPUs, and this process has none.
    """
    if config.resources.gpus and not torch.cuda.is_available():
        raise EnvironmentFault(
            f"rank {rank.rank}: the run is for GPUs, and torch {torch.__version__} finds none: {_why_no_cuda()}",
            "see nvidia-smi and CUDA_VISIBLE_DEVICES on this node; resume with resources.gpus=0 to train on CPU",
        )
    use_private_store()  # on one rank, too: Lightning and DeepSpeed initialize a group of one
    if rank.world_size == 1:
        return None
    timeout = timedelta(seconds=timeout_s or config.resilience.collective_timeout_s)
    device = device_of(config, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        torch.distributed.init_process_group("gloo", timeout=timeout)
    if rank.world_size > FULL_MESH_UP_TO:
        _allow_many_files()
        cpu_groups.connect()
    return cpu_groups.new_group(timeout, with_tree=True)


def _allow_many_files() -> None:
    """Raise the limit of open files, which is 1,024 on many systems: in a save each rank is connected to rank 0."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, _OPEN_FILES) if most >= 0 else _OPEN_FILES, most))


def apply_settings(options: TrainerOptions) -> None:
    """Apply the process-wide settings of torch in the section `trainer`; null leaves torch's default."""
    if options.matmul_precision is not None:
        torch.set_float32_matmul_precision(options.matmul_precision)


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "no device is visible"


def silence_known_warnings() -> None:
    """Suppress Lightning's warnings that do not apply, with a reason for each. New ones stay visible."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # "GPU available", tips and advertisements
    reasons = {
        "The `srun` command is available on your system but is not used": "torchrun starts the ranks, under srun too",
        ".*isinstance\\(treespec, LeafSpec\\)": "Lightning 2.6 with torch 2.13; gone with Lightning's next release",
        "It is recommended to use `self.log\\(.*sync_dist=True": "the tasks reduce over the ranks themselves",
        "The .*dataloader.* does not have many workers": "whether workers pay off depends on the data: docs/data.md",
        "The number of training batches .* is smaller than the logging": "our logging counts steps over epochs",
        "Be aware that when using `ckpt_path`, callbacks": "an evaluation needs none of them",
        "You defined a `validation_step` but have no `val_dataloader`": "a data module may have no validation",
    }
    for message in reasons:
        warnings.filterwarnings("ignore", message=message)

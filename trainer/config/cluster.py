"""Options of each launcher; `cluster.name` chooses the class. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from trainer.config.limits import Amount, AtLeast, PositiveInt


@dataclass(eq=False, repr=False)
class Prices:
    """What one hour and one kilowatt-hour of a cluster cost, for the bill of a run.

    null: not stated; then the bill has no cost, or no CO2. None has a default, because every guess would be wrong
    somewhere.
    """

    name: str = ""
    """Name of the launcher."""
    price_per_gpu_hour: Annotated[float, Amount()] | None = None
    """Price of one GPU for one hour."""
    price_per_cpu_core_hour: Annotated[float, Amount()] | None = None
    """Price of one CPU core for one hour, for jobs without GPUs."""
    currency: str | None = None
    """Currency of the prices, such as EUR; it is only printed."""
    confirm_above_gpu_hours: Annotated[float, Amount()] | None = None
    """Ask on a terminal before a job is launched that may take more GPU hours than this; null: do not ask."""
    grid_gco2_per_kwh: Annotated[float, Amount()] | None = None
    """Carbon intensity of the electricity, in grams of CO2 equivalent per kWh; your site or the operator of the grid
    publishes it."""


@dataclass(eq=False, repr=False)
class Local(Prices):
    """This machine."""

    name: str = "local"
    """Name of the launcher."""


@dataclass(eq=False, repr=False)
class Slurm(Prices):
    """A SLURM cluster: `job.sbatch` is rendered from these options, submitted, and requeued until the run ends.

    null leaves an option to the cluster's default. Put the values of a site into a small file in `conf/cluster/`.
    `trainer/slurm/options.py` checks the values.
    """

    name: str = "slurm"
    """Name of the launcher."""
    partition: str | None = None
    """Partition, or several separated by commas: SLURM uses the first in which the job can start."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit of one allocation, D-HH:MM:SS; a longer training is requeued when it ends; null: the partition's
    limit."""
    gpu_type: str | None = None
    """GPU type as the cluster names it: a100, h100, ...; null: any."""
    cpus_per_process: PositiveInt | None = None
    """CPU cores per GPU (per rank); null: the share of a node's cores that belongs to the GPUs in use."""
    memory_per_process: str | None = None
    """Host memory per GPU (per rank), such as 60G or 512M."""
    exclude: str | None = None
    """Nodes to exclude, such as node3,node[7-9]."""
    constraint: str | None = None
    """Features that the nodes must have."""
    reservation: str | None = None
    """Name of a reservation."""
    dependency: str | None = None
    """Jobs to wait for, such as afterok:1234."""
    sweep_at_once: PositiveInt | None = None
    """Maximum number of jobs of a sweep (-m) that run at the same time, as with the % of a job array; null: all."""
    nice: int | None = None
    """Adjustment of the job's scheduling priority."""
    mail_user: str | None = None
    """Address for notifications."""
    mail_type: str | None = None
    """Events to notify about, separated by commas: BEGIN, END, FAIL, REQUEUE, TIME_LIMIT_80, ALL."""
    container: str | None = None
    """Container image in which each node's part of the job runs; null: none."""
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """Container runtime: apptainer, or pyxis (enroot through srun)."""
    container_mounts: list[str] = field(default_factory=list)
    """Directories to mount in the container, as HOST:INSIDE; the run directory and the working directory always are."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load first."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash to run first, on the first node of the job, such as `source /site/profile`."""
    python: str | None = None
    """Python interpreter on the nodes, or inside the container; null: that of the submitting process."""
    extra: list[str] = field(default_factory=list)
    """More sbatch options, without the dashes, such as [exclusive,licenses=matlab:1]."""
    save_before_end_s: Annotated[int, AtLeast(30)] = 180
    """Seconds before the time limit at which the ranks are signalled to save; SLURM may signal 30 s early."""
    preflight: bool = True
    """Check all nodes before the first attempt of each allocation, which takes less than a minute. A node that fails is
    left out if there is a spare one (`resources.spare_nodes`); otherwise the job fails and names the node."""
    preflight_timeout_s: Annotated[int, AtLeast(30)] = 300
    """Seconds after which a node that has not answered counts as unfit. Most of it is for the first import of torch,
    which takes minutes from a file system that has nothing of it in memory."""
    network_interface: str | None = None
    """Network interface between the nodes, such as ib0, for gloo, NCCL and the rendezvous: sets GLOO_SOCKET_IFNAME,
    NCCL_SOCKET_IFNAME and TP_SOCKET_IFNAME. null: gloo and the rendezvous use that of the route between the nodes, and
    NCCL chooses. A job on one node uses the loopback interface only."""
    attempts_without_progress: PositiveInt = 2
    """Stop instead of requeueing after this number of consecutive attempts without a newer checkpoint."""


CLUSTERS: dict[str, type] = {"local": Local, "slurm": Slurm}
"""Options class by launcher name."""

"""Options of each launcher; `cluster.name` chooses the class. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False, repr=False)
class Local:
    """This machine."""

    name: str = "local"


@dataclass(eq=False, repr=False)
class Slurm:
    """A cluster under SLURM: `job.sbatch` is rendered from these, submitted, and requeues itself until the run ends.

    null leaves a matter to the cluster's own default. A site's values make a small file of `conf/cluster/`.
    """

    name: str = "slurm"
    partition: str | None = None
    """One, or several separated by commas: whichever starts first."""
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit of one allocation, D-HH:MM:SS; a longer training is requeued when it ends. null: the partition's."""
    gpu_type: str | None = None
    """As the cluster names it: a100, h100, ..."""
    cpus_per_process: int | None = None
    """CPU cores for each GPU (each rank); null: the share of a node's cores that goes with its GPUs."""
    memory_per_process: str | None = None
    """Host memory for each GPU (each rank): 60G, 512M."""
    exclude: str | None = None
    """Nodes not to use: node3,node[7-9]."""
    constraint: str | None = None
    """Features that the nodes must have."""
    reservation: str | None = None
    dependency: str | None = None
    """Start after other jobs: afterok:1234."""
    sweep_at_once: int | None = None
    """Of the jobs of a sweep (-m) so many may run at the same time, as with the % of a job array; null: all."""
    nice: int | None = None
    mail_user: str | None = None
    mail_type: str | None = None
    """When to write: BEGIN, END, FAIL, REQUEUE, TIME_LIMIT_80, ALL, separated by commas."""
    container: str | None = None
    """Image in which each node's part runs; null: none."""
    container_runtime: str = "apptainer"
    """apptainer, or pyxis (enroot through srun)."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to show inside, HOST:INSIDE; the run directory and the working directory always are."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load first."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that the job runs first, on its first node, such as `source /site/profile`."""
    python: str | None = None
    """Interpreter on the nodes, or inside the container; null: the one that submits."""
    extra: list[str] = field(default_factory=list)
    """More options of sbatch, without the dashes: [exclusive,licenses=matlab:1]."""
    save_before_end_s: int = 180
    """Ask the ranks to save this long before the time limit; SLURM may be 30 s early."""
    preflight: bool = True
    """Before each allocation's first attempt look whether all nodes are fit: under a minute. A node that is not is left
    out where there is a spare one (`resources.spare_nodes`), else the job fails and names it."""
    attempts_without_progress: int = 2
    """Stop, rather than requeue, after this many attempts in a row that left no newer checkpoint."""


CLUSTERS: dict[str, type] = {"local": Local, "slurm": Slurm}
"""Name to options class."""

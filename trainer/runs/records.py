"""Define the records of a run: a frozen dataclass for each file that its processes exchange.

`trainer.core.records` reads, validates and writes them; `RunDirectory` knows where each is. The events are in
`trainer.runs.events`, a checkpoint's COMMIT in `trainer.checkpoint.commit`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainer.config.shape import LaunchShape
from trainer.core.errors import DONE, HUNG, JOB_FAILED, REQUEUE
from trainer.core.records import absent, not_stored

Outcome = Literal["finished", "stopped", "requeue", "failed", "hung"]
"""How an attempt ended. requeue: it saved a checkpoint and will be requeued."""
EXIT_CODES: dict[Outcome, int] = {
    "finished": DONE,
    "stopped": DONE,
    "requeue": REQUEUE,
    "failed": JOB_FAILED,
    "hung": HUNG,
}
"""The job's exit code by outcome, unless the record has its own."""
# fmt: off
Phase = Literal[
    "start", "build", "first_step", "train", "validate", "save", "finish",
    "finished", "stopped", "requeue", "failed", "hung",
]
# fmt: on
"""Phase of a rank. The last phases are the outcomes."""


@dataclass(frozen=True, kw_only=True)
class AttemptOutcome:
    """How an attempt ended: `attempts/attempt-NN.json`.

    Written by a rank (`runtime/attempt.py`), the node process (`supervise/supervisor.py`),
    the job script (`slurm/attempt.py`), the command that stops a SLURM job (`slurm/stop.py`), or the process that
    follows a local job and kills it (`launch/follow.py`).
    """

    attempt: int = not_stored()
    outcome: Outcome
    exit_code: int | None = None
    """The job's exit code if it differs from that of the outcome; see `code`."""
    reason: str = ""
    """The exception with its whole message, or a sentence."""
    step: int | None = None
    """Optimizer steps completed; None before the first heartbeat."""
    rank: int | None = None
    """The rank that failed first."""
    host: str | None = None
    log: str | None = None
    """Its log, from the run directory."""
    lines: list[str] = field(default_factory=list)
    """The last lines of the traceback, or of the log if there is no traceback."""
    where: str | None = None
    """The line of the user's code that raised the exception."""
    mend: bool = False
    """Whether a resume fails in the same way until the code, the configuration or the files are changed."""
    restarted: bool = False
    """Whether the next attempt followed at once, so that this was not the end of the job."""
    time: float | None = None
    """Seconds since 1970."""

    @property
    def code(self) -> int:
        """The job's exit code."""
        return EXIT_CODES[self.outcome] if self.exit_code is None else self.exit_code

    @property
    def log_line(self) -> str:
        """The line (or lines, of a long reason) with which a rank logs this end."""
        return f"{self.outcome} at step {self.step}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, kw_only=True)
class WandbRun:
    """The W&B run of a run, as W&B named it: `wandb.json`. Written by rank 0; every attempt logs to it."""

    id: str
    project: str | None = None
    entity: str | None = None
    """None until an attempt was online: the server knows it."""
    sweep_id: str | None = None
    url: str | None = None
    base_url: str | None = None
    """The server; None: W&B's public one."""
    rewinds: bool | None = None
    """Whether the server can rewind a run; None: not tried yet."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The process of a run: `launch.json`. Without a launch every field has its default."""

    cluster: str | None = None
    """local or slurm."""
    shape: LaunchShape | None = None
    """Requested shape; an attempt may have fewer nodes (`resources.min_nodes`)."""
    host: str | None = None
    boot_id: str | None = None
    """Boot id of the host: process ids are reused after a reboot."""
    pid: int | None = None
    pid_started: int | None = None
    """Start time of the process in clock ticks since boot: another process may get the same id."""
    attempt: int = 0
    """The first attempt of this launch."""
    cwd: str | None = None
    """Working directory of the first launch; relative data paths refer to it."""
    slurm_job_id: str | None = None
    trusted: bool = False
    """Whether later attempts execute the run although others own it or may write to it (`trainer resume --trust`)."""

    @property
    def was_made(self) -> bool:
        """Whether the run has been launched at all."""
        return self != Launch()


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The checkpoint with the best value of the monitored metric."""

    metric: str | None
    mode: Literal["min", "max"] = "min"
    """Whether lower (min) or higher (max) values are better."""
    value: float
    step: int


@dataclass(frozen=True, kw_only=True)
class HeartbeatRecord:
    """Progress of a rank: `live/rank-R.json`, overwritten once a second.

    `time` shows that the process lives, `moved` when its step or phase last changed: a hang has a fresh `time` and an
    old `moved`. Times are seconds since 1970.
    """

    time: float = 0.0
    moved: float | None = None
    step: int = 0
    progress: int = 0
    """Counts progress without a step, such as a batch of a validation."""
    pid: int | None = None
    host: str | None = None
    device: str | None = absent()
    attempt: int = 0
    epoch: int | None = None
    phase: Phase
    max_steps: int | None = absent()
    metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of the last logged step."""
    validation: dict[str, float] | None = absent()
    """The metrics of the last validation."""
    rate: float | None = absent()
    rate_unit: str | None = absent()
    eta_s: float | None = absent()
    """Seconds left at this rate."""
    best: BestCheckpoint | None = absent()
    began: float | None = None
    """When the process was started."""
    first_step: int = 0
    """The step from which this attempt started."""
    spent: dict[str, float] | None = None
    """Seconds by phase; `runs/ledger.py` adds them up."""
    batches: int = 0
    """Number of batches in the medians."""
    own_s: float | None = absent()
    """Median seconds of a batch in which this rank waits for no other: data and forward pass."""
    batch_s: float | None = absent()
    """Median seconds of a batch."""
    data_s: float | None = absent()
    """Median seconds before the forward pass."""
    forward_s: float | None = absent()
    """Median seconds of the forward pass on the GPU."""


@dataclass(frozen=True, kw_only=True)
class NodeUsage:
    """What an attempt has held and used on one node: `usage/attempt-NN-node-R.json`, rewritten by the node process.

    `runs/bill.py` adds them up.
    """

    attempt: int = not_stored()
    node: int = not_stored()
    host: str | None = None
    device: Literal["gpu", "cpu"]
    """What the job is charged for: GPUs, or the CPU cores of a job without GPUs."""
    devices: int
    """Number of them, with those of spare nodes, which node 0 records."""
    measured: int
    """Number of them that have an energy counter."""
    began: float
    """Since when they have been held, in seconds since 1970."""
    seconds: float
    """For how long, until the last reading."""
    joules: dict[str, dict[str, float]]
    """Energy by part (gpu, cpu, memory) and phase of the first rank of the node."""
    missing: dict[str, str] = field(default_factory=dict)
    """Part to why it, or a device of it, is not measured."""


@dataclass(frozen=True, kw_only=True)
class NodeHeartbeats:
    """The heartbeats of the ranks of one node of several: `live/node-N.json`, written by its node process."""

    ranks: dict[str, HeartbeatRecord]
    """By rank."""


@dataclass(frozen=True, kw_only=True)
class HangFound:
    """A hang that the first node has found: `control/hang-NN.json`, which asks the other nodes for evidence."""

    still_s: float
    """Seconds without progress."""
    allowed_s: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The exception that ended a rank, written by the rank: `logs/attempt-NN/rank-R.failure.json`."""

    reason: str
    """The exception and its whole message: one line or several."""
    where: str | None
    """The line of the user's code that raised it."""
    step: int
    rank: int
    time: float
    is_final: bool
    """Whether another attempt would end in the same way."""
    mend: bool
    """Whether a resume would, too: the code, the configuration or the files must change first."""


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Measured steps of a rank, for `trainer time`: `timing/rank-R.json`."""

    steps: int
    wall_s: float
    """Seconds of all of them."""
    cpu_s: float
    """CPU time of the thread that trains, in all of them."""
    each_s: list[float]
    """Seconds of each; on a GPU those of the host, which may be ahead of the device."""
    each_cpu_s: list[float]
    """CPU time of the thread that trains, of each: without the threads of the heartbeat and of loggers."""
    threads: int
    """Threads that the rank computes with on a CPU."""
    steps_per_epoch: int | None
    """Optimizer steps; None: the data has no length."""
    device: str | None
    """Name of the GPU; None: a CPU rank."""


@dataclass(frozen=True, kw_only=True)
class CommandFailure:
    """The exception that ended a rank of `trainer evaluate`, `predict` or `export`: `logs/VERB.failure.json`."""

    message: str
    fix: str
    code: int
    """The exit code of the command."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `trainer evaluate` measured: `evaluations/step-NNNNNNNN-SPLIT.json`."""

    step: int
    split: str
    metrics: dict[str, float | str | None]
    world_size: int | None = None
    time: float | None = None
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class PredictedOutput:
    """An output of `predict_step`, as a file with one row per sample."""

    file: str
    rows: int
    dtype: str
    """Its NumPy type; json: a line per row."""
    shape: list[int]
    row: Literal["batch"] | None = absent()
    """batch: it has a row per batch instead."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What `trainer predict` wrote: `predictions/step-NNNNNNNN-SPLIT/predictions.json`."""

    run: str
    """Name of the run."""
    step: int
    split: str
    outputs: dict[str, PredictedOutput]
    world_size: int | None = None
    time: float | None = None
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `trainer export` wrote, beside the exported files: `export.json`."""

    format: Literal["safetensors", "onnx", "hf", "ckpt"]
    files: dict[str, int]
    """Bytes by name."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Origin of the weights."""
    largest_difference: float | None = absent()
    """Largest difference of the outputs from torch's, for ONNX."""
    lora_merged: int | None = absent()
    """Layers whose LoRA adapters were merged into the weights."""


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """The all-reduce of the preflight, as measured by one node."""

    joined: int
    """Ranks of this node that took part."""
    bytes_per_s: float | None
    """Speed of the slowest of them."""
    complaint: str | None
    rates: dict[str, float] | None = absent()
    """FLOP/s of a matrix product by its name in the baseline, such as `matrix bf16 GPU 0`."""


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """Preflight result of a node: `preflight/JOB-RESTART/NODE.json`."""

    node: str
    problems: list[str]
    """Reasons not to use the node."""
    code: str
    """Hash of the code and packages that the node would run; it must be equal on all nodes."""
    data: dict[str, bool]
    """Each value of the section `data` that looks like a path, and whether it exists on this node."""
    reduced: Reduction | None = absent()
    slow: list[str] | None = absent()
    """Measurements that are slower than this node's baseline."""


@dataclass(frozen=True, kw_only=True)
class LockHolder:
    """The launch that trains a run: the content of `control/lock`."""

    host: str
    pid: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What the plan of a run expected when it was launched: `plan.json`; null where it was not known."""

    engine: str
    """formula or simulation."""
    device: str | None = None
    """The GPU that was planned for; null: CPU."""
    peak_bytes: int | None = None
    """Peak of the tensors on each rank."""
    needed_bytes: int | None = None
    """The peak with what CUDA and fragmentation add, which is assumed."""
    capacity_bytes: int | None = None
    step_s: float | None = None
    step_error: float | None = None
    """Known relative error of the time of a step."""
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    steps: int | None = None
    train_s: float | None = None
    """Seconds of training steps."""
    device_hours: float | None = None
    energy_kwh: float | None = None
    cost: float | None = None
    currency: str | None = None

"""The typed configuration: the sections that the project reads, with the meaning of each key.

`model`, `data`, `task`, `optimizer`, `scheduler`, `callbacks` and `logger` are open sections: they hold a `_target_`
and its arguments, which `trainer.config.signature` checks against the signature of the target. All other sections are
closed: a key that is not declared here is an error. Nothing here imports torch.

A field's type says which values are valid: `Literal` for a closed set of choices, the types of
`trainer/config/limits.py` for ranges. A class's `problems()` reports invalid combinations of its fields.

The dataclasses have no `__eq__` and `__repr__`: nothing uses them, and generating them takes 1.5% of the CPU time of
`--cfg job`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from trainer.config.checkpoint_url import problem_of
from trainer.config.direction import Direction
from trainer.config.limits import (
    AtLeast,
    BatchLimit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveBatchLimit,
    PositiveFloat,
    PositiveInt,
)
from trainer.config.notify import NotifyOptions
from trainer.core.errors import UserError

MISSING: Any = "???"
"""`omegaconf.MISSING`, whose import would take 60 ms in processes that compose nothing."""
Precision = Literal["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"]
"""The precisions of Lightning's Trainer, and auto."""
PROFILED_WINDOWS = ("torch", "memory", "nsys")
"""Values of `trainer.profiler` that record some steps of one rank; the others are Lightning's."""


@dataclass(eq=False, repr=False)
class Resources:
    """Nodes, GPUs and processes of the job.

    `trainer/config/shape.py` derives the arguments of SLURM, torchrun and Lightning from them, and checks their ranges.
    """

    nodes: PositiveInt | None = None
    """Number of nodes (machines); null: 1 with cluster=local, on SLURM as many as `gpus` needs."""
    gpus: NonNegativeInt | None = None
    """Total number of GPUs over all nodes; null: all GPUs here that nobody uses, or `cpu_processes` if there are
    none; 0: train on CPU."""
    gpus_per_node: NonNegativeInt | None = None
    """Number of GPUs per node; null: `gpus / nodes`."""
    cpu_processes: PositiveInt | None = None
    """Total number of ranks when training on CPU (gloo backend); null: 2."""
    min_nodes: PositiveInt | None = None
    """On SLURM: start and resume with fewer nodes, down to this number, when some are unavailable; null: all nodes are
    required."""
    spare_nodes: NonNegativeInt = 0
    """Number of extra nodes to request, so that a faulty node can be left out."""
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = None
    """Bind each rank to the CPU cores near its GPU: torchrun's --numa-binding, which needs numactl on each node; null:
    no binding, because SLURM and containers often bind already."""
    devices: list[str] | None = None
    """GPUs of this machine to use, even if they are in use, as numbers of nvidia-smi or UUIDs, such as [2,3]; null:
    those that nobody uses, or those of CUDA_VISIBLE_DEVICES. On a cluster, SLURM assigns GPUs."""


@dataclass(eq=False, repr=False)
class TrainerOptions:
    """Length and settings of the training.

    Names and meanings are those of Lightning's Trainer unless a key says otherwise. `lightning_keys.py` translates the
    other arguments of the Trainer. See docs/configuration.md.
    """

    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps; null or -1: no limit."""
    max_epochs: PositiveInt | None = None
    """Maximum number of passes over the training data; -1: no limit; null: no limit if `max_steps` or `max_time` is
    set, else 10."""
    max_time: str | None = None
    """Maximum training time over all attempts, as DD:HH:MM:SS; null: no limit."""
    min_steps: NonNegativeInt | None = None
    """Minimum number of optimizer steps before early stopping may end the training; null: none."""
    min_epochs: NonNegativeInt | None = None
    """Minimum number of epochs before early stopping may end the training; null: none."""
    precision: Precision = "auto"
    """Floating point precision: 32-true, bf16-mixed, bf16-true, 16-mixed, 16-true, 64-true, or Lightning's short forms
    32, bf16, 16, 64; auto: bf16-mixed on a GPU that supports it, else 32-true."""
    accumulate_grad_batches: PositiveInt | None = None
    """Gradient accumulation: batches of a rank per optimizer step; null: follows from `data.batch_size` (global) and
    `data.micro_batch`."""
    find_micro_batch: bool = False
    """Before a new run trains, find the largest micro-batch that fits in memory, by trying training steps; the global
    batch stays the same. `data.micro_batch=auto` is the same. See docs/configuration.md."""
    log_every_n_steps: PositiveInt = 10
    """Optimizer steps between two logged lines of training metrics."""
    val_check_interval: PositiveBatchLimit | None = None
    """How often to validate. An integer: every so many optimizer steps, counted across epochs, or within each epoch if
    `check_val_every_n_epoch` is set. A fraction such as 0.25: every so much of an epoch (1.0: at its end). null: at the
    end of each epoch."""
    check_val_every_n_epoch: PositiveInt | None = None
    """Validate in every n-th epoch only; null: in every epoch."""
    limit_train_batches: PositiveBatchLimit | None = None
    """Training batches of a rank per epoch, as a number or a fraction, rounded up to whole optimizer steps; null:
    all."""
    limit_val_batches: BatchLimit | None = None
    """Validation batches of a rank, as a number or a fraction; null: all; 0: no validation."""
    limit_test_batches: BatchLimit | None = None
    """Test batches of a rank for `trainer evaluate --split=test`, as a number or a fraction; null: all."""
    limit_predict_batches: BatchLimit | None = None
    """Batches of a rank for `trainer predict`, as a number or a fraction; null: all."""
    overfit_batches: BatchLimit | None = None
    """Train repeatedly on the first so many global batches (or that fraction of them), in the same order, and validate
    on as many unless `limit_val_batches` is set (debug=overfit); null or 0: train on all data."""
    num_sanity_val_steps: Annotated[int, AtLeast(-1)] = 0
    """Number of validation batches to run before a new training starts; -1: all."""
    gradient_clip_norm: PositiveFloat | None = None
    """Clip gradients to this global L2 norm, as Lightning's gradient_clip_val does; null: no clipping."""
    gradient_clip_val: PositiveFloat | None = None
    """With `gradient_clip_algorithm=value`: clip each gradient element to the range from minus to plus this value;
    otherwise an alias of `gradient_clip_norm`; null: no clipping."""
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    """Meaning of `gradient_clip_val`: norm or value; null: norm."""
    deterministic: bool | Literal["warn"] = False
    """Use deterministic algorithms only (torch.use_deterministic_algorithms); warn: where they exist, with a warning
    elsewhere."""
    benchmark: bool | None = None
    """Value of torch.backends.cudnn.benchmark; null: leave torch's default."""
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """Precision of fp32 matrix products (torch.set_float32_matmul_precision): highest; high: TF32 on GPUs that have it;
    medium: bf16. null: torch's default, highest, because 32-true asks for fp32 and bf16-mixed hardly uses it."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Train the linear layers of the model's blocks with float8 matrix products (needs torchao, and a GPU since Ada or
    Hopper): one scale for a tensor, or one for each row. Evaluations do not use it."""
    channels_last: bool = False
    """Store the weights of 2D convolutions as channels_last (NHWC), which tensor cores read without a transposition;
    for image models with strategy=single or ddp."""
    prefetch_to_device: bool = True
    """Copy the next batch to the GPU on a stream of its own while a step computes, from pinned memory, at the cost of
    one batch of GPU memory. Not where hooks change the transfer or Lightning's own loop runs; no effect on CPU."""
    expandable_segments: bool = True
    """Let the CUDA allocator grow its segments, which wastes less memory when sizes vary. A value of your own in
    PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF has priority."""
    sync_batchnorm: bool = False
    """Synchronize batch normalization statistics across all ranks, for micro-batches too small for their own
    statistics."""
    inference_mode: bool = True
    """Evaluate under torch.inference_mode; false: under torch.no_grad."""
    detect_anomaly: bool = False
    """Autograd anomaly detection: name the forward operation whose gradient is NaN; slow."""
    profiler: Literal["simple", "advanced", "pytorch", "torch", "memory", "nsys"] | None = None
    """simple, advanced and pytorch are Lightning's profilers of the whole training, which use Lightning's own loop
    instead of the lean loop. The others record `profile_steps` steps of `profile_rank`. torch: a trace for Perfetto;
    memory: the history of GPU memory; both in `profiler/` of the run directory. nsys: NVTX ranges and the window of
    `nsys profile -c cudaProfilerApi`. null: none."""
    profile_after: NonNegativeInt = 10
    """With `profiler` torch, memory or nsys: steps of the attempt before the recorded ones."""
    profile_steps: PositiveInt = 3
    """With `profiler` torch, memory or nsys: number of steps to record."""
    profile_rank: NonNegativeInt = 0
    """With `profiler` torch, memory or nsys: the rank to record."""
    enable_model_summary: bool = False
    """Log a table of the model's layers at the start."""
    reload_dataloaders_every_n_epochs: NonNegativeInt = 0
    """Reload the data loaders from the data module every n epochs; 0: never."""
    use_distributed_sampler: bool = True
    """Shard every data loader over the ranks; false: leave the loaders unchanged, because the data module shards
    them."""
    default_root_dir: str | None = None
    """Value of `trainer.default_root_dir` for modules and callbacks; null: the run directory. Checkpoints are always in
    the run directory."""
    lean_loop: bool = True
    """Use the short training loop of `trainer/train/loop.py`; false: use Lightning's own."""

    def problems(self) -> Iterator[UserError]:
        """Yield problems of the limits on the length of the training."""
        if self.max_steps is None and self.max_epochs is None and self.max_time is None:
            yield UserError(
                "trainer.max_steps, trainer.max_epochs and trainer.max_time are all null: training would never end",
                "set one of them, such as trainer.max_epochs=10",
            )
        if self.max_time is not None and not re.fullmatch(r"\d+:[0-2]?\d:[0-5]?\d:[0-5]?\d", self.max_time):
            fix = "write DD:HH:MM:SS, in quotes: 'trainer.max_time=\"00:01:30:00\"' is an hour and a half"
            yield UserError(f"trainer.max_time={self.max_time}: expected DD:HH:MM:SS", fix)
        yield from self._problems_of_profile()

    def _problems_of_profile(self) -> Iterator[UserError]:
        if self.profiler not in PROFILED_WINDOWS:
            for key, default in {"profile_after": 10, "profile_steps": 3, "profile_rank": 0}.items():
                if getattr(self, key) != default:
                    fix = f"also set trainer.profiler=torch, or remove trainer.{key}"
                    yield UserError(f"trainer.{key} has no effect without trainer.profiler=torch, memory or nsys", fix)
        elif self.max_steps is not None and self.max_steps <= self.profile_after:
            message = f"trainer.max_steps={self.max_steps}: no step is left after the first {self.profile_after}"
            yield UserError(f"{message} (trainer.profile_after)", f"write trainer.profile_after={self.max_steps // 2}")


@dataclass(eq=False, repr=False)
class CheckpointOptions:
    """When checkpoints are saved, and which ones are kept."""

    every_n_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints; null: not by steps."""
    every_minutes: PositiveFloat | None = 10.0
    """Minutes between two checkpoints; null: not by time."""
    keep_last: PositiveInt = 2
    """Number of latest committed checkpoints to keep."""
    keep_best: NonNegativeInt = 1
    """Number of committed checkpoints with the best `monitor` value to keep; 0: none, and none is saved for being the
    best."""
    keep_every_n_steps: PositiveInt | None = None
    """Keep checkpoints at multiples of this number of steps forever; null: none."""
    monitor: str | None = None
    """Metric that decides which checkpoint is best; null: the module's `primary_metric`, else what validation logs: a
    loss such as val/loss or val_loss, or another metric whose name has a known direction."""
    mode: Direction | None = None
    """Whether a lower (min) or a higher (max) `monitor` value is better; null: from the module's `primary_metric`,
    torchmetrics' `higher_is_better`, or the metric's name (acc: max, loss: min)."""
    save_best: bool = True
    """Save a checkpoint after each validation that improves `monitor`, so that the best weights are kept."""
    save_best_every_minutes: PositiveFloat | None = None
    """Minimum number of minutes between two checkpoints of `save_best`, for large models; null: at every
    improvement."""
    on_failure: Literal["stop", "warn"] = "stop"
    """Action when a save fails: stop (exit code 1) or warn (log an error and continue)."""
    dir: str | None = None
    """URL of an object store (s3://BUCKET/PREFIX) to which every checkpoint of the run directory is uploaded, and from
    which one that is missing there is restored; null: none. Credentials come from the environment."""
    local_dir: str | None = None
    """Directory on the disk of each node for additional checkpoints of what its own ranks hold; null: none."""
    local_every_n_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints in `local_dir`."""
    local_keep_last: PositiveInt = 1
    """Number of latest checkpoints to keep in `local_dir`."""
    asynchronous: bool = True
    """Copy the state to host memory at the step and write it in the background; false: write it at the step."""
    snapshot: Literal["auto", "full", "streamed"] = "auto"
    """How an asynchronous save reads the state. full: copy all of this rank's part to host memory before training
    continues; streamed: write it through a buffer of `buffer_mb`, and training waits until all is read; auto: full if
    that much host memory is free."""
    buffer_mb: PositiveInt = 256
    """Megabytes (MiB) of host memory per rank through which a save that takes no full snapshot reads the GPU."""

    def problems(self) -> Iterator[UserError]:
        """Yield an error if `dir` is no URL of an object store, or only one of the keys for node-local ones is set."""
        if self.dir is not None and (problem := problem_of(self.dir)) is not None:
            yield problem
        if (self.local_dir is None) != (self.local_every_n_steps is None):
            unset = ("local_dir", "/tmp/checkpoints") if self.local_dir is None else ("local_every_n_steps", "100")
            yield UserError(
                "checkpoint.local_dir and checkpoint.local_every_n_steps must be set together",
                f"also set checkpoint.{unset[0]}={unset[1]}",
            )


@dataclass(eq=False, repr=False)
class TrackingOptions:
    """Weights & Biases. `metrics.jsonl` is written in any case."""

    name: Literal["wandb", "none"] = "wandb"
    """Experiment tracker: wandb or none."""
    mode: Literal["auto", "online", "offline", "disabled", "shared"] = "auto"
    """W&B mode. auto: from WANDB_MODE or W&B's settings files, else online with an API key and offline without one;
    online; offline; disabled: log nothing to W&B; shared: several processes log to one run."""
    project: str | None = None
    """W&B project; null: from WANDB_PROJECT or W&B's settings files, else trainer."""
    entity: str | None = None
    """W&B team or user; null: from WANDB_ENTITY or W&B's settings files."""
    group: str | None = None
    """W&B run group; null: from WANDB_RUN_GROUP or W&B's settings files."""
    run_name: str | None = None
    """Name of the W&B run; null: from WANDB_NAME, else the name of the run directory."""
    tags: list[str] | None = None
    """Tags of the W&B run; null: from WANDB_TAGS or W&B's settings files."""
    notes: str | None = None
    """Notes of the W&B run; null: from WANDB_NOTES or W&B's settings files."""
    job_type: str | None = None
    """Job type of the W&B run; null: from WANDB_JOB_TYPE or W&B's settings files."""
    dir: str | None = None
    """Directory in which W&B creates its `wandb` directory; null: from WANDB_DIR, else the run directory."""
    code: bool = False
    """Log the frozen code and the job script as an artifact of the W&B run."""
    artifacts: Literal["none", "best", "all"] = "none"
    """Checkpoints to log as artifacts of the W&B run: none; best: each new best; all. Their aliases are latest, best
    and step-N."""
    watch: Literal["gradients", "parameters", "all"] | None = None
    """Histograms to log to W&B: of gradients, of parameters, or of both (all); null: none. Not for sharded models."""
    watch_every_n_steps: PositiveInt = 100
    """Optimizer steps between two histograms."""
    alerts: bool = False
    """Send a W&B alert when the run fails, hangs, waits for a slow rank, or has a loss that is not finite."""
    stop_tag: str | None = "stop"
    """Tag that stops the run when it is added to the W&B run; null: none."""
    init_timeout_s: PositiveInt = 20
    """Seconds to wait for the W&B server before continuing offline."""
    finish_timeout_s: PositiveInt = 60
    """Seconds that the end of the run may wait for the upload."""


@dataclass(eq=False, repr=False)
class ResilienceOptions:
    """Fault tolerance: restarts, timeouts, hangs, bad losses and out-of-memory errors."""

    max_restarts: NonNegativeInt = 3
    """Maximum number of worker restarts within the job (torchrun); the count starts again at each new checkpoint."""
    agree_every_s: PositiveFloat = 1.0
    """Approximate interval in seconds at which the ranks agree on whether to stop."""
    stop_deadline_s: PositiveFloat = 120.0
    """Seconds that a rank may take to save a checkpoint after a request to stop, before it is forced to exit."""
    collective_timeout_s: PositiveFloat = 600.0
    """Timeout of a collective in seconds, after which the process exits. Until the first step is done it is
    `hang_slow_s` plus a minute, if that is longer."""
    on_nonfinite: Literal["stop", "skip", "rollback", "off"] = "stop"
    """Action on a NaN or infinite loss or gradient: stop; skip: omit the update (on a GPU this synchronizes with the
    device at each step); rollback: restore the latest checkpoint, and skip the step if it fails again; off."""
    spike_z: PositiveFloat | None = None
    """Threshold of a loss spike, in robust standard deviations above the median of the last 128 steps; null: no
    detection. 10 is a conservative start."""
    on_spike: Literal["stop", "skip", "rollback"] = "rollback"
    """Action on a loss spike: stop, skip or rollback, as for `on_nonfinite`."""
    on_oom: Literal["stop", "halve"] = "stop"
    """Action when out of memory: stop; halve: restart the workers with half the micro-batch and the same global
    batch."""
    hang_factor: NonNegativeFloat = 20.0
    """The job hangs if no step has finished for this many median step times and for `hang_after_s`. Then stacks are
    written to `logs/attempt-NN/rank-R.stacks`, the rank that lags behind is named, and the workers restart. 0: no hang
    detection."""
    hang_after_s: PositiveFloat = 180.0
    """Minimum number of seconds without progress that counts as a hang."""
    hang_slow_s: PositiveFloat = 1800.0
    """The same during start-up, the first step, validation, saving and shutdown, which are slower than a step."""
    straggler_factor: NonNegativeFloat = 1.5
    """A rank is a straggler if its own work in a step (reading data, the forward pass) takes this many times as long as
    that of the other ranks. It is named in an event, in `trainer show` and in `trainer why`. 0: no detection."""
    straggler_after_s: NonNegativeFloat = 30.0
    """Minimum number of seconds that a rank must be slow to count as a straggler."""


@dataclass(eq=False, repr=False)
class FineTuneOptions:
    """Fine-tuning: start from existing weights, and train all or some of them.

    A pattern is the name of a parameter or of a layer of the network, or a name with `*` for any text.
    """

    init_from: str | None = None
    """Source of the initial weights: a run (its best checkpoint), a checkpoint directory, a safetensors file, or a
    .ckpt file; null: new weights."""
    new: list[str] = field(default_factory=list)
    """Patterns of parameters that are newly initialized, such as an output layer for other classes."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of parameters that are not trained."""
    train: list[str] = field(default_factory=list)
    """Patterns of parameters that are trained despite `freeze` and `lora_rank`."""
    lora_rank: PositiveInt | None = None
    """Rank of LoRA adapters, trained instead of the linear layers (Hu et al. 2021; needs peft); null: no LoRA."""
    lora_alpha: PositiveFloat = 16.0
    """LoRA scale: the adapters' output is multiplied by `lora_alpha / lora_rank`."""
    lora_dropout: float = 0.0
    """Dropout probability at the input of the LoRA adapters, from 0 to less than 1."""
    lora_layers: list[str] = field(default_factory=list)
    """Patterns of the layers that get LoRA adapters; empty: the linear layers in the model's repeated blocks."""

    def problems(self) -> Iterator[UserError]:
        """Yield the combinations of options that contradict each other or have no effect."""
        if self.lora_rank is None:
            yield from self._problems_without_lora()
        if not 0 <= self.lora_dropout < 1:
            problem = f"finetune.lora_dropout={self.lora_dropout}: must be at least 0 and less than 1"
            yield UserError(problem, "use finetune.lora_dropout=0.1")
        if self.new and self.init_from is None:
            fix = "set finetune.init_from=RUN, or remove finetune.new"
            yield UserError("finetune.new without finetune.init_from: all weights are new", fix)
        for pattern in self.freeze:
            if pattern in self.train:
                yield UserError(f"{pattern} is in finetune.freeze and in finetune.train", "remove it from one of them")
        for pattern in self.new:
            frozen = self.lora_rank is not None or any(_covers(one, pattern) for one in self.freeze)
            if frozen and not any(_may_overlap(one, pattern) for one in self.train):
                fix = f"train it as well: finetune.train=[{pattern}]"
                yield UserError(f"finetune.new=[{pattern}] would start at random and never be trained", fix)

    def _problems_without_lora(self) -> Iterator[UserError]:
        defaults: dict[str, Any] = {"lora_layers": [], "lora_dropout": 0.0, "lora_alpha": 16.0}
        for key, default in defaults.items():
            if getattr(self, key) != default:
                fix = f"also set finetune.lora_rank=8, or remove finetune.{key}"
                yield UserError(f"finetune.{key} has no effect without finetune.lora_rank", fix)
        if not self.train and "*" in self.freeze:
            fix = "name the layers to train: finetune.train=[head]"
            yield UserError('finetune.freeze=["*"] leaves nothing to train', fix)


def _covers(pattern: str, other: str) -> bool:
    """Return whether `pattern` matches everything that `other` matches."""
    return fnmatchcase(other, pattern) or other.startswith(f"{pattern}.")


def _may_overlap(pattern: str, other: str) -> bool:
    """Return whether one parameter may match both patterns; with a `*` this depends on the model."""
    return "*" in pattern + other or _covers(pattern, other) or _covers(other, pattern)


@dataclass(eq=False, repr=False)
class SecurityOptions:
    """What a configuration may call and read in addition to the defaults. See docs/security.md.

    Only the command line and the primary config of the project set these keys: a config file that is passed around
    cannot give itself permissions.
    """

    allow: list[str] = field(default_factory=list)
    """Modules and full names of installed packages that a `_target_` may lead to, such as `monai` or
    `monai.networks.nets.UNet`."""
    env: list[str] = field(default_factory=list)
    """Environment variables that `${oc.env:...}` may read and `hydra.job.env_set` may set."""


@dataclass(eq=False, repr=False)
class Config:
    """The configuration of one training job. A run's frozen `config.yaml` holds exactly this, resolved."""

    name: str = MISSING
    """Name of the run: letters, digits, `.`, `_` and `-`."""
    seed: int = 0
    """Seed of all random number generators, from 0 to 2**32 - 1."""
    runs_dir: str = "runs"
    """Directory in which run directories are created. conf/config.yaml takes it from the environment variable
    TRAINER_RUNS_DIR, which the commands on runs read as well."""
    report: bool = True
    """Write `report.html` into the run directory when the training ends (docs/report.md)."""
    resources: Resources = field(default_factory=Resources)
    """Nodes, GPUs and processes."""
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    """Length and settings of the training."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    """When to save checkpoints, and which ones to keep."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    """Weights & Biases."""
    notify: NotifyOptions = field(default_factory=NotifyOptions)
    """Notifications by webhook, mail or a command."""
    resilience: ResilienceOptions = field(default_factory=ResilienceOptions)
    """Fault tolerance."""
    finetune: FineTuneOptions = field(default_factory=FineTuneOptions)
    """Initial weights, frozen layers, LoRA."""
    strategy: Any = MISSING
    """One of the classes in `trainer/config/strategy.py`, chosen by `strategy.name`."""
    cluster: Any = MISSING
    """One of the classes in `trainer/config/cluster.py`, chosen by `cluster.name`."""
    model: dict[str, Any] = MISSING
    """`_target_` and arguments of a network, or of your own LightningModule."""
    data: dict[str, Any] = MISSING
    """`_target_` and arguments of a LightningDataModule. The trainer itself also reads `batch_size` (global: samples
    per optimizer step over all ranks), `micro_batch` (samples per forward pass of a rank) and `num_workers`."""
    task: dict[str, Any] = MISSING
    """`_target_` and arguments of the LightningModule around the network; null: the default task of the data."""
    optimizer: dict[str, Any] = MISSING
    """`_target_` and arguments of a torch optimizer."""
    scheduler: dict[str, Any] = MISSING
    """`_target_` and arguments of a learning rate scheduler; empty: a constant learning rate."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Lightning callbacks: name to `_target_` and arguments; null disables one."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Lightning loggers in addition to W&B (`tracking`): name to `_target_` and arguments; null disables one."""
    security: SecurityOptions = field(default_factory=SecurityOptions)
    """What the configuration may call and read."""

    def problems(self) -> Iterator[UserError]:
        """Yield problems of the keys outside of the sections."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            valid = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-._")[:100] or "my-run"
            yield UserError(
                f"name={self.name!r}: the name of a run has letters, digits, '.', '_' and '-', starts with a letter or "
                "digit, and is at most 100 characters long",
                f"use name={valid}",
            )
        if not 0 <= self.seed < 2**32:
            yield UserError(f"seed={self.seed}: must be from 0 to {2**32 - 1}", "use a smaller seed, such as seed=0")
        if not self.runs_dir:
            yield UserError("runs_dir is empty", "name a directory; if TRAINER_RUNS_DIR is set but empty, unset it")
        runs = Path(self.runs_dir)
        if runs.exists() and not runs.is_dir():
            yield UserError(f"runs_dir={runs}: this is a file", "name a directory; it is created when needed")

"""The typed configuration: what every part of the project reads, with the meaning of each key.

`model`, `data`, `task`, `optimizer`, `scheduler`, `callbacks` and `logger` are open: they hold a `_target_` and its
arguments, which `trainer.config.signature` checks against the target's own signature. All the rest is closed:
a key that is not here is an error. Nothing here imports torch.

The dataclasses of the configuration are made without `==` and `repr`, which nobody uses: to generate them costs 1.5% of
the CPU time of `--cfg job`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(eq=False, repr=False)
class Resources:
    """The launch shape; `config/shape.py` derives what SLURM, torchrun and Lightning are told from it."""

    nodes: int | None = None
    """Number of machines; null: 1 here, on SLURM what `gpus` needs."""
    gpus: int | None = None
    """GPUs in all, over every node; null: all of this machine; 0: train on CPU."""
    gpus_per_node: int | None = None
    """GPUs a node; null: `gpus / nodes`."""
    cpu_processes: int | None = None
    """Ranks in all when training on CPU (gloo); null: 2."""
    min_nodes: int | None = None
    """On SLURM: start and go on with fewer nodes, down to this many, where some are missing; null: all are needed."""
    spare_nodes: int = 0
    """Nodes asked for beyond those needed, so that a bad one can be left out."""


@dataclass(eq=False, repr=False)
class TrainerOptions:
    """How long and how to train. Names and meanings as in Lightning's Trainer, unless said otherwise here; the
    Trainer's other arguments are translated by `lightning_keys.py`. See docs/configuration.md."""

    max_steps: int | None = None
    """Optimizer steps; null or -1: no limit by steps."""
    max_epochs: int | None = None
    """Passes over the training data; -1: no limit by epochs; null: the same beside another limit, else 10."""
    max_time: str | None = None
    """Training time over all attempts, DD:HH:MM:SS; null: no limit."""
    min_steps: int | None = None
    """Optimizer steps that early stopping waits for."""
    min_epochs: int | None = None
    """Epochs that early stopping waits for."""
    precision: str = "auto"
    """32-true, bf16-mixed, bf16-true, 16-mixed, 16-true, 64-true, and Lightning's short 32, bf16, 16, 64; auto:
    bf16-mixed on a GPU that has it, else 32-true."""
    accumulate_grad_batches: int | None = None
    """Batches of a rank in an optimizer step; null: `data.batch_size` (global) and `data.micro_batch` say it."""
    log_every_n_steps: int = 10
    """Optimizer steps between two logged lines of training metrics."""
    val_check_interval: int | float | None = None
    """An integer: optimizer steps between two validations, counted over epochs, or within each epoch where
    `check_val_every_n_epoch` is set; a fraction such as 0.25 of an epoch (1.0: its end); null: each epoch's end."""
    check_val_every_n_epoch: int | None = None
    """Validate in each n-th epoch only; null: in each."""
    limit_train_batches: int | float | None = None
    """Batches of a rank in an epoch, as a number or a fraction, rounded up to whole optimizer steps; null: all."""
    limit_val_batches: int | float | None = None
    """Validation batches of a rank, as a number or a fraction; null: all; 0: no validation."""
    limit_test_batches: int | float | None = None
    """The same for `trainer evaluate --split=test`."""
    limit_predict_batches: int | float | None = None
    """The same for `trainer predict`."""
    overfit_batches: int | float | None = None
    """Train on the first so many global batches (or that fraction of them) over and over, in the same order, and
    validate on as many unless `limit_val_batches` says otherwise (debug=overfit); null or 0: on all the data."""
    num_sanity_val_steps: int = 0
    """Validation batches before a new training begins; -1: all."""
    gradient_clip_norm: float | None = None
    """Clip the global L2 norm of the gradients to this; null: no clipping. Lightning's gradient_clip_val."""
    gradient_clip_val: float | None = None
    """With `gradient_clip_algorithm=value`: clip each element to plus and minus this. Else the same as
    `gradient_clip_norm`."""
    gradient_clip_algorithm: str | None = None
    """norm or value: what `gradient_clip_val` is; null: norm."""
    deterministic: bool | str = False
    """Only algorithms that give the same bits each time (torch.use_deterministic_algorithms); warn: where there are."""
    benchmark: bool | None = None
    """torch.backends.cudnn.benchmark; null: as torch has it."""
    sync_batchnorm: bool = False
    """Batch normalisation over the batches of all ranks, for micro-batches too small for statistics of their own."""
    inference_mode: bool = True
    """Evaluate under torch.inference_mode; false: torch.no_grad."""
    detect_anomaly: bool = False
    """Autograd names the forward operation whose gradient is NaN; slow."""
    profiler: str | None = None
    """simple, advanced or pytorch: written to `profiler/` of the run; the lean loop steps aside."""
    enable_model_summary: bool = False
    """Log a table of the model's layers at the start."""
    reload_dataloaders_every_n_epochs: int = 0
    """Ask the data module for new loaders every n epochs; 0: never."""
    use_distributed_sampler: bool = True
    """Give each rank its share of every loader; false: the loaders are left as they are, and the data module gives each
    rank its share."""
    default_root_dir: str | None = None
    """`trainer.default_root_dir` of modules and callbacks; null: the run directory. Checkpoints are in the run."""
    lean_loop: bool = True
    """The short training loop of `train/loop.py`; false: Lightning's own."""


@dataclass(eq=False, repr=False)
class CheckpointOptions:
    """When checkpoints are written and which are kept."""

    every_n_steps: int | None = None
    """Optimizer steps between two checkpoints; null: not by steps."""
    every_minutes: float | None = 10.0
    """Minutes between two checkpoints; null: not by time."""
    keep_last: int = 2
    """The newest committed checkpoints to keep."""
    keep_best: int = 1
    """The committed checkpoints with the best `monitor` to keep; 0: none, and none is saved for being the best."""
    keep_every_n_steps: int | None = None
    """Keep checkpoints at multiples of this for ever; null: none."""
    monitor: str | None = None
    """Metric that says which is best; null: the module's `primary_metric`, else what validation logs: a loss such as
    val/loss or val_loss, or another metric whose name has a known direction."""
    mode: str | None = None
    """min or max; null: the module's `primary_metric`, torchmetrics' `higher_is_better`, or what the name means (acc:
    max, loss: min)."""
    save_best: bool = True
    """Write a checkpoint at the end of each validation that improves `monitor`, so that the best weights are kept."""
    save_best_every_minutes: float | None = None
    """At least so many minutes between two such checkpoints, for large models; null: at every improvement."""
    on_failure: str = "stop"
    """When a save fails: stop (exit 1) or warn (log an error, go on)."""
    local_dir: str | None = None
    """A folder on this node's own disk for checkpoints in between; one node only; null: none."""
    local_every_n_steps: int | None = None
    """Optimizer steps between two checkpoints there."""
    local_keep_last: int = 1
    """The newest ones to keep there."""
    asynchronous: bool = True
    """Copy to host memory at the step, write in the background."""


@dataclass(eq=False, repr=False)
class TrackingOptions:
    """Weights & Biases. `metrics.jsonl` is always written."""

    name: str = "wandb"
    """wandb or none."""
    mode: str = "auto"
    """auto: as WANDB_MODE or W&B's settings files say, else online with a key and offline without; online; offline;
    disabled: nothing is logged to W&B; shared."""
    project: str | None = None
    """null: WANDB_PROJECT or W&B's settings files, else trainer. The keys below are null for the same."""
    entity: str | None = None
    group: str | None = None
    run_name: str | None = None
    """Name of the W&B run; null: WANDB_NAME, else the name of the run directory."""
    tags: list[str] | None = None
    notes: str | None = None
    job_type: str | None = None
    dir: str | None = None
    """Folder in which W&B makes its folder `wandb`; null: WANDB_DIR, else the run directory."""
    init_timeout_s: int = 20
    """How long to wait for the server before going on offline."""
    finish_timeout_s: int = 60
    """How long the end of the run may wait for the upload."""


@dataclass(eq=False, repr=False)
class ResilienceOptions:
    """What happens when something breaks."""

    max_restarts: int = 3
    """Restarts of the workers inside the job (torchrun); counted afresh after each new checkpoint."""
    agree_every_s: float = 1.0
    """About how often the ranks agree on whether to stop."""
    stop_deadline_s: float = 120.0
    """From the signal to a forced exit."""
    collective_timeout_s: float = 600.0
    """A collective that takes longer ends the process; until the first step is done `hang_slow_s` and a minute, where
    that is longer."""
    on_nonfinite: str = "stop"
    """A loss or gradient that is NaN or infinite: stop; skip (that update is left out; on a GPU this waits for the
    device on each step); rollback (the newest checkpoint again, and if the step goes bad again it is skipped); off."""
    spike_z: float | None = None
    """A loss so many robust standard deviations above the median of the last 128 steps is a spike; null: none is. 10 is
    a careful beginning."""
    on_spike: str = "rollback"
    """A spike: stop, skip, rollback, as above."""
    on_oom: str = "stop"
    """Out of memory: stop; halve (the workers restart with half the micro-batch and the same global batch)."""
    hang_factor: float = 20.0
    """The ranks hang when no step has ended for this many median steps, and `hang_after_s`: stacks are written to
    `logs/attempt-NN/rank-R.stacks`, the rank that is behind is named, and the workers restart. 0: never."""
    hang_after_s: float = 180.0
    """Shortest silence that is a hang."""
    hang_slow_s: float = 1800.0
    """The same during start-up, the first step, validation, saving and the end."""
    straggler_factor: float = 1.5
    """A rank is named in an event, in `trainer show` and `why`, when what it does alone in a step (reading data, the
    forward pass) takes so many times as long as the others'. 0: never."""
    straggler_after_s: float = 30.0
    """And has done so for this long."""


@dataclass(eq=False, repr=False)
class FineTuneOptions:
    """Start from weights that are there, and train a part of them. A pattern is the name of a parameter or a layer of
    the network, or such a name with `*` for any text."""

    init_from: str | None = None
    """A run (its best checkpoint), the folder of a checkpoint, safetensors, or a .ckpt; null: new weights."""
    new: list[str] = field(default_factory=list)
    """Patterns of what starts new all the same, such as an output layer for other classes."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of what is not trained."""
    train: list[str] = field(default_factory=list)
    """Patterns of what is trained although `freeze` or `lora_rank` says otherwise."""
    lora_rank: int | None = None
    """Train low-rank additions to linear layers instead of the layers (Hu et al. 2021; needs peft); null: no."""
    lora_alpha: float = 16.0
    """The additions are scaled by `lora_alpha / lora_rank`."""
    lora_dropout: float = 0.0
    lora_layers: list[str] = field(default_factory=list)
    """Patterns of the layers that get them; empty: the linear layers in the model's repeated blocks."""


@dataclass(eq=False, repr=False)
class Config:
    """One training job. The frozen `config.yaml` of a run is exactly this, resolved."""

    name: str = MISSING
    """Name of the run; letters, digits, `.`, `_` and `-`."""
    seed: int = 0
    runs_dir: str = "runs"
    """Where run directories are made; without it TRAINER_RUNS_DIR, where the commands on runs look, too."""
    resources: Resources = field(default_factory=Resources)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    resilience: ResilienceOptions = field(default_factory=ResilienceOptions)
    finetune: FineTuneOptions = field(default_factory=FineTuneOptions)
    strategy: Any = MISSING
    """One of `trainer/config/strategy.py`, chosen by `strategy.name`."""
    cluster: Any = MISSING
    """One of `trainer/config/cluster.py`, chosen by `cluster.name`."""
    model: dict[str, Any] = MISSING
    """`_target_`: a network, or a LightningModule of one's own."""
    data: dict[str, Any] = MISSING
    """`_target_`: a LightningDataModule; the trainer reads `batch_size`, `micro_batch`, `num_workers`, too."""
    task: dict[str, Any] = MISSING
    """`_target_`: the LightningModule around the network; null: the one that the data names."""
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Name to `_target_` and arguments of a Lightning Callback; null switches one off."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Name to `_target_` and arguments of a Lightning Logger, beside W&B (`tracking`); null switches one off."""

"""Define the records of a sweep: a frozen dataclass for each kind of file in its directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainer.core.records import absent, not_stored

Method = Literal["grid", "random", "sobol", "tpe", "cmaes", "gp"]
Direction = Literal["minimize", "maximize"]
Pruner = Literal["asha", "hyperband", "median"]
Kind = Literal["choice", "int", "float"]
ResultState = Literal["finished", "failed", "pruned", "stopped"]
ADAPTIVE: tuple[Method, ...] = ("tpe", "cmaes", "gp")
"""Methods whose points depend on the results of earlier trials."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a search space."""

    key: str
    """The key of the override, with its package and a leading `+` if it has one."""
    kind: Kind
    choices: list[str] = field(default_factory=list)
    """For `choice`: the values as they are written in an override."""
    low: float = 0.0
    high: float = 0.0
    """For `int` and `float`: the limits, both included."""
    log: bool = False
    step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a sweep searches, and how: `spec.json`, then `spec-1.json` and so on after each change."""

    revision: int = not_stored()
    id: str
    name: str
    command: list[str]
    """The overrides as they were typed."""
    fixed: list[str]
    """The overrides that every trial has."""
    parameters: list[Parameter]
    method: Method
    trials: int
    """Number of trials."""
    seed: int = 0
    metric: list[str] = field(default_factory=list)
    """Names in `metrics.jsonl`; empty: the metric by which a run chooses its best checkpoint."""
    direction: list[Direction] = field(default_factory=list)
    """One for each metric; empty: that of the best checkpoint."""
    generation: int | None = None
    """Adaptive methods: trials that are asked for together, from the results of earlier generations only."""
    at_once: int | None = None
    """Most trials that run at the same time; null: as many as fit."""
    custom_search_space: str | None = absent()
    """Dotted path of a function of the project that adds parameters to each trial."""
    prune: Pruner | None = None
    prune_after: int = 1
    """Validations before a trial may be pruned: the first rung of asha and hyperband."""
    prune_factor: int = 3
    """asha and hyperband keep one of so many trials at each rung."""
    max_failure_rate: float | None = None
    max_gpu_hours: float | None = None
    max_cost: float | None = None
    until: float | None = None
    """No trial starts after this time, in seconds since 1970."""
    startup_trials: int = 10
    """Trials that TPE and GP draw at random first."""
    cluster: str = "local"
    world_size: int = 1
    gpus: int = 0
    """GPUs of a trial."""
    planned_gpu_hours: float | None = absent()
    """What a trial takes by the plan of the first."""
    planned_cost: float | None = absent()
    host: str | None = absent()
    """Where the trials of a local sweep run."""
    cwd: str
    """Working directory of the trials: relative data paths refer to it."""
    code: str = "code"
    """The folder of the frozen project, in the sweep."""
    config_dirs: list[str] = field(default_factory=list)
    """Frozen copies of `--config-dir`, in the sweep or absolute."""
    config_name: str = "config"
    runs_dir: str
    """Absolute path of the folder of the runs."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The decision to try a point: `trials/NNNNN.trial`."""

    number: int = not_stored()
    values: dict[str, str]
    """Parameter to its value, as written in an override."""
    parameters: list[Parameter] = field(default_factory=list)
    """What `custom_search_space` has added, and from which limits."""
    overrides: list[str]
    """The whole command line of the trial."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that trains a trial: `trials/NNNNN.owner-K`. A dead one is followed by the next K."""

    number: int = not_stored()
    host: str
    boot_id: str
    pid: int
    pid_started: int | None
    slurm_job_id: str | None = absent()
    time: float


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """The run of an owner, written before the run is made: `trials/NNNNN.run-K`."""

    path: str
    first_attempt: int
    """The first attempt of this owner: earlier outcomes are of earlier owners."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a trial ended: `trials/NNNNN.result`, and `.result-J` after its J-th retry."""

    state: ResultState
    values: list[float] | None = None
    """One for each metric."""
    metric: str | None = None
    """The first metric, if the spec names none."""
    mode: Literal["min", "max"] | None = None
    step: int | None = None
    reason: str = ""
    where: str | None = absent()
    run: str | None = None
    """Path of the run."""
    gpu_hours: float = 0.0
    hours: float = 0.0
    cost: float | None = None
    time: float


@dataclass(frozen=True, kw_only=True)
class Retry:
    """The decision to void the result of a trial: `trials/NNNNN.retry-J`, J from 1."""

    first_owner: int
    """Owners before this number belong to the voided result."""
    fresh: bool
    """Whether a new run is made; else the last one is resumed."""
    time: float


@dataclass(frozen=True, kw_only=True)
class Prune:
    """The decision to stop a trial early: `trials/NNNNN.prune-J` of its J-th retry."""

    step: int
    value: float
    reason: str
    time: float


@dataclass(frozen=True, kw_only=True)
class Array:
    """The intention to submit a job array, written before it is submitted: `arrays/NNN.array`."""

    first: int
    """The trial of array index 0."""
    indices: str
    """SLURM's list of array indices."""
    comment: str
    """By which its job is found again."""
    host: str
    boot_id: str
    pid: int
    pid_started: int | None
    time: float


@dataclass(frozen=True, kw_only=True)
class ArrayJob:
    """The job of an array: `arrays/NNN.job`."""

    slurm_job_id: str

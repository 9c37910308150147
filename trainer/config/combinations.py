"""What the worker, a strategy or a callback of Lightning would refuse after the launch, where the configuration alone
decides it: found here instead, with the line to write. `tests/train/test_combinations.py` asks both sides.

Of callbacks those are known that Lightning ships; what a user's own class does is the user's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from trainer.config.namespaces import canonical
from trainer.config.typed import as_written
from trainer.core.errors import EnvironmentFault, TrainerError, UserError

FSDP = ("fsdp", "hsdp", "tp")
"""Strategies of FSDP2, which are Lightning's ModelParallelStrategy."""


@dataclass(frozen=True)
class Job:
    """The facts that decide."""

    config: dict[str, Any]
    world_size: int
    processes_per_node: int

    @property
    def strategy(self) -> str:
        """As `auto` chooses it."""
        name = str(self.config["strategy"]["name"])
        if name == "auto":
            return "single" if self.world_size == 1 else "fsdp" if self.config["resources"].get("gpus") else "ddp"
        return name

    @property
    def is_sharded(self) -> bool:
        return self.strategy in FSDP or self.strategy.startswith("deepspeed")


def problems_of_combinations(job: Job) -> Iterator[TrainerError]:
    """In the order of the sections."""
    yield from _strategy(job)
    seen: dict[tuple[Any, ...], str] = {}
    for name, node in job.config["callbacks"].items():
        kind = callback_class(node)
        if kind is None:
            continue
        where = f"callbacks.{name}"
        yield from _arguments(where, kind, node)
        yield from _with_the_rest(where, kind, node, job)
        if kind in _STATE:
            key = (kind, *(node.get(argument) for argument in _STATE[kind]))
            if key in seen:
                apart = _STATE[kind]
                same = f" with the same {', '.join(apart)}" if apart else ""
                yield UserError(
                    f"{where} and {seen[key]} are both a {kind}{same}: Lightning cannot tell their states apart",
                    f"leave one out: {where}=null" + (f", or give it another {apart[0]}" if apart else ""),
                )
            seen[key] = where


def callback_class(node: Any) -> str | None:
    """The name of the class, where `node` is one of Lightning's own callbacks."""
    if not isinstance(node, dict):
        return None
    path = canonical(str(node.get("_target_")))
    return path.rpartition(".")[2] if path.startswith("lightning.pytorch.callbacks.") else None


def _strategy(job: Job) -> Iterator[UserError]:
    precision = job.config["trainer"]["precision"]
    if precision == "16-mixed" and job.strategy in FSDP:
        yield UserError(
            f"trainer.precision=16-mixed does not go with strategy={job.strategy}: FSDP2 has no loss scaling",
            "use trainer.precision=bf16-mixed, or strategy=ddp",
        )
    model = str(job.config["model"].get("_target_"))
    size = job.config["strategy"].get("tensor_parallel_size")
    size = job.processes_per_node if size is None else size
    if job.strategy == "tp" and model.startswith(_UNSPLIT) and size > 1 and job.world_size % size == 0:
        yield UserError(
            f"strategy=tp: {model} does not say which layers to split", "use strategy=fsdp, or model=transformer"
        )


_UNSPLIT = tuple(f"trainer.models.{name}." for name in ("mlp", "resnet", "vgg", "vit", "efficientnet_lite", "rnn"))
"""The project's own networks without a method `tensor_parallel`."""


_PACKAGES = {"RichProgressBar": "rich", "RichModelSummary": "rich", "DeviceStatsMonitor": "psutil"}


def problems_of_packages(config: dict[str, Any]) -> Iterator[EnvironmentFault]:
    """Packages that only some jobs need, where the job runs here."""
    if config["cluster"]["name"] != "local":
        return
    needed = {
        f"callbacks.{name}": _PACKAGES.get(callback_class(node) or "") for name, node in config["callbacks"].items()
    }
    on_cpu = not config["resources"].get("gpus")
    if config["finetune"]["lora_rank"] is not None:
        needed["finetune.lora_rank"] = "peft"
    if str(config["strategy"]["name"]).startswith("deepspeed"):
        needed[f"strategy={config['strategy']['name']}"] = "deepspeed"
    for what, package in needed.items():
        if package is None or find_spec(package) is not None or (package == "psutil" and not on_cpu):
            continue
        fix = f"pip install {package}" + (f", or {what}=null" if what.startswith("callbacks.") else "")
        yield EnvironmentFault(f"{what} needs the package {package}, which is not installed", fix)


def _with_the_rest(where: str, kind: str, node: dict[str, Any], job: Job) -> Iterator[UserError]:
    """Callbacks that do not go with the strategy, the ranks or the limits of this job."""
    leave_out = f"leave it out with {where}=null"
    averages = kind in ("WeightAveraging", "EMAWeightAveraging")
    whole_parameters = averages and job.strategy in ("deepspeed_zero1", "deepspeed_zero2")
    if kind in _UNSHARDED and job.is_sharded and not whole_parameters:
        yield UserError(
            f"{where}: {kind} does not work with strategy={job.strategy}, which keeps parts on each rank",
            f"use strategy=ddp, or {leave_out}",
        )
    begin, endless = node.get("swa_epoch_start", 0.8), job.config["trainer"]["max_epochs"] in (None, -1)
    if kind == "StochasticWeightAveraging" and isinstance(begin, float) and endless:
        yield UserError(
            f"{where}.swa_epoch_start={begin}: a fraction needs trainer.max_epochs",
            f"set trainer.max_epochs, or {where}.swa_epoch_start=10",
        )
    if kind == "GradientAccumulationScheduler" and job.strategy.startswith("deepspeed"):
        problem = f"{where}: DeepSpeed cannot change the number of micro-batches between epochs"
        yield UserError(problem, f"use another strategy, or {leave_out}")


_UNSHARDED = (
    "StochasticWeightAveraging",
    "WeightAveraging",
    "EMAWeightAveraging",
    "ModelPruning",
    "LearningRateFinder",
)
_STATE: dict[str, tuple[str, ...]] = {
    "ModelCheckpoint": ("monitor", "mode", "every_n_train_steps", "every_n_epochs", "train_time_interval"),
    "EarlyStopping": ("monitor", "mode"),
    "Timer": (),
    "StochasticWeightAveraging": (),
    "WeightAveraging": (),
    "EMAWeightAveraging": (),
    "BackboneFinetuning": (),
}
"""Callbacks with a state, and the arguments that tell two of a kind apart."""


def _one_of(*names: Any) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), " or ".join(map(as_written, names))


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: isinstance(value, int) and value >= low), f"an integer of {low} or more"


def _learning_rates(value: Any) -> bool:
    return all(isinstance(one, float) and one > 0 for one in (value if isinstance(value, list) else [value]))


def _start(value: Any) -> bool:
    return value >= 1 if isinstance(value, int) else isinstance(value, float) and 0 <= value <= 1


def _scheduling(value: Any) -> bool:
    whole = isinstance(value, dict) and bool(value)
    return whole and all(isinstance(k, int) and k >= 0 and isinstance(v, int) and v >= 1 for k, v in value.items())


def _duration(value: Any) -> bool:
    return not isinstance(value, str) or re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", value.strip()) is not None


_PRUNING = ("ln_structured", "l1_unstructured", "random_structured", "random_unstructured")

_ARGUMENTS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "ModelCheckpoint": {
        "mode": _one_of("min", "max"),
        "save_top_k": _at_least(-1),
        "every_n_train_steps": _at_least(0),
        "every_n_epochs": _at_least(0),
    },
    "EarlyStopping": {"mode": _one_of("min", "max")},
    "LearningRateMonitor": {"logging_interval": _one_of("step", "epoch")},
    "Timer": {"duration": (_duration, "DD:HH:MM:SS"), "interval": _one_of("step", "epoch")},
    "StochasticWeightAveraging": {
        "swa_lrs": (_learning_rates, "a positive number with a point such as 0.01, or a list of them"),
        "swa_epoch_start": (_start, "an epoch from 1, or a fraction up to 1.0"),
        "annealing_strategy": _one_of("cos", "linear"),
    },
    "GradientAccumulationScheduler": {"scheduling": (_scheduling, "epochs from 0 to batches from 1, as {0: 1, 5: 4}")},
    "LearningRateFinder": {"mode": _one_of("exponential", "linear")},
    "ModelPruning": {
        "pruning_fn": ((lambda value: not isinstance(value, str) or value.lower() in _PRUNING), ", ".join(_PRUNING)),
        "verbose": _one_of(0, 1, 2),
    },
}
"""What Lightning's constructors take where more than a type decides; null is the default, as for them."""


def _arguments(where: str, kind: str, node: dict[str, Any]) -> Iterator[UserError]:
    for name, (fits, expected) in _ARGUMENTS.get(kind, {}).items():
        value = node.get(name)
        if value is not None and not fits(value):
            yield UserError(f"{where}.{name}={as_written(value)}: {kind} wants {expected}", f"correct {where}.{name}")
    if kind == "ModelCheckpoint":
        triggers = [key for key in ("every_n_train_steps", "every_n_epochs", "train_time_interval") if node.get(key)]
        if len(triggers) > 1:
            said = " and ".join(f"{where}.{key}" for key in triggers)
            yield UserError(f"{said} exclude each other", f"keep one, such as {where}.{triggers[1]}=null")
        if node.get("monitor") is None and node.get("save_top_k", 1) not in (-1, 0, 1, None):
            problem = f"{where}.save_top_k={node['save_top_k']} without a monitor: nothing says which are the best"
            yield UserError(problem, f"set {where}.monitor=val/loss, or {where}.save_top_k=-1 for all")
    if (
        kind == "ModelPruning"
        and str(node.get("pruning_fn")).endswith("_structured")
        and node.get("pruning_dim") is None
    ):
        yield UserError(f"{where}.pruning_fn={node['pruning_fn']} needs pruning_dim", f"set {where}.pruning_dim=0")

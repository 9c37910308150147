"""Combinations of options that a strategy or a Lightning callback would refuse after the launch.

They are found here from the configuration alone, with a fix. `tests/train/test_combinations.py` compares these checks
with what the ranks refuse. Pairs of strategy, precision and optimizer are in `strategy_limits.py`. Only callbacks that
Lightning ships are checked, not user-defined ones.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any

from trainer.config.namespaces import canonical
from trainer.config.problems import as_written
from trainer.config.schema import PROFILED_WINDOWS
from trainer.config.strategy import CUDA_GRAPHS, chosen_by_auto
from trainer.config.strategy_limits import FSDP, LOW_MEMORY, Pairing, problems_of_pairs
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.install import EXTRAS, pip_install


@dataclass(frozen=True)
class Job:
    """A composed configuration and its launch shape."""

    config: dict[str, Any]
    world_size: int
    processes_per_node: int
    on_gpus: bool = False
    accumulate: int = 1
    """Micro-batches of an optimizer step."""

    @property
    def strategy(self) -> str:
        """Name of the strategy, with `auto` resolved."""
        name = str(self.config["strategy"]["name"])
        if name == "auto":
            on_gpus = self.on_gpus or self.config["resources"].get("gpus")
            return chosen_by_auto(self.world_size, "cuda" if on_gpus else "cpu")
        return name

    @property
    def is_sharded(self) -> bool:
        """Whether no rank holds the full model and optimizer state."""
        return self.strategy in FSDP or self.strategy.startswith("deepspeed")


def problems_of_combinations(job: Job) -> Iterator[TrainerError]:
    """Yield the combinations that cannot work, in the order of the sections."""
    yield from problems_of_pairs(
        Pairing(
            strategy=job.strategy,
            options=job.config["strategy"],
            trainer=job.config["trainer"],
            optimizer=job.config["optimizer"] or {},
            model=str(job.config["model"].get("_target_")),
            on_gpu=job.on_gpus,
            world_size=job.world_size,
            processes_per_node=job.processes_per_node,
        )
    )
    yield from _strategy(job)
    yield from _tied(job)
    yield from _micro_batch(job)
    yield from _float8(job)
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
                identity = _STATE[kind]
                same = f" with the same {', '.join(identity)}" if identity else ""
                yield UserError(
                    f"{where} and {seen[key]} are both a {kind}{same}: Lightning cannot distinguish their states",
                    f"remove one: {where}=null" + (f", or give it another {identity[0]}" if identity else ""),
                )
            seen[key] = where


def callback_class(node: Any) -> str | None:
    """Return the class name if `node` is one of Lightning's own callbacks, else None."""
    if not isinstance(node, dict):
        return None
    path = canonical(str(node.get("_target_")))
    return path.rpartition(".")[2] if path.startswith("lightning.pytorch.callbacks.") else None


def _strategy(job: Job) -> Iterator[UserError]:
    if job.config["trainer"].get("channels_last") and job.is_sharded:
        yield UserError(
            f"trainer.channels_last=true: strategy={job.strategy} flattens or shards the weights, layout included",
            "use strategy=ddp, or trainer.channels_last=false",
        )
    watch = job.config["tracking"].get("watch")
    if watch is not None and (job.is_sharded or job.strategy == "tp"):
        yield UserError(
            f"tracking.watch={watch}: with strategy={job.strategy} no rank has a whole parameter or gradient",
            "use strategy=ddp, or tracking.watch=null",
        )
    yield from _profiler(job)
    yield from _compile(job)


def _compile(job: Job) -> Iterator[UserError]:
    """Yield what the modes of torch.compile cannot be combined with."""
    options = job.config["strategy"]
    mode = options.get("compile_mode") or "default"
    if mode != "default" and not options.get("compile"):
        yield UserError(f"strategy.compile_mode={mode}: nothing is compiled", "also set strategy.compile=true")
    for key, default in (("compile_fullgraph", False), ("compile_dynamic", None)):
        if options.get(key, default) != default and not options.get("compile"):
            yield UserError(
                f"strategy.{key}={as_written(options[key])}: nothing is compiled", "also set strategy.compile=true"
            )
    if mode not in CUDA_GRAPHS or not options.get("compile"):
        return
    fix = "write strategy.compile_mode=max-autotune-no-cudagraphs, or default"
    if not job.on_gpus:
        yield UserError(f"strategy.compile_mode={mode} uses CUDA graphs, and this job has no GPU", fix)
    elif job.is_sharded:
        problem = f"strategy.compile_mode={mode} uses CUDA graphs, which read parameters from where they were recorded;"
        yield UserError(f"{problem} strategy={job.strategy} gathers or moves them in every step", fix)
    elif job.accumulate > 1:
        problem = f"strategy.compile_mode={mode} uses CUDA graphs, which would overwrite accumulated gradients"
        yield UserError(f"{problem}: this job has {job.accumulate} micro-batches a step", fix)


def _profiler(job: Job) -> Iterator[UserError]:
    options = job.config["trainer"]
    kind, rank = options.get("profiler"), options.get("profile_rank") or 0
    if kind in ("memory", "nsys") and not job.on_gpus:
        yield UserError(f"trainer.profiler={kind} records a GPU, and this job has none", "write trainer.profiler=torch")
    if kind in PROFILED_WINDOWS and rank >= job.world_size:
        message = f"trainer.profile_rank={rank}: the ranks of this job are 0 to {job.world_size - 1}"
        yield UserError(message, "write trainer.profile_rank=0")


def _float8(job: Job) -> Iterator[UserError]:
    """Yield what `trainer.float8` cannot be combined with."""
    recipe = job.config["trainer"].get("float8", "none")
    if recipe == "none":
        return
    none = "use trainer.float8=none"
    precision = job.config["trainer"]["precision"]
    if precision not in ("auto", "bf16-mixed", "bf16-true"):
        yield UserError(f"trainer.float8={recipe} with trainer.precision={precision}", f"use bf16-mixed, or {none[4:]}")
    if job.strategy == "tp" or job.strategy.startswith("deepspeed"):
        problem = f"trainer.float8={recipe} is not supported by strategy={job.strategy}, which replaces linear layers"
        yield UserError(problem, f"use strategy=fsdp, or {none[4:]}")
    if job.config["finetune"].get("lora_rank") is not None:
        yield UserError(f"trainer.float8={recipe} with finetune.lora_rank: LoRA replaces the same layers", none)


def _tied(job: Job) -> Iterator[UserError]:
    """Yield a split output layer that shares its weight with the embedding, which every rank has whole."""
    model = job.config["model"]
    is_ours = str(model.get("_target_")) == "trainer.models.transformer.Transformer"
    if job.config["strategy"].get("loss_parallel") and is_ours and model.get("tied", True):
        problem = (
            "strategy.loss_parallel=true: with model.tied=true the output layer is the embedding, which stays whole"
        )
        yield UserError(problem, "use model.tied=false, or strategy.loss_parallel=false")


def _micro_batch(job: Job) -> Iterator[UserError]:
    """Yield what `trainer.find_micro_batch` cannot be combined with."""
    config, key = job.config, "trainer.find_micro_batch=true"
    if not config["trainer"].get("find_micro_batch"):
        return
    if config["data"].get("batch_size") is None:
        yield UserError(f"{key} splits data.batch_size, which is not set", "set data.batch_size (global)")
    for section, name in (("data", "micro_batch"), ("trainer", "accumulate_grad_batches")):
        value = config[section].get(name)
        if value is not None:
            problem = f"{key} with {section}.{name}={value}, which sets what is to be found"
            yield UserError(problem, f"remove one of them: {section}.{name}=null")
    if any(callback_class(node) == "GradientAccumulationScheduler" for node in config["callbacks"].values()):
        yield UserError(f"{key} decides the accumulation, and GradientAccumulationScheduler as well", "remove one")
    if job.world_size > 1 and config["resilience"]["max_restarts"] == 0:
        yield UserError(
            f"{key} restarts the ranks once, after the first micro-batch that does not fit, and "
            "resilience.max_restarts=0 forbids it",
            "use resilience.max_restarts=1 or more",
        )


_NETWORKS = {"trainer.models.hf.HuggingFace": "transformers", "trainer.models.timm.create": "timm"}
"""Our wrappers of networks, and the packages that these are from."""
_INSTALL = {
    "transformers": pip_install("hf"),
    "timm": "pip install timm, with a torchvision that matches the installed torch",
}
_PACKAGES = {"RichProgressBar": "rich", "RichModelSummary": "rich", "DeviceStatsMonitor": "psutil"}


def problems_of_packages(config: dict[str, Any]) -> Iterator[EnvironmentFault]:
    """Yield the optional packages that a job on this machine needs and that are not installed."""
    if config["cluster"]["name"] != "local":
        return
    callbacks = config["callbacks"].items()
    needed = {f"callbacks.{name}": _PACKAGES.get(callback_class(node) or "") for name, node in callbacks}
    on_cpu = not config["resources"].get("gpus")
    network = (config["model"] or {}).get("_target_")
    if network in _NETWORKS:
        needed[f"model._target_={network}"] = _NETWORKS[network]
    if config["finetune"]["lora_rank"] is not None:
        needed["finetune.lora_rank"] = "peft"
    if str(config["strategy"]["name"]).startswith("deepspeed"):
        needed[f"strategy={config['strategy']['name']}"] = "deepspeed"
    if config["resources"].get("numa_binding") is not None and which("numactl") is None:
        fix = "install numactl, or use resources.numa_binding=null"
        yield EnvironmentFault("resources.numa_binding needs the program numactl, which is not installed", fix)
    if config["trainer"].get("float8", "none") != "none":
        needed[f"trainer.float8={config['trainer']['float8']}"] = "torchao"
    optimizer = config["optimizer"] or {}
    if optimizer.get("_target_") == LOW_MEMORY and optimizer.get("states", "8bit") == "8bit":
        needed["optimizer.states=8bit"] = "torchao"
    for key, package in needed.items():
        if package is None or find_spec(package) is not None or (package == "psutil" and not on_cpu):
            continue
        fix = pip_install(package) if package in EXTRAS else _INSTALL.get(package, f"pip install {package}")
        if key.startswith("callbacks."):
            fix += f", or {key}=null"
        if key.startswith("optimizer"):
            fix += ", or optimizer=adamw_bf16, which needs 2 more bytes per parameter"
        yield EnvironmentFault(f"{key} needs the package {package}, which is not installed", fix)
    for key in ("offload_optimizer", "offload_parameters"):
        if config["strategy"].get(key) == "nvme" and not _builds_with_libaio():
            fix = f"apt install libaio-dev gcc, or strategy.{key}=cpu"
            yield EnvironmentFault(f"strategy.{key}=nvme needs libaio, its headers and a C compiler", fix)


def _builds_with_libaio() -> bool:
    """Return whether DeepSpeed can build its operator for NVMe, by the test that its `AsyncIOBuilder` makes."""
    environment = os.environ
    compiler = shlex.split(environment.get("CC", "cc"))
    flags, link = (shlex.split(environment.get(name, "")) for name in ("CFLAGS", "LDFLAGS"))
    program = "#include <libaio.h>\nint main(void) { return io_pgetevents(0, 0, 0, 0, 0, 0); }"
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *flags, "-x", "c", "-", "-o", f"{folder}/a", *link, "-laio"]
        try:
            return subprocess.run(command, input=program.encode(), capture_output=True, timeout=60).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def _with_the_rest(where: str, kind: str, node: dict[str, Any], job: Job) -> Iterator[UserError]:
    """Yield callbacks that do not work with the strategy or the limits of this job."""
    disable = f"disable it with {where}=null"
    averages = kind in ("WeightAveraging", "EMAWeightAveraging")
    whole_parameters = averages and job.strategy in ("deepspeed_zero1", "deepspeed_zero2")
    if kind in _UNSHARDED and job.is_sharded and not whole_parameters:
        yield UserError(
            f"{where}: {kind} does not work with strategy={job.strategy}, which shards over the ranks",
            f"use strategy=ddp, or {disable}",
        )
    start, unlimited = node.get("swa_epoch_start", 0.8), job.config["trainer"]["max_epochs"] in (None, -1)
    if kind == "StochasticWeightAveraging" and isinstance(start, float) and unlimited:
        yield UserError(
            f"{where}.swa_epoch_start={start}: a fraction needs trainer.max_epochs",
            f"set trainer.max_epochs, or {where}.swa_epoch_start=10",
        )
    if kind == "GradientAccumulationScheduler" and job.strategy.startswith("deepspeed"):
        problem = f"{where}: DeepSpeed cannot change the number of micro-batches between epochs"
        yield UserError(problem, f"use another strategy, or {disable}")


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
"""Callbacks with a state, and the arguments that distinguish two of the same class."""


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
        "swa_lrs": (_learning_rates, "a positive number with a decimal point such as 0.01, or a list of them"),
        "swa_epoch_start": (_start, "an epoch from 1, or a fraction up to 1.0"),
        "annealing_strategy": _one_of("cos", "linear"),
    },
    "GradientAccumulationScheduler": {
        "scheduling": (_scheduling, "epochs (from 0) to batches (from 1), such as {0: 1, 5: 4}")
    },
    "LearningRateFinder": {"mode": _one_of("exponential", "linear")},
    "ModelPruning": {
        "pruning_fn": ((lambda value: not isinstance(value, str) or value.lower() in _PRUNING), ", ".join(_PRUNING)),
        "verbose": _one_of(0, 1, 2),
    },
}
"""Conditions of Lightning's constructors beyond types: a predicate and its description. null is the default."""


def _arguments(where: str, kind: str, node: dict[str, Any]) -> Iterator[UserError]:
    for name, (is_valid, expected) in _ARGUMENTS.get(kind, {}).items():
        value = node.get(name)
        if value is not None and not is_valid(value):
            yield UserError(f"{where}.{name}={as_written(value)}: {kind} needs {expected}", f"correct {where}.{name}")
    if kind == "ModelCheckpoint":
        triggers = [key for key in ("every_n_train_steps", "every_n_epochs", "train_time_interval") if node.get(key)]
        if len(triggers) > 1:
            keys = " and ".join(f"{where}.{key}" for key in triggers)
            yield UserError(f"{keys} exclude each other", f"keep one, for example with {where}.{triggers[1]}=null")
        if node.get("monitor") is None and node.get("save_top_k", 1) not in (-1, 0, 1, None):
            problem = f"{where}.save_top_k={node['save_top_k']} needs a monitor that decides which are the best"
            yield UserError(problem, f"set {where}.monitor=val/loss, or {where}.save_top_k=-1 for all")
    if (
        kind == "ModelPruning"
        and str(node.get("pruning_fn")).endswith("_structured")
        and node.get("pruning_dim") is None
    ):
        yield UserError(f"{where}.pruning_fn={node['pruning_fn']} needs pruning_dim", f"set {where}.pruning_dim=0")

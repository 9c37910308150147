"""Lightning's own names and values under `trainer`: translated, or refused with a replacement.

A composed job goes through `translate` only if `typed.is_lightnings` finds such a name or value. A name with an
equivalent in another section is moved there (`trainer.devices` to `resources`), also in the frozen config.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from trainer.config.lightning_arguments import TAKEN
from trainer.config.lightning_names import WRITE, refusal
from trainer.config.problems import as_written
from trainer.config.typed import NEVER_NULL
from trainer.core.errors import TrainerError, UserError

Problems = list[TrainerError]

_TRAINERS = {
    f"{module}.Trainer"
    for package in ("lightning", "pytorch_lightning")
    for module in (package, f"{package}.pytorch", f"{package}.pytorch.trainer", f"{package}.trainer")
} | {"lightning.pytorch.trainer.trainer.Trainer", "pytorch_lightning.trainer.trainer.Trainer"}

_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}

_STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "ddp_find_unused_parameters_true": ("ddp", {"find_unused_parameters": True}),
    "ddp_find_unused_parameters_false": ("ddp", {"find_unused_parameters": False}),
    "ddp_spawn": ("ddp", {}),
    "ddp_fork": ("ddp", {}),
    "ddp_notebook": ("ddp", {}),
    "single_device": ("single", {}),
    "fsdp": ("fsdp", {}),
    "fsdp_cpu_offload": ("fsdp", {"cpu_offload": True}),
    "deepspeed": ("deepspeed_zero2", {}),
    "deepspeed_stage_1": ("deepspeed_zero1", {}),
    "deepspeed_stage_1_offload": ("deepspeed_zero1", {"offload_optimizer": "cpu"}),
    "deepspeed_stage_2": ("deepspeed_zero2", {}),
    "deepspeed_stage_2_offload": ("deepspeed_zero2", {"offload_optimizer": "cpu"}),
    "deepspeed_stage_3": ("deepspeed_zero3", {}),
    "deepspeed_stage_3_offload": ("deepspeed_zero3", {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    "deepspeed_stage_3_offload_nvme": (
        "deepspeed_zero3",
        {"offload_optimizer": "nvme", "offload_parameters": "nvme"},
    ),
}
_STRATEGY_CLASSES = {"DDPStrategy": "ddp", "FSDPStrategy": "fsdp", "ModelParallelStrategy": "tp"}


def translate(config: dict[str, Any]) -> Problems:
    """Rewrite `config["trainer"]` and the sections that its names belong to, in place; return errors."""
    options: dict[str, Any] = config["trainer"]
    problems: Problems = []
    target = options.pop("_target_", None)
    if target is not None and target not in _TRAINERS:
        fix = "remove it; a callback can do the work of your own Trainer: callbacks.NAME._target_=..."
        problems.append(UserError(f"trainer._target_={target}: Lightning's Trainer cannot be replaced", fix))
    for directive in ("_convert_", "_recursive_", "_partial_"):
        options.pop(directive, None)
    for key in [key for key, value in options.items() if value is None and (key in TAKEN or key in NEVER_NULL)]:
        del options[key]  # Lightning's default
    for key in [key for key in options if key in WRITE]:
        problems.append(refusal(key, options.pop(key)))
    _values(options, problems)
    _clipping(options, problems)
    _shape(config, options, problems)
    _fast_dev_run(config, options)
    for key, translator in _TRANSLATORS.items():
        if key in options:
            problem = translator(config, options.pop(key))
            problems += [problem] if problem else []
    return problems


def _values(options: dict[str, Any], problems: Problems) -> None:
    """Translate Lightning's notations for values of keys that the schema has as well."""
    for key in ("max_steps", "max_epochs"):
        if options.get(key) == -1:
            options[key] = None
    if options.get("overfit_batches") == 0:
        options["overfit_batches"] = None
    precision = str(options.get("precision", "auto"))
    options["precision"] = _PRECISIONS.get(precision, precision)
    if precision.startswith("transformer-engine"):
        fix = "write trainer.precision=bf16-mixed"
        problems.append(UserError(f"trainer.precision={precision}: Transformer Engine (FP8) is not supported", fix))
        options["precision"] = "auto"
    time = options.get("max_time")
    if isinstance(time, dict):
        options["max_time"] = _duration(time)
    if isinstance(options.get("val_check_interval"), (dict, str)):
        value = options.pop("val_check_interval")
        fix = "write optimizer steps, as in trainer.val_check_interval=1000, or a fraction of an epoch"
        message = f"trainer.val_check_interval={value}: a time interval would end at another step on each rank"
        problems.append(UserError(message, fix))
    schedule = options.get("accumulate_grad_batches")
    if isinstance(schedule, dict):
        text = ",".join(f"{epoch}:{count}" for epoch, count in schedule.items())
        where = "callbacks.accumulation"
        fix = (
            f"write {where}._target_=lightning.pytorch.callbacks.GradientAccumulationScheduler "
            f"'{where}.scheduling={{{text}}}'"
        )
        del options["accumulate_grad_batches"]
        problems.append(UserError("trainer.accumulate_grad_batches by epoch is a callback", fix))
    if isinstance(options.get("profiler"), dict):
        node = options.pop("profiler")
        kind = _class_of(node).removesuffix("Profiler").lower()
        line = f"trainer.profiler={kind if kind in ('simple', 'advanced', 'pytorch') else 'simple'}"
        problems.append(UserError(f"trainer.profiler._target_={node.get('_target_')}", f"write {line}"))


def _duration(parts: dict[str, Any]) -> str:
    """Format the arguments of a timedelta as DD:HH:MM:SS."""
    from datetime import timedelta

    seconds = round(timedelta(**parts).total_seconds())
    days, seconds = divmod(seconds, 86400)
    return f"{days:02d}:{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _clipping(options: dict[str, Any], problems: Problems) -> None:
    """Settle on one of two keys: `gradient_clip_norm`, or `gradient_clip_val` if the algorithm is by value."""
    value, algorithm = options.pop("gradient_clip_val", None), options.pop("gradient_clip_algorithm", None)
    norm = options.get("gradient_clip_norm")
    algorithm = str(algorithm).lower() if algorithm is not None else None
    if algorithm not in (None, "norm", "value"):
        options["gradient_clip_algorithm"] = algorithm  # refused later, with all choices
        return
    if not value:  # 0 and null: no clipping
        return
    if algorithm == "value":
        options.update(gradient_clip_val=value, gradient_clip_algorithm="value")
        if norm is not None:
            message = f"trainer.gradient_clip_norm={norm} and trainer.gradient_clip_val={value} (by value) are both set"
            problems.append(UserError(message, "set trainer.gradient_clip_norm=null, or remove gradient_clip_val"))
    elif norm is not None and norm != value:
        message = f"trainer.gradient_clip_norm={norm} and trainer.gradient_clip_val={value} are the same option"
        problems.append(UserError(message, f"write only one of them: trainer.gradient_clip_norm={value}"))
    else:
        options["gradient_clip_norm"] = value


def _shape(config: dict[str, Any], options: dict[str, Any], problems: Problems) -> None:
    """Move `devices`, `num_nodes` and `accelerator` to `resources`."""
    given = {key: options.pop(key) for key in ("accelerator", "devices", "num_nodes") if key in options}
    if not given:
        return
    accelerator = str(given.get("accelerator", "auto")).lower()
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        message = f"trainer.accelerator={accelerator}: only NVIDIA GPUs and CPUs are supported"
        problems.append(UserError(message, "write trainer.accelerator=gpu or trainer.accelerator=cpu"))
        return
    try:
        devices = _count(given.get("devices", "auto"))
        nodes = int(given["num_nodes"]) if "num_nodes" in given else None
    except ValueError:
        message = f"trainer.num_nodes={as_written(given['num_nodes'])}: expected an integer"
        problems.append(UserError(message, "write resources.nodes=2"))
        return
    except UserError as error:
        problems.append(error)
        return
    resources = config.setdefault("resources", {})
    translated = {"nodes": nodes} if nodes is not None else {}
    try:
        translated |= _processes(config, accelerator, devices, nodes or resources.get("nodes") or 1)
    except TrainerError as error:
        problems.append(error)
        return
    written = " ".join(f"trainer.{key}={as_written(value)}" for key, value in given.items())
    for key, value in translated.items():
        existing = resources.get(key)
        if existing is not None and existing != value:
            message = f"{written} and resources.{key}={existing} contradict each other"
            problems.append(UserError(message, f"remove one of them: {written} is resources.{key}={value}"))
        resources[key] = value


def _count(devices: Any) -> int | None:
    """Return the number of devices per node; None: all of them.

    Raises:
        UserError: Specific devices are selected, or none.
    """
    text = str(list(devices) if isinstance(devices, tuple) else devices).strip()
    if text in ("auto", "-1"):
        return None
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    chosen = re.findall(r"\d+", text)
    if chosen and text != "0" and not text.startswith("-"):
        raise UserError(
            f"trainer.devices={text}: the numbers of GPUs have a key of their own",
            f"write resources.devices=[{','.join(chosen)}]",
        )
    raise UserError(f"trainer.devices={text}: at least one device is needed", "write trainer.devices=1")


def _processes(config: dict[str, Any], accelerator: str, devices: int | None, nodes: int) -> dict[str, Any]:
    """Return the keys of `resources` for this number of devices on each of `nodes`.

    Raises:
        TrainerError: The accelerator or the number of devices is ambiguous, or this machine has no GPU.
    """
    from trainer.core.errors import EnvironmentFault
    from trainer.core.gpus import inventory
    from trainer.core.hardware import count_gpus

    resources, is_local = config["resources"], (config.get("cluster") or {}).get("name") == "local"
    on_gpus = accelerator in ("gpu", "cuda") or bool(resources.get("gpus") or resources.get("gpus_per_node"))
    if accelerator == "auto" and not on_gpus:
        if devices is None:
            return {}
        if not is_local and resources.get("gpus") is None and resources.get("cpu_processes") is None:
            fix = f"write resources.gpus_per_node={devices}, or on CPU resources.cpu_processes={devices * nodes}"
            raise UserError(f"trainer.devices={devices}: does this mean GPUs or CPU processes of the cluster?", fix)
        on_gpus = is_local and resources.get("gpus") is None and count_gpus() > 0
    if on_gpus and accelerator != "cpu":
        if devices is not None:
            total = resources.get("gpus")
            return {"gpus_per_node": devices} | ({"gpus": devices * nodes} if total is not None else {})
        if is_local and count_gpus() == 0:
            raise inventory().problem or EnvironmentFault(
                f"trainer.accelerator={accelerator}, but this machine has no GPU", "write trainer.accelerator=cpu"
            )
        if not is_local and not (resources.get("gpus") or resources.get("gpus_per_node")):
            fix = "set the number of GPUs per node: resources.gpus_per_node=8"
            raise UserError(f"trainer.accelerator={accelerator} without a number of devices", fix)
        return {}
    count = devices * nodes if devices is not None else resources.get("cpu_processes") or nodes
    return {"gpus": 0, "cpu_processes": count}


def _fast_dev_run(config: dict[str, Any], options: dict[str, Any]) -> None:
    """Limit all loaders to this number of batches in one epoch, untracked (`lightning/pytorch/trainer/setup.py`)."""
    batches = int(options.pop("fast_dev_run", 0) or 0)
    if not batches:
        return
    if not options.get("overfit_batches"):
        options.update(limit_train_batches=batches, limit_val_batches=batches)
    options.update(limit_test_batches=batches, limit_predict_batches=batches, max_steps=batches, max_epochs=1)
    options.update(val_check_interval=None, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    config["tracking"] = {**(config.get("tracking") or {}), "name": "none"}


def _strategy(config: dict[str, Any], value: Any) -> UserError | None:
    if value == "auto":
        return None
    if isinstance(value, dict):
        path, name = value.get("_target_") or value.get("class_path"), _class_of(value)
        strategy, options = _STRATEGY_CLASSES.get(name, "deepspeed_zero2" if "DeepSpeed" in name else "ddp"), {}
        given = value.get("init_args") or {key: one for key, one in value.items() if not key.startswith("_")}
        options = {key: given[key] for key in ("find_unused_parameters", "bucket_cap_mb", "stage") if key in given}
        if "stage" in options:
            strategy = f"deepspeed_zero{options.pop('stage')}"
        value = path
    elif value in _STRATEGIES:
        strategy, options = _STRATEGIES[value]
    else:
        from trainer.config.strategy import STRATEGIES
        from trainer.core.near import listed

        return UserError(f"trainer.strategy={value}: unknown strategy", f"write strategy= one of {listed(STRATEGIES)}")
    chosen = config.get("strategy") or {}
    if chosen.get("name") == strategy and all(chosen.get(key) == one for key, one in options.items()):
        return None
    line = " ".join([f"strategy={strategy}", *(f"strategy.{key}={as_written(one)}" for key, one in options.items())])
    return UserError(f"trainer.strategy={value}: the strategy is a separate config group", f"write {line} instead")


def _callbacks(config: dict[str, Any], value: Any) -> UserError | None:
    """Move callbacks to the section `callbacks`, under the names of their classes."""
    nodes = value if isinstance(value, list) else [value]
    if not all(isinstance(node, dict) and _class_of(node) for node in nodes):
        fix = "write callbacks.NAME._target_=my_package.MyCallback"
        return UserError("trainer.callbacks: each callback needs a _target_", fix)
    section = config["callbacks"] = dict(config.get("callbacks") or {})
    for node in nodes:
        section[_free_name(_class_of(node), section)] = _with_target(node, "lightning.pytorch.callbacks")
    return None


def _free_name(class_name: str, section: dict[str, Any]) -> str:
    """Return a name for a class that the section does not have yet, such as `early_stopping` for EarlyStopping."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).lower()
    while section.get(name) is not None:
        name += "_too"
    return name


def _logger(config: dict[str, Any], value: Any) -> UserError | None:
    """Move loggers to the section `logger`, under the names of their classes."""
    if value is True:
        return None
    if value is False:
        config["tracking"], config["logger"] = {**(config.get("tracking") or {}), "name": "none"}, {}
        return None
    nodes = value if isinstance(value, list) else [value]
    if not all(isinstance(node, dict) and _class_of(node) for node in nodes):
        fix = f"write logger={value if isinstance(value, str) else 'csv'}, or tracking=none for no logger"
        return UserError(f"trainer.logger={as_written(value)}: loggers are a separate config group", fix)
    section = config["logger"] = dict(config.get("logger") or {})
    for node in nodes:
        section[_free_name(_class_of(node), section)] = _with_target(node, "lightning.pytorch.loggers")
    return None


def _plugins(config: dict[str, Any], value: Any) -> UserError | None:
    if value in ([], ()):
        return None
    names = ", ".join(_class_of(one) or str(one) for one in (value if isinstance(value, list) else [value]))
    fix = "remove it: use trainer.precision= for precision, cluster=slurm for the environment, checkpoint.* for saving"
    return UserError(f"trainer.plugins: {names} is not supported", fix)


def _flag(key: str, allowed: tuple[Any, ...], fix: str) -> Callable[[dict[str, Any], Any], UserError | None]:
    """Return a translator that accepts `allowed` values, which have no effect, and refuses others."""

    def translate_flag(config: dict[str, Any], value: Any) -> UserError | None:
        return None if value in allowed else UserError(f"trainer.{key}={as_written(value)}: not supported", fix)

    return translate_flag


_TRANSLATORS: dict[str, Callable[[dict[str, Any], Any], UserError | None]] = {
    "strategy": _strategy,
    "callbacks": _callbacks,
    "logger": _logger,
    "plugins": _plugins,
    "enable_progress_bar": _flag("enable_progress_bar", (True, False), "remove it"),
    "enable_autolog_hparams": _flag("enable_autolog_hparams", (True,), "remove it: config.yaml has them"),
    "enable_checkpointing": _flag(
        "enable_checkpointing",
        (True,),
        "resuming, evaluating and exporting a run need checkpoints; for a single one at the end: "
        "write checkpoint.every_minutes=null checkpoint.keep_last=1 checkpoint.keep_best=0",
    ),
    "barebones": _flag("barebones", (False,), "write tracking=none trainer.num_sanity_val_steps=0"),
    "model_registry": _flag("model_registry", (), "write finetune.init_from=PATH to start from weights"),
}


def _class_of(node: Any) -> str:
    """Return the class name of a node's `_target_`, or of LightningCLI's `class_path`."""
    path = (node.get("_target_") or node.get("class_path") or "") if isinstance(node, dict) else ""
    return str(path).rpartition(".")[2]


def _with_target(node: dict[str, Any], default_module: str) -> dict[str, Any]:
    """Rewrite LightningCLI's `class_path` and `init_args` as Hydra's `_target_` and arguments."""
    if "class_path" not in node:
        return node
    path = str(node["class_path"])
    return {"_target_": path if "." in path else f"{default_module}.{path}", **(node.get("init_args") or {})}

"""Learning rate schedulers of the configuration: the interval at which they step, and checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.config.limits import OneOf
from trainer.config.problems import not_a_boolean
from trainer.core.errors import UserError

READ_BY_TRAINER = ("interval", "frequency", "monitor", "strict", "name")
"""Keys of `scheduler` with the meaning of Lightning's `lr_scheduler` dictionary; passed to the target only if its
signature names them."""
FILLED = ("total_steps", "num_training_steps", "T_max", "total_iters", "max_iters", "max_epochs")
"""Arguments for the length of the training, filled in if they are null, or missing and without a default."""
INTERVALS = ("step", "epoch")
_TORCHS = "torch.optim.lr_scheduler."
_BY_STEP = ("OneCycleLR", "CyclicLR")
_PLATEAU = "ReduceLROnPlateau"
_DECAY = OneOf(("all", "matrices"))
_OURS = ("cosine", "linear", "polynomial", "warmup_stable_decay")
_NEED_LENGTH = {
    **{f"trainer.schedules.{name}": "total_steps" for name in _OURS},
    f"{_TORCHS}OneCycleLR": "total_steps",
    f"{_TORCHS}CosineAnnealingLR": "T_max",
}
"""Argument that is filled in if it is missing, by target."""


def settle_interval(config: dict[str, Any]) -> None:
    """Set `scheduler.interval` to the default of the scheduler's class if it is unset.

    Schedulers of torch step after each epoch, others after each optimizer step. A frozen config without the key is from
    an older version, in which all schedulers step with the optimizer.
    """
    node = config.get("scheduler")
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str) or node.get("interval") is not None:
        return
    node["interval"] = _default(node)


def _default(node: dict[str, Any]) -> str:
    target: str = node["_target_"]
    if target.startswith(_TORCHS):
        return "step" if target.removeprefix(_TORCHS) in _BY_STEP else "epoch"
    names = [name for name in node if name not in READ_BY_TRAINER]
    in_epochs = any("epoch" in name for name in names) and not any("step" in name or "iter" in name for name in names)
    return "epoch" if in_epochs else "step"


_WITH_FUSED = ("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD")
"""Optimizers that update all parameters in one CUDA kernel on request (torch 2.11 to 2.13; Adagrad only on the CPU)."""


def settle_fused(config: dict[str, Any]) -> None:
    """Set `optimizer.fused` to auto for an optimizer of torch that can be fused, unless the config chooses a kernel.

    A frozen config without the key is from an older version, and keeps torch's default.
    """
    node = config.get("optimizer")
    if not isinstance(node, dict) or node.get("_target_") not in _WITH_FUSED:
        return
    if not {"fused", "foreach", "differentiable", "_args_", "_partial_"} & node.keys():
        node["fused"] = "auto"


def is_plateau(node: dict[str, Any]) -> bool:
    """Return whether the scheduler is a ReduceLROnPlateau, which follows a metric."""
    return str(node.get("_target_")).rpartition(".")[2] == _PLATEAU


def problems_of_schedule(config: dict[str, Any]) -> Iterator[UserError]:
    """Yield values of `scheduler` that Lightning would silently accept, or refuse in the ranks."""
    node = config.get("scheduler") or {}
    if not node.get("_target_"):
        if any(value is not None for value in node.values()):
            fix = "choose one with scheduler=NAME, or set scheduler._target_=torch.optim.lr_scheduler.StepLR"
            yield UserError(f"scheduler has {', '.join(node)} but no _target_: it would have no effect", fix)
        return
    interval, frequency = node.get("interval"), node.get("frequency")
    if interval is not None and interval not in INTERVALS:
        fix = "write scheduler.interval=epoch or scheduler.interval=step"
        yield UserError(f"scheduler.interval={interval}: invalid choice", fix)
    if frequency is not None and (not isinstance(frequency, int) or isinstance(frequency, bool) or frequency < 1):
        fix = "write scheduler.frequency=1"
        yield UserError(f"scheduler.frequency={frequency}: expected an integer of at least 1", fix)
    for key in ("_partial_", "scheduler"):
        if node.get(key):
            fix = f"remove scheduler.{key}: the trainer calls the class with the optimizer"
            yield UserError(f"scheduler.{key}: not allowed in this section", fix)
    options = config["trainer"]
    only_max_time = (
        ":" in str(options.get("max_time")) and options.get("max_steps") is None and options.get("max_epochs") is None
    )
    # A LightningModule may have its own optimizer and scheduler, and ignore this section.
    only_max_time = only_max_time and str(config["model"].get("_target_")).startswith("trainer.models.")
    lengths = [name for name in FILLED if name in node and node[name] is None] or [
        name for path, name in _NEED_LENGTH.items() if path == node["_target_"] and node.get(name) is None
    ]
    if only_max_time and lengths and not ("epochs" in node and "steps_per_epoch" in node):
        fix = (
            f"also set trainer.max_epochs=10 or trainer.max_steps=N, or set scheduler.{lengths[0]}=N; "
            "scheduler=constant needs no length"
        )
        yield UserError(f"{node['_target_']} needs the length of the training, but only max_time limits it", fix)
    validates = config["trainer"].get("limit_val_batches") != 0
    if is_plateau(node) and not validates and node.get("monitor") is None:
        fix = "write scheduler.monitor=METRIC with a metric that the training logs"
        yield UserError("scheduler.monitor is missing: there is no validation that logs a metric to follow", fix)


def problems_of_optimizer(config: dict[str, Any]) -> Iterator[UserError]:
    """Yield combinations that the optimizer does not support."""
    node = config.get("optimizer") or {}
    switch, decay = node.get("no_decay_norm_bias"), node.get("decay")
    wrong = _DECAY.problem("optimizer.decay", decay) if decay is not None else None
    if wrong is not None:
        yield wrong
    elif decay is not None and switch:
        fix = "keep one: with optimizer.decay=matrices norms and biases have no weight decay, either"
        yield UserError(f"optimizer.decay={decay} and optimizer.no_decay_norm_bias=true exclude each other", fix)
    if switch is not None and not isinstance(switch, bool):
        yield not_a_boolean("optimizer.no_decay_norm_bias", switch)
    if str(node.get("_target_")).rpartition(".")[2] != "LBFGS":
        return
    if config["trainer"]["precision"] == "16-mixed":
        fix = "use trainer.precision=bf16-mixed or trainer.precision=32-true"
        yield UserError(
            "LBFGS evaluates the loss several times per step, which a gradient scaler does not support", fix
        )
    if switch:
        fix = "use optimizer.no_decay_norm_bias=false"
        yield UserError("optimizer.no_decay_norm_bias: LBFGS has no weight decay and only one parameter group", fix)

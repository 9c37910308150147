"""When a scheduler of the configuration steps: after each epoch as torch's own are meant, or each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.core.errors import UserError

READ_BY_TRAINER = ("interval", "frequency", "monitor", "strict", "name")
"""Keys of `scheduler` that mean what they mean in Lightning's `lr_scheduler` dictionary; handed to the target only
where its signature names them."""
FILLED = ("total_steps", "num_training_steps", "T_max", "total_iters", "max_iters", "max_epochs")
"""Arguments that are the length of the training: null, or left out where the target has no default, they are filled."""
INTERVALS = ("step", "epoch")
_TORCHS = "torch.optim.lr_scheduler."
_BY_STEP = ("OneCycleLR", "CyclicLR")
_PLATEAU = "ReduceLROnPlateau"
_OURS = ("cosine", "linear", "polynomial", "warmup_stable_decay")
_NEED_LENGTH = {
    **{f"trainer.schedules.{name}": "total_steps" for name in _OURS},
    f"{_TORCHS}OneCycleLR": "total_steps",
    f"{_TORCHS}CosineAnnealingLR": "T_max",
}
"""Target to the argument that is filled although it is left out."""


def settle_interval(config: dict[str, Any]) -> None:
    """Write `scheduler.interval` where it is left to the class. A frozen job without it is from before there was one:
    it steps with the optimizer."""
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


def is_plateau(node: dict[str, Any]) -> bool:
    """Whether it follows a metric."""
    return str(node.get("_target_")).rpartition(".")[2] == _PLATEAU


def problems_of_schedule(config: dict[str, Any]) -> Iterator[UserError]:
    """Values that Lightning would take silently, or refuse in the ranks."""
    node = config.get("scheduler") or {}
    if not node.get("_target_"):
        if any(value is not None for value in node.values()):
            fix = "choose one with scheduler=NAME, or set scheduler._target_=torch.optim.lr_scheduler.StepLR"
            yield UserError(f"scheduler has {', '.join(node)} and no _target_: nothing would be scheduled", fix)
        return
    interval, frequency = node.get("interval"), node.get("frequency")
    if interval is not None and interval not in INTERVALS:
        fix = "write scheduler.interval=epoch or scheduler.interval=step"
        yield UserError(f"scheduler.interval={interval}: there is no such interval", fix)
    if frequency is not None and (not isinstance(frequency, int) or isinstance(frequency, bool) or frequency < 1):
        yield UserError(
            f"scheduler.frequency={frequency}: expected an integer from 1 on", "write scheduler.frequency=1"
        )
    for key in ("_partial_", "scheduler"):
        if node.get(key):
            fix = f"leave scheduler.{key} out; the trainer calls the class with the optimizer"
            yield UserError(f"scheduler.{key}: not in this section", fix)
    options = config["trainer"]
    endless = (
        ":" in str(options.get("max_time")) and options.get("max_steps") is None and options.get("max_epochs") is None
    )
    # A LightningModule may have an optimizer and a schedule of its own, to which this section is nothing.
    endless = endless and str(config["model"].get("_target_")).startswith("trainer.models.")
    open_ended = [name for name in FILLED if name in node and node[name] is None] or [
        name for path, name in _NEED_LENGTH.items() if path == node["_target_"] and node.get(name) is None
    ]
    if endless and open_ended and not ("epochs" in node and "steps_per_epoch" in node):
        fix = (
            f"write trainer.max_epochs=10 or trainer.max_steps=N beside it, or scheduler.{open_ended[0]}=N; "
            "scheduler=constant needs no length"
        )
        yield UserError(f"{node['_target_']} needs the length of the training, and only max_time ends it", fix)
    validates = config["trainer"].get("limit_val_batches") != 0
    if is_plateau(node) and not validates and node.get("monitor") is None:
        fix = "write scheduler.monitor=METRIC, one that the training logs"
        yield UserError("scheduler.monitor is missing: there is no validation whose metric could be followed", fix)


def problems_of_optimizer(config: dict[str, Any]) -> Iterator[UserError]:
    """What an optimizer cannot do with the rest of the job."""
    node = config.get("optimizer") or {}
    switch = node.get("no_decay_norm_bias")
    if switch is not None and not isinstance(switch, bool):
        fix = "write optimizer.no_decay_norm_bias=true"
        yield UserError(f"optimizer.no_decay_norm_bias={switch}: expected true or false", fix)
    if str(node.get("_target_")).rpartition(".")[2] != "LBFGS":
        return
    strategy, precision = config["strategy"]["name"], config["trainer"]["precision"]
    if strategy not in ("single", "ddp", "auto"):
        yield UserError(f"LBFGS needs whole parameters, and strategy={strategy} shards them", "use strategy=ddp")
    if precision == "16-mixed":
        fix = "use trainer.precision=bf16-mixed or trainer.precision=32-true"
        yield UserError("LBFGS evaluates the loss several times a step, which a gradient scaler cannot follow", fix)
    if switch:
        fix = "use optimizer.no_decay_norm_bias=false"
        yield UserError("optimizer.no_decay_norm_bias: LBFGS has no weight decay and takes one parameter group", fix)

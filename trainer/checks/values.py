"""Check the values of arguments of targets: numbers that this project's classes and torch's optimizers refuse.

They would refuse them too, but only in the ranks, after the queue. Arguments of other classes are theirs to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.limits import AtLeast, Limit, MoreThan, Share
from trainer.config.problems import as_written
from trainer.core.errors import UserError

_READ_OF_DATA = {"batch_size": AtLeast(1), "micro_batch": AtLeast(1), "num_workers": AtLeast(0)}
"""Limits of the keys of `data` that the trainer itself reads, whatever the class."""
_EXAMPLES = {"max_bytes": 2**30, "max_pixels": 10**8}
_WHOLE = {*_READ_OF_DATA, "max_bytes", "max_pixels", "max_bad"}
"""Keys whose values must be integers; the types of others are in the signature of the class."""
_SIZE, _COUNT, _PART = AtLeast(1), AtLeast(0), Share()
_OPTIMIZERS = ("torch.optim.", "trainer.optimizers.")
_OF_OPTIMIZERS: dict[str, Limit] = dict.fromkeys(("lr", "weight_decay", "momentum", "eps", "alpha", "rho"), _COUNT)
LIMITS: dict[tuple[str, str], dict[str, Limit]] = {
    ("data", "trainer.data."): {
        **dict.fromkeys(("max_bytes", "max_pixels", "sequence_length", "vocab_size", "shuffle_shards"), _SIZE),
        **dict.fromkeys(("size", "side", "rate", "mels", "train_samples"), _SIZE),
        **dict.fromkeys(("max_bad", "crop_padding"), _COUNT),
        **dict.fromkeys(("cache_gb", "seconds"), MoreThan(0)),
        "held_out": _PART,
    },
    ("model", "trainer.models."): {
        **dict.fromkeys(("dim", "layers", "heads", "kv_heads", "ffn_dim", "patch", "width", "hidden"), _SIZE),
        **dict.fromkeys(("vocab_size", "sequence_length", "num_classes"), _SIZE),
        "dropout": _PART,
    },
    **{("optimizer", prefix): _OF_OPTIMIZERS for prefix in _OPTIMIZERS},
    ("scheduler", "trainer.schedules."): {"warmup_steps": _COUNT, "min_ratio": _COUNT},
}
"""Section and beginning of a target to the limits of its arguments."""


def problems_of_values(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Yield the values that a target cannot take; null is checked by type only."""
    yield from _of_data(config["data"])
    for (section, prefix), limits in LIMITS.items():
        node = config.get(section)
        if not isinstance(node, Mapping) or not str(node.get("_target_")).startswith(prefix):
            continue
        for key, limit in limits.items():
            value = node.get(key)
            if key not in _WHOLE and _is_number(value) and (problem := limit.problem(f"{section}.{key}", value)):
                yield problem
    yield from _divisible(config.get("model"))
    yield from _betas(config.get("optimizer"))


def _of_data(node: Mapping[str, Any]) -> Iterator[UserError]:
    """Yield the problems of values that must be integers."""
    is_own = str(node.get("_target_")).startswith("trainer.data.")
    limits = {**_READ_OF_DATA, **(LIMITS["data", "trainer.data."] if is_own else {})}
    for key in (key for key in limits if key in _WHOLE):
        value = node.get(key)
        if value is None:
            continue
        if key == "micro_batch" and value == "auto":  # `trainer fit` has replaced it (cli/job.py)
            yield UserError("data.micro_batch=auto: only a new run can look for it", "use trainer fit, or a number")
        elif not isinstance(value, int) or isinstance(value, bool):
            fix = f"write data.{key}={_EXAMPLES.get(key, 32)}" + (" or auto" if key == "micro_batch" else "")
            yield UserError(f"data.{key}={as_written(value)}: expected an integer", fix)
        elif problem := limits[key].problem(f"data.{key}", value):
            yield problem


def _divisible(node: Any) -> Iterator[UserError]:
    """Yield the problem of attention heads that do not share the features, or the queries, evenly."""
    if not isinstance(node, Mapping) or not str(node.get("_target_")).startswith("trainer.models."):
        return
    for whole, part in (("dim", "heads"), ("heads", "kv_heads")):
        value, divisor = node.get(whole), node.get(part)
        if type(value) is int and type(divisor) is int and value > 0 and divisor > 0 and value % divisor:
            problem = f"model.{whole}={value} is not a multiple of model.{part}={divisor}"
            yield UserError(problem, f"change one of them, such as model.{whole}={-(-value // divisor) * divisor}")


def _betas(node: Any) -> Iterator[UserError]:
    """Yield the problem of `betas`, which are two numbers from 0 to below 1 in every optimizer that has them."""
    if not isinstance(node, Mapping) or not str(node.get("_target_")).startswith(_OPTIMIZERS):
        return
    betas = node.get("betas")
    if betas is None or isinstance(betas, str):  # a text is a problem of its type
        return
    is_pair = isinstance(betas, list) and len(betas) == 2
    if not is_pair or not all(_is_number(one) and 0 <= one < 1 for one in betas):
        problem = f"optimizer.betas={as_written(betas)}: expected two numbers from 0 to below 1"
        yield UserError(problem, "write optimizer.betas=[0.9,0.999]")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

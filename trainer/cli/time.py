"""`trainer time`: measure the steps of a job, here or as a short job on the cluster."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
from contextlib import redirect_stdout
from typing import Any

from trainer.cli.deep import names_data
from trainer.cli.job import Job, check_all
from trainer.cli.launching import launch
from trainer.cli.overrides import compose_all, overrides_parser
from trainer.cli.time_report import keep, lines, planned, report_of, what_fits
from trainer.core.errors import DONE, UserError
from trainer.plan.timing import Timed, duration_of, timed
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import reference_to

_DESCRIPTION = (
    "Measure the optimizer steps of a job instead of planning them: train for a few steps, on this machine or as a "
    "short job on the cluster, and print the time of a step, the speed, and how many steps and epochs fit in a time or "
    "a budget. Later plans on the same hardware are calibrated by what was measured."
)
_CLUSTER_TIME = "0:20:00"
"""Time limit of the short job on a cluster."""


def main(argv: list[str]) -> int:
    """Run `trainer time`; returns the exit code of the short job."""
    arguments = _parse(argv)
    composed = compose_all(arguments)
    if len(composed) != 1:
        raise UserError("trainer time: a sweep", "measure one job at a time, without -m")
    original = copy.deepcopy(composed[0].config)
    _shorten(composed[0].config, arguments.warmup, arguments.steps)
    (job,) = check_all(composed)
    budget = _budget(arguments, job)
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        code, run = launch(job, arguments)
    if code != DONE:
        return code
    found = timed(run.timings())
    plan, around = planned(job, run, original, names_data(composed[0].overrides), found.device)
    report = report_of(found, plan, run, job)
    report["kept"] = keep(found, plan, around, run)
    report["fits"] = what_fits(found, _limits(arguments, budget, found, job.config["cluster"].get("currency")))
    if not arguments.keep:
        _remove(run)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(lines(report)))
    return DONE


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = overrides_parser(
        "time",
        _DESCRIPTION,
        "trainer time experiment=quickstart --steps 50",
        "trainer time experiment=text_transformer --for 8h",
        "trainer time cluster=my_site resources.gpus=16 --budget 500",
        sweeps=False,
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps to measure (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)")
    parser.add_argument("--for", dest="duration", metavar="DURATION", help="print what fits in this time, such as 8h")
    parser.add_argument(
        "--budget", type=float, metavar="AMOUNT", help="print what fits in this amount of cluster.currency, such as 500"
    )
    parser.add_argument("--keep", action="store_true", help="keep the run directory of the short job")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    arguments: argparse.Namespace = parser.parse_intermixed_args(argv)
    arguments.follow, arguments.detach = True, False
    for option, least in (("steps", 1), ("warmup", 1)):
        if getattr(arguments, option) < least:
            raise UserError(f"--{option} {getattr(arguments, option)}: too few", f"write --{option} {least} or more")
    if arguments.duration is not None:
        duration_of(arguments.duration, "--for")  # refused before anything is trained
    return arguments


def _budget(arguments: argparse.Namespace, job: Job) -> tuple[float, float] | None:
    """Return the budget and the price of a device or core hour; None: no budget.

    Raises:
        UserError: There is no price.
    """
    if arguments.budget is None:
        return None
    if not 0 < arguments.budget < math.inf:
        raise UserError(f"--budget {arguments.budget:g}: not an amount", "write the amount, such as --budget 500")
    key = "price_per_gpu_hour" if job.shape.device == "cuda" else "price_per_cpu_core_hour"
    price = job.config["cluster"].get(key)
    if not price:
        raise UserError("--budget needs a price", f"set cluster.{key}=2.50")
    return arguments.budget, price


def _shorten(config: dict[str, Any], warmup: int, steps: int) -> None:
    """Make a job that trains for a few steps and then saves once, without validation and trackers."""
    config["name"] = f"{config['name']}-time"
    config["trainer"] |= {
        "max_steps": warmup + steps,
        "max_epochs": None,
        "max_time": None,
        "min_steps": None,
        "min_epochs": None,
        "limit_val_batches": 0,
        "val_check_interval": None,
        "num_sanity_val_steps": 0,
        "profiler": None,
    }
    # Without validation nothing logs the metric that the best checkpoint is chosen by.
    config["checkpoint"] |= {"every_n_steps": None, "every_minutes": None, "save_best": False, "keep_best": 0}
    config["checkpoint"]["monitor"] = None
    config["checkpoint"] |= {"local_dir": None, "local_every_n_steps": None}
    config["tracking"]["name"], config["logger"] = "none", {}
    callbacks = {name: node for name, node in config["callbacks"].items() if name != "early_stopping"}
    target = "trainer.callbacks.step_times.StepTimes"
    config["callbacks"] = {**callbacks, "step_times": {"_target_": target, "warmup": warmup, "steps": steps}}
    if config["cluster"]["name"] == "slurm" and config["cluster"]["time"] is None:
        config["cluster"]["time"] = _CLUSTER_TIME


def _limits(
    arguments: argparse.Namespace, budget: tuple[float, float] | None, found: Timed, currency: str | None
) -> dict[str, float]:
    """Return the seconds that the options of the command line grant, by their names."""
    limits = {}
    if arguments.duration is not None:
        limits[f"in {arguments.duration}"] = duration_of(arguments.duration, "--for")
    if budget is not None:
        limits[f"for {budget[0]:g} {currency or ''}".rstrip()] = budget[0] / budget[1] / found.units * 3600
    return limits


def _remove(run: RunDirectory) -> None:
    """Delete the run of the short job; renamed first, so that an interrupted deletion leaves no partial run."""
    doomed = run.path.with_name(f".deleting-{run.path.name}")
    try:
        os.rename(run.path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        print(f"{reference_to(run)} was not deleted: {error.strerror}", file=sys.stderr)

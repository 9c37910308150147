"""`trainer plan`: memory, time, cost and energy of a job, and what would fit instead."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.checks.config import check
from trainer.cli.auto import settle_auto
from trainer.cli.deep import names_data
from trainer.cli.initial import settle_micro_batch
from trainer.cli.overrides import compose_all, overrides_parser
from trainer.cli.plan_text import alternatives_table, lines, winners
from trainer.cli.planning import SIMULATED, on_one_machine, planned_device, planned_shape, plans, variant_of
from trainer.core.errors import DONE, USER_MUST_CHANGE, UserError
from trainer.hardware.catalogue import Device
from trainer.launch import launchers
from trainer.plan.answer import Plan
from trainer.plan.job import Variant, on_nodes
from trainer.plan.outlook import look_around, with_forecasts
from trainer.plan.storage import space

_DESCRIPTION = (
    "Plan a job without its GPUs: the peak memory of each rank by part, the time of a step and of the whole training, "
    "SLURM jobs, checkpoints, energy and cost; and the strategies, micro-batches and kinds of activation checkpointing "
    "that would also fit at the same global batch. Exit code 2 if the job does not fit. The transformer that comes "
    "with trainer is planned by formula, any other module by simulating a step on fake tensors."
)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = overrides_parser(
        "plan",
        _DESCRIPTION,
        "trainer plan model=llama3_8b strategy=fsdp resources.gpus=8 --gpu 'NVIDIA A40'",
        sweeps=False,
    )
    parser.add_argument("--gpu", metavar="NAME", help="device to plan for, as torch.cuda.get_device_name names it")
    parser.add_argument(
        "--network",
        type=float,
        metavar="GB/s",
        help="speed of the network for each GPU while all of a node use it (default: assumed by the age of the GPU)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "formula", "simulation"),
        default="auto",
        help="how to plan memory: by formula, by simulation, or auto: by formula where there is one (default: auto)",
    )
    parser.add_argument(
        "--search",
        metavar="nodes=A..B",
        help="also plan these numbers of nodes, at the same global batch, and name the fastest and the cheapest",
    )
    parser.add_argument(
        "--alternatives",
        type=int,
        default=SIMULATED,
        metavar="N",
        help=f"number of alternatives to simulate, which takes seconds for each (default: {SIMULATED})",
    )
    parser.add_argument("--by", choices=("time", "cost"), default="time", help="order of the table (default: time)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: job, alternatives, device")
    arguments: argparse.Namespace = parser.parse_intermixed_args(argv)
    if arguments.network is not None and not 0 < arguments.network < math.inf:
        raise UserError(
            f"--network {arguments.network:g}: not a speed", "write GB/s for each GPU, such as --network 40"
        )
    if arguments.alternatives < 0:
        raise UserError(f"--alternatives {arguments.alternatives}: too few", "write --alternatives 0 or more")
    return arguments


def main(argv: list[str]) -> int:
    """Run `trainer plan`; returns 2 if the job does not fit."""
    arguments = _parse(argv)
    composed = compose_all(arguments)
    if len(composed) != 1:
        raise UserError("trainer plan: a sweep", "plan one job at a time, without -m")
    overrides, config = composed[0].overrides, composed[0].config
    settle_micro_batch(config)
    with_data = names_data(overrides)
    known = planned_device(arguments.gpu, config)
    shape = planned_shape(config, known)
    for line in settle_auto(config, shape, known if shape.device == "cuda" else None):
        print(f"note: {line}", file=sys.stderr)
    check(on_one_machine(config, shape), fits=with_data)
    job = variant_of(config, shape, known)
    known = known if job.device == "cuda" else None
    capacity = None if known is None else known.memory_bytes
    batch_size = config["data"].get("batch_size")
    nodes = searched_nodes(arguments.search) if arguments.search else range(job.nodes, job.nodes + 1)
    found = on_nodes(job, batch_size, nodes)
    if not found:
        raise UserError(
            f"--search {arguments.search}: {none_divides(batch_size, job)}", "search other numbers of nodes"
        )
    others = [one for one in found if one != job]
    engine = arguments.engine
    plan, *rest = plans(config, with_data, [job, *others], capacity, engine, simulated=arguments.alternatives)
    if plan.peak is None:
        raise UserError(f"trainer plan: {plan.reason}", "trainer fit with trainer.find_micro_batch=true measures it")
    network = arguments.network * 1e9 if arguments.network else None
    around = look_around(config, known, job.ranks_of_node, launchers.time_limit_s(config), network)
    plan, *rest = with_forecasts([plan, *rest], around)
    rest = ranked(rest, arguments.by)
    if arguments.json:
        _print_json(plan, rest, known)
    else:
        print("\n".join(lines(plan, known, config, space(Path(config["runs_dir"])))))
        if table := alternatives_table(rest, arguments.by):
            print(f"\n{table}")
        if arguments.search:
            print("\n" + "\n".join(winners([plan, *rest])))
    if plan.fits is not False:
        return DONE
    fitting = [one for one in rest if one.fits]
    nearest = min(fitting, key=lambda one: one.variant.other_nodes, default=None)
    advice = f"the nearest that fits: {nearest.variant.overrides}" if nearest else "nothing in the table fits"
    print(f"trainer: does not fit\n  {advice}", file=sys.stderr)
    return USER_MUST_CHANGE


def searched_nodes(text: str) -> range:
    """Return the numbers of nodes of `--search nodes=1..64`.

    Raises:
        UserError: It is written otherwise.
    """
    match = re.fullmatch(r"nodes=(\d{1,5})(?:\.\.(\d{1,5}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--search {text}: not numbers of nodes", "write --search nodes=1..64")
    return range(first, last + 1)


def none_divides(batch_size: int | None, job: Variant) -> str:
    """Return why no other number of nodes has a plan."""
    if batch_size is None:
        return "the module's own loaders set the batch, so other numbers of nodes change the global batch"
    each = f"{job.ranks_of_node} rank{'s' * (job.ranks_of_node > 1)}"
    return f"the global batch of {batch_size} cannot be divided among them, with {each} each"


def ranked(rest: Sequence[Plan], by: str = "time") -> list[Plan]:
    """Return the alternatives: those that fit first, then by the time of a step or by device time, where all are known.

    At one price, the cost of a step is proportional to the time of all devices.
    """
    known = [one for one in rest if one.peak is not None]
    is_timed = all(one.forecast is not None for one in known)

    def order(one: Plan) -> tuple[object, ...]:
        time: tuple[float, ...] = ()
        if is_timed and one.forecast is not None:
            both = one.forecast.step_s, one.forecast.step_s * one.variant.world_size
            time = both if by == "time" else both[::-1]
        return one.fits is not True, one.peak is None, *time, *one.variant.order()

    return sorted(rest, key=order)


def _print_json(plan: Plan, rest: Sequence[Plan], known: Device | None) -> None:
    answer = {
        "job": plan.as_dict(),
        "alternatives": [one.as_dict() for one in rest],
        "device": None if known is None else asdict(known),
    }
    json.dump(answer, sys.stdout, indent=1)
    sys.stdout.write("\n")

"""`trainer plan`: memory, time, cost and energy of a job, and what would fit instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.checks.config import check
from trainer.cli.deep import names_data
from trainer.cli.initial import settle_micro_batch
from trainer.cli.overrides import compose_all, overrides_parser
from trainer.cli.plan_text import alternatives_table, lines
from trainer.cli.planning import on_one_machine, planned_device, planned_shape, plans, variant_of
from trainer.core.errors import DONE, USER_MUST_CHANGE, UserError
from trainer.hardware.catalogue import Device
from trainer.launch import launchers
from trainer.plan.answer import Plan
from trainer.plan.job import alternatives
from trainer.plan.outlook import look_around, with_forecast
from trainer.plan.storage import space

_DESCRIPTION = (
    "Plan a job on GPUs that need not be here: the peak of memory on each rank and what it consists of, the time of a "
    "step and of the whole training, allocations, checkpoints, energy and cost; and the strategies, micro-batches and "
    "kinds of activation checkpointing that would fit instead at the same global batch. Exit code 2: the job does not "
    "fit. Our own decoder is planned in closed form, any other module by simulating a step without values."
)


def main(argv: list[str]) -> int:
    """Run `trainer plan`; returns 2 if the job does not fit."""
    parser = overrides_parser(
        "plan",
        _DESCRIPTION,
        "trainer plan model=llama3_8b strategy=fsdp resources.gpus=8 --gpu 'NVIDIA A40'",
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
        help="closed form, simulated step, or the closed form where there is one (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: job, alternatives, device")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.network is not None and not arguments.network > 0:
        raise UserError(
            f"--network {arguments.network:g}: not a speed", "write GB/s for each GPU, such as --network 40"
        )
    composed = compose_all(arguments)
    if len(composed) != 1:
        raise UserError("trainer plan: a sweep", "plan one job at a time, without -m")
    overrides, config = composed[0].overrides, composed[0].config
    settle_micro_batch(config)
    with_data = names_data(overrides)
    known = planned_device(arguments.gpu, config)
    shape = planned_shape(config, known)
    check(on_one_machine(config, shape), fits=with_data)
    job = variant_of(config, shape, known)
    known = known if job.device == "cuda" else None
    capacity = None if known is None else known.memory_bytes
    others = alternatives(job, config["data"].get("batch_size"))
    plan, *rest = plans(config, with_data, [job, *others], capacity, arguments.engine)
    if plan.peak is None:
        raise UserError(f"trainer plan: {plan.reason}", "trainer fit with trainer.find_micro_batch=true measures it")
    network = arguments.network * 1e9 if arguments.network else None
    around = look_around(config, known, job.ranks_of_node, launchers.time_limit_s(config), network)
    plan, *rest = (with_forecast(one, around) for one in (plan, *rest))
    rest = ranked(rest)
    if arguments.json:
        _print_json(plan, rest, known)
    else:
        print("\n".join(lines(plan, known, config, space(Path(config["runs_dir"])))))
        if table := alternatives_table(rest):
            print(f"\n{table}")
    if plan.fits is not False:
        return DONE
    nearest = next((one for one in rest if one.fits), None)
    advice = f"the nearest that fits: {nearest.variant.overrides}" if nearest else "nothing in the table fits"
    print(f"trainer: does not fit\n  {advice}", file=sys.stderr)
    return USER_MUST_CHANGE


def ranked(rest: Sequence[Plan]) -> list[Plan]:
    """Return the alternatives: those that fit first, then by time where all times are known."""
    known = [one for one in rest if one.peak is not None]
    by_time = all(one.forecast is not None for one in known)

    def order(one: Plan) -> tuple[object, ...]:
        time = (one.forecast.step_s,) if by_time and one.forecast is not None else ()
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

"""`trainer plan`: the memory that a job will need on each rank, and what would fit instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer.checks.config import check
from trainer.cli.child import ask
from trainer.cli.common import table
from trainer.cli.deep import names_data
from trainer.cli.initial import settle_micro_batch
from trainer.cli.overrides import compose_all, overrides_parser
from trainer.config.batch import BatchPlan
from trainer.config.shape import LaunchShape, resolve
from trainer.config.strategy import STRATEGIES, ranks_per_sample
from trainer.core.errors import DONE, USER_MUST_CHANGE, UserError
from trainer.core.gpus import inventory
from trainer.hardware.catalogue import Device, device, names
from trainer.plan.answer import ALLOWANCE_ERROR, ERRORS, Plan, of_estimate, of_simulation
from trainer.plan.closed_form import NoFormula
from trainer.plan.job import Variant, alternatives, by_formula
from trainer.plan.parts import PARTS
from trainer.supervise import entry

_DESCRIPTION = (
    "Plan the memory of a job on GPUs that need not be here: the peak on each rank and what it consists of, and the "
    "strategies, micro-batches and kinds of activation checkpointing that would fit instead at the same global batch. "
    "Exit code 2: the job does not fit. Our own decoder is planned in closed form, any other module by simulating a "
    "step without values."
)
_ROWS = 12
"""Alternatives that are printed."""
_SIMULATED = 24
"""Most alternatives that are simulated: each takes seconds."""
_TIMEOUT_S = 1800.0


def main(argv: list[str]) -> int:
    """Run `trainer plan`; returns 2 if the job does not fit."""
    parser = overrides_parser(
        "plan",
        _DESCRIPTION,
        "trainer plan model=llama3_8b strategy=fsdp resources.gpus=8 --gpu 'NVIDIA A40'",
    )
    parser.add_argument("--gpu", metavar="NAME", help="device to plan for, as torch.cuda.get_device_name names it")
    parser.add_argument(
        "--engine",
        choices=("auto", "formula", "simulation"),
        default="auto",
        help="closed form, simulated step, or the closed form where there is one (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: job, alternatives, device")
    arguments = parser.parse_intermixed_args(argv)
    composed = compose_all(arguments)
    if len(composed) != 1:
        raise UserError("trainer plan: a sweep", "plan one job at a time, without -m")
    overrides, config = composed[0].overrides, composed[0].config
    settle_micro_batch(config)
    with_data = names_data(overrides)
    known = _device(arguments.gpu, config)
    shape = _shape(config, known)
    check(_on_one_machine(config, shape), fits=with_data)
    job = _variant(config, shape, known)
    capacity = None if known is None or job.device == "cpu" else known.memory_bytes
    others = alternatives(job, config["data"].get("batch_size"))
    plan, *rest = _plans(config, with_data, [job, *others], capacity, arguments.engine)
    if plan.peak is None:
        raise UserError(f"trainer plan: {plan.reason}", "trainer fit with trainer.find_micro_batch=true measures it")
    fitting = [one for one in rest if one.fits is not False and one.peak is not None]
    rest = sorted(rest, key=lambda one: (one.fits is not True, one.variant.order()))
    if arguments.json:
        answer = {
            "job": plan.as_dict(),
            "alternatives": [one.as_dict() for one in rest],
            "device": None if known is None or job.device == "cpu" else asdict(known),
        }
        json.dump(answer, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _print(plan, rest, known)
    if plan.fits is not False:
        return DONE
    nearest = next((one for one in rest if one in fitting and one.fits), None)
    advice = f"the nearest that fits: {nearest.variant.overrides}" if nearest else "nothing in the table fits"
    print(f"trainer: does not fit\n  {advice}", file=sys.stderr)
    return USER_MUST_CHANGE


def _device(name: str | None, config: dict[str, Any]) -> Device | None:
    """Return the named device, or that of this machine's GPUs; None: the job is planned for CPU ranks."""
    if name is not None:
        return device(name)
    if config["resources"].get("gpus") == 0:
        return None
    here = inventory().gpus
    if here and here[0].name in names():
        return device(here[0].name)
    if here:
        raise UserError(f"the hardware catalogue does not have {here[0].name}", f"--gpu NAME: {', '.join(names())}")
    if config["resources"].get("gpus") or config["resources"].get("gpus_per_node"):
        raise UserError("this machine has no GPU to plan for", f"name one: --gpu NAME, of {', '.join(names())}")
    return None


def _shape(config: dict[str, Any], known: Device | None) -> LaunchShape:
    """Return the launch shape; the GPUs of a named device need not be on this machine."""
    resources = dict(config["resources"])
    if known is not None:
        if not resources.get("gpus") and not resources.get("gpus_per_node"):
            resources["gpus"] = resources.get("nodes") or 1
        return resolve({**config, "resources": resources, "cluster": {**config["cluster"], "name": "planned"}})
    return resolve({**config, "resources": {**resources, "gpus": 0}})


def _on_one_machine(config: dict[str, Any], shape: LaunchShape) -> dict[str, Any]:
    """Return the job with as many CPU ranks: what is checked must not depend on the GPUs of this machine."""
    ranks = {"nodes": 1, "gpus": 0, "gpus_per_node": None, "cpu_processes": shape.world_size, "devices": None}
    return {**config, "resources": {**config["resources"], **ranks}}


def _variant(config: dict[str, Any], shape: LaunchShape, known: Device | None) -> Variant:
    strategy = dict(config["strategy"])
    if strategy["name"] == "auto" or (strategy["name"] == "ddp" and shape.world_size == 1):
        name = "single" if shape.world_size == 1 else "fsdp" if shape.device == "cuda" else "ddp"
        kept = {key: value for key, value in strategy.items() if key in vars(STRATEGIES["single"]())}
        strategy = {**vars(STRATEGIES[name]()), **kept, "name": name}
    readers = shape.world_size // ranks_per_sample(strategy, shape.processes_per_node)
    data, accumulate = config["data"], config["trainer"]["accumulate_grad_batches"]
    batch = (data.get("micro_batch") or 1, accumulate or 1)
    if data.get("batch_size") is not None:
        split = BatchPlan.of(data["batch_size"], data.get("micro_batch"), readers, accumulate)
        batch = (split.micro_batch, split.accumulate)
    precision = config["trainer"]["precision"]
    if precision == "auto":
        has_bf16 = known is not None and shape.device == "cuda" and "bf16" in known.peak_tflops
        precision = "bf16-mixed" if has_bf16 else "32-true"
    return Variant(strategy, *batch, shape.world_size, shape.processes_per_node, precision, shape.device)


def _plans(
    config: dict[str, Any], with_data: bool, variants: Sequence[Variant], capacity: int | None, engine: str
) -> list[Plan]:
    """Return the plan of each variant: in closed form if the job has one, else simulated in one process."""
    found: dict[int, Plan] = {}
    reasons: dict[int, str] = {}
    if engine != "simulation":
        for index, variant in enumerate(variants):
            try:
                found[index] = of_estimate(variant, by_formula(config, variant), capacity)
            except NoFormula as error:
                reasons[index] = str(error)
        if engine == "formula" and 0 in reasons:
            raise UserError(f"--engine formula: {reasons[0]}", "use --engine simulation")
    # Where the job itself has a formula, alternatives without one are left out: simulating takes seconds for each.
    left = [index for index in range(len(variants)) if index not in found] if 0 not in found else []
    left = [index for index in left if not index or index <= _SIMULATED]
    if left:
        answers = _simulate(config, with_data, [variants[index] for index in left])
        for index, answer in zip(left, answers, strict=True):
            found[index] = of_simulation(variants[index], answer, capacity)
    return [found[index] for index in sorted(found)]


def _simulate(config: dict[str, Any], with_data: bool, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    request = {"config": config, "with_data": with_data, "variants": [asdict(one) for one in variants]}
    return ask(entry.PLAN, request, _TIMEOUT_S, "the simulation", "plan a model with fewer layers")


def _print(plan: Plan, rest: Sequence[Plan], known: Device | None) -> None:
    variant = plan.variant
    assert plan.peak is not None
    assert plan.needed is not None
    assert plan.engine is not None
    error = ERRORS[plan.engine][variant.device]
    where = "forward and backward pass" if plan.where == "passes" else "update"
    on = known.name if known is not None and variant.device == "cuda" else "CPU"
    rows = [
        ("job", f"{variant.world_size} x {on}, {variant.overrides}, {variant.precision}"),
        (
            "peak",
            f"{_gib(plan.peak)} on each rank, in the {where}; {plan.engine}, error: {error}",
        ),
        *((f"  {part}", _gib(plan.parts[part])) for part in PARTS if part in plan.parts),
    ]
    if plan.allowances:
        rows.append(("allowance", f"{_gib(sum(plan.allowances.values()))}; error: {ALLOWANCE_ERROR}"))
        rows += [(f"  {name}", _gib(size)) for name, size in plan.allowances.items()]
    if plan.capacity is not None and known is not None:
        verdict = "fits" if plan.fits else "does not fit"
        rows.append(("needed", f"{_gib(plan.needed)} of {_gib(plan.capacity)}: {verdict} ({known.memory_source})"))
    rows.append(("not planned", "time, cost, energy"))
    print("\n".join(f"{title:<24}{text}" for title, text in rows))
    shown = [one for one in rest if one.peak is not None][:_ROWS]
    if not shown:
        return
    header = ("needed", "fits", "strategy", "micro-batch", "accumulate", "checkpointing")
    cells = [
        (
            _gib(one.needed or 0),
            {True: "yes", False: "no", None: "not known"}[one.fits],
            one.variant.strategy["name"],
            str(one.variant.micro_batch),
            str(one.variant.accumulate),
            one.variant.checkpointing,
        )
        for one in shown
    ]
    print("\nAt the same global batch, least recomputing and traffic first:\n" + table(cells, header))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

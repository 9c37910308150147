"""Plans of a composed job and of its alternatives, for the verbs that print or use them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trainer.cli.child import ask
from trainer.config.batch import BatchPlan
from trainer.config.shape import LaunchShape, resolve
from trainer.config.strategy import STRATEGIES, chosen_by_auto, ranks_per_sample
from trainer.core.errors import UserError
from trainer.core.gpus import inventory
from trainer.hardware.catalogue import DEVICES, Device, device, known, names, suggestion
from trainer.plan.answer import Plan, of_estimate, of_simulation
from trainer.plan.closed_form import NoFormula
from trainer.plan.job import Variant, by_formula
from trainer.plan.messages import SimulationAnswer, SimulationRequest
from trainer.supervise import entry

SIMULATED = 12
"""Most alternatives that are simulated: each takes seconds."""
TIMEOUT_S = 1800.0


def planned_device(name: str | None, config: dict[str, Any]) -> Device | None:
    """Return the named device, or that of this machine's GPUs; None: the job is planned for CPU ranks.

    Raises:
        UserError: No device is named and this machine has none to plan for, or the catalogue does not have it.
    """
    if name is not None:
        return device(name)
    if config["resources"].get("gpus") == 0:
        return None
    here = inventory().gpus
    if here and here[0].name in names():
        return device(here[0].name)
    if here:
        raise UserError(
            f"the hardware catalogue does not have {here[0].name}", f"--gpu NAME; {suggestion(here[0].name)}"
        )
    if config["resources"].get("gpus") or config["resources"].get("gpus_per_node"):
        raise UserError(
            "this machine has no GPU to plan for", f"name one: --gpu 'NVIDIA H100 80GB HBM3'; {suggestion()}"
        )
    return None


def device_of(config: dict[str, Any]) -> Device | None:
    """Return the GPU of the job: that of this machine, or on a cluster the one that `cluster.gpu_type` names.

    Where several devices of the catalogue have that type, the one with the most memory, so that nothing is refused that
    may fit.
    """
    if config["cluster"]["name"] == "local":
        here = inventory().gpus
        return known(here[0].name) if here else None
    words = re.split(r"[^a-z0-9]+", str(config["cluster"].get("gpu_type") or "").lower())
    candidates = [one for word in words for one in devices_by_word().get(word, ())]
    return max(candidates, key=lambda one: one.memory_bytes, default=None)


def devices_by_word() -> dict[str, list[Device]]:
    """Return the devices by the words of their names that tell them apart, such as h100."""
    found: dict[str, list[Device]] = {}
    for one in DEVICES.values():
        for word in set(re.split(r"[^a-z0-9]+", one.name.lower())):
            if re.fullmatch(r"(?=.*[a-z])(?=.*\d)(?!\d+gb$|hbm|sxm)\w+", word):
                found.setdefault(word, []).append(one)
    return found


def planned_shape(config: dict[str, Any], gpu: Device | None) -> LaunchShape:
    """Return the launch shape; the GPUs of a named device need not be on this machine."""
    resources = dict(config["resources"])
    if gpu is not None:
        if not resources.get("gpus") and not resources.get("gpus_per_node"):
            resources["gpus"] = resources.get("nodes") or 1
        return resolve({**config, "resources": resources, "cluster": {**config["cluster"], "name": "planned"}})
    return resolve({**config, "resources": {**resources, "gpus": 0}})


def on_one_machine(config: dict[str, Any], shape: LaunchShape) -> dict[str, Any]:
    """Return the job with as many CPU ranks: what is checked must not depend on the GPUs of this machine."""
    ranks = {"nodes": 1, "gpus": 0, "gpus_per_node": None, "cpu_processes": shape.world_size, "devices": None}
    return {**config, "resources": {**config["resources"], **ranks}}


def variant_of(config: dict[str, Any], shape: LaunchShape, gpu: Device | None) -> Variant:
    """Return the job as it is configured; `auto` is what it stands for without a plan."""
    strategy = dict(config["strategy"])
    if strategy["name"] == "auto" or (strategy["name"] == "ddp" and shape.world_size == 1):
        name = chosen_by_auto(shape.world_size, shape.device)
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
        has_bf16 = gpu is not None and shape.device == "cuda" and gpu.supports("bf16")
        precision = "bf16-mixed" if has_bf16 else "32-true"
    return Variant(
        strategy, *batch, shape.world_size, shape.processes_per_node, precision, shape.device, is_configured=True
    )


def formula_plans(
    config: dict[str, Any], variants: Sequence[Variant], capacity: int | None, skip: bool = False
) -> list[Plan]:
    """Return the plans in closed form.

    Args:
        config: The composed configuration.
        variants: What to plan.
        capacity: Memory of the device.
        skip: Leave out variants without a closed form.

    Raises:
        NoFormula: A variant has none.
    """
    found = []
    for variant in variants:
        try:
            found.append(of_estimate(variant, by_formula(config, variant), capacity))
        except NoFormula:
            if not skip:
                raise
    return found


def plans(
    config: dict[str, Any],
    with_data: bool,
    variants: Sequence[Variant],
    capacity: int | None,
    engine: str,
    *,
    simulated: int = SIMULATED,
) -> list[Plan]:
    """Return the plan of each variant, the job's first: in closed form if it has one, else simulated in one process.

    Args:
        config: The composed configuration.
        with_data: Whether to read the data.
        variants: What to plan.
        capacity: Memory of the device.
        engine: auto, formula or simulation.
        simulated: Most alternatives that are simulated.

    Raises:
        UserError: `engine` is formula, and the job has none.
    """
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
    left = [index for index in left if index <= simulated]
    if left:
        answers = _simulate(config, with_data, [variants[index] for index in left])
        for index, answer in zip(left, answers, strict=True):
            found[index] = of_simulation(variants[index], answer, capacity)
    return [found[index] for index in sorted(found)]


def _simulate(config: dict[str, Any], with_data: bool, variants: list[Variant]) -> list[SimulationAnswer]:
    return ask(
        entry.PLAN,
        SimulationRequest(config=config, with_data=with_data, variants=variants),
        SimulationAnswer,
        count=len(variants),
        timeout_s=TIMEOUT_S,
        what="the simulation",
        shorten="plan a model with fewer layers",
    )

"""The variants of a job that a plan compares, and the closed form of each. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from trainer.config.strategy import STRATEGIES, ranks_in_group, ranks_per_sample
from trainer.config.strategy_limits import has_fused
from trainer.core.errors import UserError
from trainer.plan.closed_form import Case, Estimate, NoFormula, estimate
from trainer.plan.decoder import Decoder
from trainer.plan.decoder_work import work_of
from trainer.plan.states import Layout

_LANGUAGE = "trainer.tasks.language_modelling.LanguageModelling"
_COST = {"none": 0, "selective": 1, "full": 2}
"""Order of the kinds of activation checkpointing by what they compute again."""
_TRAFFIC = {"single": 0, "ddp": 1, "hsdp": 2, "fsdp": 3, "tp": 4}
"""Order of the strategies by what they send in a step."""


@dataclass(frozen=True)
class Variant:
    """A strategy, a micro-batch and a kind of activation checkpointing, at the job's global batch."""

    strategy: dict[str, Any]
    """The section `strategy`, with `name` not `auto`."""
    micro_batch: int
    accumulate: int
    world_size: int
    ranks_of_node: int
    precision: str
    """Lightning's name, not `auto`."""
    device: str
    """cuda or cpu."""
    is_configured: bool = False
    """Whether this is the job as it is configured, not an alternative."""
    other_nodes: bool = False
    """Whether the number of nodes is not the job's."""

    @property
    def checkpointing(self) -> str:
        """Kind of activation checkpointing."""
        return str(self.strategy.get("activation_checkpointing", "none"))

    @property
    def overrides(self) -> str:
        """The overrides that choose this variant."""
        ranks = f" resources.nodes={self.nodes} resources.gpus={self.world_size}" if self.other_nodes else ""
        return (
            f"strategy={self.strategy['name']} data.micro_batch={self.micro_batch} "
            f"strategy.activation_checkpointing={self.checkpointing}"
            f"{' strategy.cpu_offload=true' if self.offloads else ''}{ranks}"
        )

    @property
    def offloads(self) -> bool:
        """Whether FSDP2 keeps shards, gradients and optimizer states in host memory."""
        return bool(self.strategy.get("cpu_offload")) and self.device == "cuda"

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.world_size // self.ranks_of_node)

    def order(self) -> tuple[bool, int, int, int]:
        """Return the key of the order: without offloading, less computed again, less sent, larger micro-batches."""
        traffic = _TRAFFIC.get(self.strategy["name"], 5)
        return self.offloads, _COST[self.checkpointing], traffic, -self.micro_batch

    def layout(self) -> Layout:
        """Return how the parameters are spread."""
        name = self.strategy["name"]
        group = ranks_in_group(self.strategy, self.world_size, self.ranks_of_node)
        shards = {"fsdp": self.world_size, "hsdp": group, "tp": self.world_size // group}.get(name, 1)
        return Layout(
            name,
            shards,
            group if name == "tp" else 1,
            self.world_size,
            bool(self.strategy.get("loss_parallel")),
            self.precision,
        )


def on_nodes(job: Variant, batch_size: int | None, nodes: Iterable[int]) -> list[Variant]:
    """Return the job and its alternatives on each of these numbers of nodes that divides its global batch.

    Args:
        job: The job as it is configured.
        batch_size: The global batch; None: only the job's own number of nodes keeps it.
        nodes: Numbers of nodes.
    """
    found: list[Variant] = []
    for count in nodes:
        world = count * job.ranks_of_node
        readers = world // ranks_per_sample(job.strategy, job.ranks_of_node)
        if count == job.nodes:
            found += [job, *alternatives(job, batch_size)]
        elif batch_size is not None and batch_size % readers == 0:
            moved = replace(job, world_size=world, is_configured=False, other_nodes=True)
            if moved.strategy["name"] == "single" or not _divides(moved):
                continue
            moved = replace(moved, micro_batch=batch_size // readers, accumulate=1)
            found += [moved, *alternatives(moved, batch_size)]
    return found


def _divides(variant: Variant) -> bool:
    try:
        ranks_in_group(variant.strategy, variant.world_size, variant.ranks_of_node)
    except UserError:
        return False
    return True


def alternatives(job: Variant, batch_size: int | None) -> list[Variant]:
    """Return other variants of the job at its global batch, in their order.

    Args:
        job: The job as it is configured.
        batch_size: The global batch; None: the module's own loaders set it, and the micro-batch is not changed.
    """
    found: dict[str, Variant] = {}
    for strategy in _strategies(job):
        readers = job.world_size // ranks_per_sample(strategy, job.ranks_of_node)
        for micro in [job.micro_batch] if batch_size is None else _micro_batches(batch_size, readers):
            accumulate = job.accumulate if batch_size is None else batch_size // (readers * micro)
            for kind in _COST:
                options = {**strategy, "activation_checkpointing": kind}
                one = replace(job, strategy=options, micro_batch=micro, accumulate=accumulate, is_configured=False)
                found[one.overrides] = one
    found.pop(job.overrides, None)
    return sorted(found.values(), key=Variant.order)


def _strategies(job: Variant) -> Iterator[dict[str, Any]]:
    yield job.strategy
    if job.world_size == 1:
        names = ["single", "fsdp"]
    else:
        several = 1 < job.ranks_of_node < job.world_size
        names = ["ddp", *(["hsdp"] if several else []), "fsdp"]
    shared = {key: job.strategy[key] for key in vars(STRATEGIES["single"]()) if key in job.strategy}
    for name in names:
        if name != job.strategy["name"]:
            yield {**vars(STRATEGIES[name]()), **shared, "name": name}
    if job.device == "cuda" and not job.offloads:
        own = job.strategy if job.strategy["name"] == "fsdp" else {**vars(STRATEGIES["fsdp"]()), **shared}
        yield {**own, "name": "fsdp", "cpu_offload": True}


def _micro_batches(batch_size: int, readers: int) -> list[int]:
    """Return a rank's share of the batch and its halves that divide it."""
    if batch_size % readers:
        return []
    share = batch_size // readers
    sizes, size = [], share
    while size:
        if share % size == 0:
            sizes.append(size)
        size //= 2
    return sizes


def case_of(config: Mapping[str, Any], variant: Variant) -> Case:
    """Return the case of the closed form.

    Raises:
        NoFormula: The job has none.
    """
    model = Decoder.of(config["model"])
    if model is None:
        raise NoFormula("the model is not our decoder, or its sizes come from the data")
    task = config["task"].get("_target_")
    if task not in (None, _LANGUAGE):
        raise NoFormula(f"the task {task} has no formula")
    reason = _other_options(config, variant.strategy)
    if reason is not None:
        raise NoFormula(reason)
    strategy = variant.strategy
    length = config["data"].get("sequence_length") if config["data"].get("_target_") else None
    return Case(
        model,
        variant.micro_batch,
        variant.layout(),
        settled_optimizer(config, variant),
        length=min(length, model.sequence_length) if length else None,
        checkpointing=variant.checkpointing,
        device=variant.device,
        accumulates=variant.accumulate > 1,
        chunked=config["task"].get("chunked_loss", True) is not False,
        prefetch=strategy.get("prefetch", 1),
        reshards=strategy.get("reshard_after_forward", True),
        reduce_bytes=2 if strategy.get("reduce_dtype") == "bfloat16" else 4,
        frozen=_frozen(model, config["finetune"]),
        offloads=variant.offloads,
    )


def by_formula(config: Mapping[str, Any], variant: Variant) -> Estimate:
    """Return the memory and the work of a variant in closed form.

    Raises:
        NoFormula: It has none.
    """
    case = case_of(config, variant)
    return replace(estimate(case), work=work_of(case))


def _other_options(config: Mapping[str, Any], strategy: Mapping[str, Any]) -> str | None:
    trainer = config["trainer"]
    if config["finetune"].get("lora_rank"):
        return "LoRA adapters have no formula"
    if trainer.get("float8") not in (None, "none"):
        return "float8 has no formula"
    if strategy.get("gradient_sync") == "step":
        return "strategy.gradient_sync=step has no formula"
    if strategy.get("param_dtype", "auto") != "auto":
        return "strategy.param_dtype has no formula"
    if strategy.get("gradient_as_bucket_view") is False:
        return "strategy.gradient_as_bucket_view=false has no formula"
    if str(strategy.get("comm_hook", "none")) != "none":
        return "strategy.comm_hook has no formula"
    return None


def settled_optimizer(config: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Return the section `optimizer` with the kernel that a rank would choose for `fused: auto`."""
    node = dict(config["optimizer"] or {})
    if node.get("fused") != "auto":
        return node
    del node["fused"]
    trainer = config["trainer"]
    clips = trainer.get("gradient_clip_norm") or trainer.get("gradient_clip_val")
    can_fuse = has_fused(node.get("_target_"), str(variant.strategy["name"]))
    if variant.device == "cuda" and can_fuse and not (variant.precision == "16-mixed" and clips):
        node["fused"] = True
    return node


def _frozen(model: Decoder, options: Mapping[str, Any]) -> frozenset[str]:
    names = [one.name for one in model.parameters()]

    def matching(patterns: Any) -> set[str]:
        return {
            name for name in names for one in patterns or () if fnmatchcase(name, one) or fnmatchcase(name, f"{one}.*")
        }

    return frozenset(matching(options.get("freeze")) - matching(options.get("train")))

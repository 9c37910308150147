"""How the samples of an optimizer step are split over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch = world_size * micro_batch * accumulate`, always."""

    global_batch: int
    """Samples of an optimizer step over all ranks."""
    micro_batch: int
    """Samples of one forward and backward pass on a rank."""
    accumulate: int
    """Passes on a rank before each optimizer step."""
    world_size: int
    """Ranks that read different samples: all of the job, but for tensor parallel."""
    whole_steps: bool = False
    """An epoch does not end with a smaller step, whatever its loader says of `drop_last`."""

    @classmethod
    def of(cls, batch_size: int, micro_batch: int | None, world_size: int, accumulate: int | None = None) -> BatchPlan:
        """Split `batch_size`; without a micro-batch each rank takes its part in one pass.

        `accumulate`: what `trainer.accumulate_grad_batches` says of the same split, where it says something.

        Raises UserError, which names the nearest batch sizes that work, where it does not divide: a global
        batch that quietly became another one would change the training.
        """
        if batch_size < 1:
            raise UserError(
                f"data.batch_size={batch_size}: an optimizer step needs at least one sample",
                f"set data.batch_size to {world_size} or more (it is shared by all {world_size} ranks)",
            )
        if micro_batch is not None and micro_batch < 1:
            raise UserError(
                f"data.micro_batch={micro_batch}: a rank needs at least one sample",
                "set data.micro_batch to 1 or more, or to null to do without accumulation",
            )
        unit = world_size * (micro_batch or 1)
        if batch_size % unit:
            raise _does_not_divide(batch_size, micro_batch, world_size)
        micro = micro_batch or batch_size // world_size
        plan = cls(batch_size, micro, batch_size // (world_size * micro), world_size)
        if accumulate is not None and accumulate != plan.accumulate:
            raise _accumulates_otherwise(plan, micro_batch, accumulate)
        return plan

    def split(self, ranks: int) -> str:
        """`4 ranks x 8 x 2 accumulated`, where `ranks` are in the job: with tensor parallel more than `world_size`."""
        plural = "" if self.world_size == 1 else "s"
        sharing = ranks // self.world_size
        who = f"rank{plural}" if sharing == 1 else f"group{plural} of {sharing} ranks"
        accumulated = f" x {self.accumulate} accumulated" if self.accumulate > 1 else ""
        return f"{self.world_size} {who} x {self.micro_batch}{accumulated}"


def _does_not_divide(batch_size: int, micro_batch: int | None, world_size: int) -> UserError:
    unit = world_size * (micro_batch or 1)
    below = batch_size // unit * unit
    nearest = [str(size) for size in (below, below + unit) if size]
    split = f"{world_size} ranks" if micro_batch is None else f"{world_size} ranks x micro_batch {micro_batch}"
    fix = f"set data.batch_size={' or data.batch_size='.join(nearest)}"
    if micro_batch is not None and batch_size % world_size == 0:
        share = batch_size // world_size
        fits = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
        fix += f", or data.micro_batch={fits}"
    return UserError(f"data.batch_size={batch_size} does not divide into {split}", fix)


def _accumulates_otherwise(plan: BatchPlan, micro_batch: int | None, accumulate: int) -> UserError:
    """Where `trainer.accumulate_grad_batches` and the keys of `data` say different things.

    Lightning's batch is a rank's own, so `data.batch_size=32` and 4 batches a step are 128 samples a rank there.
    """
    size, ranks = plan.global_batch, plan.world_size
    said = f"trainer.accumulate_grad_batches={accumulate} with data.batch_size={size}"
    if micro_batch is not None:
        return UserError(
            f"{said} and data.micro_batch={micro_batch}: on {ranks} ranks that is {plan.accumulate} batches a step",
            f"write trainer.accumulate_grad_batches={plan.accumulate}, "
            f"or data.batch_size={micro_batch * accumulate * ranks}",
        )
    lines = f"batches of {size} on each rank: write data.batch_size={size * accumulate * ranks} data.micro_batch={size}"
    if size % (ranks * accumulate) == 0:
        lines += f"; the {size} in {accumulate} parts: write data.micro_batch={size // (ranks * accumulate)}"
    return UserError(f"{said}: batch_size is the samples of a whole optimizer step, over all {ranks} ranks", lines)

"""The split of a global batch over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The split of a global batch, with `global_batch = world_size * micro_batch * accumulate`."""

    global_batch: int
    """Samples per optimizer step over all ranks."""
    micro_batch: int
    """Samples per forward and backward pass of a rank."""
    accumulate: int
    """Gradient accumulation: passes of a rank per optimizer step."""
    world_size: int
    """Number of ranks that read different samples: all ranks of the job, except with tensor parallelism."""
    whole_steps: bool = False
    """Whether the last optimizer step of an epoch is a full one, whatever `drop_last` of its loader is."""

    @classmethod
    def of(cls, batch_size: int, micro_batch: int | None, world_size: int, accumulate: int | None = None) -> BatchPlan:
        """Split a global batch; without a micro-batch each rank processes its share in one pass.

        A batch size that does not divide is refused rather than rounded, which would change the training.

        Args:
            batch_size: Samples per optimizer step over all ranks.
            micro_batch: Samples per pass of a rank; None: the whole share of a rank.
            world_size: Number of ranks that read different samples.
            accumulate: Value of `trainer.accumulate_grad_batches`, which must agree with the split.

        Raises:
            UserError: The batch does not divide; the message names the nearest batch sizes that do.
        """
        if batch_size < 1:
            raise UserError(
                f"data.batch_size={batch_size}: an optimizer step needs at least one sample",
                f"set data.batch_size to {world_size} or more (it is shared by all {world_size} ranks)",
            )
        if micro_batch is not None and micro_batch < 1:
            raise UserError(
                f"data.micro_batch={micro_batch}: a rank needs at least one sample",
                "set data.micro_batch to 1 or more, or to null for no gradient accumulation",
            )
        unit = world_size * (micro_batch or 1)
        if batch_size % unit:
            raise _does_not_divide(batch_size, micro_batch, world_size)
        micro = micro_batch or batch_size // world_size
        plan = cls(batch_size, micro, batch_size // (world_size * micro), world_size)
        if accumulate is not None and accumulate != plan.accumulate:
            raise _contradicts(plan, micro_batch, accumulate)
        return plan

    def split(self, ranks: int) -> str:
        """Describe the split as `4 ranks x 8 x 2 accumulated`.

        `ranks` is the number of ranks of the job: more than `world_size` with tensor parallelism.
        """
        plural = "" if self.world_size == 1 else "s"
        sharing = ranks // self.world_size
        readers = f"rank{plural}" if sharing == 1 else f"group{plural} of {sharing} ranks"
        accumulated = f" x {self.accumulate} accumulated" if self.accumulate > 1 else ""
        return f"{self.world_size} {readers} x {self.micro_batch}{accumulated}"


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


def _contradicts(plan: BatchPlan, micro_batch: int | None, accumulate: int) -> UserError:
    """Return the error for a `trainer.accumulate_grad_batches` that contradicts the keys of `data`.

    In Lightning the batch size is that of a rank: `data.batch_size=32` and 4 batches per step are 128 samples per rank.
    """
    size, ranks = plan.global_batch, plan.world_size
    keys = f"trainer.accumulate_grad_batches={accumulate} with data.batch_size={size}"
    if micro_batch is not None:
        return UserError(
            f"{keys} and data.micro_batch={micro_batch}: on {ranks} ranks this is {plan.accumulate} batches per step",
            f"write trainer.accumulate_grad_batches={plan.accumulate}, "
            f"or data.batch_size={micro_batch * accumulate * ranks}",
        )
    fix = (
        f"for batches of {size} on each rank: write data.batch_size={size * accumulate * ranks} data.micro_batch={size}"
    )
    if size % (ranks * accumulate) == 0:
        micro = size // (ranks * accumulate)
        fix += f"; to split these {size} into {accumulate} micro-batches: write data.micro_batch={micro}"
    message = f"{keys}: batch_size is the number of samples per optimizer step over all {ranks} ranks"
    return UserError(message, fix)

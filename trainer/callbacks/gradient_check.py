"""Fast checks that gradients are finite, for `callbacks/guard.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_GRADIENT = attrgetter("grad")


def local_gradients(optimizer: Any) -> list[torch.Tensor]:
    """Return this rank's shard of every gradient, as real numbers; empty ones are left out."""
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                values = _real_values(parameter.grad)
                if values.numel():
                    gradients.append(values)
    return gradients


def _real_values(gradient: torch.Tensor) -> torch.Tensor:
    """Return the real numbers of this rank's shard of a gradient, of any layout."""
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    if gradient.is_sparse:
        gradient = gradient._values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def sum_of_norms(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the gradients' norms; not finite if any of them is not."""
    return torch.stack(torch._foreach_norm(gradients)).sum()


def non_finite_flag(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return 0, or infinity if any gradient is not finite; for the CPU.

    This takes half the time of the norms. It uses the check of the gradient scalers, which multiplies by a scale: 1
    leaves every bit unchanged.
    """
    flag = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, flag, torch.ones(()))
    return flag.atanh_()


def first_non_finite(module: nn.Module) -> str | None:
    """Return the name of the first parameter whose gradient is not finite."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(_real_values(parameter.grad)).all()):
            return name
    return None


class FiniteGradientCheck:
    """Checks that all gradients of an optimizer are finite, for gradients on the CPU that need no communication.

    After a backward pass none of this is in the CPU's caches, and each query to a tensor takes 1 us. So the memory
    layout is determined once. Under DDP the gradients are views of its buckets, and one reduction per bucket is enough.
    Elsewhere a sum only reads and is four times as fast as the check of the gradient scalers, which also writes. But a
    sum costs a few us per tensor, and 40 us for the first one, whose code is not cached either. So it pays off for
    tensors of at least `LARGE_NUMEL` elements that have at least `MIN_SUMMED_NUMEL` elements together, and for all
    tensors if they have `MEAN_SUMMED_NUMEL` elements on average: then none of the other check's code is needed.
    """

    LARGE_NUMEL, MIN_SUMMED_NUMEL, MEAN_SUMMED_NUMEL = 2**15, 2**18, 2**14

    def __init__(self, optimizer: Any, only_ddp: bool = False) -> None:
        """Create the check of an optimizer.

        Args:
            optimizer: The optimizer.
            only_ddp: Whether only DDP sets gradients, so that one gradient per bucket shows if the bucket is in use.
        """
        self._optimizer = optimizer
        self._only_ddp = only_ddp
        self._flag, self._one = torch.zeros(()), torch.ones(())
        self._reductions: list[Callable[[], torch.Tensor]] = []
        """One for each bucket."""
        self._watched: list[torch.Tensor] = []
        """Parameters whose gradients show whether the buckets are in use."""
        self._views: list[torch.Tensor] = []
        """The gradients of `_watched`."""
        self._small: list[torch.Tensor] = []
        """Parameters that are checked together."""
        self._summed: list[torch.Tensor] = []
        """Parameters that are summed one by one."""
        self._sharded: list[torch.Tensor] = []
        """Parameters that are DTensors. Their local shards are checked together, without DTensor's dispatch."""
        self._num_parameters = -1

    def is_finite(self) -> bool:
        """Return whether all gradients are finite, and no sum overflows: else the caller checks in detail."""
        count = 0
        for group in self._optimizer.param_groups:
            count += len(group["params"])
        if count != self._num_parameters or (
            self._views and not all(map(is_, map(_GRADIENT, self._watched), self._views))
        ):
            self._partition()
        for reduce in self._reductions:
            if not math.isfinite(reduce().item()):
                return False
        for gradient in map(_GRADIENT, self._summed):
            if gradient is not None and not math.isfinite(abs(gradient.sum().item())):
                return False
        if self._small:
            try:
                torch._amp_foreach_non_finite_check_and_unscale_(
                    list(map(_GRADIENT, self._small)), self._flag, self._one
                )
            except TypeError:  # a parameter without a gradient is rare
                gradients = [one.grad for one in self._small if one.grad is not None]
                if gradients:
                    torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._flag, self._one)
            if self._flag.item():
                self._flag.zero_()
                return False
        if self._sharded:
            gradients = [parameter.grad for parameter in self._sharded if parameter.grad is not None]
            shards = [shard for shard in map(_real_values, gradients) if shard.numel()]
            return not shards or math.isfinite(non_finite_flag(shards).item())
        return True

    def _partition(self) -> None:
        """Assign each parameter to a bucket, to the joint check, or to a separate sum.

        A sum works with every layout and type, which are unknown for a parameter that has no gradient yet.
        """
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        self._num_parameters = len(parameters)
        buckets = _buckets([parameter for parameter in parameters if _is_plain(parameter.grad)])
        self._reductions = [_reduction_of(bucket) for bucket, _ in buckets]
        self._watched = [parameter for _, inside in buckets for parameter in (inside[:1] if self._only_ddp else inside)]
        self._views = [view for parameter in self._watched if (view := parameter.grad) is not None]
        in_buckets = {parameter for _, inside in buckets for parameter in inside}
        self._sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        parameters = [one for one in parameters if one not in in_buckets and not isinstance(one, DTensor)]
        large = {parameter for parameter in parameters if parameter.numel() >= self.LARGE_NUMEL}
        if sum(parameter.numel() for parameter in large) < self.MIN_SUMMED_NUMEL:
            large.clear()
        if sum(parameter.numel() for parameter in parameters) >= self.MEAN_SUMMED_NUMEL * len(parameters):
            large.update(parameters)
        self._small, self._summed = [], []
        for parameter in parameters:
            is_small = _is_plain(parameter.grad) and parameter.numel() and parameter not in large
            (self._small if is_small else self._summed).append(parameter)


def _reduction_of(bucket: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function whose result is not finite if an element of the bucket is not.

    A dot product runs through less code than a sum: 55 us for 70, with none of it cached. In float16 the squares of
    gradients would overflow.
    """
    return partial(bucket.dot, bucket) if bucket.dtype == torch.float32 else bucket.sum


def _is_plain(gradient: torch.Tensor | None) -> bool:
    return not (gradient is None or isinstance(gradient, DTensor) or gradient.is_sparse or gradient.is_complex())


def _buckets(parameters: list[torch.Tensor]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return each storage that several gradients fill without gaps, as a flat tensor, and their parameters."""
    sharing: dict[tuple[int, torch.dtype], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        place = int(gradient.storage_offset()), gradient, parameter
        sharing.setdefault((gradient.untyped_storage().data_ptr(), gradient.dtype), []).append(place)
    buckets = []
    for places in sharing.values():
        end = 0
        for start, gradient, _ in sorted(places, key=itemgetter(0)):
            end = end + gradient.numel() if start == end else -1
        first = places[0][1]
        if len(places) > 1 and end * first.itemsize == first.untyped_storage().nbytes():
            buckets.append((first.as_strided((end,), (1,), 0), [parameter for _, _, parameter in places]))
    return buckets

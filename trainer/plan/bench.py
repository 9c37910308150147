"""Measures what a CPU rank reaches: matrix products, memory, and starting an operator. Takes about a second.

The fastest of many short trials counts: other processes on the machine make a trial slower, never faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from trainer.plan.rates import Machine, cpu_hardware, keep_machine, machine

_SIZE = 512
_ELEMENTS = 2**22
_OPERATORS = 200
_TRIALS = 15
_OLD_S = 30 * 86400.0


def ensure(threads: int) -> Machine:
    """Return the rates of a CPU rank with this number of threads, measured now unless they were in the last 30 days."""
    hardware = cpu_hardware(threads)
    found = machine(hardware)
    if found is not None and time.time() - found.time < _OLD_S:
        return found
    found = measure(threads)
    keep_machine(found)
    return found


def measure(threads: int) -> Machine:
    """Return the rates of a CPU rank, measured now."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.rand(_SIZE, _SIZE), torch.rand(_SIZE, _SIZE)
        product_s = _fastest(lambda: torch.mm(left, right))
        one, other, result = (torch.rand(_ELEMENTS) for _ in range(3))
        sum_s = _fastest(lambda: torch.add(one, other, out=result))
        operator_s = _fastest(_operators) / (2 * _OPERATORS)
    finally:
        torch.set_num_threads(before)
    return Machine(cpu_hardware(threads), 2.0 * _SIZE**3 / product_s, 12.0 * _ELEMENTS / sum_s, operator_s, time.time())


def _operators() -> None:
    """Run small operators forward and backward."""
    value = torch.ones(4, requires_grad=True)
    result = value
    for _ in range(_OPERATORS):
        result = result * 1.0
    result.sum().backward()  # type: ignore[no-untyped-call]


def _fastest(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)

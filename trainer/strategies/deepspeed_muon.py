"""DeepSpeed asks of every optimizer whether it is its Muon. Importing Muon to ask that readies torch's compiler for
kernels that nothing else uses: 1 s of CPU on every rank, at every start and restart of a ZeRO run.
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/utils.py#L66
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def import_muon() -> None:
    """Import it so that a kernel is compiled when it is first called. Does nothing once it is imported."""
    import torch
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda: functools.partial(_compile_later, torch.compile)
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = original


def _compile_later(compile_: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = functools.cache(lambda: compile_(function))

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return compiled()(*arguments, **keywords)

    return call

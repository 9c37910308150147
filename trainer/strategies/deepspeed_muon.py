"""DeepSpeed asks of every optimizer whether it is its Muon. Importing Muon to ask that readies torch's compiler for
kernels that nothing else uses: 1 s of CPU on every rank, at every start and restart of a ZeRO run.
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/utils.py#L66
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch


def import_muon() -> None:
    """Import it so that a kernel is compiled when it is first called. Does nothing once it is imported, nor
    where another version of DeepSpeed has other names."""
    from deepspeed.runtime import compiler

    original = getattr(compiler, "compile", None)
    compiler.compile = lambda: _compile_later
    try:
        with contextlib.suppress(ImportError, AttributeError, TypeError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = original


def _compile_later(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments, **keywords)
        return compiled()(*arguments, **keywords)

    return call

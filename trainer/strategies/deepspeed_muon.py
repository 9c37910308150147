"""A cheaper import of DeepSpeed's Muon.

DeepSpeed checks whether an optimizer is its own Muon, and imports Muon for that. The import sets up torch's compiler
for kernels that nothing else uses: 1.6 s of CPU time instead of 1 ms, on every rank, at every start and restart of a
ZeRO run (DeepSpeed 0.19.8, torch 2.13). tests/strategies/test_deepspeed_muon.py fails when this is no longer needed.
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/utils.py#L66
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch


def import_muon() -> None:
    """Import Muon so that a kernel is compiled only when it is first called.

    Does nothing if it is already imported, or if this version of DeepSpeed uses other names.
    """
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

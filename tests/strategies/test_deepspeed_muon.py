"""Muon of DeepSpeed is imported without torch's compiler, and its kernels are what they were."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILER = "torch._inductor.compile_fx"
_IMPORT = """
import sys
from deepspeed.runtime import compiler
before = compiler.compile
{how}
print("{compiler}" in sys.modules, compiler.compile is before)
"""
_CALL = """
import torch
from trainer.strategies.deepspeed_muon import import_muon
import_muon()
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5 as kernel
compiled = []
def compile_(function):
    compiled.append(function.__name__)
    return lambda *arguments: function(*arguments) * 2
torch.compile = compile_  # a compiler for C++ may be missing
matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
plain = kernel.__wrapped__(matrix, 5)
doubled = [torch.equal(kernel(matrix, 5), plain * 2) for _ in range(2)]
print(doubled, compiled)
"""


def _printed(program: str) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.executed
def test_the_compiler_is_left_for_those_who_use_it() -> None:
    how = "from trainer.strategies.deepspeed_muon import import_muon; import_muon()"
    assert _printed(_IMPORT.format(how=how, compiler=COMPILER)) == "False True"


def test_deepspeed_still_imports_it() -> None:
    """When this fails, trainer/strategies/deepspeed_muon.py can go."""
    how = "import deepspeed.runtime.zero.muon.original_muon"
    assert _printed(_IMPORT.format(how=how, compiler=COMPILER)) == "True True"


def test_a_kernel_is_compiled_once_when_it_is_called() -> None:
    assert _printed(_CALL) == "[True, True] ['zeropower_via_newtonschulz5']"

"""Cases that two real ranks train."""

from __future__ import annotations

from tests.plan.drawn import Drawn

_MODEL = {"vocab_size": 512, "sequence_length": 256, "dim": 64, "layers": 3, "heads": 4, "tied": False}
CASES = [
    Drawn(_MODEL, 2, "fsdp", 2, 2, "bf16-mixed", "none", "cpu", False, "float32"),
    Drawn(_MODEL, 2, "fsdp", 2, 2, "32-true", "full", "cpu", True, "float32"),
    Drawn(_MODEL | {"tied": True}, 2, "fsdp", 2, 2, "bf16-mixed", "full", "cpu", False, "bfloat16"),
]

"""Cases that two real ranks train."""

from __future__ import annotations

from tests.plan.drawn import Drawn

_MODEL = {"vocab_size": 512, "sequence_length": 256, "dim": 64, "layers": 2, "heads": 4, "tied": False}
_FROZEN = ("embedding", "body.0")
CASES = [
    Drawn(_MODEL, 2, "fsdp", 2, 2, "bf16-mixed", "none", "cpu", False, "float32"),
    Drawn(_MODEL | {"layers": 3}, 2, "fsdp", 2, 2, "32-true", "full", "cpu", True, "float32"),
    Drawn(_MODEL | {"tied": True}, 2, "fsdp", 2, 2, "bf16-mixed", "full", "cpu", False, "bfloat16"),
    *(  # the other precision of each stage is below
        Drawn(_MODEL, 2, f"deepspeed_zero{stage}", 2, 1, precision, "none", "cpu", precision == "32-true", "float32")
        for stage, precision in ((1, "32-true"), (2, "bf16-mixed"), (3, "32-true"))
    ),
    Drawn(_MODEL, 2, "fsdp", 2, 2, "32-true", "none", "cpu", False, "float32", foreach=True, frozen=_FROZEN),
    Drawn(_MODEL | {"tied": True}, 2, "fsdp", 2, 2, "bf16-mixed", "full", "cpu", True, "float32", lora_rank=4),
    Drawn(_MODEL | {"tied": True}, 2, "deepspeed_zero1", 2, 1, "bf16-mixed", "none", "cpu", False, "float32", "SGD"),
    Drawn(_MODEL, 2, "deepspeed_zero2", 2, 1, "32-true", "none", "cpu", True, "float32", foreach=True, frozen=_FROZEN),
    Drawn(_MODEL, 2, "deepspeed_zero3", 2, 1, "bf16-mixed", "none", "cpu", False, "float32", lora_rank=4),
    Drawn(_MODEL, 2, "deepspeed_zero3", 2, 1, "bf16-mixed", "none", "cpu", False, "float32", frozen=_FROZEN),
]

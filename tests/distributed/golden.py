"""Loss curves that were recorded, one file a machine type: a change of any bit must be meant."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("golden")
RECORD = "TRAINER_RECORD_GOLDEN"
HOW = f"TRAINER_ALL_PAIRS=1 {RECORD}=1 pytest tests/distributed -k golden   writes the file of this machine type"
Curves = dict[str, list[float]]


def machine() -> str:
    """What the bits depend on: the model of the CPU and the version of torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, torch {torch.__version__}"


def path_of(key: str) -> Path:
    return FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def record(curves: Curves) -> None:
    FOLDER.mkdir(exist_ok=True)
    content = {"machine": machine(), "losses": {name: [one.hex() for one in curve] for name, curve in curves.items()}}
    path_of(machine()).write_text(json.dumps(content, indent=1) + "\n")


def recorded() -> tuple[Curves, bool]:
    """The curves of this machine type, or of another, and whether they are of this one."""
    own = path_of(machine())
    path = own if own.exists() else min(FOLDER.glob("*.json"))
    content = json.loads(path.read_text())
    curves = {name: [float.fromhex(one) for one in curve] for name, curve in content["losses"].items()}
    return curves, path == own

"""`trainer env`: versions and hardware for a bug report."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

from trainer.cli.options import make_parser
from trainer.core.errors import TrainerError
from trainer.core.text import one_line
from trainer.runs.environment_report import report
from trainer.slurm.commands import SlurmRefused, is_here
from trainer.slurm.commands import run as call

_DESCRIPTION = (
    "Print what a bug report needs: versions, hardware, cluster, and the environment variables that change how "
    "a job runs. Values of secrets are masked, your home directory is written as ~. Read it before you publish it."
)
_FIRST = ("torch", "lightning", "hydra-core", "omegaconf", "deepspeed", "wandb", "numpy", "torchmetrics", "safetensors")


def main(argv: list[str]) -> int:
    """Run `trainer env`."""
    parser = make_parser("env", _DESCRIPTION, "trainer env --json")
    parser.add_argument("--json", action="store_true", help="print JSON with every installed package")
    arguments = parser.parse_args(argv)
    content = {**report(), "slurm": _slurm()}
    if arguments.json:
        json.dump(content, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(_text(content))
    return 0


def _slurm() -> str | None:
    """Return the version of SLURM here; None without it."""
    if not is_here():
        return None
    try:
        return call("sbatch", "--version").strip()
    except (SlurmRefused, TrainerError):  # a client without a configuration
        return "does not answer"


def _text(content: dict[str, Any]) -> str:
    packages, machine = content["packages"], content["machine"]
    gpus = content["gpus"]
    rows = [
        ("trainer", content["trainer"]),
        ("Python", f"{content['python']}, {content['system']}"),
        ("system", ", ".join(filter(None, (content["distribution"], content["libc"], machine["container"])))),
        ("torch", f"{packages.get('torch', 'not installed')}, built for {content['torch_build'] or '?'}"),
        ("packages", ", ".join(f"{name} {packages[name]}" for name in _FIRST[1:] if name in packages)),
        ("processor", f"{machine['cores']} cores of {machine['cpu']}"),
        ("GPUs", ", ".join(gpus) or content["gpu_problem"] or "none"),
        ("SLURM", content["slurm"] or "not installed here"),
        *((name, value) for name, value in content["variables"].items()),
    ]
    size = max(len(name) for name, _ in rows) + 2
    width = shutil.get_terminal_size((120, 24)).columns
    lines = []
    for name, value in rows:
        text = one_line(str(value))
        while len(name) + len(text) and size + len(text) > width and " " in text[: width - size]:
            cut = text[: width - size].rfind(" ")
            lines.append(f"{name:<{size}}{text[:cut]}")
            name, text = "", text[cut + 1 :]
        lines.append(f"{name:<{size}}{text}")
    return "\n".join(lines)

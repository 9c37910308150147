"""Values of a composed configuration that are replaced once, before it is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoint import commit
from trainer.core.errors import UserError
from trainer.runs.registry import find

FILES = (".safetensors", ".ckpt", ".pt", ".pth")


def settle_start(config: dict[str, Any]) -> None:
    """Replace `finetune.init_from` of a composed configuration by an absolute path.

    Raises:
        UserError: If it names neither a file, a checkpoint nor a run with a good checkpoint.
    """
    reference = config["finetune"]["init_from"]
    if reference is not None:
        config["finetune"]["init_from"] = str(_path(reference, Path(config["runs_dir"])).absolute())


def settle_micro_batch(config: dict[str, Any]) -> None:
    """Replace `data.micro_batch=auto` by its other name, `trainer.find_micro_batch=true`."""
    if config["data"].get("micro_batch") == "auto":
        config["data"]["micro_batch"] = None
        config["trainer"]["find_micro_batch"] = True


def _path(reference: str, runs_dir: Path) -> Path:
    path = Path(reference).expanduser()
    if path.is_file():
        if path.suffix not in FILES:
            raise UserError(f"finetune.init_from={reference}: unknown file type", f"use one of {', '.join(FILES)}")
        return path
    if (path / commit.COMMIT).is_file() or any(path.glob("*.safetensors")):
        return path
    if path.suffix in FILES and not path.exists():
        raise UserError(f"finetune.init_from={reference}: there is no such file", "name a file, a checkpoint or a run")
    from trainer.cli.chosen import choose  # imported late: most jobs do not start from a run

    try:
        return choose(find(reference, runs_dir), "best").path
    except UserError as error:
        raise UserError(f"finetune.init_from={reference}: {error.message}", error.fix) from None

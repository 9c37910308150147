"""`trainer export [RUN|CHECKPOINT]`: the weights of a checkpoint for other programs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.checkpoint import commit
from trainer.checkpoint.store import Checkpoint
from trainer.cli.chosen import choose, logged, raise_failure
from trainer.cli.common import size
from trainer.config.shape import LaunchShape
from trainer.core.errors import UserError
from trainer.core.files import read_json
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import find, runs_dir_from
from trainer.supervise import entry, torchrun
from trainer.supervise.torchrun import Place

_EXAMPLE = "example: trainer export k3v9 --format hf --out my_model"
_RECORD = "export.json"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer export", description=__doc__, epilog=_EXAMPLE, allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN|CHECKPOINT", help="a run, or a checkpoint's folder; the latest")
    parser.add_argument("--format", choices=["safetensors", "onnx", "hf", "ckpt"], default="safetensors")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|STEP")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder; RUN/exports/step-N-FORMAT")
    parser.add_argument("--keep-lora", action="store_true", help="write low-rank additions apart, not merged")
    parser.add_argument("--runs-dir", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.keep_lora and options.format not in ("safetensors", "ckpt"):
        raise UserError(f"--keep-lora: --format={options.format} has no place for them", "use --format=safetensors")
    run, checkpoint = _source(options.run, options.checkpoint, options.runs_dir)
    target = _target(options.out, run, checkpoint, options.format)
    _write(run, checkpoint, [options.format, "keep" if options.keep_lora else "merge"], target)
    record = read_json(target / _RECORD)
    if options.json:
        print(json.dumps({"path": str(target), **record}))
        return 0
    print(f"step {checkpoint.step} -> {target}")
    for name, num_bytes in record["files"].items():
        print(f"  {name:<32}{size(num_bytes)}")
    if "lora_merged" in record:
        print(f"  the low-rank additions of {record['lora_merged']} layers are merged into their weights")
    if "largest_difference" in record:
        print(f"  its outputs differ from torch's by at most {record['largest_difference']:.2g}")
    return 0


def _source(reference: str | None, which: str, runs_dir: str | None) -> tuple[RunDirectory | None, Checkpoint]:
    """The run, if the checkpoint is in one, and the checkpoint."""
    if reference and (Path(reference) / commit.COMMIT).exists():
        path = Path(reference).absolute()
        try:
            checkpoint = Checkpoint.read(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a complete checkpoint: {error}", "trainer show lists those of a run"
            ) from None
        problems = commit.verify(path)
        if problems:
            raise UserError(f"{path} is damaged: {'; '.join(problems)}", "export another")
        run = RunDirectory(path.parent.parent)
        return (run if run.exists() else None), checkpoint
    run = find(reference, runs_dir_from(runs_dir))
    return run, choose(run, which)


def _target(given: Path | None, run: RunDirectory | None, checkpoint: Checkpoint, kind: str) -> Path:
    """Where to write. A folder of the user's own must be new; one of ours is replaced."""
    if given is not None:
        if given.exists() and not (given.is_dir() and not any(given.iterdir())):
            raise UserError(f"--out={given} is there already", "name a new folder, or remove this one")
        return given.absolute()
    if run is None:
        raise UserError("this checkpoint is in no run directory", "say where to write: --out=DIR")
    return run.path / "exports" / f"step-{checkpoint.step:08d}-{kind}"


def _write(run: RunDirectory | None, checkpoint: Checkpoint, how: list[str], target: Path) -> None:
    """Written beside the target and renamed: it is whole, or as it was before. Raises TrainerError.

    `how`: the format, and what becomes of low-rank additions, as the worker's arguments."""
    staging = target.parent / f".{target.name}.{os.getpid()}"
    staging.mkdir(parents=True)
    shape = LaunchShape(1, 1, "cpu")
    code_dir = run.code_dir if run is not None else Path.cwd()
    seed = run.hash_seed() if run is not None else "0"
    command = [sys.executable, *entry.started(entry.EXPORT, code_dir), str(run.path) if run else "-"]
    variables = torchrun.environment(os.environ, code_dir, shape, Place(), 0, hash_seed=seed)
    log = run.logs_dir / "export.log" if run else Path(tempfile.gettempdir(), f"trainer-export-{os.getpid()}.log")
    try:
        with logged(log, variables) as output:
            done = subprocess.run(
                [*command, str(checkpoint.path), *how, str(staging)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
            )
        raise_failure(done.returncode, f"trainer export of {run.path.name if run else checkpoint.path}", log, variables)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

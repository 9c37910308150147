"""`trainer export [RUN|CHECKPOINT]`: write the weights of a checkpoint in a format that other programs read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from trainer.checkpoint import commit
from trainer.checkpoint.store import Checkpoint
from trainer.cli.chosen import choose, judge, logged, make_room, raise_failure
from trainer.cli.common import size
from trainer.cli.options import Parser, add_checkpoint_option, add_output_options, add_trust, make_parser
from trainer.config.shape import LaunchShape
from trainer.core import processes, records
from trainer.core.errors import DONE, UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Exported
from trainer.runs.registry import runs_dir_from
from trainer.runs.trust import find_trusted, require
from trainer.supervise import entry, rank_environment
from trainer.supervise.rank_environment import Interpreter
from trainer.supervise.rendezvous import Place

_DESCRIPTION = (
    "Write the weights of a checkpoint as safetensors, as a Hugging Face model, as ONNX (compared with torch first) or "
    "as a Lightning checkpoint. LoRA adapters are merged into the weights."
)
_RECORD = "export.json"


def _parser() -> Parser:
    parser = make_parser("export", _DESCRIPTION, "trainer export k3v9 --format hf --out my_model")
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN|CHECKPOINT",
        help="a run (id or its prefix, name, path or SLURM job id) or the folder of a checkpoint (default: the latest "
        "run)",
    )
    parser.add_argument(
        "--format",
        choices=["safetensors", "onnx", "hf", "ckpt"],
        default="safetensors",
        help="hf: the layout of from_pretrained; ckpt: for load_from_checkpoint of Lightning (default: safetensors)",
    )
    add_checkpoint_option(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to create (default: RUN/exports/step-STEP-FORMAT)"
    )
    parser.add_argument(
        "--keep-lora",
        action="store_true",
        help="keep LoRA adapters as separate tensors (safetensors and ckpt only)",
    )
    add_trust(parser)
    add_output_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run `trainer export` and return the exit code."""
    options = _parser().parse_args(argv)
    if options.keep_lora and options.format not in ("safetensors", "ckpt"):
        raise UserError(f"--keep-lora: --format={options.format} cannot hold LoRA adapters", "use --format=safetensors")
    run, checkpoint = _source(options.run, options.checkpoint, options.runs_dir, options.trust)
    if run is not None:
        judge(run)
    target = _target(options.out, run, checkpoint, options.format)
    _write(run, checkpoint, [options.format, "keep" if options.keep_lora else "merge"], target)
    record = records.read_existing(Exported, target / _RECORD)
    if options.json:
        print(json.dumps({"path": str(target), **records.to_json(record)}))
        return DONE
    print(f"step {checkpoint.step} -> {target}")
    for name, num_bytes in record.files.items():
        print(f"  {name:<32}{size(num_bytes)}")
    if record.lora_merged is not None:
        print(f"  merged the LoRA adapters of {record.lora_merged} layers into their weights")
    if record.largest_difference is not None:
        print(f"  outputs differ from torch's by at most {record.largest_difference:.2g}")
    return DONE


def _source(
    reference: str | None, which: str, runs_dir: str | None, trusted: bool
) -> tuple[RunDirectory | None, Checkpoint]:
    """Return the checkpoint, and its run if it lies in a run directory."""
    if reference and (Path(reference) / commit.COMMIT).exists():
        path = Path(reference).absolute()
        try:
            checkpoint = Checkpoint.read(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a complete checkpoint: {error}", "`trainer show RUN` lists the checkpoints of a run"
            ) from None
        problems = commit.verify(path)
        if problems:
            raise UserError(f"{path} is damaged: {'; '.join(problems)}", "export another checkpoint")
        run = RunDirectory(path.parent.parent)
        if not run.exists():
            return None, checkpoint
        require(run, trusted)
        return run, checkpoint
    run = find_trusted(reference, runs_dir_from(runs_dir), trusted)
    return run, choose(run, which)


def _target(given: Path | None, run: RunDirectory | None, checkpoint: Checkpoint, kind: str) -> Path:
    """Return the folder to write. With --out it must be new or empty; below the run directory it is replaced."""
    if given is not None:
        if given.exists() and not (given.is_dir() and not any(given.iterdir())):
            raise UserError(f"--out={given} already exists", "name a new folder, or remove this one")
        return given.absolute()
    if run is None:
        raise UserError("this checkpoint is not in a run directory", "name an output folder: --out=DIR")
    target = run.path / "exports" / f"step-{checkpoint.step:08d}-{kind}"
    make_room(target, _RECORD, delete=False)
    return target


def _write(run: RunDirectory | None, checkpoint: Checkpoint, how: list[str], target: Path) -> None:
    """Export in a separate process into a temporary folder, and rename it, so that the target is never partial.

    Args:
        run: The run of the checkpoint, if there is one.
        checkpoint: The checkpoint.
        how: Arguments FORMAT and LORA of `trainer.export.run`.
        target: The folder to write.

    Raises:
        TrainerError: With the message of the process.
    """
    staging = target.parent / f".{target.name}.{os.getpid()}"
    staging.mkdir(parents=True)
    shape = LaunchShape(1, 1, "cpu")
    code_dir = run.code_dir if run is not None else Path.cwd()
    seed = run.hash_seed() if run is not None else "0"
    command = [*processes.python_module(*entry.started(entry.EXPORT, code_dir)[1:]), str(run.path) if run else "-"]
    python = Interpreter(code_dir=code_dir, hash_seed=seed)
    variables = rank_environment.environment(os.environ, python, shape, Place(), attempt=0)
    log = run.logs_dir / "export.log" if run else Path(tempfile.gettempdir(), f"trainer-export-{os.getpid()}.log")
    try:
        with logged(log, variables) as output:
            process = subprocess.run(
                [*command, str(checkpoint.path), *how, str(staging)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
            )
        source = run.path.name if run else checkpoint.path
        raise_failure(process.returncode, f"trainer export of {source}", log, variables)
        make_room(target, _RECORD)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

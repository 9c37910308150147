"""The checkpoint that a command refers to, and the processes that work on it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from trainer.checkpoint import commit
from trainer.checkpoint.store import Checkpoint, CheckpointStore, best_of, in_order
from trainer.config.instantiate import read_whole
from trainer.config.problems import raise_all
from trainer.config.shape import LaunchShape, resolve
from trainer.config.targets import problems_of_targets
from trainer.config.typed import is_closed, problems_of, to_config
from trainer.core import claims
from trainer.core.errors import JOB_FAILED, TrainerError, UserError
from trainer.core.files import no_space_on
from trainer.core.records import read_or_skip
from trainer.runs import cause
from trainer.runs.code_snapshot import import_paths
from trainer.runs.directory import RunDirectory
from trainer.runs.records import CommandFailure
from trainer.runs.registry import reference_to, shortest
from trainer.runs.remote_checkpoints import remote_of, url_of
from trainer.supervise import entry, rank_environment, torchrun
from trainer.supervise.rank_environment import Interpreter
from trainer.supervise.rendezvous import Place, private_folder


def choose(run: RunDirectory, which: str) -> Checkpoint:
    """Return a committed checkpoint: `last`, `best` (by the monitored metric), or the one of a step.

    One that is only in the object store (`checkpoint.dir`) is downloaded into the run directory.

    Raises:
        UserError: If the checkpoint does not exist, or its checksums do not match.
    """
    remote = remote_of(run, url_of(run.config()))
    checkpoint = _select(run, which, remote.committed() if remote is not None else [])
    if remote is not None and not commit.is_committed(checkpoint.path):
        print(f"downloading {checkpoint.path.name} from {remote.objects.url}", file=sys.stderr)
        remote.fetch(checkpoint.path.name)
    problems = commit.verify(checkpoint.path)
    if problems:
        raise UserError(f"{checkpoint.path} is damaged: {'; '.join(problems)}", "use another: --checkpoint=STEP")
    return checkpoint


def _select(run: RunDirectory, which: str, remote: list[Checkpoint]) -> Checkpoint:
    here = CheckpointStore(run.checkpoints_dir).committed()
    committed = in_order({one.path.name: one for one in [*remote, *here]}.values())
    if not committed:
        raise UserError(
            f"{run.path.name} has no checkpoint",
            f"see why: trainer why {reference_to(run)}; or choose another run",
        )
    if which == "last":
        return committed[-1]
    if which == "best":
        return best_of(committed, mode=fallback_mode(run)) or committed[-1]
    for checkpoint in reversed(committed):  # the last step may have two: before and after on_train_end
        if str(checkpoint.step) == which:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in committed)
    raise UserError(
        f"--checkpoint={which}: {run.path.name} has no such checkpoint",
        f"use best, last or a step: {steps}",
    )


def fallback_mode(run: RunDirectory) -> str:
    """Return "min" or "max" for checkpoints of older versions, whose COMMIT has no `monitor_mode`."""
    beat = run.heartbeat(0)
    return beat.best.mode if beat and beat.best else "min"


def run_on_ranks(
    run: RunDirectory, module: str, arguments: list[str], ranks: int | None = None, quiet: bool = False
) -> None:
    """Run `module` under torchrun on this machine, in the foreground.

    Output of the user's code is shown; warnings and tracebacks go to `logs/VERB.log`.

    Args:
        run: The run; its directory is the first argument of the module.
        module: The module to run.
        arguments: Further arguments of the module.
        ranks: Number of processes, on the run's kind of device. By default those of the run's launch shape.
        quiet: Send the module's stdout to stderr, because the command prints JSON.

    Raises:
        TrainerError: With the message of the rank that failed first.
    """
    verb = module.rpartition(".")[2]
    shape = run.launch().shape or resolve(read_whole(run.config_path))
    if ranks is not None:
        shape = LaunchShape(1, ranks, shape.device)
    worker = entry.started(module, run.code_dir)
    command = torchrun.command(run.path, f"{run.id}-{verb}", shape, Place(), max_restarts=0, worker=worker)
    preload = entry.module_of(module, run.code_dir)
    with ExitStack() as stack:
        inherited = dict(os.environ)
        if shape.device == "cuda":
            # Beside the training of this run, if there is no other GPU.
            claim = claims.claim(shape.processes_per_node, is_strict=False, wait_s=0.0)
            stack.callback(claim.release)
            inherited |= claim.variables()
        variables = rank_environment.environment(
            inherited,
            Interpreter(
                code_dir=run.code_dir,
                preload=preload,
                hash_seed=run.hash_seed(),
                expandable_segments=run.config()["trainer"].get("expandable_segments", True),
            ),
            shape,
            Place(),
            attempt=0,
            store=stack.enter_context(private_folder()),
        )
        log = stack.enter_context(logged(run.logs_dir / f"{verb}.log", variables))
        child = torchrun.start([*command, *arguments], variables, stdout=sys.stderr if quiet else None, stderr=log)
        try:
            code = child.wait()
        finally:
            child.kill()  # on Ctrl-C: torchrun ignores SIGINT, and its workers die with it
            child.wait()
    raise_failure(code, f"trainer {verb} of {run.path.name}", Path(log.name), variables)


def judge(run: RunDirectory) -> None:
    """Check the frozen configuration of a run again before it is used: types, and which targets are called.

    Raises:
        UserError: With what is wrong.
    """
    config = read_whole(run.config_path)
    raise_all([one for section in config if is_closed(section) for one in problems_of(section, config[section])])
    to_config(config)
    # The project may have moved since; then its modules are those of the snapshot.
    folders = [Path(run.launch().cwd or "."), Path(import_paths(run.code_dir)[0])]
    found = [problems_of_targets(config, folder) for folder in folders if folder.is_dir()]
    raise_all(min(found, key=len, default=[]))


def make_room(target: Path, record: str, delete: bool = True) -> None:
    """Delete what an earlier call of this command wrote to `target`: a folder with the file `record`.

    Args:
        target: Path of the folder that the command is about to create.
        record: File that the command writes into it.
        delete: False: only check that it could be deleted.

    Raises:
        UserError: Something else is there.
    """
    if target.parent.is_symlink() or (
        os.path.lexists(target) and (target.is_symlink() or not (target / record).is_file())
    ):
        raise UserError(f"{shortest(target)} is not deleted: this command did not write it", "move it elsewhere")
    if delete:
        shutil.rmtree(target, ignore_errors=True)


@contextmanager
def logged(path: Path, variables: dict[str, str]) -> Iterator[TextIO]:
    """Open a new log, and add to `variables` the path to which a rank writes why it failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    variables[cause.FAILURE_VARIABLE] = str(path.with_suffix(".failure.json"))
    Path(variables[cause.FAILURE_VARIABLE]).unlink(missing_ok=True)
    with open(path, "w", opener=_not_through_a_link) as log:
        yield log


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def raise_failure(code: int, what: str, log: Path, variables: dict[str, str]) -> None:
    """Raise the failure that a process has recorded, with the path of its log, unless `code` is 0.

    Raises:
        TrainerError: With the exit code that the failed process requests.
    """
    if code == 0:
        return
    failure = read_or_skip(CommandFailure, Path(variables[cause.FAILURE_VARIABLE]))
    where = f"the log is {shortest(log)}"
    if failure is None:
        lines = [line for line in cause.tail(log) if line.strip()]
        how = f"killed by {cause.signal_name(-code)}" if code < 0 else f"exit code {code}"
        full = no_space_on(log.parent)
        raise TrainerError(f"{what} failed ({how})", "\n  ".join([*lines[-3:], *([full] if full else []), where]))
    error = TrainerError(failure.message, "\n  ".join(filter(None, [failure.fix, where])))
    error.code = failure.code
    if error.code != JOB_FAILED:  # a known error: its fix is enough, the log has nothing to add
        error.fix = failure.fix
    raise error

"""Turn the exception that ends a rank into a message without a traceback, and decide whether to retry the attempt.

Does not import torch, because it must work if torch cannot be imported. The traceback is in the log of the rank,
between two markers (`trainer.runs.cause`), so that a terminal that follows the log does not show it.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trainer.core import records
from trainer.core.errors import DONE, JOB_FAILED, EnvironmentFault, TrainerError, UserError
from trainer.core.files import write_new
from trainer.runs.cause import FAILURE_VARIABLE, LOST_PEER, TRACEBACK_BEGINS, TRACEBACK_ENDS
from trainer.runs.directory import RunDirectory
from trainer.runs.records import CommandFailure, Failure
from trainer.runtime.abort import abort_nccl
from trainer.runtime.attempt import Attempt
from trainer.runtime.process import Rank

_MOST_LINES, _MOST_CHARACTERS = 12, 2000
"""Limits of a message: torch lists every key of a state dict that does not match."""
_WAIT_S = 30.0
"""Longest wait for the other ranks. The node process kills them earlier (`supervisor.FAILED_GRACE_S`)."""
_ALWAYS = ("ImportError", "SyntaxError", "NameError", "NotImplementedError", "MisconfigurationException")
"""Exceptions that another attempt raises again, by class name, so that the classes need not be imported."""
_ALWAYS_FROM = ("hydra.errors", "omegaconf.errors")
"""Modules of such exceptions."""
_MISTAKES = (
    *("TypeError", "AttributeError", "LookupError", "ValueError", "ArithmeticError", "AssertionError"),
    *("FileNotFoundError", "NotADirectoryError", "IsADirectoryError", "PermissionError", "PicklingError"),
)
"""Exceptions that are mistakes in code, configuration or paths if they are raised before the first step."""
_TENSORS = re.compile(
    r"shapes? .*cannot be multiplied|size mismatch|sizes? of tensor|must match the size|is invalid for input of size"
    r"|Expected .*(size|dim|channels|tensor|dtype|scalar type|input)|expected scalar type|must have the same dtype"
    r"|Input type .* should be the same|No CUDA|Found no NVIDIA|CUDA .*not available|not compiled with CUDA"
    r"|invalid device ordinal|in loading state_dict|does not require grad|inplace operation|second time"
    r"|not implemented for|Can't call numpy|size of the target|batch.*size.*to match|Sizes of tensors must match",
    re.IGNORECASE,
)
"""Messages of a RuntimeError of torch about shapes, dtypes and devices that do not match."""
_ALWAYS_MESSAGES = re.compile(
    r"parameters (that )?were not used in producing the loss|^RuntimeError: Early stopping condition"
)
"""Messages of a RuntimeError that each attempt raises again.

The first is from trainer/strategies/ddp.py and DDP itself, the second from EarlyStopping whose metric is not logged.
"""
_REFUSING = (
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "deepspeed",
    "torch/optim",
    "torch/distributed/tensor",
)
"""Installed packages that refuse a configuration with an exception of any class, such as RuntimeError."""
_TRANSIENT = (
    "RollBack",
    "ConnectionError",
    "TimeoutError",
    "DistError",
    "OutOfMemoryError",
    "MemoryError",
    "BlockingIOError",
)
_TRANSIENT_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT, errno.ENETDOWN)
_WORKER_DIED = re.compile(r"DataLoader worker .*(killed|exited unexpectedly)|unable to open shared memory", re.I)
_IN_WORKER = re.compile(r"^Caught (\S+) in DataLoader worker process (\d+)\.\nOriginal Traceback .*?\n", re.S)
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.M)
_INSTALLED = ("site-packages", "dist-packages")
_OWN = Path(__file__).resolve().parents[1]


def conclude(error: BaseException, attempt: Attempt) -> int:
    """Record the exception that ended this rank, and return the exit code of its process (`docs/architecture.md`).

    After a failure that would be repeated it records the outcome of the job and waits until the other ranks have failed
    as well, or are killed. Otherwise torchrun would restart them.
    """
    abort_nccl()
    failure = _failure_of(error, attempt)
    print_traceback(error)
    try:
        attempt.directory.write_failure(attempt.rank.attempt, failure)
    except OSError:  # the disk is full; the log has the traceback
        pass
    if not failure.is_final:
        attempt.heartbeat.stop("failed")
        return JOB_FAILED
    attempt.fail(failure)
    _wait_for_others(attempt.directory, attempt.rank)
    return DONE


def restart(attempt: Attempt, reason: str) -> int:
    """Record why this rank ends so that torchrun restarts all ranks, and return the exit code of its process."""
    abort_nccl()
    attempt.directory.write_failure(attempt.rank.attempt, _failure(attempt, reason, None, is_final=False, mend=False))
    attempt.heartbeat.stop("failed")
    return JOB_FAILED


def reported(main: Callable[[], int]) -> int:
    """Run the `main` of a command on this rank, and record its exception for the terminal.

    The first rank that fails writes the message to the file in the environment variable `TRAINER_FAILURE`. The
    traceback goes to stderr, which is a log file then.
    """
    path = os.environ.get(FAILURE_VARIABLE)
    if path is None:
        return main()
    try:
        return main()
    except Exception as error:
        abort_nccl()
        print_traceback(error)
        reason, where = describe(error, Path(os.environ.get("PYTHONPATH", "").partition(os.pathsep)[0] or "."))
        code, fix = JOB_FAILED, f"in {where}" if where else ""
        if isinstance(error, TrainerError):
            code, reason, fix = error.code, error.message, error.fix
        if _is_transient(error, reason) and LOST_PEER.search(reason):
            time.sleep(1.0)  # the rank that failed first has the better message
        write_new(Path(path), records.dumps(CommandFailure(message=reason, fix=fix, code=code)))
        return code


def print_traceback(error: BaseException) -> None:
    """Print the traceback into the log of this rank, between the markers."""
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        print(f"{TRACEBACK_BEGINS}\n{text}\n{TRACEBACK_ENDS}", file=sys.stderr, flush=True)
    except OSError:  # the disk is full, and what follows must still be tried
        pass


def _failure_of(error: BaseException, attempt: Attempt) -> Failure:
    step, first = attempt.heartbeat.step, attempt.first_step
    reason, where = describe(error, attempt.directory.code_dir)
    has_moved, has_saved = first is not None and step > first, _has_checkpoint(attempt)
    mend = True
    if _ALWAYS_MESSAGES.search(reason):
        final, reason = True, reason.removeprefix("RuntimeError: ")
    elif isinstance(error, TrainerError):
        # Errors of checks during training need not be repeated when an older checkpoint is resumed.
        final, mend = True, isinstance(error, UserError) or not (isinstance(error, EnvironmentFault) or has_moved)
    elif _is_transient(error, reason):
        return _failure(attempt, reason, where, is_final=False, mend=False)
    elif _is_one_of(error, _ALWAYS) or type(error).__module__.startswith(_ALWAYS_FROM):
        final = True
    elif _is_one_of(error, _MISTAKES) or (isinstance(error, RuntimeError) and _TENSORS.search(reason)):
        final = not has_moved or not has_saved
    elif not has_moved and _is_refusal(error):
        final = True
    else:
        final, mend = False, not has_saved
    if not final and _is_repeated(attempt, reason, step):
        final = mend = True
    return _failure(attempt, reason, where, is_final=final, mend=mend)


def _failure(attempt: Attempt, reason: str, where: str | None, *, is_final: bool, mend: bool) -> Failure:
    return Failure(
        reason=reason,
        where=where,
        step=attempt.heartbeat.step,
        rank=attempt.rank.rank,
        time=time.time(),
        is_final=is_final,
        mend=mend,
    )


def describe(error: BaseException, code_dir: Path | None = None) -> tuple[str, str | None]:
    """Return the message of an exception, and the line of user code that raised it: `model.py:12, in forward: ...`."""
    if isinstance(error, TrainerError):
        return str(error), None
    name, message = type(error).__name__, str(error)
    in_worker = _IN_WORKER.match(message)
    if in_worker:
        where = _last_user_frame(_frames_in(message), code_dir)
        lines = [line for line in message.splitlines() if line and not line.startswith((" ", "Caught", "Original"))]
        message = "\n".join(lines) or f"{in_worker[1]} in DataLoader worker process {in_worker[2]}"
        return _short(message), where
    frames = [(frame.filename, frame.lineno or 0, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0, "<module>"))
        message = error.msg
    return _short(f"{name}: {message}" if message else name), _last_user_frame(frames, code_dir)


def _short(text: str) -> str:
    lines = text.strip().splitlines()
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"... {len(lines) - _MOST_LINES} more lines in the log"]
    kept = "\n".join(lines)
    return kept if len(kept) <= _MOST_CHARACTERS else f"{kept[:_MOST_CHARACTERS]} ..."


def _frames_in(text: str) -> list[tuple[str, int, str]]:
    return [(file, int(line), name) for file, line, name in _FRAME.findall(text)]


def _last_user_frame(frames: Iterable[tuple[str, int, str]], code_dir: Path | None) -> str | None:
    """Return the innermost frame that is not from an installed package or from this project."""
    for file, line, name in reversed(list(frames)):
        path = Path(file)
        if any(part in file for part in _INSTALLED) or file.startswith("<") or _is_below(path, _OWN):
            continue
        if file.startswith(os.path.dirname(os.__file__)):  # the standard library
            continue
        code = _line_of(path, line)
        shown = next((path.relative_to(base) for base in _roots(code_dir) if _is_below(path, base)), path)
        return f"{shown}:{line}" + (f", in {name}" if name != "<module>" else "") + (f": {code}" if code else "")
    return None


def _roots(code_dir: Path | None) -> Iterator[Path]:
    if code_dir is not None:
        yield code_dir
    yield Path.cwd()


def _is_below(path: Path, folder: Path) -> bool:
    return path.is_absolute() and path.is_relative_to(folder)


def _line_of(path: Path, number: int) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[number - 1].strip()[:120]
    except (OSError, IndexError):
        return ""


def _is_refusal(error: BaseException) -> bool:
    """Return whether the exception comes from a `raise` statement of a package that refuses configurations.

    Other exceptions of these packages come from an operation that failed in them, perhaps because of the machine.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    _, installed, inside = frames[-1].filename.rpartition("-packages/")
    is_known = bool(installed) and any(inside.startswith(f"{name}/") for name in _REFUSING)
    return is_known and (frames[-1].line or "").startswith("raise ")


def _is_one_of(error: BaseException, names: tuple[str, ...]) -> bool:
    return any(base.__name__ in names for base in type(error).__mro__)


def _is_transient(error: BaseException, reason: str) -> bool:
    """Return whether the machine, the network or another rank may be the cause."""
    if _is_one_of(error, _TRANSIENT) or _WORKER_DIED.search(reason):
        return True
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT_ERRNO
    return isinstance(error, RuntimeError) and LOST_PEER.search(reason) is not None


def _has_checkpoint(attempt: Attempt) -> bool:
    from trainer.checkpoint.store import CheckpointStore

    return bool(CheckpointStore(attempt.directory.checkpoints_dir).committed())


def _is_repeated(attempt: Attempt, reason: str, step: int) -> bool:
    """Return whether the previous attempt ended with the same message at the same step."""
    before = attempt.directory.failures(attempt.rank.attempt - 1)
    return any(one.step == step and _constant(one.reason) == _constant(reason) for one in before)


def _constant(text: str) -> str:
    """Return the text without addresses, which differ between processes."""
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def _wait_for_others(directory: RunDirectory, place: Rank) -> None:
    deadline = time.monotonic() + _WAIT_S
    records_of_all = [directory.failure_record(place.attempt, rank) for rank in range(place.world_size)]
    while time.monotonic() < deadline and not all(path.exists() for path in records_of_all):
        time.sleep(0.05)

"""The run directory, the only thing that the control plane and the workers share. See docs/architecture.md."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.shape import LaunchShape
from trainer.core import processes, records
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.files import (
    append_line,
    read_bytes,
    read_json,
    require_utf8,
    sync,
    write_atomic,
    write_new,
)
from trainer.runs import events
from trainer.runs.events import E, Event, StopRequested, StopRequester
from trainer.runs.heartbeats import Heartbeats
from trainer.runs.records import (
    AttemptOutcome,
    Failure,
    HeartbeatRecord,
    Launch,
    NodeUsage,
    PlannedRun,
    StepTiming,
    WandbRun,
)

if TYPE_CHECKING:
    from trainer.config.hydra_files import HydraFiles

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
"""Base 32: without digits that look like letters."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_NUMBER = re.compile(r"[0-9]{1,9}")
_USAGE = re.compile(r"attempt-([0-9]{1,9})-node-([0-9]{1,9})\.json")
_ID = re.compile(r"[a-z2-7]{8}")


class RunDirectory:
    """A run directory, `runs/<name>-<id>/`: its paths, and the reader and writer of each record.

    Creating the object reads nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self.name, _, self.id = self.path.name.rpartition("-")
        self.config_path = self.path / "config.yaml"
        self.overrides_path = self.path / "overrides.txt"
        self.manifest_path = self.path / "manifest.json"
        self.launch_path = self.path / "launch.json"
        self.events_path = self.path / "events.jsonl"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self.code_dir = self.path / "code"
        self.attempts_dir = self.path / "attempts"
        self.checkpoints_dir = self.path / "checkpoints"
        self.logs_dir = self.path / "logs"
        self.live_dir = self.path / "live"
        self.usage_dir = self.path / "usage"
        self.live = Heartbeats(self.live_dir)
        self.evaluations_dir = self.path / "evaluations"
        self.wandb_dir = self.path / "wandb"
        self.wandb_path = self.path / "wandb.json"
        self.plan_path = self.path / "plan.json"
        self.stop_request = self.path / "control" / "stop"

    @classmethod
    def create(
        cls,
        config: dict[str, Any],
        *,
        overrides: list[str],
        choices: dict[str, str],
        code_root: Path,
        hydra: HydraFiles | None = None,
    ) -> RunDirectory:
        """Create a run directory by an exclusive mkdir, and freeze the configuration and the code in it.

        Args:
            config: The resolved configuration.
            overrides: The command line.
            choices: Configuration group to the chosen option.
            code_root: The folder of the user's code.
            hydra: The files that Hydra would write; they and `config` have a placeholder for the run directory.

        Raises:
            UserError: The name cannot be the name of a folder, or a folder has a name that is not UTF-8.
            EnvironmentFault: The folder cannot be written.
        """
        from trainer.config.instantiate import freeze
        from trainer.runs.code_snapshot import snapshot
        from trainer.runs.manifest import manifest_of

        compose_s, began = processes.age_s(), time.monotonic()
        runs_dir = Path(config["runs_dir"]).expanduser()
        require_utf8(code_root, runs_dir)
        run = cls.new(runs_dir, config["name"])
        with _whole_or_absent(run.path):
            if hydra is not None:
                config = hydra.keep(run.path, config, code_root)
            write_atomic(run.config_path, freeze(config))
            write_atomic(run.overrides_path, shlex.join(overrides) + "\n")
            copied = snapshot(code_root, run.code_dir, leave_out=run.path.parent)
            manifest = manifest_of(choices, copied, config.get("data"), code_root)
            write_atomic(run.manifest_path, json.dumps({**manifest, "id": run.id}, indent=1))
            snapshot_s = round(time.monotonic() - began, 3)
            run.add_event(events.Created(overrides=overrides, compose_s=round(compose_s, 3), snapshot_s=snapshot_s))
        return run

    @classmethod
    def new(cls, runs_dir: Path, name: str, identity: str | None = None) -> RunDirectory:
        """Create a run directory with its empty folders. Raises as `create` does.

        Args:
            runs_dir: The folder of the runs.
            name: The name of the run.
            identity: An id of `new_identity`; None: a new one.
        """
        run = cls(_make_folder(runs_dir, name, identity))
        with _whole_or_absent(run.path):
            for folder in (run.live_dir, run.logs_dir, run.attempts_dir, run.checkpoints_dir, run.stop_request.parent):
                folder.mkdir()
        return run

    def exists(self) -> bool:
        """Return whether this is a run: a folder with a frozen configuration."""
        return os.path.isfile(self.config_path)  # not Path.is_file, which raises for a folder that may not be read

    def created_at(self) -> float:
        """Return when the run was created, in seconds since 1970: config.yaml is written first."""
        try:
            return self.config_path.stat().st_mtime
        except OSError:  # deleted since it was listed
            return 0.0

    def add_event(self, event: Event) -> None:
        """Append to `events.jsonl`."""
        append_line(self.events_path, records.dumps(event))

    def events(self) -> list[Event]:
        """Return every event, oldest first. A line that cannot be used is left out and reported on stderr."""
        try:
            text = read_bytes(self.events_path, end=True).decode(errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            records.skip(records.damaged(self.events_path, error.strerror or str(error)))
            return []
        return list(events.parse(text, self.events_path))

    def events_of(self, kind: type[E]) -> list[E]:
        """Return the events of one class, oldest first."""
        return [event for event in self.events() if isinstance(event, kind)]

    def config(self) -> dict[str, Any]:
        """Return the frozen configuration as plain dicts."""
        from trainer.config.instantiate import read_plain

        return read_plain(self.config_path)

    def launch(self) -> Launch:
        """Return the record of the launch; all its fields have their defaults before the first launch.

        Raises:
            BadRecord: `launch.json` is damaged or of a newer version.
        """
        return records.read(Launch, self.launch_path) or Launch()

    def shape(self) -> LaunchShape:
        """Return the requested shape of a launched run. Raises BadRecord as `launch` does."""
        shape = self.launch().shape
        if shape is None:
            raise records.damaged(self.launch_path, "shape is missing", "shape")
        return shape

    def write_launch(self, launch: Launch) -> None:
        """Replace `launch.json`. What was sealed about the run is no longer true (`runs/seal.py`)."""
        self.unseal()
        write_atomic(self.launch_path, records.dumps(launch, indent=1))

    def wandb(self) -> WandbRun | None:
        """Return the W&B run; None: no attempt has logged to W&B, or the record cannot be used."""
        return records.read_or_skip(WandbRun, self.wandb_path)

    def write_wandb(self, record: WandbRun) -> None:
        """Replace `wandb.json`."""
        write_atomic(self.wandb_path, records.dumps(record, indent=1))

    def plan(self) -> PlannedRun | None:
        """Return what was planned at the launch; None: it was not known, or the record cannot be used."""
        return records.read_or_skip(PlannedRun, self.plan_path)

    def write_plan(self, record: PlannedRun) -> None:
        """Write `plan.json`."""
        write_atomic(self.plan_path, records.dumps(record, indent=1))

    def evaluation_path(self, step: int, split: str) -> Path:
        """Return the file of an `Evaluation`."""
        return self.evaluations_dir / f"step-{step:08d}-{split}.json"

    def request_stop(self, who: StopRequester) -> None:
        """Ask the ranks to save a checkpoint and exit; `who` is recorded for the reader of the run directory."""
        if not self.stop_request.exists():
            self.stop_request.parent.mkdir(exist_ok=True)
            write_atomic(self.stop_request, who + "\n")
            self.add_event(StopRequested(reason=who))

    def unseal(self) -> None:
        """Delete `summary.json`, before something that it is derived from changes."""
        self.summary_path.unlink(missing_ok=True)

    def manifest(self) -> dict[str, Any]:
        """Return `manifest.json`; empty if there is none."""
        manifest: dict[str, Any] = read_json(self.manifest_path, {})
        return manifest

    def identity(self) -> str:
        """Return the id that the run was created with, which its checkpoints carry, also once the folder is renamed."""
        stored = self.manifest().get("id")
        return stored if isinstance(stored, str) and _ID.fullmatch(stored) else self.id

    def hash_seed(self) -> str:
        """Return PYTHONHASHSEED for every process of the run: its value at `fit`, or 0.

        Without it each process has another order of a set of strings, and of a vocabulary that is built from one.
        """
        return str(self.manifest().get("python_hash_seed") or os.environ.get("PYTHONHASHSEED") or "0")

    def attempt_record(self, attempt: int) -> Path:
        """Return the file with the outcome of an attempt."""
        return self.attempts_dir / f"attempt-{attempt:02d}.json"

    def attempt_logs(self, attempt: int) -> Path:
        """Return the folder of an attempt's logs."""
        return self.logs_dir / f"attempt-{attempt:02d}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """Return the log of a rank."""
        return self.attempt_logs(attempt) / f"rank-{rank}.log"

    def rank_logs(self, attempt: int) -> dict[int, Path]:
        """Return the logs of an attempt's ranks that exist, by rank."""
        return _by_rank(self.attempt_logs(attempt).glob("rank-*.log"))

    def node_log(self, attempt: int, node: int) -> Path:
        """Return the log of a node process and its torchrun; it has every attempt of the launch."""
        return self.attempt_logs(attempt) / f"node-{node}.log"

    def failure_record(self, attempt: int, rank: int) -> Path:
        """Return the file in which a rank records the exception that ends it."""
        return self.attempt_logs(attempt) / f"rank-{rank}.failure.json"

    def stacks(self, attempt: int, rank: int) -> Path:
        """Return the file to which a rank writes its stacks on request (SIGUSR2)."""
        return self.attempt_logs(attempt) / f"rank-{rank}.stacks"

    def collectives_request(self, attempt: int) -> Path:
        """Return the file that requests the trace of collectives from every rank of an attempt."""
        return self.live_dir / f"collectives-{attempt:02d}.request"

    def collectives_trace(self, attempt: int, rank: int) -> Path:
        """Return the file to which a rank writes its trace of collectives."""
        return self.attempt_logs(attempt) / f"rank-{rank}.collectives.json"

    def memory_snapshot(self, attempt: int, rank: int) -> Path:
        """Return the file to which a rank that has run out of GPU memory writes a memory snapshot."""
        return self.attempt_logs(attempt) / f"rank-{rank}.memory.pickle"

    def hang_found(self, attempt: int) -> Path:
        """Return the file by which the first node tells the others that the job hangs."""
        return self.stop_request.with_name(f"hang-{attempt:02d}.json")

    def samples_path(self, attempt: int, rank: int) -> Path:
        """Return the file to which `SampleLog` writes the samples that a rank has read."""
        return self.path / "samples" / f"attempt-{attempt:02d}-rank-{rank}.jsonl"

    def timing_path(self, rank: int) -> Path:
        """Return the file to which a rank of `trainer time` writes the times of its steps."""
        return self.path / "timing" / f"rank-{rank}.json"

    def timings(self) -> list[StepTiming]:
        """Return the measured steps of all ranks, by rank."""
        paths = _by_rank((self.path / "timing").glob("rank-*.json"))
        return [
            found for _, path in sorted(paths.items()) if (found := records.read_or_skip(StepTiming, path)) is not None
        ]

    def trace_path(self, attempt: int, rank: int) -> Path:
        """Return the file in which `trainer verify-resume` records the inputs of each batch of a rank."""
        return self.path / "trace" / f"attempt-{attempt:02d}-rank-{rank}.jsonl"

    def outcome(self, attempt: int) -> AttemptOutcome | None:
        """Return how an attempt ended; None if it is not recorded, or the record cannot be used."""
        return records.read_or_skip(AttemptOutcome, self.attempt_record(attempt), attempt=attempt)

    def attempts(self) -> list[AttemptOutcome]:
        """Return the outcome of every attempt that has one, oldest first.

        A record that cannot be used is left out and reported on stderr, as if nothing had been recorded.
        """
        outcomes = [self.outcome(number) for number in _numbers(self.attempts_dir)]
        return [outcome for outcome in outcomes if outcome is not None]

    def write_outcome(self, outcome: AttemptOutcome, *, replace: bool = True) -> bool:
        """Record how an attempt ended. Without `replace` an existing record stays; returns whether it was written."""
        self.unseal()
        self.attempts_dir.mkdir(exist_ok=True)
        path, text = self.attempt_record(outcome.attempt), records.dumps(outcome)
        if not replace:
            return write_new(path, text)
        write_atomic(path, text)
        return True

    def logged_attempts(self) -> list[int]:
        """Return the numbers of the attempts that have a folder of logs, in order."""
        return _numbers(self.logs_dir)

    def next_attempt(self) -> int:
        """Return one more than the largest number used, by a log folder or a recorded outcome."""
        return max([*self.logged_attempts(), *_numbers(self.attempts_dir)], default=-1) + 1

    def failures(self, attempt: int) -> list[Failure]:
        """Return the recorded exceptions that ended ranks of an attempt, by rank."""
        found = _by_rank(self.attempt_logs(attempt).glob("rank-*.failure.json"))
        failures = [records.read_or_skip(Failure, path) for path in found.values()]
        return [failure for failure in failures if failure is not None]

    def write_failure(self, attempt: int, failure: Failure) -> None:
        """Record the exception that ends a rank."""
        write_atomic(self.failure_record(attempt, failure.rank), records.dumps(failure))

    def heartbeat(self, rank: int) -> HeartbeatRecord | None:
        """Return the last heartbeat of a rank; None if there is none, or it cannot be used."""
        return self.live.of_rank(rank)

    def heartbeats(self) -> dict[int, HeartbeatRecord]:
        """Return the last heartbeat of every rank, by rank, including ranks that only an earlier attempt had."""
        return self.live.newest()

    def past_heartbeats(self, rank: int) -> list[HeartbeatRecord]:
        """Return the last heartbeat of a rank in each earlier attempt."""
        return self.live.past(rank)

    def last_step(self, attempt: int) -> int | None:
        """Return the step in the last heartbeat of rank 0 up to the end of an attempt, which the next may follow."""
        beats = [*self.past_heartbeats(0), *filter(None, [self.heartbeat(0)])]
        return next((beat.step for beat in reversed(beats) if beat.attempt <= attempt), None)

    def write_heartbeat(self, rank: int, beat: HeartbeatRecord) -> None:
        """Overwrite the heartbeat of a rank in place, in a job on one node."""
        self.live.write(rank, beat)

    def usage(self) -> list[NodeUsage]:
        """Return what every attempt has used on every node, oldest attempt first.

        A record that cannot be used is left out and reported on stderr.
        """
        found = []
        for path in sorted(self.usage_dir.glob("attempt-*-node-*.json")):
            if match := _USAGE.fullmatch(path.name):
                record = records.read_or_skip(NodeUsage, path, attempt=int(match[1]), node=int(match[2]))
                found += [record] if record is not None else []
        return found

    def write_usage(self, usage: NodeUsage) -> None:
        """Replace the record of what an attempt has used on a node."""
        self.unseal()
        self.usage_dir.mkdir(exist_ok=True)
        write_atomic(self.usage_dir / f"attempt-{usage.attempt:02d}-node-{usage.node}.json", records.dumps(usage))


def _numbers(folder: Path) -> list[int]:
    """Return the numbers NN of `attempt-NN` and `attempt-NN.json` in a folder, in order."""
    names = (path.name.removesuffix(".json").removeprefix("attempt-") for path in folder.glob("attempt-*"))
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


def _by_rank(paths: Iterable[Path]) -> dict[int, Path]:
    """Return the files named `rank-R.*` by rank, in order."""
    ranks = {path.name.partition(".")[0].removeprefix("rank-"): path for path in paths}
    return dict(sorted((int(rank), path) for rank, path in ranks.items() if _NUMBER.fullmatch(rank)))


def new_identity() -> str:
    """Return a random id for a run."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(8))


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[None]:
    """Delete a new run directory that could not be completed.

    Raises:
        EnvironmentFault: The operating system refused it.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_create(path.parent, error) from error
        raise


def _cannot_create(runs_dir: Path, error: OSError) -> EnvironmentFault:
    what, fix = error.strerror or str(error), "set runs_dir to a folder you can write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = f"free some space, or {fix}"
    elif error.filename and not _is_on_the_way(Path(os.path.abspath(error.filename)), runs_dir.absolute()):
        what, fix = f"{what}: {error.filename}", "get permission for it, or remove it"  # of the user's code
    return EnvironmentFault(f"cannot create a run directory in {runs_dir}: {what}", fix)


def _is_on_the_way(path: Path, runs_dir: Path) -> bool:
    return path == runs_dir or path in runs_dir.parents or runs_dir in path.parents


def _make_folder(runs_dir: Path, name: str, identity: str | None) -> Path:
    """Create `<runs_dir>/<name>-<id>`. The mkdir is exclusive, so that two launches never share one."""
    if not _NAME.fullmatch(name) or name.startswith((".", "-")):
        raise UserError(f"name={name!r} cannot name a folder", "use letters, digits, '.', '_' and '-'")
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            path = runs_dir / f"{name}-{identity or new_identity()}"
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                if identity is not None:
                    raise
                continue
            sync(runs_dir)
            return path
    except OSError as error:
        raise _cannot_create(runs_dir, error) from None

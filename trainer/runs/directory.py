"""The run directory: the only thing that the control plane and the workers share. See docs/architecture.md."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.files import append_line, fsync_folder, read_json, write_atomic

if TYPE_CHECKING:
    from trainer.config.hydra_files import HydraFiles

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
"""Base 32 without the digits that look like letters."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class RunDirectory:
    """`runs/<name>-<id>/`. Opening one reads nothing."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self.name, _, self.id = self.path.name.rpartition("-")
        self.config_path = self.path / "config.yaml"
        self.overrides_path = self.path / "overrides.txt"
        self.manifest_path = self.path / "manifest.json"
        self.launch_path = self.path / "launch.json"
        self.events_path = self.path / "events.jsonl"
        self.metrics_path = self.path / "metrics.jsonl"
        self.code_dir = self.path / "code"
        self.attempts_dir = self.path / "attempts"
        self.checkpoints_dir = self.path / "checkpoints"
        self.logs_dir = self.path / "logs"
        self.live_dir = self.path / "live"
        self.wandb_dir = self.path / "wandb"
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
        """Make a new one by an exclusive mkdir and freeze the configuration and the code into it.

        `hydra`: with the files that Hydra would write; `config`, too, names the run directory by its placeholder.
        Raises UserError for a name that cannot be one of a folder, EnvironmentFault where it cannot be written.
        """
        from trainer.config.instantiate import freeze
        from trainer.runs.code_snapshot import snapshot
        from trainer.runs.manifest import manifest_of

        run = cls(_make_folder(Path(config["runs_dir"]).expanduser(), config["name"]))
        for folder in (run.live_dir, run.logs_dir, run.attempts_dir, run.checkpoints_dir, run.stop_request.parent):
            folder.mkdir()
        if hydra is not None:
            config = hydra.keep(run.path, config, code_root)
        write_atomic(run.config_path, freeze(config))
        write_atomic(run.overrides_path, shlex.join(overrides) + "\n")
        taken = snapshot(code_root, run.code_dir, leave_out=run.path.parent)
        write_atomic(run.manifest_path, json.dumps(manifest_of(choices, taken), indent=1))
        run.event("created", overrides=overrides)
        return run

    def exists(self) -> bool:
        """Whether this is a run: a folder with a frozen configuration."""
        return self.config_path.is_file()

    def created_at(self) -> float:
        """Seconds since 1970. config.yaml is written once, when the run is made."""
        return self.config_path.stat().st_mtime

    def event(self, name: str, **fields: Any) -> None:
        """Append to `events.jsonl`."""
        append_line(self.events_path, json.dumps({"time": round(time.time(), 3), "event": name, **fields}))

    def events(self) -> list[dict[str, Any]]:
        """Every event, oldest first; a line cut short by a crash is left out."""
        found = []
        try:
            lines = self.events_path.read_text().splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def config(self) -> dict[str, Any]:
        """The frozen configuration as plain dicts."""
        from trainer.config.instantiate import read_plain

        return read_plain(self.config_path)

    def launch(self) -> dict[str, Any]:
        """Who started it where; empty before the first launch."""
        return read_json(self.launch_path, {})

    def manifest(self) -> dict[str, Any]:
        return read_json(self.manifest_path, {})

    def collectives_request(self, attempt: int) -> Path:
        """A file that asks every rank of this attempt for its trace of collectives."""
        return self.live_dir / f"collectives-{attempt:02d}.request"

    def collectives_trace(self, attempt: int, rank: int) -> Path:
        return self.logs_dir / f"attempt-{attempt:02d}" / f"rank-{rank}.collectives.json"

    def hash_seed(self) -> str:
        """PYTHONHASHSEED for every process of the run: what it was at `fit`, or 0.

        Without it the order of a set of texts, and a vocabulary made of one, is another in each process.
        """
        return str(self.manifest().get("python_hash_seed") or os.environ.get("PYTHONHASHSEED") or "0")

    def attempts(self) -> list[dict[str, Any]]:
        """What is recorded of each attempt's end, with its number as `attempt`, oldest first."""
        found = []
        for path in sorted(self.attempts_dir.glob("attempt-*.json")):
            try:
                record = read_json(path)
            except UserError:  # damaged: as if the attempt had not come to say it
                continue
            if isinstance(record, dict):
                found.append({"attempt": int(path.stem.rpartition("-")[2]), **record})
        return found

    def next_attempt(self) -> int:
        """One more than the largest number used, by a log folder or a recorded end."""
        used = [-1]
        for folder in (self.logs_dir, self.attempts_dir):
            used += [int(path.stem.rpartition("-")[2]) for path in folder.glob("attempt-*")]
        return max(used) + 1


def _make_folder(runs_dir: Path, name: str) -> Path:
    """`<runs_dir>/<name>-<id>`; the mkdir is exclusive, so no two launches can ever share one."""
    if not _NAME.fullmatch(name) or name.startswith((".", "-")):
        raise UserError(f"name={name!r} cannot name a folder", "use letters, digits, '.', '_' and '-'")
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            identity = "".join(secrets.choice(_ALPHABET) for _ in range(8))
            path = runs_dir / f"{name}-{identity}"
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                continue
            fsync_folder(runs_dir)
            return path
    except OSError as error:
        raise EnvironmentFault(
            f"cannot make a run directory in {runs_dir}: {error.strerror}", "set runs_dir to a folder you can write"
        ) from None

"""One run in a list of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.runs.facts import Facts
from trainer.runs.metric_ranges import Ranges
from trainer.runs.state import ACTIVE


class Row:
    """What is known about a run."""

    def __init__(
        self, folder: str, facts: Facts, config: Callable[[], Mapping[str, Any]], ranges: Callable[[], Ranges]
    ) -> None:
        self.folder = folder
        """The run directory."""
        self.facts = facts
        """The keys of `trainer show --json`."""
        self.cursor = 0
        """Position of its last change; see `Index.since`."""
        self.read_config = config
        """Returns `config` without keeping it: of a thousand runs it takes as much memory as all else."""
        self._read_ranges = ranges

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.folder)

    @property
    def id(self) -> str:
        """The id of the run."""
        return self.folder.rpartition("-")[2]

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.rpartition("/")[2].rpartition("-")[0]

    @property
    def state(self) -> str:
        """One of `runs.state.STATES`."""
        return str(self.facts["state"])

    @property
    def is_active(self) -> bool:
        """Whether the run is in the queue or has processes."""
        return self.state in ACTIVE

    @property
    def metrics(self) -> Mapping[str, float | str]:
        """The last value of each metric."""
        metrics: Mapping[str, float | str] = self.facts["metrics"]
        return metrics

    @property
    def tags(self) -> list[str]:
        """`tracking.tags`."""
        return list(self.facts["tags"])

    @property
    def started(self) -> float | None:
        """When the first attempt started, in seconds since 1970."""
        started: float | None = self.facts["started"]
        return started

    @property
    def ended(self) -> float | None:
        """When the last attempt ended; None while the run is active."""
        ended: float | None = self.facts["ended"]
        return ended

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The chosen groups, and the leaves of the frozen configuration by their dotted keys."""
        return self.read_config()

    @cached_property
    def ranges(self) -> Ranges:
        """The last, lowest and highest value of each metric. Of an active run they are read when this is called."""
        return self._read_ranges()

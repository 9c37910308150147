"""Which rank has not come to a collective that others wait in, by the ranks' flight recorders. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.runs.directory import RunDirectory


def request_of(run: RunDirectory, attempt: int) -> Path:
    """A file that asks every rank of this attempt for its trace."""
    return run.live_dir / f"collectives-{attempt:02d}.request"


def trace_of(run: RunDirectory, attempt: int, rank: int) -> Path:
    return run.logs_dir / f"attempt-{attempt:02d}" / f"rank-{rank}.collectives.json"


@dataclass(frozen=True)
class Missing:
    """One collective that not all ranks have come to."""

    ranks: list[int]
    """Those that have not."""
    waiting: list[int]
    what: str
    """`gloo:all_reduce of Float [7], number 4 of group 0 (gloo)`"""

    def __str__(self) -> str:
        have, wait = ("has" if len(self.ranks) == 1 else "have"), ("waits" if len(self.waiting) == 1 else "wait")
        return f"{_ranks(self.ranks)} {have} not come to {self.what}, in which {_ranks(self.waiting)} {wait}"


def missing(traces: dict[int, Path]) -> Missing | None:
    """Of the collectives in which a rank waits, the oldest that another rank of the group has not begun.

    `traces`: rank to its file; one that is not there says nothing. A rank is of a group when it has begun a
    collective of it before.
    """
    begun: dict[str, dict[int, int]] = {}
    """Group to the last number that each rank has begun."""
    open_entries: list[tuple[int, str, int, int, dict[str, Any]]] = []
    for rank, path in traces.items():
        for entry in _entries(path):
            group, number = _group_of(entry), int(entry["collective_seq_id"])
            begun.setdefault(group, {})[rank] = max(number, begun.get(group, {}).get(rank, 0))
            if not entry.get("retired"):
                open_entries.append((int(entry["time_created_ns"]), group, number, rank, entry))
    for _, group, number, _, entry in sorted(open_entries, key=lambda one: one[0]):
        behind = sorted(rank for rank, last in begun[group].items() if last < number)
        if behind:
            waiting = sorted({one[3] for one in open_entries if one[1:3] == (group, number)})
            return Missing(behind, waiting, f"{_described(entry)}, number {number} of group {group}")
    return None


def _entries(path: Path) -> Iterable[dict[str, Any]]:
    """Collectives only: what is sent from one rank to another has numbers of its own."""
    try:
        entries = json.loads(path.read_text())["entries"]
    except (OSError, ValueError, KeyError):
        return []
    return [entry for entry in entries if not entry.get("is_p2p")]


def _group_of(entry: dict[str, Any]) -> str:
    """gloo and NCCL count apart, also in one group of both."""
    return f"{entry['process_group'][0]} ({str(entry.get('profiling_name')).partition(':')[0]})"


def _described(entry: dict[str, Any]) -> str:
    inputs = zip(entry.get("input_dtypes", []), entry.get("input_sizes", []), strict=False)
    told = ", ".join(f"{dtype} {size}" for dtype, size in inputs)
    return f"{entry.get('profiling_name', 'a collective')}" + (f" of {told}" if told else "")


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"

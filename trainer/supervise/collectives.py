"""Find the rank that has not entered a collective in which others wait, from flight recorder traces.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Missing:
    """A collective that not all ranks have entered."""

    ranks: list[int]
    """Ranks that have not entered it."""
    waiting: list[int]
    """Ranks that wait in it."""
    what: str
    """The collective: `gloo:all_reduce of Float [7], number 4 of group 0 (gloo)`."""

    def __str__(self) -> str:
        have, wait = ("has" if len(self.ranks) == 1 else "have"), ("waits" if len(self.waiting) == 1 else "wait")
        return f"{_ranks(self.ranks)} {have} not entered {self.what}, in which {_ranks(self.waiting)} {wait}"


def missing(traces: dict[int, Path]) -> Missing | None:
    """Return the oldest collective that a rank has not entered although it waits for no other rank itself.

    A rank belongs to a process group when it has begun a collective of that group before.

    Args:
        traces: Rank to its trace file. A missing or unreadable file is ignored.
    """
    calls = [_Call.of(rank, entry) for rank, path in traces.items() for entry in _entries(path)]
    begun: dict[str, dict[int, int]] = {}
    """Group to rank to the number of the last collective it has begun."""
    done: dict[tuple[str, int], int] = {}
    """Group and rank to the number of the last collective it has completed. An earlier one cannot be waiting, whatever
    its entry says."""
    for call in calls:
        ranks = begun.setdefault(call.group, {})
        ranks[call.rank] = max(call.number, ranks.get(call.rank, 0))
        if call.is_done:
            done[call.group, call.rank] = max(call.number, done.get((call.group, call.rank), 0))
    waits = [call for call in calls if call.number > done.get((call.group, call.rank), 0)]
    late = {call: sorted(rank for rank, last in begun[call.group].items() if last < call.number) for call in waits}
    waiting = {call.rank for call, ranks in late.items() if ranks}
    for call in sorted(waits, key=lambda call: call.began_ns):
        # A late rank that waits elsewhere is not the culprit: those it waits for are, or the ranks wait in a circle.
        if culprits := [rank for rank in late[call] if rank not in waiting]:
            same = sorted({one.rank for one in waits if (one.group, one.number) == (call.group, call.number)})
            return Missing(culprits, same, f"{call.what}, number {call.number} of group {call.group}")
    return None


@dataclass(frozen=True)
class _Call:
    """The entry of one rank for one collective."""

    rank: int
    group: str
    number: int
    is_done: bool
    began_ns: int
    what: str

    @staticmethod
    def of(rank: int, entry: dict[str, Any]) -> _Call:
        return _Call(
            rank,
            _group_of(entry),
            int(entry["collective_seq_id"]),
            bool(entry.get("retired")),
            int(entry["time_created_ns"]),
            _described(entry),
        )


def _entries(path: Path) -> Iterable[dict[str, Any]]:
    """Return the collectives of a trace. Point-to-point operations are left out: they have their own numbering."""
    try:
        entries = json.loads(path.read_text())["entries"]
    except (OSError, ValueError, KeyError):
        return []
    return [entry for entry in entries if not entry.get("is_p2p")]


def _group_of(entry: dict[str, Any]) -> str:
    """Return a name for the process group and backend of an entry.

    The backend is part of the name because gloo and NCCL number their collectives separately within one group. The
    name of a subgroup is a hash, so its description is added.
    """
    name, description = [*entry["process_group"], ""][:2]
    detail = f" {description}" if description not in ("", "undefined", "default_pg") else ""
    return f"{name[:8]}{detail} ({str(entry.get('profiling_name')).partition(':')[0]})"


def _described(entry: dict[str, Any]) -> str:
    inputs = zip(entry.get("input_dtypes", []), entry.get("input_sizes", []), strict=False)
    shapes = ", ".join(f"{dtype} {size}" for dtype, size in inputs)
    return f"{entry.get('profiling_name', 'a collective')}" + (f" of {shapes}" if shapes else "")


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"

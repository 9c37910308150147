"""Which rank has not come to a collective that others wait in, by the ranks' flight recorders. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    """Of the collectives in which a rank waits, the oldest that a rank of the group has not begun which itself waits
    for nobody.

    `traces`: rank to its file; one that is not there says nothing. A rank is of a group when it has begun a
    collective of it before.
    """
    calls = [_Call.of(rank, entry) for rank, path in traces.items() for entry in _entries(path)]
    begun: dict[str, dict[int, int]] = {}
    """Group to the last number that each rank has begun."""
    done: dict[tuple[str, int], int] = {}
    """Group and rank to the last number that it has ended: one that ended never waits, whatever its record says."""
    for call in calls:
        ranks = begun.setdefault(call.group, {})
        ranks[call.rank] = max(call.number, ranks.get(call.rank, 0))
        if call.is_done:
            done[call.group, call.rank] = max(call.number, done.get((call.group, call.rank), 0))
    waits = [call for call in calls if call.number > done.get((call.group, call.rank), 0)]
    late = {call: sorted(rank for rank, last in begun[call.group].items() if last < call.number) for call in waits}
    waiting = {call.rank for call, ranks in late.items() if ranks}
    for call in sorted(waits, key=lambda call: call.began_ns):
        # Who waits for others is not the one to name: they are, or the ranks wait for each other and none is.
        if culprits := [rank for rank in late[call] if rank not in waiting]:
            same = sorted({one.rank for one in waits if (one.group, one.number) == (call.group, call.number)})
            return Missing(culprits, same, f"{call.what}, number {call.number} of group {call.group}")
    return None


@dataclass(frozen=True)
class _Call:
    """One rank's part of a collective."""

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
    """Collectives only: what is sent from one rank to another has numbers of its own."""
    try:
        entries = json.loads(path.read_text())["entries"]
    except (OSError, ValueError, KeyError):
        return []
    return [entry for entry in entries if not entry.get("is_p2p")]


def _group_of(entry: dict[str, Any]) -> str:
    """gloo and NCCL count apart, also in one group of both. Of groups of some ranks the name is a hash, and the
    description says more."""
    name, description = [*entry["process_group"], ""][:2]
    told = f" {description}" if description not in ("", "undefined", "default_pg") else ""
    return f"{name[:8]}{told} ({str(entry.get('profiling_name')).partition(':')[0]})"


def _described(entry: dict[str, Any]) -> str:
    inputs = zip(entry.get("input_dtypes", []), entry.get("input_sizes", []), strict=False)
    told = ", ".join(f"{dtype} {size}" for dtype, size in inputs)
    return f"{entry.get('profiling_name', 'a collective')}" + (f" of {told}" if told else "")


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"

"""Noticing that nothing moves any more, and which rank is to blame, from the heartbeats and the Python stacks.

A rank that hangs takes the others along at their next collective, so the job stands as a whole: no rank changes its
step or phase. Their heartbeats go on, because a thread writes them. The node then asks each of its ranks for the stacks
of all its threads (SIGUSR2, `faulthandler`; they go to the rank's log) and kills them; what restarts workers that died
restarts these.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.cluster import processes
from trainer.cluster.cause import Cause
from trainer.errors import HUNG

STACKS_SIGNAL = signal.SIGUSR2
"""`trainer/worker/process.py` registers faulthandler for it."""
LOOK_EVERY_S = 1.0
_STACKS_S = 3.0
"""How long to wait for the stacks; a process that is stuck in the kernel gives none."""
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
_COLLECTIVE = re.compile(r"/torch/distributed/|/torch/autograd/|/deepspeed/comm/")
"""Where a rank stands that waits for the others: DDP's and FSDP's collectives run inside the backward pass."""


@dataclass(frozen=True)
class Limits:
    """`resilience.hang_*`; seconds."""

    factor: float
    least_s: float
    slow_s: float

    @staticmethod
    def of(resilience: Mapping[str, Any]) -> Limits | None:
        """None where hangs are not looked for."""
        factor = resilience.get("hang_factor")
        if factor is None:
            return None
        return Limits(float(factor), float(resilience["hang_min_s"]), float(resilience["hang_slow_s"]))


class HangWatch:
    """Follows the heartbeats of one attempt after another. Times are this node's monotonic clock: a clock that is set
    back or forward, here or on another node, is no hang."""

    def __init__(self, live_dir: Path, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._live_dir = live_dir
        self._limits = limits
        self._clock = clock
        self._attempt = -1
        self._moved = clock()
        self._looked = clock()
        self._seen: dict[int, tuple[int, str]] = {}
        self._step_s: deque[float] = deque(maxlen=32)

    def stands_since(self, attempt: int) -> float | None:
        """For how many seconds nothing has moved, once that is a hang. Looks once a second, however often it is asked."""
        now = self._clock()
        if now - self._looked < LOOK_EVERY_S and attempt == self._attempt:
            return None
        self._looked = now
        if attempt != self._attempt:
            self._attempt, self._moved, self._seen = attempt, now, {}
            self._step_s.clear()
        seen = {
            rank: (int(beat["step"]), str(beat["phase"]))
            for rank, beat in heartbeats(self._live_dir).items()
            if beat.get("attempt") == attempt
        }
        if seen != self._seen:
            self._measure(seen, now)
            self._seen, self._moved = seen, now
            return None
        stood_s = now - self._moved
        return stood_s if stood_s > self.allowance_s else None

    @property
    def allowance_s(self) -> float:
        """How long it may stand as it stands now."""
        training = bool(self._seen) and all(phase == "train" for _, phase in self._seen.values())
        if not training or not self._step_s:
            return max(self._limits.slow_s, self._limits.least_s)
        return max(self._limits.least_s, self._limits.factor * statistics.median(self._step_s))

    def _measure(self, seen: Mapping[int, tuple[int, str]], now: float) -> None:
        """Seconds a step, between two looks of which both saw training."""
        if not self._seen or any(phase != "train" for _, phase in [*self._seen.values(), *seen.values()]):
            return
        steps = max(step for step, _ in seen.values()) - max(step for step, _ in self._seen.values())
        if steps > 0:
            self._step_s.append((now - self._moved) / steps)


def heartbeats(live_dir: Path) -> dict[int, dict[str, Any]]:
    """Rank to its last heartbeat."""
    found = {}
    for path in live_dir.glob("rank-*.json"):
        try:
            found[int(path.stem.removeprefix("rank-"))] = dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def dump_stacks(pids: list[int], attempt_dir: Path) -> dict[int, list[str]]:
    """Have these processes write their stacks into their logs; rank to the frames of its main thread, innermost first.

    Reads the logs of all ranks, those of other nodes too, which are asked by their own node.
    """
    logs = {int(path.stem.removeprefix("rank-")): path for path in attempt_dir.glob("rank-*.log")}
    sizes = {rank: path.stat().st_size for rank, path in logs.items()}
    for pid in pids:
        if processes.handles(pid, STACKS_SIGNAL):
            processes.send(pid, STACKS_SIGNAL)
    deadline = time.monotonic() + _STACKS_S
    stacks: dict[int, list[str]] = {}
    while len(stacks) < len(logs) and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank, path in logs.items():
            frames = main_thread(path.read_bytes()[sizes[rank] :].decode(errors="replace"))
            if frames:
                stacks[rank] = frames
    return stacks


def main_thread(dump: str) -> list[str]:
    """The frames of the main thread, innermost first: `faulthandler` writes it last, and marks it as current where
    the signal found it running Python."""
    threads = re.split(r"^(?:Current thread|Thread) .*:\n", dump, flags=re.MULTILINE)[1:]
    return [line for line in threads[-1].splitlines() if _FRAME.match(line)] if threads else []


def blame(beats: Mapping[int, Mapping[str, Any]], stacks: Mapping[int, list[str]], stood_s: float) -> Cause:
    """Name the rank that is behind: of those with the fewest steps one that is not waiting in a collective."""
    fewest = min((int(beat["step"]) for beat in beats.values()), default=0)
    behind = sorted(rank for rank, beat in beats.items() if int(beat["step"]) == fewest)
    alone = [rank for rank in behind if rank in stacks and not _waits(stacks[rank])]
    silent = [rank for rank in behind if rank not in stacks]
    suspects = alone or silent or behind or [0]
    rank = suspects[0]
    beat = beats.get(rank, {})
    frames = stacks.get(rank, [])
    if len(suspects) == len(beats) > 1:
        who = f"all {len(beats)} ranks"
    else:
        who = ", ".join(f"rank {suspect}" for suspect in suspects[:4]) + (" and others" if len(suspects) > 4 else "")
    where = f", {_place(frames[0])}" if frames else ", which gave no Python stack"
    reason = f"hang: nothing moved for {stood_s:.0f} s; {who} on {beat.get('host', '?')} at step {fewest}{where}"
    return Cause(reason, frames[:8], None, HUNG, rank, beat.get("host"))


def _waits(frames: list[str]) -> bool:
    return any(_COLLECTIVE.search(frame) for frame in frames[:6])


def _place(frame: str) -> str:
    match = _FRAME.match(frame)
    assert match is not None
    return f"in {match['function']} ({match['file']}:{match['line']})"

"""Seal what is known about a run that ended into `summary.json`, so that a list of runs reads one file per run.

A sealed summary is either true or not used. It lists the files and folders that it was derived from with their `stat`
signatures, compared by equality only: neither the reader's clock nor that of a file server matters.

- Whoever changes a run deletes its seal first (`RunDirectory.unseal`); a command that takes long, such as `trainer
  evaluate`, also leaves a mark for that time (`changing`), so that nobody seals in between. The mark of a command that
  was killed counts no more.
- A reader compares the signatures of the launch and of the folder of checkpoints, so that it notices what other
  programs do: `rm -r` of a checkpoint, an older release that resumes the run, a copy (other inodes). The file states
  its own signature, so that a reader that remembers its content (`row_cache.py`) need not open it again.
- A reader seals only what nobody has changed for some seconds (`ending.py`). The file system's own clock (the time of
  the temporary file) must be past every signature: a change after the seal then has another time. Where times have
  whole seconds, the seal waits for a later reader.

Nothing waits for the disk: a summary that a crash of the machine damages fails its checksum and is derived anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trainer import __version__
from trainer.core import processes, records
from trainer.core.files import parse_json, read_text
from trainer.core.secrets import mask
from trainer.runs.directory import RunDirectory
from trainer.runs.facts import Facts, is_well_formed, with_absolute_paths, with_relative_paths
from trainer.runs.metric_ranges import MetricRange, Ranges, read_ranges

Signature = list[int]
"""Time of the last change in ns, bytes and inode of a file or folder; empty if there is none."""

FILE = "summary.json"
SOURCES = (
    "launch.json",
    "checkpoints",
    "attempts",
    "config.yaml",
    "evaluations",
    "events.jsonl",
    "live",
    "logs",
    "manifest.json",
    "metrics.jsonl",
    "usage",
    "wandb.json",
)
"""What a summary is derived from, relative to the run directory."""
COMPARED = SOURCES[:2]
"""What every reader compares: two calls, beside the one for `summary.json`."""
SCANNED_BYTES = 32 << 20
"""Of larger metrics no ranges are sealed: reading them takes longer than a second."""
_TICK_NS = 20 * 10**6
"""Granularity of the times of a file system that has fractions of a second: the timer tick, 1 to 10 ms."""
_COARSEST_NS = 2 * 10**9
"""The same of FAT, the coarsest."""
_MARK = ".changing-"
_MARK_LASTS_S = 86400.0
_MOST_BYTES = 16 << 20
_CHUNK = 1 << 18
_CHECKSUM = re.compile(rb', "crc32": ([0-9]{1,10})\}\s*')
_63_BITS = (1 << 63) - 1
_HUGE = re.compile(rb"[:\[,] ?-?[0-9]{20,}[,\]}]")
"""An integer of more than 63 bits, which no fact is: another program may have written the file."""
_END_OF_FACTS = b",\n"
"""No text of JSON has a line feed."""
_Part = TypeVar("_Part", bound="SealedFacts")


@dataclass(frozen=True, kw_only=True)
class SealedFacts:
    """The first line of `summary.json`, which is all that most lists of runs need."""

    release: str
    """The version of trainer: another one may derive other facts."""
    folder: str
    """Name of the run directory: a renamed one is another run."""
    written: int
    """Time that the file was given, in ns since 1970: a multiple of two seconds, which every file system can store."""
    inode: int
    is_over: bool
    """Whether no scheduler runs the job again; otherwise it is asked each time."""
    sources: dict[str, Any]
    """The signatures of `SOURCES` before they were read."""
    facts: dict[str, Any]
    """`summary()`; paths of checkpoints are relative to the run directory."""


@dataclass(frozen=True, kw_only=True)
class SealedSummary(SealedFacts):
    """What is known about a run that ended: `summary.json`."""

    config: dict[str, Any] = field(default_factory=dict)
    """The chosen groups, and the leaves of the frozen configuration by their dotted keys."""
    ranges: dict[str, Any] | None = None
    """The `MetricRange` of each metric, validated by `ranges_of`; null if there were too many to read in passing."""


def signature(path: str | Path) -> Signature:
    """Return the signature of a file or folder."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return []
    return [found.st_mtime_ns, found.st_size, found.st_ino & _63_BITS]


def seen_now(folder: str, names: Iterable[str]) -> dict[str, Signature]:
    """Return the signatures of files and folders in a run directory."""
    return {name: signature(f"{folder}/{name}") for name in names}


def signatures(run: RunDirectory) -> dict[str, Signature]:
    """Return the signature of everything that a summary is derived from."""
    return seen_now(str(run.path), SOURCES)


class Sealed(NamedTuple):
    """A sealed summary that was read."""

    seen: dict[str, Signature]
    """The signatures of files and folders under which it is true."""
    is_over: bool
    """As in `SealedFacts`."""
    facts: Facts
    """Paths are absolute."""
    content: bytes
    """The content of the file, for `parse`."""


def read(folder: str) -> Sealed | None:
    """Return the sealed summary of a run directory; None if there is none that is true now. Three calls."""
    content = _read_file(folder) or b""
    found = _first_line(content) if _is_whole(content) else None
    if found is None or found.release != __version__ or found.folder != os.path.basename(folder):
        return None
    seen = seen_now(folder, COMPARED)
    if any(now != found.sources.get(name) for name, now in seen.items()):
        return None
    return _sealed(content, found, {FILE: [found.written, len(content), found.inode], **seen}, folder)


def sealed_from(content: bytes, seen: dict[str, Signature], folder: str) -> Sealed | None:
    """Return the sealed summary of a run directory from its content, which is kept elsewhere; None: it is damaged."""
    found = _first_line(content)
    return None if found is None else _sealed(content, found, seen, folder)


def _sealed(content: bytes, found: SealedFacts, seen: dict[str, Signature], folder: str) -> Sealed | None:
    """Return the sealed summary with absolute paths; None if its facts are not those of this release."""
    if not is_well_formed(found.facts):
        return None
    return Sealed(seen, found.is_over, with_absolute_paths(found.facts, folder), content)


def ranges_of(summary: SealedSummary) -> Ranges | None:
    """Return the values of each metric; None if they are not sealed. Most lists of runs do not need them."""
    try:
        sealed = records.from_json(_Sealed, {"ranges": summary.ranges}, FILE)
    except records.BadRecord:
        return None
    return sealed.ranges


@dataclass(frozen=True)
class _Sealed:
    ranges: dict[str, MetricRange] | None


def _ranges_to_seal(run: RunDirectory) -> dict[str, Any] | None:
    """Return the ranges of the metrics, unless there are too many to read in passing."""
    found = signature(run.metrics_path)
    if found and found[1] > SCANNED_BYTES:
        return None
    return {name: records.to_json(values) for name, values in read_ranges(run.metrics_path).items()}


def summary_of(
    run: RunDirectory, facts: Facts, config: Mapping[str, Any], sources: dict[str, Signature], is_over: bool
) -> SealedSummary:
    """Return the summary of a run that ended.

    Args:
        run: The run.
        facts: Its `summary()`.
        config: Its flat configuration.
        sources: `signatures` from before the facts were read.
        is_over: As in `SealedSummary`.
    """
    return SealedSummary(
        release=__version__,
        folder=run.path.name,
        written=time.time_ns() // _COARSEST_NS * _COARSEST_NS,
        inode=0,
        is_over=is_over,
        sources=sources,
        facts=with_relative_paths(facts, run),
        config=dict(config),
        ranges=_ranges_to_seal(run),
    )


def write(run: RunDirectory, summary: SealedSummary, waits_ns: int = 0) -> bool:
    """Seal a run, if nothing has changed for `waits_ns`, and return whether it was sealed."""
    try:
        return _replace(run, summary, waits_ns)
    except OSError:  # a read-only or full file system
        return False


def is_being_changed(run: RunDirectory) -> bool:
    """Return whether a command that changes the run has left its mark and still lives."""
    with os.scandir(run.path) as entries:
        return any([_is_live_mark(entry) for entry in entries if entry.name.startswith(_MARK)])


@contextlib.contextmanager
def changing(run: RunDirectory) -> Iterator[None]:
    """Delete the seal and prevent a new one while the block changes the run, also where it is killed."""
    mark = run.path / f"{_MARK}{socket.gethostname()}-{os.getpid()}"
    with contextlib.suppress(OSError):  # not ours: then it was never sealed by us
        mark.write_text(f"{processes.boot_id()} {processes.started_ticks(os.getpid())}")
        run.unseal()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            run.unseal()
            mark.unlink(missing_ok=True)


def _is_live_mark(entry: os.DirEntry[str]) -> bool:
    host, _, pid = entry.name.removeprefix(_MARK).rpartition("-")
    try:
        if host != socket.gethostname() or not pid.isdigit():
            return time.time() - entry.stat(follow_symlinks=False).st_mtime < _MARK_LASTS_S
        boot_id, started = read_text(Path(entry.path), 200, errors="replace").split()
    except (OSError, ValueError):  # just removed, or not written yet
        return os.path.lexists(entry.path)
    is_same_boot = boot_id == str(processes.boot_id()) and started.isdigit()
    return is_same_boot and processes.is_alive(int(pid), int(started))


def _read_file(folder: str) -> bytes | None:
    """Return the content of `summary.json`.

    There is no `stat` of the open file: of a FIFO or a folder nothing can be read.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(f"{folder}/{FILE}", flags)
    except OSError:
        return None
    try:
        chunks = [os.read(descriptor, _CHUNK)]
        while len(chunks[-1]) == _CHUNK and len(chunks) * _CHUNK < _MOST_BYTES:
            chunks.append(os.read(descriptor, _CHUNK))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return b"".join(chunks)


def parse(content: bytes) -> SealedSummary | None:
    """Return the record in the bytes of a `summary.json`; None if they are damaged, or of a newer version."""
    return _record(SealedSummary, content) if _is_whole(content) else None


def _is_whole(content: bytes) -> bool:
    """Return whether the checksum is that of the rest."""
    head, mark, tail = content.rpartition(b', "crc32": ')
    match = _CHECKSUM.fullmatch(mark + tail)
    return match is not None and zlib.crc32(head + b"}") == int(match[1])


def _first_line(content: bytes) -> SealedFacts | None:
    """Return the facts, without parsing the configuration and the ranges."""
    line = content[: content.find(_END_OF_FACTS)] + b"}"
    return None if _HUGE.search(line) else _record(SealedFacts, line)


def _record(cls: type[_Part], content: bytes) -> _Part | None:
    try:
        return records.from_json(cls, parse_json(content.decode()), FILE)
    except (ValueError, records.BadRecord):
        return None


def content_of(summary: SealedSummary) -> bytes:
    """Return the bytes that `parse` reads: an object of two lines, the first one with the facts."""
    content = records.to_json(summary)
    rest = {name: content.pop(name) for name in ("config", "ranges")}
    text = mask(f"{json.dumps(content)[:-1]}{_END_OF_FACTS.decode()}{json.dumps(rest)[1:]}")
    return f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}\n'.encode()


def _replace(run: RunDirectory, summary: SealedSummary, waits_ns: int) -> bool:
    """Write `summary.json`, unless a source has changed since it was read or has a time that may come again."""
    descriptor, temporary = tempfile.mkstemp(dir=run.path, prefix=f".{FILE}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content_of(replace(summary, inode=os.fstat(descriptor).st_ino & _63_BITS)))
            file.flush()
            if not _wait_for(summary.sources, descriptor, waits_ns):
                return False
            os.utime(descriptor, ns=(summary.written, summary.written))
        if signatures(run) != summary.sources or is_being_changed(run):
            return False
        os.replace(temporary, run.summary_path)
        return True
    finally:
        Path(temporary).unlink(missing_ok=True)


def _wait_for(sources: Mapping[str, Signature], descriptor: int, waits_ns: int) -> bool:
    """Return whether the sources are settled by the clock of the file system, at once or after two ticks."""
    for tries_left in (1, 0):
        os.utime(descriptor)
        if is_settled(sources, os.fstat(descriptor).st_mtime_ns, waits_ns):
            return True
        if tries_left and not waits_ns:
            time.sleep(2 * _TICK_NS / 1e9)
    return False


def is_settled(sources: Mapping[str, Signature], now_ns: int, waits_ns: int = 0) -> bool:
    """Return whether any later change of a source gives it another time than it has.

    A time in the future, of files that were copied from a machine whose clock is ahead, is no obstacle.
    """
    times = [found[0] for found in sources.values() if found]
    has_fractions = any(one % 10**9 for one in times)
    least_ns = max(waits_ns, _TICK_NS if has_fractions else _COARSEST_NS)
    return all(one + least_ns <= now_ns or one > now_ns + _COARSEST_NS for one in times)

"""Checks of the file systems: speed, renames, locks, space."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.doctor.finding import Finding, error, ok, skipped, warning
from trainer.doctor.probe import Probe
from trainer.doctor.speed import measurements

_LEAST_BYTES_S = 50e6
_LEAST_RENAMES_S = 20
_LEAST_FREE, _LITTLE_FREE = 1_000_000_000, 20_000_000_000
_LEAST_INODES = 10_000
_VOLATILE = ("tmpfs", "ramfs", "overlay")
_REMOUNT = {
    "lustre": "mount it with -o flock",
    "nfs": "mount it without nolock and local_lock",
    "nfs4": "mount it without local_lock",
}


def speed(probe: Probe) -> Iterator[Finding]:
    """Check how fast checkpoints are written and read."""
    use = probe.storage
    if use is None:
        yield skipped("not measured (--quick)")
        return
    if use.problem:
        fix = "choose a folder that you may write to: runs_dir=FOLDER, or TRAINER_RUNS_DIR"
        yield error(f"the folder of the runs cannot be used: {use.problem}", fix)
        return
    slow = False
    for name in [name for name in measurements(probe) if name.startswith("storage")]:
        share = None if probe.baseline is None else probe.baseline.slower(name, measurements(probe)[name])
        if share is not None:
            slow = True
            text = f"{name} has {share:.0%} of what it usually reaches"
            yield warning(text, "run it again later: others may use it now; --new-baseline accepts it")
    text = f"{_megabytes(use.write_bytes_s)} written, {_megabytes(use.read_bytes_s)} read"
    if use.write_bytes_s < _LEAST_BYTES_S:
        fix = "put runs_dir on a faster file system; checkpoint.every_minutes spaces the saves"
        yield warning(f"{text}: saving 10 GB takes {10e9 / use.write_bytes_s / 60:.0f} min", fix)
    elif not slow:
        yield ok(text)


def renames(probe: Probe) -> Iterator[Finding]:
    """Check that a rename replaces a file at once for other processes, and how many files are made per second."""
    use = probe.storage
    if use is None or use.problem:
        yield skipped("not checked" if use else "not checked (--quick)")
        return
    if use.torn:
        fix = "put runs_dir on another file system: checkpoints and records are committed by renaming"
        yield error(use.torn, fix)
    elif use.renames_s < _LEAST_RENAMES_S:
        text = f"renames are safe, but only {use.renames_s:.0f} files per second are made"
        yield warning(text, "put runs_dir on a file system that is made for small files")
    else:
        yield ok(f"renames are safe, {use.renames_s:.0f} files per second")


def locks(probe: Probe) -> Iterator[Finding]:
    """Check that a lock keeps a second process out; `control/lock` and the caches rely on it."""
    use = probe.storage
    if use is None or use.problem:
        yield skipped("not checked" if use else "not checked (--quick)")
        return
    kind, _ = _mount(probe)
    if use.unlocked:
        fix = _REMOUNT.get(kind, "mount it with locks, or put runs_dir on another file system")
        yield error(f"{' and '.join(use.unlocked)} locks do not keep a second process out ({kind})", fix)
    else:
        yield ok("locks keep a second process out" + ("" if use.has_links else "; no hard links, which is fine"))


def space(probe: Probe) -> Iterator[Finding]:
    """Check the free space and the kind of the file system."""
    kind, place = _mount(probe)
    folder = existing(probe.folder)
    try:
        has = probe.space(folder)
    except OSError as problem:
        yield error(f"{folder}: {problem.strerror}", "choose another folder: runs_dir=FOLDER")
        return
    free = has.f_bavail * has.f_frsize
    text = f"{free / 1e9:.1f} GB free on {place or folder} ({kind or 'unknown'})"
    fix = "delete what is no longer needed (trainer ls, trainer rm), or set runs_dir to another file system"
    if free < _LEAST_FREE or (has.f_files and has.f_favail < _LEAST_INODES):
        inodes = f", {has.f_favail} files can be made" if has.f_favail < _LEAST_INODES else ""
        yield error(text + inodes, fix)
    elif free < _LITTLE_FREE:
        yield warning(text, fix)
    elif kind in _VOLATILE:
        yield warning(f"{text}: it is gone after a restart", "set runs_dir to a file system that stays")
    else:
        yield ok(text)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    for one in (folder, *folder.absolute().parents):
        if one.is_dir():
            return one
    return Path("/")


def _mount(probe: Probe) -> tuple[str, str]:
    """Return the type and the place of the file system of the folder, from /proc/self/mountinfo."""
    folder = os.path.realpath(existing(probe.folder))
    best = ("", "")
    for line in probe.read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        place = fields[4].encode().decode("unicode_escape")
        if (folder == place or folder.startswith(place.rstrip("/") + "/")) and len(place) >= len(best[1]):
            best = (after.split()[0], place)
    return best


def _megabytes(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.1f} GB/s" if bytes_s >= 1e9 else f"{bytes_s / 1e6:.0f} MB/s"

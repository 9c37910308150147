"""Token shards, and stores of them with faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy
from fsspec.implementations.memory import MemoryFileSystem

from trainer.data.shard_index import add_index

LENGTH = 4
TOKENS = 41
"""Tokens of a shard: ten windows."""


def write_shards(root: Path, shards: int = 6, indexed: bool = True) -> Path:
    """Write `shards` training shards whose tokens are all different, and one each of val and test."""
    root.mkdir(parents=True)
    for number in range(shards):
        (1000 * number + numpy.arange(TOKENS)).astype(numpy.uint16).tofile(root / f"train-{number:05d}.bin")
    for split in ("val", "test"):
        numpy.arange(TOKENS, dtype=numpy.uint16).tofile(root / f"{split}-00000.bin")
    meta = {"vocab_size": 60_000, "tokens": {"train": shards * TOKENS, "val": TOKENS}, "bytes": {"val": TOKENS}}
    (root / "meta.json").write_text(json.dumps(meta))
    if indexed:
        add_index(root)
    return root


class Faulty(MemoryFileSystem):
    """Files in memory, whose reads pass through `fault`."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    fault: ClassVar[Callable[[str, bytes], bytes]] = staticmethod(lambda name, content: content)
    """Given the name of a file and what is read of it, returns what the reader gets, or raises."""
    reads: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("faulty://")))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **arguments: Any) -> bytes:
        name = path.rpartition("/")[2]
        Faulty.reads.append(name)
        return Faulty.fault(name, super().cat_file(path, start, end, **arguments))


def upload(root: Path) -> str:
    """Copy a folder into the store, without faults, and return its URL."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.fault, Faulty.reads = staticmethod(lambda name, content: content), []  # type: ignore[assignment]
    files = Faulty()
    files.store.clear()
    for path in root.iterdir():
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    return "faulty://bucket"

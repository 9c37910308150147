"""`index.json`: the files of a folder of token shards, with their sizes and checksums. Imports no torch.

With it, opening a folder costs one read, however many shards there are, and what was downloaded can be verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.core.errors import UserError
from trainer.data.files import SPLITS
from trainer.data.locations import INDEX, SHARDS
from trainer.data.tokenizers import TOKENIZER
from trainer.data.untrusted import JSON_BYTES, natural, object_of, open_regular, read_object, shown

INDEX_AGAIN = "trainer data index FOLDER"
_BLOCK_BYTES = 2**20
_SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d+\.bin")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class IndexedFile:
    """Size and checksum of a file."""

    bytes: int
    sha256: str


def sha256(path: Path) -> str:
    """Return the checksum of a file as hexadecimal digits."""
    with open_regular(path) as file:
        return sha256_of(file.fileno())


def sha256_of(descriptor: int) -> str:
    """Return the checksum of an open file as hexadecimal digits."""
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK_BYTES, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def write_index(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write `index.json` for the shards in a folder, and return the entry of `meta.json` that describes it.

    Args:
        folder: The folder of token shards.
        known: Checksums of files that need not be read again.
    """
    known = known or {}
    names = [path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name) or path.name == TOKENIZER]
    files = {}
    for name in sorted(names):
        files[name] = [(folder / name).stat().st_size, known.get(name) or sha256(folder / name)]
    content = json.dumps({"files": files}, indent=0).encode()
    temporary = folder / f".{INDEX}"
    temporary.write_bytes(content)
    temporary.rename(folder / INDEX)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def add_index(folder: Path) -> int:
    """Write the index of a folder of finished shards, and return the number of files in it.

    Raises:
        UserError: The folder has no `meta.json`.
    """
    path = folder / SHARDS
    meta = read_object(path, "write the shards again: trainer data tokenize")
    meta["index"] = write_index(folder)
    temporary = folder / f".{SHARDS}"
    temporary.write_text(json.dumps(meta, indent=1))
    temporary.rename(path)
    with open_regular(folder / INDEX) as file:
        return len(read_index(file, folder / INDEX))


def described(meta: Mapping[str, Any], source: object) -> IndexedFile | None:
    """Return size and checksum of the index as `meta.json` has them; None if the folder has no index."""
    if "index" not in meta:
        return None
    return _indexed([natural(meta, source, "index", "bytes"), meta["index"].get("sha256")], source)


def read_index(file: BinaryIO, source: object, expected: IndexedFile | None = None) -> dict[str, IndexedFile]:
    """Return the files that an index lists.

    Args:
        file: The index.
        source: Its name in messages.
        expected: Its size and checksum; None: not verified.

    Raises:
        UserError: It is no index, or not the one that is expected.
    """
    fix, content = f"write it again: {INDEX_AGAIN}", file.read(JSON_BYTES + 1)
    if expected is not None and hashlib.sha256(content).hexdigest() != expected.sha256:
        raise UserError(f"{shown(source)} is not the index that {SHARDS} describes", fix)
    files = object_of(content, source, fix).get("files")
    if not isinstance(files, dict):
        raise UserError(f"{shown(source)} lists no files", fix)
    for name in files:
        if not (_SHARD.fullmatch(name) or name == TOKENIZER):
            raise UserError(f"{shown(source)} lists {shown(name)}, which is no token shard", fix)
    return {name: _indexed(entry, source) for name, entry in files.items()}


def _indexed(entry: Any, source: object) -> IndexedFile:
    is_pair = isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and isinstance(entry[1], str)
    if not is_pair or not 0 <= entry[0] < 2**62 or not _SHA256.fullmatch(entry[1]):
        problem = f"{shown(source)}: {shown(repr(entry)[:80])} is not a size and a sha256"
        raise UserError(problem, f"write the index again: {INDEX_AGAIN}")
    return IndexedFile(*entry)

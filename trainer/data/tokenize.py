"""Tokenisation of text, JSON lines, Parquet and Arrow into token shards: `trainer data tokenize`. Imports no torch.

A shard is made from a unit of input files by one worker process, written to a temporary file and renamed. Existing
shards are kept, so a killed job resumes where it was. `index.json` and, last, `meta.json` are written at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from trainer.core import records
from trainer.core.errors import UserError
from trainer.data.files import NOT_SOURCES, SPLITS, read_text
from trainer.data.locations import SHARDS
from trainer.data.shard_index import sha256, write_index
from trainer.data.tables import BESIDE_TABLES, SUFFIXES, column_of
from trainer.data.tokenizers import BytePairs, Bytes, Tokenizer, write_tokens
from trainer.data.untrusted import has_hole, limit_bytes, open_regular, shown

UNIT_BYTES = 64 * 2**20
"""Approximate input size of a shard."""
NAMED = 100
"""Bad records that are kept by name; all are counted."""
TRAINING_BYTES = 20 * 2**20
"""Amount of text that byte pairs are trained on: takes 4 s, and more changes the vocabulary little."""

Document = tuple[str, bytes]
"""Name and UTF-8 text."""


@dataclass
class Shard:
    """Counts of one unit, which are stored next to its shard as JSON."""

    tokens: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    """File of tokens to its checksum; of the totals, those of all files."""
    documents: int = 0
    bad: int = 0
    bad_names: list[str] = field(default_factory=list)

    def skip(self, name: str, reason: object) -> None:
        """Count a bad record."""
        self.bad += 1
        if len(self.bad_names) < NAMED:
            self.bad_names.append(f"{shown(name)}: {shown(reason)}")


@dataclass(frozen=True)
class Settings:
    """Options for reading and tokenising; the same for all shards of a folder."""

    tokenizer: str = "bytes"
    """`bytes`; `bpe`, trained on the beginning of the data; or the path of a `tokenizer.json`."""
    vocab_size: int = 32_000
    """Vocabulary size of `bpe`."""
    text_key: str = "text"
    """The key of a JSON line, or the column of a table, that holds the text."""
    held_out: float = 0.005
    """Fraction of the documents for each of val and test."""


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """Whose shards a folder holds: `job.json`."""

    digest: str
    """Of the files and the settings."""


def tokenize(
    inputs: Sequence[Path], out: Path, settings: Settings, workers: int, progress: Callable[[int, int, Shard], None]
) -> Shard:
    """Write `out/{train,val,test}-NNNNN.bin`, `out/index.json` and `out/meta.json`.

    Args:
        inputs: Files and folders.
        out: Folder of the shards.
        settings: How to read and tokenise.
        workers: Number of worker processes.
        progress: Called with (completed units, number of units, totals so far).

    Returns:
        The totals.

    Raises:
        UserError: `out` holds shards of other inputs or settings.
    """
    units = _units(inputs)
    out.mkdir(parents=True, exist_ok=True)
    _refuse_other_job(out, units, settings)
    tokenizer_path = _tokenizer_path(units, out, settings)
    totals = Shard()
    make = partial(_make_shard, out=out, settings=settings, tokenizer_path=tokenizer_path)
    # spawn: a tokenizer that has run threads must not be forked.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(make, number, unit) for number, unit in enumerate(units)]
        for done, future in enumerate(as_completed(futures), 1):
            _add(totals, future.result())
            progress(done, len(units), totals)
    counts = asdict(totals)
    index = write_index(out, counts.pop("sha256"))
    meta = {"vocab_size": _load(tokenizer_path).vocab_size, "shards": len(units), **counts, "index": index}
    _write(out / SHARDS, json.dumps(meta, indent=1))
    return totals


def _make_shard(number: int, unit: list[Path], out: Path, settings: Settings, tokenizer_path: Path | None) -> Shard:
    record = out / f"shard-{number:05d}.json"
    if record.is_file():
        return records.read_existing(Shard, record)
    shard, tokenizer = Shard(), _load(tokenizer_path)
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for path in unit:
        for name, text in _documents(path, settings.text_key, shard):
            parts[_split_of(name, settings.held_out)].append(text)
            shard.documents += 1
    for split, texts in parts.items():
        temporary, name = out / f".{split}-{number:05d}", f"{split}-{number:05d}.bin"
        shard.tokens[split], shard.bytes[split] = write_tokens(temporary, texts, tokenizer)
        shard.sha256[name] = sha256(temporary)
        temporary.rename(out / name)
    _write(record, records.dumps(shard))
    return shard


def _documents(path: Path, text_key: str, shard: Shard) -> Iterator[Document]:
    """Yield the documents of a file.

    Documents that are empty, binary, not UTF-8 or without a text are counted in `shard`.
    """
    if path.suffix == ".jsonl":
        documents = _json_lines(path, text_key, shard)
    elif path.suffix in SUFFIXES:
        documents = _rows(path, text_key)
    else:
        documents = iter([(str(path), read_text(path))])
    for name, text in documents:
        try:
            if not text.strip():
                raise ValueError("empty")
            if b"\0" in text:
                raise ValueError("binary")
            text.decode()
            yield name, text
        except ValueError as error:
            shard.skip(name, error)


def _json_lines(path: Path, text_key: str, shard: Shard) -> Iterator[Document]:
    limit = limit_bytes()
    with open_regular(path) as file:
        if has_hole(file):
            shard.skip(str(path), "sparse")
            return
        for number, line in enumerate(iter(lambda: file.readline(limit), b""), 1):
            name = f"{path}:{number}"
            try:
                yield name, str(json.loads(line)[text_key]).encode()
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                shard.skip(name, f"{type(error).__name__}: {error}")


def _rows(path: Path, text_key: str) -> Iterator[Document]:
    for _, first, chunk in column_of([path], text_key):
        for row, value in enumerate(chunk.to_pylist(), first):
            yield f"{path}:{row}", value if isinstance(value, bytes) else str("" if value is None else value).encode()


def _units(inputs: Sequence[Path]) -> list[list[Path]]:
    """Group the files, sorted by path, into units of about UNIT_BYTES."""
    units: list[list[Path]] = []
    room = 0
    for path in _files(inputs):
        size = path.stat().st_size
        if not units or size > room:
            units.append([])
            room = UNIT_BYTES
        units[-1].append(path)
        room -= size
    if not units:
        raise UserError(f"no files in {', '.join(map(str, inputs))}", "use folders or files that hold text")
    return units


def _files(inputs: Iterable[Path]) -> Iterator[Path]:
    for root in inputs:
        if not root.exists():
            raise UserError(f"{root} does not exist", "use folders or files that hold text")
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            below = path.relative_to(root).parts
            hidden = any(part.startswith(".") or part in NOT_SOURCES for part in below)
            if path.is_file() and not hidden and path.name not in BESIDE_TABLES:
                yield path


def _refuse_other_job(out: Path, units: list[list[Path]], settings: Settings) -> None:
    files = [[str(path), path.stat().st_size] for unit in units for path in unit]
    digest = hashlib.sha256(json.dumps([files, asdict(settings)]).encode()).hexdigest()
    record = out / "job.json"
    before = records.read(Job, record)
    if before is not None and before.digest != digest:
        raise UserError(f"{out} holds shards of other files or settings", "use another folder, or remove this one")
    _write(record, records.dumps(Job(digest=digest, **asdict(settings)), indent=1))


def _tokenizer_path(units: list[list[Path]], out: Path, settings: Settings) -> Path | None:
    """Return the tokenizer's file in `out`, after training or copying it; None for bytes."""
    if settings.tokenizer == "bytes":
        return None
    path = out / "tokenizer.json"
    if path.is_file():
        return path
    if settings.tokenizer == "bpe":
        temporary = out / ".tokenizer.json"
        BytePairs.train(_beginning(units, settings.text_key), settings.vocab_size, temporary)
        temporary.rename(path)
    else:
        given = Path(settings.tokenizer)
        if not given.is_file():
            raise UserError(f"--tokenizer {given} does not exist", "use bytes, bpe or the path of a tokenizer.json")
        _write(path, given.read_text())
    return path


def _beginning(units: list[list[Path]], text_key: str) -> Iterator[bytes]:
    left = TRAINING_BYTES
    for path in (path for unit in units for path in unit):
        for _, text in _documents(path, text_key, Shard()):
            if left <= 0:
                return
            left -= len(text)
            yield text


def _load(tokenizer_path: Path | None) -> Tokenizer:
    return BytePairs(tokenizer_path) if tokenizer_path else Bytes()


def _split_of(name: str, held_out: float) -> str:
    point = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56
    return "test" if point < held_out else "val" if point < 2 * held_out else "train"


def _add(totals: Shard, shard: Shard) -> None:
    for split in SPLITS:
        totals.tokens[split] = totals.tokens.get(split, 0) + shard.tokens[split]
        totals.bytes[split] = totals.bytes.get(split, 0) + shard.bytes[split]
    totals.sha256 |= shard.sha256
    totals.documents += shard.documents
    totals.bad += shard.bad
    totals.bad_names += shard.bad_names[: NAMED - len(totals.bad_names)]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)

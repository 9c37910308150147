"""Token shards written by `trainer data tokenize`, in a folder or behind a URL."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy

from trainer.core.errors import UserError
from trainer.data import locations
from trainer.data.arrays import ArrayDataModule
from trainer.data.files import SPLITS
from trainer.data.remote import RemoteFolder
from trainer.data.shard_cache import Prefetcher, ShardCache, default_folder
from trainer.data.shard_index import INDEX_AGAIN, IndexedFile, described, read_index
from trainer.data.token_files import TokenFiles, open_in
from trainer.data.tokenizers import MAX_VOCABULARY, TOKENIZER, BytePairs, Bytes, token_type
from trainer.data.tokens import TokenWindows, evaluation_windows
from trainer.data.untrusted import JSON_BYTES, natural, object_of, open_regular, read_object, shown

TOKENIZE_AGAIN = "write the shards again: trainer data tokenize"
SHUFFLED_TOGETHER = 8
"""Shards of a remote folder whose windows are shuffled together."""


class LocalShards:
    """The files of a folder of token shards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = locations.token_shards(str(root)) / locations.SHARDS
        self.source = str(path)
        self.meta = read_object(path, TOKENIZE_AGAIN)
        index = described(self.meta, path)
        self.index = None if index is None else _read_index(root / locations.INDEX, index)

    def files(self, split: str, kind: type[numpy.unsignedinteger]) -> TokenFiles:
        """Return the files of a split."""
        if self.index is None:  # written before there was an index
            return TokenFiles.local(self.root, sorted(path.name for path in self.root.glob(f"{split}-*.bin")), kind)
        names = _of_split(self.index, split)
        sizes = [self.index[name].bytes for name in names]
        return TokenFiles(names, sizes, kind, partial(open_in, self.root))

    def tokenizer(self) -> Path | None:
        """Return the file of the tokenizer; None: bytes."""
        path = self.root / TOKENIZER
        return path if path.is_file() else None

    def connect(self, windows: TokenWindows, group: int | None) -> None:
        """Prepare a split for being read in groups of shards."""


class RemoteShards:
    """The files behind a URL, through a cache on this node.

    Args:
        url: Such as `s3://bucket/shards`.
        cache: Folder of the cache.
        max_bytes: Limit of the cache.

    Raises:
        UserError: There are no token shards, or they have no index.
        RemoteUnavailable: They cannot be read.
    """

    def __init__(self, url: str, cache: Path, max_bytes: int) -> None:
        remote = RemoteFolder(url)
        self.source = f"{remote.url}/{locations.SHARDS}"
        content = remote.read(locations.SHARDS, JSON_BYTES)
        self.meta = object_of(content, self.source, TOKENIZE_AGAIN)
        index = described(self.meta, self.source)
        if index is None:
            fix = "trainer data index FOLDER, where the shards are, and copy index.json and meta.json"
            raise UserError(f"{self.source} describes no index, by which what is read can be verified", fix)
        name = hashlib.sha256(remote.url.encode() + b"\0" + content).hexdigest()[:20]
        self.cache = ShardCache(cache, name, max_bytes, remote.fetch)
        with self.cache.open(locations.INDEX, index) as file:
            self.index = read_index(file, f"{remote.url}/{locations.INDEX}")
        self._tokenizer: BinaryIO | None = None
        self._prefetcher = Prefetcher(lambda name: self.cache.prefetch(name, self.index[name]))

    def files(self, split: str, kind: type[numpy.unsignedinteger]) -> TokenFiles:
        """Return the files of a split."""
        names = _of_split(self.index, split)
        return TokenFiles(names, [self.index[name].bytes for name in names], kind, self._open)

    def _open(self, name: str) -> BinaryIO:
        return self.cache.open(name, self.index[name])

    def tokenizer(self) -> Path | None:
        """Return the file of the tokenizer; None: bytes."""
        if TOKENIZER not in self.index:
            return None
        self._tokenizer = self._tokenizer or self._open(TOKENIZER)  # stays open, so that it stays in the cache
        return self.cache.folder / TOKENIZER

    def connect(self, windows: TokenWindows, group: int | None) -> None:
        """Prepare a split for being read in groups of shards.

        Raises:
            UserError: The cache is smaller than two groups.
        """
        sizes = sorted(self.index[name].bytes for name in windows.files.names)
        needed = sum(sizes[-2 * (group or 1) :])
        if needed > self.cache.max_bytes:
            problem = (
                f"data.cache_gb={self.cache.max_bytes / 1e9:g}: two groups of {group or 1} shards, one that is read "
                f"and the next, may have {needed / 1e9:.3g} GB"
            )
            raise UserError(problem, "use a larger data.cache_gb, or a smaller data.shuffle_shards")

        def prefetch(now: Any, following: Any) -> None:
            windows.files.keep_only(now)
            self._prefetcher.want([windows.files.names[number] for number in (*now, *following)])

        windows.announce(prefetch)


class TokenShards(ArrayDataModule):
    """Next-token windows of token shards.

    Batches: two `(batch, sequence_length)` int64 tensors, the tokens and the tokens one position later.

    Args:
        root: The folder that `trainer data tokenize` wrote, or the URL of a copy, such as `s3://bucket/shards`.
        batch_size: Global batch size.
        sequence_length: Tokens per window.
        document_mask: Whether positions attend only within their document; see `Transformer.document_end`.
        shuffle_shards: Shards whose windows are shuffled together, so that few files are read at a time; None: 8 behind
            a URL, else all.
        cache: Folder of this node for shards behind a URL; None: one in the temporary directory.
        cache_gb: Limit of that folder, in 10^9 bytes.
    """

    default_task = "trainer.tasks.language_modelling.LanguageModelling"
    provides: ClassVar[dict[str, Any]] = {"vocab_size": None, "sequence_length": "sequence_length"}

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        sequence_length: int = 1024,
        document_mask: bool = False,
        *,
        shuffle_shards: int | None = None,
        cache: str | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        super().__init__(batch_size)
        self.root, self.sequence_length = root, sequence_length
        self.document_mask = document_mask
        if shuffle_shards is not None and shuffle_shards < 1:
            raise UserError(f"data.shuffle_shards={shuffle_shards}: must be at least 1", "use null for the default")
        self.shuffle_shards = shuffle_shards
        self.cache = Path(cache).expanduser() if cache else default_folder()
        self.cache_bytes = int(cache_gb * 1e9)
        self.evaluation_batch = evaluation_windows(sequence_length)
        self.shards: LocalShards | RemoteShards | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find the shards and build the dataset of each split, once."""
        if self.train is not None:
            return
        is_remote = locations.is_remote(self.root)
        if is_remote:
            self.shards = RemoteShards(self.root, self.cache, self.cache_bytes)
        else:
            self.shards = LocalShards(Path(self.root).expanduser())
        meta, path = self.shards.meta, self.shards.source
        vocab_size = natural(meta, path, "vocab_size", largest=MAX_VOCABULARY)
        for key in ("bytes", "tokens"):
            natural(meta, path, key, "val")
        kind, end = token_type(vocab_size), self._document_end()
        group = self.shuffle_shards or (SHUFFLED_TOGETHER if is_remote else None)
        splits = {}
        for split in SPLITS:
            windows = TokenWindows(self.shards.files(split, kind), self.sequence_length, kind, end, vocab_size)
            self.shards.connect(windows, group if split == "train" else None)
            splits[split] = windows
        if group is not None:
            splits["train"].shuffle_shards(group)
        self.train, self.val, self.test = (splits[split] for split in SPLITS)

    @property
    def meta(self) -> dict[str, Any]:
        """The content of `meta.json`, after `setup`."""
        assert self.shards is not None, "call setup() first"
        return self.shards.meta

    def _document_end(self) -> int | None:
        """Return the token that ends a document if documents are masked."""
        if not self.document_mask:
            return None
        assert self.shards is not None
        path = self.shards.tokenizer()
        return Bytes.end_of_text if path is None else BytePairs(path).end_of_text

    def facts(self) -> dict[str, Any]:
        """Return `vocab_size`, `sequence_length`, `bytes_per_token`, and with a document mask `document_end`."""
        end = self._document_end()
        return {
            **({} if end is None else {"document_end": end}),
            "vocab_size": self.meta["vocab_size"],
            "sequence_length": self.sequence_length,
            "bytes_per_token": self.meta["bytes"]["val"] / max(1, self.meta["tokens"]["val"]),
        }


def _read_index(path: Path, expected: IndexedFile) -> dict[str, IndexedFile]:
    try:
        with open_regular(path) as file:
            return read_index(file, path, expected)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be read: {error}", f"write it again: {INDEX_AGAIN}") from None


def _of_split(index: Mapping[str, IndexedFile], split: str) -> list[str]:
    return sorted(name for name in index if name.startswith(f"{split}-"))

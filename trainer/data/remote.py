"""Folders of an object store or a web server, read through fsspec: every failure is retried, then reported."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from trainer.core import retries
from trainer.core.errors import EnvironmentFault, UserError
from trainer.data.locations import require_remote
from trainer.data.shard_index import INDEX_AGAIN, IndexedFile, sha256_of
from trainer.data.untrusted import shown

_log = logging.getLogger(__name__)
_TRIES, _WAIT_S = 6, 0.5
"""Tries of a request, and the wait after the first, which doubles: up to 15 s, as long as a store throttles."""
_TIMEOUT_S = 60.0
"""Longest request: a quarter of a megabyte per second."""
_RANGE_BYTES, _RANGES_AT_ONCE = 16 * 2**20, 4
"""Size of a request, and how many of a file run together: one alone does not fill the network of a node."""
_CHUNK_BYTES = 2**16


class RemoteUnavailable(ConnectionError):
    """A remote file could not be read. Another attempt of the job may succeed."""


class RemoteFolder:
    """A folder behind a URL.

    Args:
        url: Such as `s3://bucket/shards`; credentials and endpoint come from the environment.

    Raises:
        UserError: Nothing reads the protocol.
        EnvironmentFault: The package that reads it is not installed.
    """

    def __init__(self, url: str) -> None:
        require_remote(url)
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self._files, self._path = url_to_fs(self.url)

    def read(self, name: str, most: int) -> bytes:
        """Return the content of a small file.

        Raises:
            UserError: It does not exist, must not be read, or is larger than `most` bytes.
            RemoteUnavailable: It could not be read.
        """
        content = self._retried(name, lambda: self._request(name, 0, most + 1, most))
        if len(content) > most:
            raise UserError(f"{self.url}/{name} is larger than {most:,} bytes", "set data.root to a folder of shards")
        return content

    def fetch(self, name: str, expected: IndexedFile, descriptor: int) -> None:
        """Write the content of a file into an open, empty one, and verify it.

        Raises:
            UserError: It does not exist, must not be read, or is not what the index describes.
            RemoteUnavailable: It could not be read.
            EnvironmentFault: The disk is full.
        """
        for _ in range(2):
            self._write(name, expected.bytes, descriptor)
            if sha256_of(descriptor) == expected.sha256:
                return
            _log.warning("%s/%s: what was read is not what its index describes", self.url, name)
        problem = f"{self.url}/{name} is not what its index describes: its sha256 is another one"
        raise UserError(problem, f"copy it again, or write the index again: {INDEX_AGAIN}")

    def _write(self, name: str, size: int, descriptor: int) -> None:
        def copy(begin: int) -> int:
            end = min(begin + _RANGE_BYTES, size)
            content = self._retried(name, lambda: self._range(name, begin, end, size))
            offset = 0 if len(content) == size else begin  # a web server that knows no ranges sends all
            _write_at(descriptor, content, offset)
            return len(content)

        begins = range(0, size, _RANGE_BYTES)
        if not size or copy(0) == size:
            return
        with ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:
            list(pool.map(copy, begins[1:]))

    def _range(self, name: str, begin: int, end: int, size: int) -> bytes:
        content = self._request(name, begin, end, size)
        if len(content) > size:
            problem = f"{self.url}/{name} is larger than its index says"
            raise UserError(problem, f"copy it again, or write the index again: {INDEX_AGAIN}")
        if len(content) not in (end - begin, size):
            raise OSError(f"{len(content):,} bytes where {end - begin:,} were expected")
        return content

    def _request(self, name: str, begin: int, end: int, most: int) -> bytes:
        """Return the bytes from `begin` to `end`, or all of the file; of a web server `most` and one more at most."""
        path = f"{self._path.rstrip('/')}/{name}"
        if not self._files.async_impl:
            return bytes(self._files.cat_file(path, start=begin, end=end))
        from fsspec.asyn import sync

        read, options = self._files._cat_file, {"start": begin, "end": end}
        if "http" in self._files.protocol:
            read, options = self._get, {"begin": begin, "end": end, "most": most}
        return bytes(sync(self._files.loop, read, path, timeout=_TIMEOUT_S, **options))

    async def _get(self, url: str, begin: int, end: int, most: int) -> bytes:
        """Do as fsspec's `_cat_file`, which takes whatever a server sends: also without an end, and unpacked."""
        session = await self._files.set_session()
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        content = bytearray()
        async with session.get(self._files.encode_url(url), headers=headers) as answer:
            answer.raise_for_status()
            async for part in answer.content.iter_chunked(_CHUNK_BYTES):
                content += part
                if len(content) > most:
                    break
        return bytes(content[: most + 1])

    def _retried(self, name: str, read: Callable[[], bytes]) -> bytes:
        def log(number: int, error: Exception) -> None:
            _log.warning("%s/%s: try %d of %d: %s", self.url, name, number, _TRIES, _reason(error))

        try:
            return retries.retried(read, [_WAIT_S * 2**number for number in range(_TRIES - 1)], log)
        except UserError:
            raise
        except Exception as error:
            self._refuse(name, error)
            problem = f"{self.url}/{name} cannot be read, after {_TRIES} tries: {_reason(error)}"
            raise RemoteUnavailable(problem) from error

    def _refuse(self, name: str, error: Exception) -> None:
        """Raise UserError for what another try would get again."""
        if isinstance(error, FileNotFoundError) or retries.status_of(error) in (404, 410):
            fix = f"copy the folder completely; an older one has no index: {INDEX_AGAIN}, before it is copied"
            raise UserError(f"{self.url}/{name} does not exist", fix) from None
        if retries.is_refusal(error):
            problem = f"{self.url}/{name} must not be read: {shown(error)[:300]}"
            raise UserError(problem, "set the credentials in the environment, such as AWS_PROFILE") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(error)[:300]}"


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    try:
        while left:
            written = os.pwrite(descriptor, left, offset)
            left, offset = left[written:], offset + written
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = "data.cache: the disk is full"
        raise EnvironmentFault(problem, "free some of it, use a smaller data.cache_gb, or another data.cache") from None

"""Objects below a URL (`s3://bucket/prefix`), through fsspec.

Every call is bounded in time, and repeated after a failure that may pass: a lost reply, throttling, a broken
connection. Credentials and the address of the server come from the environment, as the server's own tools take them
(`AWS_*`, `~/.aws`). This module does not import torch, and fsspec only when it is used.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from trainer.config.checkpoint_url import missing_package, problem_of
from trainer.core import retries
from trainer.core.errors import EnvironmentFault

RETRY_FOR_S = 300.0
"""A call that fails for so long has failed."""
PIECE_BYTES = 16 << 20
"""Size of the parts in which a large object is sent and read."""
PARALLEL = 4
"""Parts of an object that are sent or read at the same time: with `PIECE_BYTES`, the host memory of a transfer."""
_CONNECT_S, _READ_S = 10, 60
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
Result = TypeVar("Result")


class Object(NamedTuple):
    """An object as a listing describes it."""

    bytes: int
    tag: str
    """Changes with the content."""


class Exists(FileExistsError):
    """There is an object of this name already."""


class ObjectStore:
    """The objects below a URL. Keys are relative to it."""

    def __init__(self, url: str, retry_for_s: float | None = None) -> None:
        self.url = url.rstrip("/")
        self._retry_for_s = RETRY_FOR_S if retry_for_s is None else retry_for_s
        scheme, _, self._root = self.url.partition("://")
        if (problem := problem_of(url) or missing_package(url)) is not None:
            raise problem
        import fsspec

        options = {
            "connect_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
            "retries": {"total_max_attempts": 1},
        }
        self._files: Any = fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False, max_concurrency=PARALLEL, config_kwargs=options
        )
        self._files.retries = 1  # `_retried` repeats calls, and knows what a lost reply means

    def objects(self, prefix: str = "") -> dict[str, Object]:
        """Return all objects whose keys begin with the folder `prefix`, by key."""
        root = f"{self._root}/{prefix}".rstrip("/")
        found = self._retried(f"listing {self.url}", lambda: self._files.find(root, detail=True))
        length = len(self._root) + 1
        return {
            path[length:]: Object(int(one["size"]), str(one.get("ETag")))
            for path, one in found.items()
            if path.startswith(f"{root}/")
        }

    def read(self, key: str, most_bytes: int) -> bytes:
        """Return the content of a small object, at most so many bytes. Raises FileNotFoundError."""
        content: bytes = self._retried(
            f"reading {key}", lambda: self._files.cat_file(f"{self._root}/{key}", start=0, end=most_bytes)
        )
        return content

    def pieces(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the content of an object of `size` bytes in order; `PARALLEL` pieces of it are read ahead."""

        def read(begin: int) -> bytes:
            end = min(begin + PIECE_BYTES, size)
            content: bytes = self._retried(
                f"reading {key}", lambda: self._files.cat_file(f"{self._root}/{key}", start=begin, end=end)
            )
            return content

        ahead: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(PARALLEL, "checkpoint-download") as pool:
            for begin in range(0, size, PIECE_BYTES):
                ahead.append(pool.submit(read, begin))
                if len(ahead) == PARALLEL:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def put_file(self, path: Path, key: str) -> None:
        """Send a file, unless there is an object of this size: keys are named by their content."""
        size = path.stat().st_size

        def put() -> None:
            if self._size(key) != size:
                self._files.put_file(str(path), f"{self._root}/{key}", chunksize=PIECE_BYTES, max_concurrency=PARALLEL)

        self._retried(f"sending {key}", put)

    def create(self, key: str, content: bytes) -> None:
        """Create an object, only if there is none of this name (`If-None-Match: *`).

        Raises:
            Exists: There is one with other content. After a lost reply one with this content is ours.
        """

        def create() -> None:
            try:
                self._files.pipe_file(f"{self._root}/{key}", content, mode="create")
            except OSError as error:
                if retries.code_of(error) == "NotImplemented":  # a server without conditional writes
                    if self._size(key) is None:
                        self._files.pipe_file(f"{self._root}/{key}", content)
                        return
                elif not isinstance(error, FileExistsError) and retries.code_of(error) != "PreconditionFailed":
                    raise
                if self.read(key, len(content) + 1) != content:
                    raise Exists(key) from None

        self._retried(f"writing {key}", create)

    def delete(self, keys: list[str]) -> None:
        """Delete objects; those that are gone already are no error."""
        if keys:
            paths = [f"{self._root}/{key}" for key in keys]
            self._retried(f"deleting {keys[0]}", lambda: self._files.rm(paths))

    def abort_unfinished(self) -> None:
        """Discard the parts of uploads that a killed process has left, which a server keeps, and charges for."""
        bucket, _, prefix = self._root.partition("/")

        def abort() -> None:
            for upload in self._files.list_multipart_uploads(bucket):
                if upload["Key"].startswith(f"{prefix}/"):
                    self._files.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

        try:
            self._retried("aborting uploads", abort)
        except (OSError, AttributeError, EnvironmentFault):
            pass  # not allowed, or not known to the server: only its own clean-up is left

    def _size(self, key: str) -> int | None:
        try:
            return int(self._files.info(f"{self._root}/{key}", refresh=True)["size"])
        except FileNotFoundError:
            return None

    def _retried(self, what: str, call: Callable[[], Result]) -> Result:
        """Return what `call` returns; a call that fails is repeated after growing pauses.

        Raises:
            FileNotFoundError: The object, or the bucket, does not exist.
            Exists: From `call`.
            EnvironmentFault: The server refuses, or has failed for `retry_for_s` seconds.
        """
        try:
            return retries.retried(call, retries.growing(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, self._retry_for_s))
        except (FileNotFoundError, Exists, EnvironmentFault):
            raise
        except Exception as error:
            raise self._fault(what, error) from error

    def _fault(self, what: str, error: Exception) -> EnvironmentFault:
        name, code = type(error).__name__, retries.code_of(error)
        text = " ".join(str(error).split())[:300] or name
        if name in retries.NO_CREDENTIALS:
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment of the job"
        elif code in retries.WRONG_CREDENTIALS:
            fix = "correct AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        elif isinstance(error, PermissionError):
            fix = f"allow these credentials to list, read, write and delete below {self.url}"
        else:
            fix = "check AWS_ENDPOINT_URL, AWS_REGION and the network of this machine"
        return EnvironmentFault(f"checkpoint.dir: {what} failed: {text}", fix)


def probe(url: str) -> None:
    """Check that checkpoints can be listed, written and deleted below a URL. Leaves nothing there.

    Raises:
        UserError: The URL or its package.
        EnvironmentFault: Credentials, bucket, permissions or network, with what to change.
    """
    store = ObjectStore(url, retry_for_s=10.0)
    key = f".probe-{random.getrandbits(64):016x}"
    try:
        store.objects()
        store.create(key, b"trainer")
        store.delete([key])
    except FileNotFoundError:
        bucket = urlsplit(url).hostname
        raise EnvironmentFault(
            f"checkpoint.dir={url}: there is no bucket {bucket}", f"create it: aws s3 mb s3://{bucket}"
        ) from None

"""Requests to a server through fsspec: what another try would get again, and what is tried again after a pause.

botocore, aiohttp and the operating system raise exceptions that have no common class, and are not always installed.
So they are recognized by their names, error codes and statuses.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from trainer.core.errors import TrainerError

NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError")
WRONG_CREDENTIALS = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken")
_REFUSED = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, TrainerError)
_REFUSED_NAMES = (*NO_CREDENTIALS, "InvalidURL")
_REFUSED_CODES = (*WRONG_CREDENTIALS, "NoSuchBucket", "InvalidBucketName", "PreconditionFailed", "NotImplemented")
_REFUSED_STATUSES = (400, 401, 403, 404, 405, 410)
Result = TypeVar("Result")


def retried(
    call: Callable[[], Result],
    pauses: Iterable[float],
    on_retry: Callable[[int, Exception], None] = lambda number, error: None,
) -> Result:
    """Return what `call` returns; after an error that may pass it is called again.

    Args:
        call: A request. It may have been served although its reply was lost.
        pauses: Seconds before each further call. They are shortened by up to a half, by chance: thousands of ranks do
            not come back at the same instant.
        on_retry: Called before each pause, with the number of the call that failed, from 1, and its error.

    Raises:
        Exception: The last error, when no pause is left; one that `is_refusal` at once.
    """
    left = iter(pauses)
    for number in itertools.count(1):
        try:
            return call()
        except Exception as error:
            pause = None if is_refusal(error) else next(left, None)
            if pause is None:
                raise
            on_retry(number, error)
        time.sleep(pause * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def growing(first_s: float, longest_s: float, for_s: float) -> Iterator[float]:
    """Yield pauses that double up to `longest_s`, until another one would end later than `for_s` seconds from now."""
    deadline, pause = time.monotonic() + for_s, first_s
    while time.monotonic() + pause <= deadline:
        yield pause
        pause = min(2 * pause, longest_s)


def is_refusal(error: BaseException) -> bool:
    """Return whether another try would get the same answer."""
    return (
        isinstance(error, _REFUSED)
        or type(error).__name__ in _REFUSED_NAMES
        or code_of(error) in _REFUSED_CODES
        or status_of(error) in _REFUSED_STATUSES
    )


def code_of(error: BaseException) -> str | None:
    """Return the error code of an object store, such as `NoSuchBucket`."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code) if code is not None else None


def status_of(error: BaseException) -> Any:
    """Return the status of an answer by HTTP; None: the error is none."""
    return getattr(error, "status", None)

"""Requests are tried again after what may pass, and not after what another try would get again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trainer.core import retries
from trainer.core.errors import UserError


def of_server(code: str) -> OSError:
    """What s3fs raises for an error code of the server."""
    error = OSError(code)
    error.__cause__ = type("ClientError", (Exception,), {"response": {"Error": {"Code": code}}})()
    return error


def of_http(status: int) -> Exception:
    error = ConnectionError(str(status))
    error.status = status  # type: ignore[attr-defined]
    return error


def named(name: str) -> Exception:
    error: Exception = type(name, (Exception,), {})()
    return error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        FileExistsError("x"),
        PermissionError("x"),
        UserError("x", "y"),
        of_server("NoSuchBucket"),
        of_server("InvalidAccessKeyId"),
        of_http(404),
        of_http(403),
        named("NoCredentialsError"),
        named("InvalidURL"),
    ],
    ids=repr,
)
def test_a_refusal_is_raised_at_once(error: Exception) -> None:
    assert calls_until_raised(error) == 1


@pytest.mark.parametrize(
    "error", [TimeoutError(), OSError("reset"), of_server("SlowDown"), of_http(503), named("ServerTimeoutError")]
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert calls_until_raised(error) == 3


def calls_until_raised(error: Exception) -> int:
    """Return how often a call with two pauses was made."""
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retries.retried(call, [0.0, 0.0])
    return len(calls)


def test_a_call_that_succeeds_in_the_end_gives_its_result_and_is_logged() -> None:
    answers = iter([OSError("reset"), TimeoutError("late"), "content"])
    logged: list[tuple[int, str]] = []

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = retries.retried(call, [0.0] * 5, lambda number, error: logged.append((number, str(error))))
    assert (found, logged) == ("content", [(1, "reset"), (2, "late")])


def test_pauses_grow_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pauses = []
    for pause in retries.growing(1.0, 5.0, 20.0):
        pauses.append(pause)
        clock[0] += pause
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]

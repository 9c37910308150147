"""The bounds of the attacks hold: against what computes, and against what waits."""

from __future__ import annotations

import threading
from itertools import count

import pytest

from tests.security.bounds import ends_within

pytestmark = pytest.mark.honest


def test_what_computes_for_ever_is_ended() -> None:
    told = r"^x took more than 0\.05 s of CPU time$"
    with pytest.raises(pytest.fail.Exception, match=told), ends_within(0.05, "x"):
        all(number >= 0 for number in count())


def test_what_waits_for_ever_is_ended() -> None:
    told = r"^x did not end within 0\.05 s$"
    with pytest.raises(pytest.fail.Exception, match=told), ends_within(9.0, "x", blocked_s=0.05):
        threading.Event().wait(60)


def test_what_waits_for_a_busy_machine_is_not() -> None:
    ended = False
    with ends_within(0.05):
        threading.Event().wait(0.2)
        ended = True
    assert ended

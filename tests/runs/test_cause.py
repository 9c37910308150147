"""Which rank failed first, by the logs of torchrun on several nodes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runs.test_directory import make
from trainer.runs import cause
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Failure, HeartbeatRecord

GLOG = "E%m%d %H:%M:%S.000000 77 torch/distributed/elastic/multiprocessing/api.py:1002] "
BASIC = "ERROR:torch.distributed.elastic.multiprocessing.api:"
"""How torchrun's lines begin: by default, and by TORCH_LOGS_FORMAT=basic."""
LOST_PEER = "RuntimeError: [gloo] Connection closed by peer [10.0.0.7]:4711"


@pytest.fixture
def in_zone() -> Iterator[Callable[[str], None]]:
    """Set the time zone of this process."""
    before = os.environ.get("TZ")

    def set_to(zone: str) -> None:
        os.environ["TZ"] = zone
        time.tzset()

    yield set_to
    del os.environ["TZ"]
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def the_run(folder: Path) -> RunDirectory:
    run = make(folder)
    run.attempt_logs(0).mkdir(parents=True)
    return run


def torchrun_log(run: RunDirectory, node: int, prefix: str, code: int, pid: int, changed_at: float) -> None:
    """The log of a node on whose only rank, `node`, torchrun reports a failure."""
    log = run.node_log(0, node)
    log.write_text(
        f"attempt 0: 2 nodes on node{node}\n{prefix}failed (exitcode: {code}) local_rank: 0 (pid: {pid}) of\n"
    )
    os.utime(log, (changed_at, changed_at))
    run.write_heartbeat(node, HeartbeatRecord(phase="train", pid=pid, host=f"node{node}"))


NEW_YEAR, LEAP_DAY, SUMMER = 1_798_761_600.0, 1_835_395_200.0, 1_780_000_000.0
"""2027-01-01, 2028-02-29, and 2026-05-28 20:26:40, in UTC."""


@pytest.mark.parametrize(
    ("first", "second", "zones"),
    [
        (NEW_YEAR - 3, NEW_YEAR + 4, ("UTC", "UTC")),
        (LEAP_DAY - 3, LEAP_DAY + 4, ("UTC", "UTC")),
        (SUMMER, SUMMER + 7, ("UTC", "America/New_York")),
        (SUMMER, SUMMER + 7, ("Asia/Kathmandu", "UTC")),
        (SUMMER, SUMMER + 7, ("Pacific/Kiritimati", "Pacific/Pago_Pago")),
    ],
    ids=["New Year", "leap day", "west", "east", "25 hours"],
)
@pytest.mark.parametrize("reader", ["UTC", "Asia/Tokyo"])
def test_the_failure_that_came_first_is_the_cause_whatever_the_calendar(
    tmp_path: Path,
    in_zone: Callable[[str], None],
    first: float,
    second: float,
    zones: tuple[str, str],
    reader: str,
) -> None:
    run = the_run(tmp_path)
    for node, (when, zone) in enumerate([(second, zones[1]), (first, zones[0])]):
        in_zone(zone)
        torchrun_log(run, node, time.strftime(GLOG, time.localtime(when)), -6 - 5 * node, 41 + node, when + 20)
    in_zone(reader)
    found = cause.find(run, 0, run.node_log(0, 0))
    assert (found.reason, found.host) == ("rank 1 was killed by SIGSEGV", "node1")


def test_a_line_in_another_format_is_as_old_as_its_log(tmp_path: Path) -> None:
    run = the_run(tmp_path)
    torchrun_log(run, 0, BASIC, -6, 41, NEW_YEAR + 9)
    torchrun_log(run, 1, time.strftime(GLOG, time.localtime(NEW_YEAR)), -11, 42, NEW_YEAR + 1)
    assert cause.find(run, 0, run.node_log(0, 0)).reason == "rank 1 was killed by SIGSEGV"
    torchrun_log(run, 0, BASIC, -6, 41, NEW_YEAR - 9)
    assert cause.find(run, 0, run.node_log(0, 0)).reason == "rank 0 was killed by SIGABRT"


def test_copied_logs_are_ordered_by_what_they_say(tmp_path: Path) -> None:
    run = the_run(tmp_path)
    for node, second in enumerate((9, 2)):
        torchrun_log(run, node, f"E0102 03:04:0{second}.000000 1 api.py:1002] ", -6 - 5 * node, 41 + node, time.time())
    assert cause.find(run, 0, run.node_log(0, 0)).reason == "rank 1 was killed by SIGSEGV"


REPORT = """\
E0102 03:04:05.891000 7 api.py:1002] failed (exitcode: 1) local_rank: 0 (pid: 41) of
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trainer.train FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-02_03:04:{second}
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 42)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 42
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-02_03:04:05
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 41)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""
"""What torchrun prints when it sees at the same time that a rank was killed and that another lost its peer."""


@pytest.mark.parametrize("recorded", ["failure record", "log"])
@pytest.mark.parametrize(
    ("second", "reason"), [("05", "rank 1 was killed by SIGKILL"), ("35", LOST_PEER)], ids=["at once", "by torchrun"]
)
def test_a_killed_rank_is_the_cause_though_torchrun_blames_the_one_that_lost_it(
    tmp_path: Path, recorded: str, second: str, reason: str
) -> None:
    run = the_run(tmp_path)
    run.node_log(0, 0).write_text(REPORT.format(second=second))
    run.rank_log(0, 1).write_text("step 7\n")
    run.rank_log(0, 0).write_text(f"{cause.TRACEBACK}\n  File\n{LOST_PEER}\n")
    if recorded == "failure record":
        lost = Failure(reason=LOST_PEER, where=None, step=7, rank=0, time=1.0, is_final=False, mend=False)
        run.write_failure(0, lost)
    assert cause.find(run, 0, run.node_log(0, 0)).reason.startswith(reason)


@pytest.mark.parametrize("reason", ["FileNotFoundError: /data/igloo/train.bin", "KeyError: 'gloomy'"])
def test_a_word_that_holds_gloo_is_no_lost_peer(reason: str) -> None:
    assert cause.LOST_PEER.search(reason) is None
    assert cause.LOST_PEER.search("RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] x")
    assert cause.LOST_PEER.search("ProcessGroupGloo::barrier failed")

"""What the nodes of a job tell each other through the run directory, and how often."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment
from tests.train.in_process import new_run
from trainer.config.shape import LaunchShape
from trainer.core import records
from trainer.core.errors import HUNG
from trainer.core.network import loopback_interface
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runs.ledger import ledger
from trainer.runs.node_folder import NODE_FOLDER_VARIABLE, NodeFolder
from trainer.runs.records import AttemptOutcome, HangFound, HeartbeatRecord
from trainer.runtime.flight_recorder import FlightRecorder
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank
from trainer.supervise import hang_response, supervisor
from trainer.supervise.hang_detection import main_stack
from trainer.supervise.hang_response import HangHandler, Watched
from trainer.supervise.relay import Relay, interval_s
from trainer.supervise.rendezvous import Place
from trainer.supervise.supervisor import Supervisor

BEAT = HeartbeatRecord(time=1.0, step=3, phase="train", host="here", pid=1, batches=64, own_s=0.1, batch_s=0.1)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "relayed-abcdefgh")
    for folder in (run.live_dir, run.attempts_dir, run.attempt_logs(0), run.attempt_logs(1), run.stop_request.parent):
        folder.mkdir(parents=True)
    run.config_path.write_text("resilience: {hang_factor: 20.0, hang_after_s: 5.0, hang_slow_s: 5.0}\n")
    return run


def node_folder(tmp_path: Path, node: int) -> NodeFolder:
    folder = NodeFolder(tmp_path / f"node-{node}")
    folder.path.mkdir(exist_ok=True)
    return folder


def test_ranks_of_several_nodes_write_to_their_node_which_publishes_one_file(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in (0, 1):
        folder = node_folder(tmp_path, node)
        monkeypatch.setenv(NODE_FOLDER_VARIABLE, str(folder.path))
        relay = Relay(run, folder, node, attempt=0)
        for rank in (2 * node, 2 * node + 1):
            heartbeat = Heartbeat(run, Rank(rank, rank % 2, 4, 2, attempt=0))
            heartbeat.update(step=7 + rank, phase="train")
            heartbeat.write()
        assert not list(run.live_dir.glob(f"*{node}*"))
        relay.publish()
        FlightRecorder(run, Rank(2 * node, 0, 4, 2, 0)).check()
        assert not run.collectives_trace(0, 2 * node).exists()
        relay.request_stop()
        assert folder.stop_request.exists()
    assert sorted(path.name for path in run.live_dir.iterdir()) == ["node-0.json", "node-1.json"]
    assert {rank: beat.step for rank, beat in run.heartbeats().items()} == {0: 7, 1: 8, 2: 9, 3: 10}
    beat = run.heartbeat(3)
    assert beat is not None
    assert beat.step == 10
    assert run.heartbeat(4) is None


def test_heartbeats_are_kept_when_the_number_of_nodes_changes(run: RunDirectory, tmp_path: Path) -> None:
    """One node, then two, then one again: each attempt's last heartbeats stay, and the newest is that of the newest."""
    run.write_heartbeat(0, replace(BEAT, step=1))
    run.write_heartbeat(1, replace(BEAT, step=1))
    folder = node_folder(tmp_path, 0)
    relay = Relay(run, folder, 0, attempt=1)
    folder.write_heartbeat(0, replace(BEAT, attempt=1, step=2, time=0.5))  # another host's clock may be behind
    relay.publish()
    assert run.heartbeat(0) == replace(BEAT, attempt=1, step=2, time=0.5)
    heartbeat = Heartbeat(run, Rank(0, 0, 1, 1, attempt=2), every_s=60)
    heartbeat.start()
    heartbeat.stop("finished")
    newest = run.heartbeat(0)
    assert newest is not None
    assert newest.attempt == 2
    assert [beat.step for beat in run.past_heartbeats(0)] == [1, 2]
    assert [beat.step for beat in run.past_heartbeats(1)] == [1]
    names = ["attempt-00-rank-0.json", "attempt-00-rank-1.json", "attempt-01-node-0.json", "rank-0.json"]
    assert sorted(path.name for path in run.live_dir.iterdir()) == names


def test_a_damaged_file_of_a_node_hides_only_its_own_ranks(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.live.write_node(0, {0: BEAT})
    run.live.node_path(1).write_text('{"ranks": {"1": {"phase": "dancing"}}}')
    run.live.node_path(2).write_text('{"ranks": {"-1": {"phase": "train"}, "٣": {"phase": "train"}}}')
    assert list(run.heartbeats()) == [0]
    assert "ranks.1.phase" in capsys.readouterr().err


def test_other_nodes_kill_their_ranks_once_the_first_has_seen_the_evidence(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read no heartbeats: the first node tells them, and records the cause when it has all traces."""
    folder = node_folder(tmp_path, 1)
    killed: list[int] = []
    monkeypatch.setattr(hang_response, "_workers", lambda pid: [101, 102])
    monkeypatch.setattr(hang_response.processes, "handles", lambda pid, signum: False)
    monkeypatch.setattr(hang_response.processes, "send", lambda pid, signum: killed.append(pid))
    monkeypatch.setattr(RunDirectory, "heartbeats", lambda self: pytest.fail("reads the ranks of other nodes"))
    watcher = HangHandler(Watched(run, 4, range(2, 4), tmp_path / "node.log", folder))
    assert watcher.check(0, 100) is None
    found = HangFound(still_s=9.0, allowed_s=5.0)
    run.hang_found(0).write_text(records.dumps(found))

    def recorded(seconds: float) -> None:
        assert folder.collectives_request(0).exists()
        assert killed == []
        run.write_outcome(
            AttemptOutcome(attempt=0, outcome="hung", exit_code=HUNG, reason="rank 0 sleeps", restarted=True)
        )

    monkeypatch.setattr(hang_response.time, "sleep", recorded)
    cause = watcher.check(0, 100)
    assert cause is not None
    assert (cause.reason, cause.exit_code, killed) == ("rank 0 sleeps", HUNG, [101, 102])
    assert watcher.check(0, 100) is None
    assert watcher.check(1, 100) is None  # that file is of another attempt


def test_a_request_to_stop_reaches_the_ranks_before_the_signal_that_comes_with_it(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trainer stop` writes the request and signals the job: a rank that sees only the signal asks to be requeued."""
    folder = node_folder(tmp_path, 1)
    node = Supervisor(run, LaunchShape(2, 1, "cpu"), Place(2, 1, "node0"))
    node._start_watching(folder.path)
    seen: list[bool] = []
    monkeypatch.setattr(supervisor.torchrun, "workers", lambda pid: [101])
    monkeypatch.setattr(supervisor.processes, "handles", lambda pid, signum: True)
    monkeypatch.setattr(supervisor.processes, "send", lambda pid, signum: seen.append(folder.stop_request.exists()))
    node.requested.add(signal.SIGUSR1)
    node._forward(100)
    run.stop_request.touch()
    node.requested.add(signal.SIGTERM)
    node._forward(100)
    assert seen == [False, True]


@pytest.mark.parametrize("nodes", [2, 8, 64, 512])
def test_the_interval_bounds_what_the_first_node_reads(nodes: int) -> None:
    assert interval_s(nodes) >= 0.5
    assert nodes / interval_s(nodes) <= 128
    assert interval_s(1) == 0


def test_the_file_operations_of_a_node_do_not_grow_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on the supervisors themselves by the benchmark whose figures are in docs/scale.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import watching

    few, many = (watching.simulate(nodes, seconds=2) for nodes in (2, 16))
    assert few["other"] == many["other"] <= 13
    assert many["first"] - few["first"] <= 14 / 0.5  # a file of each further node
    assert many["all"] <= 16 * many["other"] + 16 / 0.5 + 10
    sys.modules.pop("watching")


def test_a_hang_on_another_node_is_named_by_the_first_and_ends_both(workdir: Path) -> None:
    """Two node processes of two ranks each on this machine; rank 3 stops in a step, and ignores nothing else."""
    overrides = [
        "experiment=quickstart",
        "resources.cpu_processes=2",
        "trainer.max_steps=4000",
        "trainer.max_epochs=null",
        "trainer.limit_val_batches=0",
        "resilience.hang_after_s=3",
        "+callbacks.fault._target_=trainer.faultbench.inject.InjectFault",
        "+callbacks.fault.kind=hang",
        "+callbacks.fault.step=400",
        "+callbacks.fault.ranks=[3]",
    ]
    run = new_run(workdir, overrides)
    place = ["--nodes=2", "--local-addr=127.0.0.1", "--rendezvous=first-node"]
    variables = {**clean_environment(), "GLOO_SOCKET_IFNAME": loopback_interface(), "TRAINER_ATTEMPT": "0"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.supervise.node", str(run.path), *place, f"--node-rank={rank}"],
            env=variables,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    codes = [node.wait(150) for node in nodes]
    logs = [run.node_log(0, rank).read_text() for rank in (0, 1)]
    assert codes == [HUNG, HUNG], "\n".join(logs)
    (found,) = run.events_of(events.Hang)
    assert found.rank == 3
    assert found.where is not None
    assert "inject.py" in found.where
    outcome = run.outcome(0)
    assert outcome is not None
    assert (outcome.outcome, outcome.reason) == ("hung", found.reason)
    assert f"hang: {found.reason}; killing its workers" in logs[1]
    assert sorted(path.name for path in run.live_dir.glob("*.json")) == ["node-0.json", "node-1.json"]
    assert all(run.collectives_trace(0, rank).exists() and main_stack(run.stacks(0, rank)) for rank in range(4))
    accounts = ledger(run)
    assert accounts is not None
    assert accounts["seconds"]["hang"] >= 3

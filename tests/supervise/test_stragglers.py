"""Which rank the others wait for, and when it is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.documentation import documented
from trainer.runs.directory import RunDirectory
from trainer.runs.records import HeartbeatRecord
from trainer.supervise.stragglers import Pace, StragglerWatch, paces_of, slowest

SLOW_RANK_1 = [
    "experiment=quickstart",
    "tracking=none",
    "trainer.max_steps=120",
    "trainer.max_epochs=null",
    "trainer.limit_val_batches=0",
    "resilience.straggler_after_s=1",
    "+callbacks.fault._target_=trainer.faultbench.inject.InjectFault",
    "+callbacks.fault.kind=slow",
    "+callbacks.fault.step=0",
    "+callbacks.fault.ranks=[1]",
    "+callbacks.fault.delay_s=0.08",
]


def paces(*own_s: float, batch_s: float = 1.0) -> list[Pace]:
    return [Pace(rank, f"host{rank}", "cpu", batch_s, {"own_s": one}) for rank, one in enumerate(own_s)]


def test_the_slowest_is_compared_with_the_median_of_the_others() -> None:
    found = slowest(paces(0.2, 0.5, 0.22, 0.18), factor=1.5)
    assert found is not None
    assert (found.pace.rank, found.own_s, found.others_s) == (1, 0.5, 0.2)
    assert found.waiting_share == pytest.approx(0.3)
    assert documented("reliability.md", "straggler: ").shows(f"straggler: {found}")
    assert str(found).startswith("rank 1 on host1 (cpu) takes 0.5 s for its data and forward pass, the others 0.2 s")


@pytest.mark.parametrize(
    "ranks",
    [paces(0.2, 0.28), paces(0.01, 0.09), paces(0.5), [], paces(0.2, 0.2, 0.2)],
    ids=["within the factor", "not felt in a step", "alone", "nobody", "equal"],
)
def test_nobody_is_blamed_for_little(ranks: list[Pace]) -> None:
    assert slowest(ranks, factor=1.5) is None


def test_a_slow_device_is_seen_where_the_host_is_as_fast_as_the_others() -> None:
    ranks = [Pace(rank, "host", f"cuda:{rank}", 1.0, {"own_s": 0.1, "forward_s": 0.2}) for rank in range(3)]
    ranks[2].measures["forward_s"] = 0.5
    found = slowest(ranks, factor=1.5)
    assert found is not None
    assert (found.pace.rank, found.what) == (2, "the forward pass on its device")


def test_it_is_named_once_and_only_when_it_lasts() -> None:
    watch = StragglerWatch(1.5, after_s=10)
    slow, well = paces(0.2, 0.6), paces(0.2, 0.2)
    assert watch.check(slow, 0) is None
    assert watch.check(well, 5) is None
    assert watch.check(slow, 6) is None
    assert watch.check(slow, 15) is None
    found = watch.check(slow, 16)
    assert found is not None
    assert found.pace.rank == 1
    assert watch.check(slow, 100) is None


def test_ranks_are_compared_when_all_train_and_have_trained_enough(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.live_dir.mkdir()
    beat = HeartbeatRecord(attempt=0, phase="train", host="a", batches=16, own_s=0.1, batch_s=0.3)
    for rank in range(2):
        run.write_heartbeat(rank, beat)
    assert [pace.measures for pace in paces_of(run.heartbeats(), 0, 2)] == [{"own_s": 0.1}] * 2
    assert paces_of(run.heartbeats(), 0, 3) == []
    run.write_heartbeat(1, replace(beat, batches=15))
    assert paces_of(run.heartbeats(), 0, 2) == []
    run.write_heartbeat(1, replace(beat, phase="validate"))
    assert paces_of(run.heartbeats(), 0, 2) == []


def test_a_slow_rank_is_named_where_the_others_wait_for_it_in_the_forward_pass(
    trainer_cli: TrainerCli, workdir: Path
) -> None:
    done = trainer_cli("fit", *SLOW_RANK_1, "strategy=fsdp")
    assert done.returncode == 0, done.stdout + done.stderr
    (event,) = json.loads(trainer_cli("show", "--json").stdout)["stragglers"]
    assert event["rank"] == 1
    assert "what comes before its forward pass" in event["reason"]


def test_a_slow_rank_of_a_real_job_is_named(trainer_cli: TrainerCli, workdir: Path) -> None:
    done = trainer_cli("fit", *SLOW_RANK_1)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(trainer_cli("show", "--json", "--ranks").stdout)
    (event,) = found["stragglers"]
    assert event["rank"] == 1
    assert event["own_s"] > 0.08 > event["others_s"]
    assert f"stragglers   rank 1 on {event['host']} (cpu) takes" in trainer_cli("show").stdout
    for row in found["ranks"]:
        spent, whole = row["seconds"], found["ledger"]["wall_s"]
        assert sum(spent.values()) == pytest.approx(whole, abs=10.0)  # the ranks do not end at once
        assert spent["train"] > 4
